"""Preset turbo: pictures in 4 calls, beside diffusers' pipelines for LCM-LoRAs and for latent consistency models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from minisd import Sampler, StableDiffusion
from minisd.features.lcm_unet import LCMUNet
from minisd.guidance import Guidance

PROMPT = "a red fox in the snow"
MUSH = "the sampler lcm .* needs a model distilled for it"
# the layers that published LCM-LoRAs change, in the small model
LAYERS = [
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.down_blocks.1.resnets.0.time_emb_proj",
    "unet.up_blocks.1.resnets.0.conv1",
]


@pytest.fixture
def sd(small_model: Path) -> StableDiffusion:
    return StableDiffusion.from_pretrained(small_model, device="cpu")


def write_lora(sd: StableDiffusion, path: Path, layers: list[str], metadata: dict[str, str] | None = None) -> Path:
    weights, generator = {}, torch.Generator().manual_seed(0)
    for name in layers:
        part, _, rest = name.partition(".")
        out, *inner = getattr(sd, part).get_submodule(rest).weight.shape
        shapes = {"A": (2, *inner), "B": (out, 2, *(1 for _ in inner[1:]))}
        weights |= {f"{name}.lora_{f}.weight": 0.5 * torch.randn(s, generator=generator) for f, s in shapes.items()}
    path.parent.mkdir(exist_ok=True)
    save_file(weights, path, metadata={"format": "pt"} | (metadata or {}))
    return path


def latents_of(pipe: Any, scale: float) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    drawn = pipe(PROMPT, num_inference_steps=4, guidance_scale=scale, generator=generator, output_type="latent")
    return drawn.images


def test_lcm_lora_draws_the_picture_of_diffusers(sd, small_model, tmp_path):
    path = write_lora(sd, tmp_path / "pytorch_lora_weights.safetensors", LAYERS)
    pipe = StableDiffusionPipeline.from_pretrained(str(small_model), local_files_only=True)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(str(path))
    theirs = latents_of(pipe, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = StableDiffusion.from_pretrained(small_model, device="cpu")
        sd.load_lora(path)
        ours = sd(PROMPT, seed=3, preset="turbo", output_type="latent")
    with pytest.warns(UserWarning, match=MUSH):
        without = plain(PROMPT, seed=3, preset="turbo", output_type="latent")
    error, effect = (float((ours - other).abs().max() / theirs.std()) for other in (theirs, without))
    print(f"largest difference {error:.1e} of the latents' deviation; that of the LoRA {effect:.2f}")
    assert error < 1e-4 < 0.05 < effect


@pytest.fixture(scope="module")
def lcm_folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent consistency model whose UNet takes the guidance scale, written by diffusers."""
    pipe = StableDiffusionPipeline.from_pretrained(str(small_model), local_files_only=True)
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_config({**pipe.unet.config, "time_cond_proj_dim": 16})
    for weight in unet.time_embedding.cond_proj.parameters():
        torch.nn.init.normal_(weight)
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer")}
    model = LatentConsistencyModelPipeline(
        **parts, unet=unet, scheduler=LCMScheduler.from_config(pipe.scheduler.config), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("lcm") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scale", [8.5, 2.0])
def test_consistency_model_draws_the_picture_of_diffusers(lcm_folder, tmp_path, scale):
    theirs = latents_of(LatentConsistencyModelPipeline.from_pretrained(str(lcm_folder), local_files_only=True), scale)
    model = StableDiffusion.from_pretrained(lcm_folder, device="cpu")
    # diffusers' own default scale is 8.5
    assert isinstance(model.unet, LCMUNet) and model.defaults.guidance_scale == 8.5
    changes: dict[str, Any] = {} if scale == 8.5 else {"guidance_scale": scale}
    calls: list[int] = []
    model.unet.conv_in.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    ours = model(PROMPT, seed=3, preset="turbo", output_type="latent", **changes)
    assert calls == [1] * 4
    assert float((ours - theirs).abs().max() / theirs.std()) < 1e-4
    other = model(PROMPT, seed=3, preset="turbo", output_type="latent", guidance_scale=5.0)
    assert float((ours - other).abs().max() / theirs.std()) > 0.01
    both = model([PROMPT] * 2, seed=[3, 3], preset="turbo", output_type="latent", guidance_scale=[scale, 5.0])
    torch.testing.assert_close(both, torch.cat([ours, other]), rtol=0, atol=1e-4)
    # saved, it is the same model to both
    model.save_pretrained(tmp_path / "saved")
    again = LatentConsistencyModelPipeline.from_pretrained(str(tmp_path / "saved"), local_files_only=True)
    torch.testing.assert_close(latents_of(again, scale), theirs, rtol=0, atol=1e-6)
    loaded = StableDiffusion.from_pretrained(tmp_path / "saved", device="cpu")
    assert torch.equal(loaded(PROMPT, seed=3, output_type="latent", **changes), ours)


def test_one_call_of_a_consistency_model(lcm_folder):
    pipe = LatentConsistencyModelPipeline.from_pretrained(str(lcm_folder), local_files_only=True)
    model = StableDiffusion.from_pretrained(lcm_folder, device="cpu")
    latents, context = torch.randn(2, 4, 4, 4), torch.randn(2, 77, 16)
    embedding = pipe.get_guidance_scale_embedding(torch.full((2,), 3.0), embedding_dim=16)
    with torch.no_grad():
        theirs = pipe.unet(latents, 259, context, timestep_cond=embedding).sample
    torch.testing.assert_close(model.predict(latents, 259.0, context, 4.0), theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="without negative prompts"):
        model.predict(latents, 259.0, torch.cat([context, context]))
    with pytest.raises(ValueError, match=r"call it through with_scales"):
        model.unet(latents, torch.tensor(259.0), context)


def test_consistency_model_refuses_guidance_by_two_calls(lcm_folder):
    class Own(Guidance):
        pass

    model = StableDiffusion.from_pretrained(lcm_folder, device="cpu")
    for options in ({"guidance_rescale": 0.5}, {"guidance_interval": (0, 0.5)}, {"guidance": Own(3.0)}):
        with pytest.raises(ValueError, match="no meaning for this model"):
            model.denoise(PROMPT, **options)
    with pytest.warns(UserWarning, match="negative prompts have no effect"):
        model.denoise(PROMPT, negative_prompt="snow")


@pytest.mark.parametrize(
    ("name", "layers", "metadata", "distilled"),
    [
        ("style", LAYERS[:2], {}, False),
        ("lcm-lora-sdv1-5", LAYERS[:2], {}, True),
        ("models--latent-consistency--lcm-lora-sdv1-5/pytorch_lora_weights", LAYERS[:2], {}, True),
        ("Hyper-SD15-4steps-lora", LAYERS[:2], {}, True),
        ("pytorch_lora_weights", LAYERS, {}, True),
        ("style", [*LAYERS, "text_encoder.text_model.encoder.layers.0.mlp.fc1"], {}, False),
        ("style", LAYERS[:2], {"ss_output_name": "my_LCM_v2"}, True),
        ("style", LAYERS[:2], {"modelspec.title": "watercolor"}, False),
    ],
)
def test_what_points_at_distillation(sd, tmp_path, name, layers, metadata, distilled):
    path = write_lora(sd, tmp_path / f"{name}.safetensors", layers, metadata)
    sd.lora_folder = path.parent

    def mush(prompt: str = PROMPT, **options: Any) -> bool:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sd.denoise(prompt, seed=0, **options)
        return len([each for each in caught if "needs a model distilled" in str(each.message)]) == 1

    assert mush(preset="turbo") and not mush()
    assert mush(f"{PROMPT} <lora:{path.stem}:1>", preset="turbo") is not distilled
    assert mush(f"{PROMPT} <lora:{path.stem}:0>", preset="turbo")
    loaded = sd.load_lora(path, "mine")
    assert mush(sampler="lcm") is not distilled and mush(sampler=Sampler("lcm")) is not distilled
    sd.set_adapters({loaded: 0.0})
    assert mush(preset="turbo")
    sd.set_adapters({loaded: 1.0})
    sd.fuse_lora()
    assert mush(preset="turbo") is not distilled


def test_model_says_by_its_scheduler_or_name_that_it_is_distilled(small_model, tmp_path):
    names = {"mine": "DDIMScheduler", "other": "LCMScheduler", "dreamshaper-LCM": "DDIMScheduler"}
    for name, scheduler in names.items():
        pipe = StableDiffusionPipeline.from_pretrained(str(small_model), local_files_only=True)
        if scheduler == "LCMScheduler":
            pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        pipe.save_pretrained(tmp_path / name)
        sd = StableDiffusion.from_pretrained(tmp_path / name, device="cpu")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sd.denoise(PROMPT, preset="turbo")
        assert len(caught) == (name == "mine")


def test_weights_of_the_scale_are_loaded(lcm_folder):
    model = StableDiffusion.from_pretrained(lcm_folder, device="cpu")
    weights = load_file(lcm_folder / "unet/diffusion_pytorch_model.safetensors")
    assert torch.equal(model.unet.time_embedding.cond_proj.weight, weights["time_embedding.cond_proj.weight"])
