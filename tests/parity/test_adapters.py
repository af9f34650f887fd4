"""LoRA and textual inversion: the same files in diffusers (with peft) and here, on the same small random model."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SMALL, TOKENIZER
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from minisd import SD15, SD21, StableDiffusion, TextEncoder, Tokenizer, UNet
from minisd.app.cli import main
from minisd.features.adapters import layers_of
from minisd.features.textual_inversion import add_token
from minisd.io.adapter_files import read_lora, read_textual_inversion, save_lora
from minisd.io.checkpoint import CheckpointError
from minisd.io.configs import to_dict
from minisd.lora import LoRA, LowRank
from minisd.training.adapting import EXAMPLES, InversionTask, LoRATask, read_examples
from minisd.training.loop import Options, train

TOLERANCE = 1e-10  # of the output's standard deviation, in float64
CLEAR = 1e-3  # what a mistake must exceed
PROMPT = "a red fox in the snow"
RANK = 3

ATTENTION = r"unet\..*(to_[qkv]|to_out\.0)|text_encoder\..*_proj"
LINEAR = ATTENTION + r"|unet\..*(ff\.net\.0\.proj|ff\.net\.2|time_emb_proj|linear_[12])|text_encoder\..*fc[12]"
EVERYTHING = LINEAR + r"|unet\..*(proj_(in|out)|conv\d?|conv_shortcut|conv_in|conv_out)"

Factors = dict[str, tuple[Tensor, Tensor]]
Spelling = Callable[[str, str], str]


@pytest.fixture
def reference(models: Any) -> StableDiffusionPipeline:
    """diffusers' model, to read names and shapes from; what changes it needs `theirs`."""
    return models[1]


@pytest.fixture
def theirs(models: Any) -> StableDiffusionPipeline:
    pipe = models[1]
    pipe.set_progress_bar_config(disable=True)
    parts = {"unet": copy.deepcopy(pipe.unet), "text_encoder": copy.deepcopy(pipe.text_encoder)}
    own = {"tokenizer": CLIPTokenizer.from_pretrained(TOKENIZER)} | parts
    return StableDiffusionPipeline(**pipe.components | own, requires_safety_checker=False)


