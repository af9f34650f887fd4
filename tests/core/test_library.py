"""What code that builds on the library relies on: files, tensors that can be trained with, names of LoRAs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

from minisd import StableDiffusion, UNet, samplers
from minisd.guidance import Guidance
from minisd.pipeline.arguments import Options, SettingsArguments
from minisd.pipeline.metadata import read_parameters
from minisd.pipeline.settings import SETTINGS

KNOWN = {"seed": 3, "num_inference_steps": 3}


@pytest.fixture
def sd(small_model: Path) -> StableDiffusion:
    return StableDiffusion.from_pretrained(small_model, device="cpu")


def write_lora(sd: StableDiffusion, path: Path, seed: int = 0) -> Path:
    generator, layer = torch.Generator().manual_seed(seed), sd.unet.conv_in.weight
    a, b = (torch.randn(shape, generator=generator) for shape in ((2, *layer.shape[1:]), (len(layer), 2, 1, 1)))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"unet.conv_in.lora_A.weight": a, "unet.conv_in.lora_B.weight": b}, path)
    return path


def test_save_pretrained_wants_a_folder(sd, tmp_path):
    with pytest.raises(ValueError, match=r"model.safetensors names a file; .*save_single_file"):
        sd.save_pretrained(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_encodes_and_decodes_can_be_trained_with(sd):
    """Inference tensors cannot be saved for a backward pass."""
    context = sd.encode_text("a fox")
    latents = sd.encode_image(torch.zeros(1, 3, 32, 32))
    weight = torch.ones((), requires_grad=True)
    (sd.unet(weight * latents, torch.tensor([500.0]), context * weight).mean()).backward()
    assert weight.grad is not None and bool(torch.isfinite(weight.grad))
    pixels = sd.decode_to_tensor(latents)
    (pixels * weight).square().mean().backward()
    assert not any(each.is_inference() for each in (context, latents, pixels))


def test_loras_of_one_file_name(sd, tmp_path):
    paths = [write_lora(sd, tmp_path / f"{name}/export/lora.safetensors", seed) for seed, name in enumerate("abc")]
    assert [sd.load_lora(path) for path in paths] == ["lora", "export/lora", "c/export/lora"]
    with pytest.raises(ValueError, match="already loaded"):
        sd.load_lora(paths[0])
    sd.unload_lora()
    sd.lora_folder = tmp_path
    with pytest.raises(ValueError, match=r"several: a/export/lora.safetensors, b/.*, c/.*; name its folder"):
        sd.denoise("a fox <lora:lora:1>")
    drawn = sd("a fox <lora:b/export/lora:0.5>", output_type="latent", **KNOWN)
    plain = sd("a fox", output_type="latent", **KNOWN)
    sd.load_lora(paths[1], weight=0.5)
    torch.testing.assert_close(drawn, sd("a fox", output_type="latent", **KNOWN), rtol=0, atol=1e-5)
    assert not torch.allclose(drawn, plain, atol=1e-2)
    with pytest.raises(ValueError, match="'c', which is not in"):
        sd.denoise("a fox <lora:c:1>")


def test_output_types(sd):
    """As in diffusers, arrays and tensors are in [0, 1]; a PIL image is the same, rounded."""
    picture, two = sd("a fox", **KNOWN), sd(["a fox", "red snow"], **KNOWN)
    array, tensor = (sd("a fox", output_type=kind, **KNOWN) for kind in ("np", "pt"))
    assert array.shape == (1, 32, 32, 3) and array.dtype == np.float32 and tensor.shape == (1, 3, 32, 32)
    assert np.array_equal(array[0], tensor[0].permute(1, 2, 0).numpy())
    assert np.abs(255 * array[0] - np.asarray(picture)).max() <= 0.501
    latents = sd(["a fox", "red snow"], output_type="latent", **KNOWN)
    assert latents.shape == (2, 4, 4, 4) and not latents.is_inference()
    assert [each.tobytes() for each in sd.decode(latents)] == [each.tobytes() for each in two]
    with pytest.raises(ValueError, match="output_type='jpg'; expected one of 'pil', 'np', 'pt', 'latent'"):
        sd("a fox", output_type="jpg")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 32, 16))
    painted = sd.inpaint("a fox", picture, mask, **KNOWN)
    array = sd.inpaint("a fox", picture, mask, output_type="np", **KNOWN)[0]
    assert np.array_equal((255 * array).round(), np.asarray(painted))


def test_callback_changes_the_latents(sd):
    seen = []

    def look(index, t, latents):
        seen.append((index, t, latents.clone()))

    steps = list(sd.denoise("a fox", callback=look, **KNOWN))
    assert [(index, t) for index, t, _ in seen] == [(step.index, step.t) for step in steps]
    assert all(torch.equal(latents, step.latents) for (*_, latents), step in zip(seen, steps, strict=True))
    assert torch.equal(steps[-1].latents, list(sd.denoise("a fox", **KNOWN))[-1].latents)

    def replaced(index, t, latents):  # with the latents of another run, which then goes on as that one
        other = seen[index][2]
        with torch.enable_grad():
            x = latents.detach().requires_grad_()
            x.sum().backward()
        assert x.grad is not None
        return other

    changed = list(sd.denoise("red snow", callback=replaced, sampler="euler", **KNOWN))
    for step, (*_, latents) in zip(changed, seen, strict=True):
        torch.testing.assert_close(step.latents, latents, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="callback=3; expected a function"):
        sd("a fox", callback=3)
    with pytest.raises(ValueError, match="the callback's result has shape"):
        sd("a fox", callback=lambda index, t, latents: latents[:, :2])


def test_guidance_objects(sd):
    assert sd("a fox", guidance=Guidance(3.0, 0.5, (0.0, 0.7)), **KNOWN).tobytes() == (
        sd("a fox", guidance_scale=3.0, guidance_rescale=0.5, guidance_interval=(0.0, 0.7), **KNOWN).tobytes()
    )

    class Conditional(Guidance):
        def combine(self, uncond, cond):
            return cond

    unguided = sd("a fox", guidance_scale=1.0, output_type="latent", **KNOWN)
    own = sd("a fox", guidance=Conditional(), output_type="latent", **KNOWN)
    torch.testing.assert_close(own, unguided, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="guidance and guidance_scale exclude each other"):
        sd("a fox", guidance=Guidance(), guidance_scale=2.0)
    with pytest.raises(TypeError, match=r"guidance=7.5; expected a Guidance"):
        sd("a fox", guidance=7.5)


def test_own_sampler(sd, tmp_path):
    def mine(schedule, n, start=0, spacing=None, levels=None):
        return samplers.euler(schedule, n, start, spacing, levels)

    for options in ({}, {"karras": True}, {"spacing": "trailing"}, {"sigmas": "beta"}):
        drawn = sd("a fox", sampler=mine, **options, **KNOWN)
        assert drawn.tobytes() == sd("a fox", sampler="euler", **options, **KNOWN).tobytes()
    assert "Sampler: mine (own)" in read_parameters(sd.save(sd("a fox", sampler=mine, **KNOWN), tmp_path / "own.png"))
    with pytest.raises(ValueError, match="'mine' does not support eta"):
        sd("a fox", sampler=mine, eta=0.5)
    with pytest.raises(TypeError, match="sampler must be a name, a Sampler or a function"):
        sd("a fox", sampler=3)


def test_own_unet(sd):
    class Zero(UNet):
        def __init__(self, config):
            torch.nn.Module.__init__(self)
            self.config, self.scale = config, torch.nn.Parameter(torch.zeros(()))

        def forward(self, latents, timesteps, context):
            return self.scale * latents

    config = replace(sd.config, schedule=replace(sd.config.schedule, prediction_type="epsilon"))
    own = StableDiffusion(config, sd.tokenizer, sd.text_encoder, Zero(sd.unet.config), sd.autoencoder)
    latents = own("a fox", output_type="latent", sampler="ddim", **KNOWN)
    # ε = 0: the clean latents are x₀ = x / √ᾱ, and DDIM ends at √ᾱ_final x₀
    first, last = own.schedule.timesteps(3, None)[0], own.schedule.alphas_cumprod[0]
    noise = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(3))
    expected = noise * (last / own.schedule.alphas_cumprod[int(first)]) ** 0.5
    torch.testing.assert_close(latents[0], expected.float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="needs the blocks of minisd's UNet"):
        own("a fox", feature_reuse=(2, 1))


def test_lists_and_resizing(sd):
    pictures = [Image.new("RGB", (90, 60), "red"), Image.new("RGBA", (40, 80), "blue")]
    fitted = [ImageOps.fit(each.convert("RGB"), (32, 32), Image.Resampling.LANCZOS) for each in pictures]
    options = {"strength": 0.7, **KNOWN}
    drawn = sd.image_to_image("a fox", pictures, resize=True, **options)
    assert [each.tobytes() for each in drawn] == [
        each.tobytes() for each in sd.image_to_image("a fox", fitted, **options)
    ]
    assert sd.image_to_image("a fox", pictures[0], resize=True, width=48, height=40, **options).size == (48, 40)
    mask = Image.new("L", (90, 60), 0)
    mask.paste(255, (0, 0, 45, 60))
    painted = np.asarray(sd.inpaint("a fox", pictures[0], mask, resize=True, **KNOWN))
    assert painted.shape == (32, 32, 3) and (painted[:, 20:] == (255, 0, 0)).all()
    assert sd.encode_image(fitted).shape == (2, 4, 4, 4)
    wide = sd.outpaint("a fox", fitted, right=16, **KNOWN)
    assert [each.size for each in wide] == [(48, 32)] * 2
    assert sd.outpaint("a fox", fitted[0], right=16, **KNOWN).crop((0, 0, 32, 32)).tobytes() == fitted[0].tobytes()
    with pytest.raises(ValueError, match="resize and padding_mask_crop exclude each other"):
        sd.inpaint("a fox", pictures[0], mask, resize=True, padding_mask_crop=4)


def test_saved_picture_is_drawn_again(sd, run, tmp_path):
    drawn = sd(["a fox", "red (snow:1.2)"], negative_prompt="fox", sampler="heun", guidance_scale=[4.0, 2.5], **KNOWN)[
        1
    ]
    assert sd.save(drawn, tmp_path / "a.png") == tmp_path / "a.png"
    assert sd.save(drawn, tmp_path / "a.png") == tmp_path / "a-2.png"
    assert run("generate", "--like", "a.png", "-o", "again.png")[0] == 0
    with Image.open("again.png") as again:
        assert np.abs(np.asarray(again, int) - np.asarray(drawn, int)).max() <= 1
    sd.save(sd.image_to_image("a fox", drawn, **KNOWN), tmp_path / "b.png")
    assert run("generate", "--like", "b.png", "-o", "c.png")[0] == 2
    with pytest.raises(ValueError, match="not drawn by minisd"):
        sd.save(Image.new("RGB", (8, 8)), tmp_path / "c.png")
    with pytest.raises(ValueError, match="expected a name ending in .png"):
        sd.save(drawn, tmp_path / "c.jpg")


def test_to(sd, small_model, tmp_path):
    lora = sd.load_lora(write_lora(sd, tmp_path / "style.safetensors"))
    before = sd("a fox", output_type="latent", **KNOWN)
    assert sd.to("cpu", torch.float64) is sd and sd.dtype == torch.float64
    assert {p.dtype for part in (sd.unet, sd.text_encoder, sd.autoencoder) for p in part.parameters()} == {sd.dtype}
    torch.testing.assert_close(sd("a fox", output_type="latent", **KNOWN), before, rtol=1e-3, atol=1e-3)
    again = sd.to(dtype=torch.float32)("a fox", output_type="latent", **KNOWN)
    torch.testing.assert_close(again, before, rtol=1e-5, atol=1e-5)
    weights = StableDiffusion.from_pretrained(small_model, device="cpu").unet.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in sd.unet.state_dict().items())
    sd.fuse_lora()
    with pytest.raises(ValueError, match=rf"{lora} is fused"):
        sd.to(dtype=torch.float16)
    with pytest.raises(TypeError, match="dtype=3; expected one of"):
        sd.unload_lora() or sd.to(dtype=3)


def test_merge(sd, small_model):
    """W = (1 − w) W₁ + w W₂, and W₁ + w (W₂ − W₀), by hand for one weight of each part."""
    models = [StableDiffusion.from_pretrained(small_model, device="cpu") for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for model in models:
        for part in (model.unet, model.text_encoder, model.autoencoder):
            for value in part.parameters():
                value.add_(0.01 * torch.randn(value.shape, generator=generator))
    names = {"unet": "conv_in.weight", "text_encoder": "text_model.final_layer_norm.weight"}
    values = [{part: getattr(m, part).state_dict()[name].clone() for part, name in names.items()} for m in models]
    kept = models[0].autoencoder.state_dict()["encoder.conv_in.weight"].clone()
    models[0].merge(models[1], 0.3)
    for part, name in names.items():
        expected = 0.7 * values[0][part] + 0.3 * values[1][part]
        torch.testing.assert_close(getattr(models[0], part).state_dict()[name], expected)
    models[1].merge(models[2], 0.5, base=sd)
    for part, name in names.items():
        expected = values[1][part] + 0.5 * (values[2][part] - getattr(sd, part).state_dict()[name])
        torch.testing.assert_close(getattr(models[1], part).state_dict()[name], expected)
    assert torch.equal(models[0].autoencoder.state_dict()["encoder.conv_in.weight"], kept)
    with pytest.raises(ValueError, match="differ in their text_encoder"):
        sd.merge(StableDiffusion.from_pretrained(device="cpu"))
    with pytest.raises(ValueError, match="weight=nan"):
        sd.merge(models[0], float("nan"))


def test_arguments_are_the_settings():
    assert list(SettingsArguments.__annotations__) == [name for name in SETTINGS if name != "strength"]
    assert set(Options.__annotations__) - set(SETTINGS) == {
        "preset", "guidance", "callback", "negative_prompt", "seed", "progress",
    }  # fmt: skip