def random_lora(pipe: StableDiffusionPipeline, pattern: str, rank: int = RANK, seed: int = 0) -> Factors:
    """A and B for the layers of diffusers' modules whose names fit, large enough to change the output as W does."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for part in ("unet", "text_encoder"):
        for name, module in getattr(pipe, part).named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and re.fullmatch(pattern, f"{part}.{name}"):
                out, *rest = module.weight.shape
                a = torch.randn(rank, *rest, generator=generator) * module.weight[0].numel() ** -0.5
                b = torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator) * rank**-0.5
                factors[f"{part}.{name}"] = (a, b)
    return factors


def peft(name: str, factor: str) -> str:
    return f"{name}.lora_{factor}.weight"


def peft_with_prefix(name: str, factor: str) -> str:
    return peft(name.replace("text_encoder.", "text_encoder.text_model."), factor)


def old(name: str, factor: str) -> str:
    """As diffusers wrote before version 0.24: attention in its processors, everything else beside its layer."""
    way = {"A": "down", "B": "up"}[factor]
    if match := re.fullmatch(r"(unet\..*attn\d)\.(to_[qkv]|to_out)(\.0)?", name):
        return f"{match[1]}.processor.{match[2]}_lora.{way}.weight"
    name = name.replace("text_encoder.", "text_encoder.text_model.")
    return f"{name}.{'lora' if name.startswith('unet') else 'lora_linear_layer'}.{way}.weight"


def oldest(name: str, factor: str) -> str:
    """As `old`, with the text encoder's attention spelled as the UNet's."""
    names = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}
    stem, _, last = name.rpartition(".")
    if last in names and name.startswith("text"):
        stem = stem.replace("text_encoder.", "text_encoder.text_model.")
        return f"{stem}.{names[last]}.{'down' if factor == 'A' else 'up'}.weight"
    return old(name, factor)


def kohya(name: str, factor: str) -> str:
    part, _, rest = name.partition(".")
    stem = ("lora_unet_" if part == "unet" else "lora_te_text_model_") + rest.replace(".", "_")
    return f"{stem}.alpha" if factor == "alpha" else f"{stem}.lora_{'down' if factor == 'A' else 'up'}.weight"


def write(path: Path, factors: Factors, spelling: Spelling, alpha: float | None = None, **metadata: str) -> Path:
    tensors = {}
    for name, (a, b) in factors.items():
        tensors |= {spelling(name, "A"): a.contiguous(), spelling(name, "B"): b.contiguous()}
        if alpha is not None:
            tensors[spelling(name, "alpha")] = torch.tensor(alpha)
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"} | metadata)
    else:
        torch.save(tensors, path)
    return path


@torch.inference_mode()
def our_output(sd: StableDiffusion) -> Tensor:
    context = sd.encode_text(PROMPT)
    return torch.cat([context.flatten(), sd.unet(latents(), torch.tensor(500), context).flatten()])


@torch.inference_mode()
def their_output(pipe: StableDiffusionPipeline) -> Tensor:
    context = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    return torch.cat([context.flatten(), pipe.unet(latents(), torch.tensor(500), context).sample.flatten()])


def latents() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.std())


def same(sd: StableDiffusion, before: dict[str, Tensor]) -> bool:
    """Whether all weights are, bit for bit, what they were."""
    now = weights(sd)
    return now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)


def weights(sd: StableDiffusion) -> dict[str, Tensor]:
    parts = {"unet": sd.unet, "text_encoder": sd.text_encoder}
    return {
        f"{part}.{key}": value.clone() for part, module in parts.items() for key, value in module.state_dict().items()
    }


def hooks(sd: StableDiffusion) -> int:
    return sum(len(module._forward_hooks) for part in (sd.unet, sd.text_encoder) for module in part.modules())


def test_models_agree_without_adapters(ours, theirs):
    assert difference(our_output(ours), their_output(theirs)) <= TOLERANCE


LAYOUTS: list[tuple[str, Spelling, str, float | None]] = [
    (EVERYTHING, peft, ".safetensors", None),
    (EVERYTHING, peft_with_prefix, ".safetensors", None),
    (LINEAR, old, ".bin", None),
    (ATTENTION, oldest, ".safetensors", None),
    (LINEAR, kohya, ".safetensors", 1.5),
    (ATTENTION + r"|unet\..*(proj_(in|out)|conv[12]|conv_shortcut|samplers\.0\.conv)", kohya, ".safetensors", 7.0),
    (LINEAR, kohya, ".pt", 3.0),
]


@pytest.mark.parametrize(("pattern", "spelling", "suffix", "alpha"), LAYOUTS)
def test_a_file_of_every_layout_acts_as_in_diffusers(ours, theirs, tmp_path, pattern, spelling, suffix, alpha):
    plain, before = our_output(ours), weights(ours)
    factors = random_lora(theirs, pattern)
    path = write(tmp_path / f"style{suffix}", factors, spelling, alpha)
    theirs.load_lora_weights(tmp_path, weight_name=path.name if suffix != ".pt" else rename(path, ".bin").name)
    expected = their_output(theirs)
    assert ours.load_lora(path) == "style"
    assert len(ours.adapters.loras["style"].names) == len(factors)
    assert difference(our_output(ours), expected) <= TOLERANCE
    assert difference(plain, expected) > 0.1
    for _, update in ours.adapters.loras["style"].items():  # the mistake: α forgotten
        update.scale = 1.0
    assert alpha in (None, RANK) or difference(our_output(ours), expected) > CLEAR
    ours.unload_lora()
    assert same(ours, before) and torch.equal(our_output(ours), plain) and not hooks(ours)


def rename(path: Path, suffix: str) -> Path:
    """diffusers reads pickles by the name .bin only."""
    path.with_suffix(suffix).write_bytes(path.read_bytes())
    return path.with_suffix(suffix)


def test_alpha_and_rank_of_each_layer_against_the_formula(ours, reference, tmp_path):
    """diffusers 0.42 mistakes the layers of a text encoder whose alphas differ, so numpy says what is right."""
    tensors, expected = {}, {}
    before = weights(ours)
    for i, (name, _) in enumerate(random_lora(reference, EVERYTHING).items()):
        rank, alpha = 1 + i % 4, 0.5 * (1 + i % 7)
        a, b = random_lora(reference, re.escape(name), rank, seed=i)[name]
        tensors |= {kohya(name, "A"): a, kohya(name, "B"): b, kohya(name, "alpha"): torch.tensor(alpha)}
        key = f"{name.replace('text_encoder.', 'text_encoder.text_model.')}.weight"
        product = b.double().numpy().reshape(len(b), rank) @ a.double().numpy().reshape(rank, -1)
        expected[key] = before[key] + 0.7 * alpha / rank * torch.from_numpy(product).reshape(before[key].shape)
    save_file(tensors, tmp_path / "mixed.safetensors")
    ours.load_lora(tmp_path / "mixed.safetensors", weight=0.7)
    unfused = our_output(ours)
    ours.fuse_lora()
    for key, value in weights(ours).items():
        torch.testing.assert_close(value, expected.get(key, before[key]), rtol=0, atol=1e-12)
    assert difference(our_output(ours), unfused) <= TOLERANCE


def test_alpha_in_the_metadata_that_diffusers_writes(ours, theirs, tmp_path):
    factors = random_lora(theirs, ATTENTION)
    write(tmp_path / "kohya.safetensors", factors, kohya, alpha=8.0)
    theirs.load_lora_weights(tmp_path, weight_name="kohya.safetensors", adapter_name="a")
    expected = their_output(theirs)
    layers = {part: {} for part in ("unet", "text_encoder")}
    for name, (a, b) in factors.items():
        part, _, rest = name.partition(".")
        layers[part] |= {f"{rest}.lora_A.weight": a, f"{rest}.lora_B.weight": b}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=theirs.unet.peft_config["a"].to_dict(),
        text_encoder_lora_adapter_metadata=theirs.text_encoder.peft_config["a"].to_dict(),
    )
    ours.load_lora(tmp_path)  # the folder, where diffusers' name for the file is found
    assert difference(our_output(ours), expected) <= TOLERANCE
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert not any(key.endswith("alpha") for key in saved)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_that_peft_writes(ours, theirs, tmp_path, rslora):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=["to_q", "conv1", "proj_in"],
        alpha_pattern={"conv1": 2, r"down_blocks.1.attentions.0.proj_in": 5},
        init_lora_weights=False,
        use_rslora=rslora,
    )
    torch.manual_seed(0)
    wrapped = get_peft_model(theirs.unet, config)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape) * value[0].numel() ** -0.5)
    wrapped.save_pretrained(tmp_path)
    expected = their_output(theirs)
    plain = our_output(ours)
    ours.load_lora(tmp_path, "own")
    assert difference(our_output(ours), expected) <= TOLERANCE
    assert difference(plain, expected) > 0.1


def test_several_with_weights(ours, theirs, reference, tmp_path):
    names = ("one", "two", "three")
    for seed, (name, pattern) in enumerate(zip(names, (EVERYTHING, ATTENTION, LINEAR), strict=True)):
        path = write(tmp_path / f"{name}.safetensors", random_lora(reference, pattern, 2 + seed, seed), peft)
        ours.load_lora(path, weight=0.25)
        theirs.load_lora_weights(path, adapter_name=name)
    theirs.set_adapters(list(names), [0.25] * 3)
    assert difference(our_output(ours), their_output(theirs)) <= TOLERANCE
    theirs.set_adapters(["three", "one"], [0.4, -0.8])
    ours.set_adapters({"three": 0.4, "one": -0.8})
    expected = their_output(theirs)
    assert ours.adapters.weights == {"one": -0.8, "two": 0.0, "three": 0.4}
    assert difference(our_output(ours), expected) <= TOLERANCE
    ours.fuse_lora()
    assert difference(our_output(ours), expected) <= TOLERANCE
    ours.unload_lora("three")  # while fused: the others stay fused
    theirs.set_adapters(["one"], [-0.8])
    assert difference(our_output(ours), their_output(theirs)) <= TOLERANCE
    assert ours.adapters.fused and not hooks(ours)
    ours.unfuse_lora()
    assert difference(our_output(ours), their_output(theirs)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_unfuse_restores_every_bit(ours, reference, tmp_path, dtype):
    for part in (ours.unet, ours.text_encoder):
        part.to(dtype)
    before = weights(ours)
    path = write(tmp_path / "big.safetensors", random_lora(reference, EVERYTHING), kohya, alpha=300.0)
    ours.load_lora(path)
    ours.fuse_lora()
    fused = weights(ours)
    assert sum(not torch.equal(fused[key], before[key]) for key in before) == len(load_file(path)) / 3
    # taking the update away again would not do: it is so large that the sum has lost bits of W
    key = "unet.mid_block.attentions.0.proj_in.weight"
    update = dict(ours.adapters.loras["big"].items())[key.removesuffix(".weight")]
    assert not torch.equal((fused[key] - update.delta()).to(dtype), before[key])
    ours.unfuse_lora()
    assert same(ours, before)
    assert {p.dtype for p in ours.unet.parameters()} == {dtype}


def test_fused_weights_are_saved_and_others_are_not(ours, reference, tmp_path):
    ours.load_lora(write(tmp_path / "style.safetensors", random_lora(reference, LINEAR), peft))
    expected = our_output(ours)
    with pytest.raises(ValueError, match=r"style is not fused; call fuse_lora\(\) or unload_lora\(\)"):
        ours.save_pretrained(tmp_path / "model")
    ours.fuse_lora()
    ours.save_pretrained(tmp_path / "model")
    again = StableDiffusion.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float64)
    assert torch.equal(our_output(again), our_output(ours))
    assert difference(our_output(again), expected) <= TOLERANCE


def test_what_is_saved_acts_the_same_in_diffusers(ours, theirs, tmp_path):
    layers = layers_of({"unet": ours.unet, "text_encoder": ours.text_encoder})
    torch.manual_seed(3)
    lora = LoRA({name: LowRank(layer, 4, alpha=6.0) for name, layer in layers.items()})
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    save_lora(lora, tmp_path / "own.safetensors")
    theirs.load_lora_weights(tmp_path / "own.safetensors")
    plain = our_output(ours)
    lora.double().attach(layers)
    assert difference(our_output(ours), their_output(theirs)) <= 1e-6  # B·α/r was rounded to float32
    assert difference(plain, their_output(theirs)) > 0.1


def test_a_new_lora_changes_nothing(ours):
    plain = our_output(ours)
    layers = layers_of({"unet": ours.unet, "text_encoder": ours.text_encoder})
    lora = LoRA({name: LowRank(layer, 4) for name, layer in layers.items()}).double()
    lora.attach(layers)
    assert hooks(ours) == len(layers)
    # the same but for rounding: a map of 1×1 that zeros were added to has other strides, and its norm another kernel
    torch.testing.assert_close(our_output(ours), plain, rtol=0, atol=1e-14)
    nn.init.ones_(lora.updates[0].lora_B)
    assert not torch.equal(our_output(ours), plain)


# Keys as sd-scripts writes them; its log of a Stable Diffusion 1 run counts 72 modules of the text encoder and 192 of
# the UNet, and lists names such as these.
KOHYA_NAMES = (
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "lora_te_text_model_encoder_layers_11_self_attn_out_proj",
    "lora_unet_down_blocks_0_attentions_0_proj_in",
    "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0",
    "lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_ff_net_0_proj",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
    "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_ff_net_2",
    "lora_unet_up_blocks_3_attentions_2_proj_out",
    "lora_unet_down_blocks_0_resnets_0_conv1",
    "lora_unet_down_blocks_1_resnets_0_conv_shortcut",
    "lora_unet_down_blocks_1_resnets_1_time_emb_proj",
    "lora_unet_down_blocks_2_downsamplers_0_conv",
    "lora_unet_up_blocks_1_upsamplers_0_conv",
    "lora_unet_time_embedding_linear_1",
    "lora_unet_conv_in",
)


@pytest.mark.parametrize("config", [SD15, SD21], ids=["SD 1", "SD 2"])
def test_kohya_names_at_full_size(config, tmp_path):
    with torch.device("meta"):
        parts = {"unet": UNet(config.unet), "text_encoder": TextEncoder(config.text_encoder)}
        reference = UNet2DConditionModel.from_config(to_dict(config.unet))
    layers = {name: module for name, module in reference.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    inside = [name for name in layers if ".attentions." in name]
    assert len(inside) == 192
    tensors = {}
    for name in [f"lora_unet_{name.replace('.', '_')}" for name in inside] + [*KOHYA_NAMES]:
        stem = name.removeprefix("lora_unet_")
        layer = next((module for each, module in layers.items() if each.replace(".", "_") == stem), None)
        out, *rest = layer.weight.shape if layer else text_shape(name, config.text_encoder.hidden_size)
        tensors[f"{name}.lora_down.weight"] = torch.zeros(1, *rest)
        tensors[f"{name}.lora_up.weight"] = torch.zeros(out, 1, *(1 for _ in rest[1:]))
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "names.safetensors")
    found = read_lora(tmp_path / "names.safetensors", parts).names
    assert len(found) == len(set(found)) == len(tensors) / 3
    assert set(found) >= {f"unet.{name}" for name in inside}
    assert "text_encoder.text_model.encoder.layers.11.self_attn.out_proj" in found
    # no two layers share a spelling, else a key would be a guess
    for part, root in parts.items():
        names = [name for name, module in root.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        assert len({name.replace(".", "_") for name in names}) == len(names), part


def text_shape(name: str, width: int) -> tuple[int, int]:
    return (4 * width, width) if name.endswith("fc1") else (width, width)


def damaged(change: str) -> Callable[[dict[str, Tensor]], None]:
    """A change to the tensors of a good file, in kohya's layout, by the name of what is wrong with it."""
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"

    def apply(tensors: dict[str, Tensor]) -> None:
        if change == "unknown layer":
            tensors["lora_unet_mid_block_attentions_7_proj_in.lora_down.weight"] = torch.zeros(3, 3)
        elif change == "unknown kind":
            tensors[f"{stem}.hada_w1_a"] = torch.zeros(3, 3)
        elif change == "no partner":
            del tensors[f"{stem}.lora_up.weight"]
        elif change == "alone":
            del tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"]
        elif change == "shape":
            tensors[f"{stem}.lora_up.weight"] = torch.zeros(64, 2)
        elif change == "width":
            tensors[f"{stem}.lora_down.weight"] = torch.zeros(RANK, 65)
        elif change == "alpha":
            tensors[f"{stem}.alpha"] = torch.zeros(2)
        elif change == "whole numbers":
            tensors[f"{stem}.lora_up.weight"] = torch.zeros(64, RANK, dtype=torch.int32)
        elif change == "twice":
            tensors["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"] = torch.zeros(RANK, 64)
        elif change == "empty":
            tensors.clear()

    return apply


DAMAGES = {
    "unknown layer": r"mid_block_attentions_7_proj_in.lora_down.weight belongs to no layer",
    "unknown kind": r"attn1_to_q\.hada_w1_a is beside factors of another kind",
    "no partner": r"attn1_to_q\.lora_down\.weight has no matching lora_B \(up\)",
    "alone": r"attn1_to_q\.alpha has no matching lora_A \(down\)",
    "shape": r"attn1_to_q\.lora_up\.weight has shape \[64, 2\]; expected \[64, 3\]",
    "width": r"attn1_to_q\.lora_down\.weight has shape \[3, 65\]; expected \[rank, 64\]",
    "alpha": r"attn1_to_q\.alpha has shape \[2\]; expected a scalar",
    "whole numbers": r"attn1_to_q\.lora_up\.weight has dtype I32; expected float16",
    "twice": r"is a duplicate of",
    "empty": r"it contains no LoRA",
}


@pytest.mark.parametrize("change", DAMAGES)
def test_what_does_not_fit_is_named_and_nothing_is_applied(ours, reference, tmp_path, change):
    good = write(tmp_path / "good.safetensors", random_lora(reference, ATTENTION), kohya, alpha=2.0)
    ours.load_lora(good)
    before, output = weights(ours), our_output(ours)
    tensors = load_file(good)
    damaged(change)(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=DAMAGES[change]):
        ours.load_lora(tmp_path / "bad.safetensors")
    assert list(ours.adapters.loras) == ["good"]
    assert same(ours, before) and torch.equal(our_output(ours), output)


def test_names_weights_and_order_of_calls(ours, reference, tmp_path):
    path = write(tmp_path / "style.safetensors", random_lora(reference, ATTENTION), peft)
    for call in (ours.fuse_lora, ours.unfuse_lora):
        with pytest.raises(ValueError, match="no LoRA is"):
            call()
    with pytest.raises(FileNotFoundError, match="no adapter at .*nothing.safetensors"):
        ours.load_lora(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="a folder with pytorch_lora_weights.safetensors"):
        ours.load_lora(TOKENIZER)
    with pytest.raises(ValueError, match="weight of 'style'=inf"):
        ours.load_lora(path, weight=float("inf"))
    ours.load_lora(path)
    output = our_output(ours)
    with pytest.raises(ValueError, match="a LoRA named 'style' is already loaded"):
        ours.load_lora(path)
    for call in (lambda: ours.set_adapters({"style": 0.5, "stile": 1.0}), lambda: ours.unload_lora("stile")):
        with pytest.raises(ValueError, match="no LoRA named 'stile'; loaded LoRAs: style"):
            call()
    with pytest.raises(ValueError, match="weight of 'style'=nan"):
        ours.set_adapters({"style": float("nan")})
    assert torch.equal(our_output(ours), output)
    ours.fuse_lora()
    for call in (lambda: ours.set_adapters({"style": 0.5}), lambda: ours.load_lora(path, "more"), ours.fuse_lora):
        with pytest.raises(ValueError, match=r"style is fused into the weights; call unfuse_lora\(\) first"):
            call()
    ours.unfuse_lora()
    assert torch.equal(our_output(ours), output)


def test_a_pickle_that_would_run_code_is_refused(ours, tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"string_to_param": {"*": Evil()}}, tmp_path / "evil.pt")
    for load in (ours.load_lora, ours.load_textual_inversion):
        with pytest.raises(CheckpointError, match="could run code"):
            load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def vectors(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, SMALL.text_encoder.hidden_size, generator=torch.Generator().manual_seed(seed))


INVERSIONS: dict[str, Any] = {
    "one.safetensors": {"<one>": vectors(1)[0]},
    "flat.safetensors": {"<flat>": vectors(1)},
    "many.safetensors": {"<many>": vectors(3)},
    "many.bin": {"<many>": vectors(2)},
    "webui.pt": {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": {"*": nn.Parameter(vectors(4))},
        "name": "my-style",
        "step": 1000,
        "sd_checkpoint": None,
    },
}
TEXTS = ("a {} in the snow", "{}", "{}, {}!", "a{}b", "{}s fox", "a red fox", "<{}> {}_1 {}_9", "fox_1 {}\n{}")


@pytest.mark.parametrize("name", INVERSIONS)
def test_a_word_acts_as_in_diffusers(ours, theirs, tmp_path, name):
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(INVERSIONS[name], path)
    table, tokenizer = ours.text_encoder.token_embedding, ours.tokenizer
    theirs.load_textual_inversion(path)
    word = ours.load_textual_inversion(path)
    for template in TEXTS:
        for spelled in (word, word.upper()):
            text = template.replace("{}", spelled)
            ids = theirs.tokenizer(theirs.maybe_convert_prompt(text.lower(), theirs.tokenizer))["input_ids"]
            if "{}_" not in template:  # there diffusers replaces its own replacements
                assert [*ours.tokenizer([text])[0]][: len(ids)] == ids, text
            assert ours.tokenizer.encode(text.upper()) == ours.tokenizer.encode(text)
    prompt = f"a {word} in the snow"
    with torch.inference_mode():
        expected = theirs.encode_prompt(prompt, "cpu", 1, False)[0]
    assert difference(ours.encode_text(prompt), expected) <= TOLERANCE
    assert difference(ours.encode_text("a fox in the snow"), expected) > 0.1
    assert ours.unknown_words(prompt) == []
    # what was there before is left as it was
    assert table.weight.shape[0] == 49408 and not tokenizer.added and tokenizer is not ours.tokenizer
    assert len(tokenizer.vocabulary) == 49408
    assert tokenizer.encode(prompt) == Tokenizer.from_pretrained().encode(prompt) != ours.tokenizer.encode(prompt)


def test_added_tokens_split_texts_as_in_transformers():
    words = ("<dragon>", "s*", "café thing", "<dragon>x", "ж")
    reference = CLIPTokenizer.from_pretrained(TOKENIZER)
    ours = Tokenizer.from_pretrained()
    for word in words:
        assert reference.add_tokens([word]) == 1
        ours = add_token(ours, word)
    texts = [
        "a <dragon> here", "<DRAGON>x <dragon>X<dragon>y", "a<dragon>b<dragon><dragon>!", "s* S*t xs*d",
        "cafe\u0301 thing", "CAFÉ  THING", "caféthing", "Ж ежa", "<|endoftext|><dragon>", "<drag on>",
        "", " <dragon> ",
    ]  # fmt: skip
    for text in texts:
        expected = reference(text)["input_ids"]
        assert [ours.bos_token_id, *ours.encode(text), ours.eos_token_id] == expected, text
        assert (
            ours.decode(expected, skip_special_tokens=True).split()
            == reference.decode(expected[1:-1]).replace("<|endoftext|>", "").split()
        )


def test_another_word_and_several_in_one_model(ours, theirs, tmp_path):
    for seed, word in enumerate(("<a>", "<b>")):
        save_file({word: vectors(2, seed)}, tmp_path / f"{seed}.safetensors")
        theirs.load_textual_inversion(tmp_path / f"{seed}.safetensors", token=f"{word}-new")
        assert ours.load_textual_inversion(tmp_path / f"{seed}.safetensors", f"{word}-new") == f"{word}-new"
    prompt = "a <b>-new beside a <a>-new"
    with torch.inference_mode():
        expected = theirs.encode_prompt(prompt, "cpu", 1, False)[0]
    assert difference(ours.encode_text(prompt), expected) <= TOLERANCE
    ours.save_pretrained(tmp_path / "model")
    again = StableDiffusion.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float64)
    assert difference(again.encode_text(prompt), expected) <= TOLERANCE


def test_a_word_beside_a_lora(ours, theirs, tmp_path):
    path = write(tmp_path / "style.safetensors", random_lora(theirs, LINEAR), peft)
    save_file({"<new>": vectors(2)}, tmp_path / "word.safetensors")
    for load_lora, load_word in (
        (ours.load_lora, ours.load_textual_inversion),
        (theirs.load_lora_weights, theirs.load_textual_inversion),
    ):
        load_lora(path)
        load_word(tmp_path / "word.safetensors")
    with torch.inference_mode():
        expected = theirs.encode_prompt("a <new> fox", "cpu", 1, False)[0]
    assert difference(ours.encode_text("a <new> fox"), expected) <= TOLERANCE


def test_words_that_cannot_be_added(ours, tmp_path):
    table, tokenizer = ours.text_encoder.token_embedding, ours.tokenizer
    bad: dict[str, tuple[Any, str]] = {
        "known.bin": ({"fox": vectors(1)}, "'fox' is already in the vocabulary"),
        "special.bin": ({"<|endoftext|>": vectors(1)}, "is already in the vocabulary"),
        "blank.bin": ({"  ": vectors(1)}, "expected a non-empty word with at least 1 token"),
        "wide.bin": ({"<wide>": torch.zeros(768)}, "'<wide>' have width 768; expected 32"),
        "two.bin": ({"clip_l": vectors(1), "clip_g": vectors(1)}, "contains clip_l, clip_g; expected one word"),
        "cube.bin": ({"<cube>": torch.zeros(1, 1, 32)}, "contains <cube>; expected one word with embeddings"),
        "none.bin": ({"<none>": torch.zeros(0, 32)}, "contains <none>; expected one word with embeddings"),
        "list.bin": ([1, 2], "contains list; expected one word"),
    }
    for name, (content, message) in bad.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=re.escape(message)):
            ours.load_textual_inversion(tmp_path / name)
        assert ours.text_encoder.token_embedding is table and ours.tokenizer is tokenizer
    torch.save({"<new>": vectors(2)}, tmp_path / "new.bin")
    ours.load_textual_inversion(tmp_path / "new.bin")
    for word in ("<new>", "<NEW>", "<new>_1"):
        with pytest.raises(ValueError, match="is already in the vocabulary"):
            ours.load_textual_inversion(tmp_path / "new.bin", word)
    other = StableDiffusion(ours.config, tokenizer, ours.text_encoder, ours.unet, ours.autoencoder)
    with pytest.raises(ValueError, match="49410 token embeddings, but the tokenizer has 49408 tokens"):
        other.load_textual_inversion(tmp_path / "new.bin", "<other>")
    assert read_textual_inversion(tmp_path / "new.bin")[0] == "<new>"


def test_the_web_ui_names_its_safetensors_by_the_file(tmp_path):
    save_file({"emb_params": vectors(2)}, tmp_path / "my-style.safetensors")
    word, rows = read_textual_inversion(tmp_path / "my-style.safetensors")
    assert word == "my-style" and torch.equal(rows, vectors(2))


def test_the_command_draws_what_python_draws(small_model, tmp_path, capsys):
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    layers = layers_of({"unet": sd.unet})
    torch.manual_seed(5)
    lora = LoRA({name: LowRank(layer, 2) for name, layer in layers.items() if "attn" in name or "conv1" in name})
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    save_lora(lora, tmp_path / "style.safetensors")
    save_file({"<thing>": torch.randn(2, 16)}, tmp_path / "thing.safetensors")
    drawn = tmp_path / "drawn.png"
    command = [
        "generate",
        "red <thing>",
        "--model",
        str(small_model),
        "--seed",
        "7",
        "-o",
        str(drawn),
        "--device",
        "cpu",
    ]
    more = [
        "--lora",
        f"{tmp_path / 'style.safetensors'}:0.5",
        "--textual-inversion",
        str(tmp_path / "thing.safetensors"),
    ]
    assert main([*command, *more]) == 0
    assert "never learned" not in capsys.readouterr().err
    sd.load_lora(tmp_path / "style.safetensors", weight=0.5)
    sd.load_textual_inversion(tmp_path / "thing.safetensors")
    with Image.open(drawn) as picture:
        assert picture.tobytes() == sd("red <thing>", seed=7).tobytes()
        assert "LoRA: style 0.5" in picture.info["parameters"]
    sd.set_adapters({"style": 1.0})
    assert picture.tobytes() != sd("red <thing>", seed=7).tobytes()
    for value, message in (
        ("there:x", "no adapter at there:x"),
        ("nothing.safetensors:0.5", "no adapter at nothing.safetensors"),
    ):
        assert main([*command, "--lora", value]) == 1
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three plain pictures, one of them not square, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for index, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (48, 32 + 8 * index), color).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"a Thing on snow {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def their_pipeline(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


@torch.inference_mode()
def small_prediction(context: Tensor, unet: Callable[..., Any]) -> Tensor:
    noisy = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    out = unet(noisy, torch.tensor(300), context)
    return out if isinstance(out, Tensor) else out.sample


def test_which_layers_are_trained(small_model, pictures):
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    for layers in ("attention", "all"):
        task = LoRATask(sd, pictures, rank=2, layers=layers)
        assert all(not update.lora_B.any() and update.lora_A.all() for _, update in task.model.items())
        attention = [name for name in task.model.names if "attn" in name]
        assert len(attention) == 8 * sum("attn1.to_q" in name for name in attention) > 0
        assert (len(attention) < len(task.model.names)) == (layers == "all")


def test_training_a_lora(small_model, pictures, tmp_path):
    """What is written acts the same in diffusers; the loss falls; the frozen weights stay."""
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    before = weights(sd)
    task = LoRATask(sd, pictures, rank=2)
    options = Options(tmp_path / "run", steps=40, batch=4, lr=1e-2, warmup=1, decays=(0.9,))
    first = [float(task.loss(step, range(4), slice(4), 0)[0]) for step in range(8)]
    train(task, options)
    last = [float(task.loss(step, range(4), slice(4), 0)[0]) for step in range(8)]
    assert sum(last) < 0.97 * sum(first)
    assert same(sd, before)
    with Image.open(tmp_path / "run/sheet-000040.png") as sheet:
        assert sheet.width == 3 * 32
    saved = load_file(tmp_path / "run/export/pytorch_lora_weights.safetensors")
    assert len(saved) == 2 * len(task.model.names)
    pipe = their_pipeline(small_model)
    ours = StableDiffusion.from_pretrained(small_model, device="cpu")
    context = ours.encode_text("a thing on snow")
    plain = small_prediction(context, ours.unet)
    pipe.load_lora_weights(tmp_path / "run/export")
    ours.load_lora(tmp_path / "run/export")
    assert difference(small_prediction(context, ours.unet), small_prediction(context, pipe.unet)) <= 1e-5
    assert difference(plain, small_prediction(context, pipe.unet)) > CLEAR


def test_training_a_word(small_model, pictures, tmp_path):
    """The same for textual inversion, by the command; only rows that begin as the initial word are trained."""
    output = tmp_path / "word"
    words = ["--token", "<it>", "--word", "thing", "--initial", "red fox", "--vectors", "3"]
    run = ["--pictures", str(pictures), "--model", str(small_model), "--output", str(output), "--batch", "4"]
    assert main(["train", "inversion", *words, *run, "--steps", "1", "--lr", "0"]) == 0
    table = load_file(small_model / "text_encoder/model.safetensors")["text_model.embeddings.token_embedding.weight"]
    red, fox = Tokenizer.from_pretrained().encode("red fox")
    path = output / "export/learned_embeds.safetensors"
    assert torch.equal(load_file(path)["<it>"], table[[red, fox, red]])
    path = tmp_path / "longer/export/learned_embeds.safetensors"
    run[run.index(str(output))] = str(tmp_path / "longer")
    assert main(["train", "inversion", *words, *run, "--steps", "5"]) == 0
    assert (load_file(path)["<it>"] != table[[red, fox, red]]).any(dim=1).all()
    pipe, ours = their_pipeline(small_model), StableDiffusion.from_pretrained(small_model, device="cpu")
    pipe.load_textual_inversion(path)
    assert ours.load_textual_inversion(path) == "<it>"
    with torch.inference_mode():
        expected = pipe.encode_prompt("a <it> on snow", "cpu", 1, False)[0]
    assert difference(ours.encode_text("a <it> on snow"), expected) <= 1e-5


def test_a_trained_word_is_seen_as_it_will_be_loaded(small_model, pictures):
    """The context in training is that of a model which has loaded the word."""
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    task = InversionTask(sd, pictures, "<it>", "thing", "fox", vectors=2)
    nn.init.normal_(task.model.vectors)
    assert task.renamed("a thing, things, Thing") == "a <it>, things, <it>"
    context = task.context(["a thing on snow"])
    context.sum().backward()
    assert bool(task.model.vectors.grad.any()) and sd.text_encoder.token_embedding.weight.grad is None
    grown, prompts = task.adapted()
    assert prompts[0] == "a <it> on snow 0"
    torch.testing.assert_close(context.detach(), grown.encode_text("a <it> on snow"), rtol=0, atol=1e-6)
    assert sd.tokenizer.added == {} and len(sd.text_encoder.token_embedding.weight) == 49408


def test_pictures_that_cannot_be_used(small_model, pictures, tmp_path, capsys):
    images, captions = read_examples(pictures, 32)
    assert images.shape == (3, 3, 32, 32) and captions[2] == "a Thing on snow 2"
    assert images[0, :, 5, 9].tolist() == [1, -1, -1]
    cases = {
        "": "names no picture",
        '{"file_name": "0.png"}': "line 1: expected a picture and its text",
        '{"file_name": "none.png", "text": "x"}': "none.png",
        "no json": "line 1",
        '{"file_name": "0.png", "file_name": "1.png", "text": "x"}': "duplicate key",
        "[" * 100_000: "nested more than 64 deep",
    }
    for content, message in cases.items():
        (tmp_path / "metadata.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_examples(tmp_path, 32)
    marked = "\ufeff" + (pictures / "metadata.jsonl").read_text(encoding="utf-8")
    (pictures / "metadata.jsonl").write_text(marked, encoding="utf-8")
    assert read_examples(pictures, 32)[1] == captions
    (pictures / "metadata.jsonl").write_text(marked[1:], encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="metadata.jsonl is missing"):
        read_examples(small_model, 32)
    command = ["train", "inversion", "--pictures", str(pictures), "--model", str(small_model), "--steps", "1"]
    for more, message in (
        (["--initial", "fox"], "lacks the word 'unicorn', for which '<unicorn>' is to stand"),
        (["--initial", "horse", "--word", "thing"], "does not know 'horse'"),
        (["--initial", "fox", "--word", "thing", "--token", "snow"], "'snow' is already in the vocabulary"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err


def test_pictures_outside_their_folder_are_not_read(pictures, tmp_path):
    folder, outside = tmp_path / "a", tmp_path / "x.png"
    (folder / "sub").mkdir(parents=True)
    outside.write_bytes((pictures / "0.png").read_bytes())
    for name in ("in.png", "sub/in.png", "C:x.png", "..\\x.png", "sub\\x.png", "x.png:y"):  # file names on Linux
        (folder / name).write_bytes(outside.read_bytes())
    (folder / "link.png").symlink_to(outside)
    (folder / "out").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.png")
    bad = ["../x.png", str(outside), "sub/../../x.png", "link.png", "out/x.png", "pipe.png", "sub", "", ".", 5, None]
    bad += [
        "C:x.png",
        r"..\x.png",
        r"sub\x.png",
        "x.png:y",
        r"\\host\x.png",
        "//host/x.png",
        "C:/x.png",
        "a\0.png",
        ["in.png"],
    ]
    for name in bad:
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
        with pytest.raises(ValueError, match="line 1: expected a picture and its text"):
            read_examples(folder, 32)
    for name in ("in.png", "sub/in.png", "./in.png"):
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
        assert read_examples(folder, 32)[1] == ["x"]


def test_the_shipped_pictures():
    images, captions = read_examples(EXAMPLES, 192)
    assert 20 <= len(captions) <= 60 and images.shape[2:] == (192, 192)
    assert all("unicorn" in caption and "snow" not in caption and "sea" not in caption for caption in captions)
    assert sum(path.stat().st_size for path in EXAMPLES.iterdir()) < 300_000
    assert (images.flatten(1).std(dim=1) > 0.1).all()
    known = StableDiffusion.from_pretrained(device="cpu")
    assert {word for caption in captions for word in known.unknown_words(caption)} == {"unicorn"}
