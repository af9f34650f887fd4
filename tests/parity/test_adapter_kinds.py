"""LoHa, LoKr and DoRA against peft, and against the formulas for what peft does not read; weights for each part."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minisd import StableDiffusion
from minisd.features.adapters import layers_of
from minisd.io.checkpoint import CheckpointError

TOLERANCE = 1e-10  # of the output's standard deviation, in float64
LAYERS = r".*(to_[qkv]|to_out\.0|ff\.net\.2|conv1|conv_shortcut|proj_in|time_emb_proj)"
# peft rounds the scale of a LoHa to float32, so alpha / r are numbers that float32 holds
KINDS: dict[str, Any] = {
    "LoHa": LoHaConfig(r=4, alpha=5, target_modules=LAYERS),
    "LoHa, Tucker": LoHaConfig(r=4, alpha=2, target_modules=LAYERS, use_effective_conv2d=True),
    "LoHa, ranks and alphas": LoHaConfig(
        r=2, alpha=2, target_modules=LAYERS, rank_pattern={"to_q": 4, "conv1": 1}, alpha_pattern={"to_q": 3, "to_k": 7}
    ),
    "LoKr": LoKrConfig(r=2, alpha=3, target_modules=LAYERS),
    "LoKr, both decomposed": LoKrConfig(r=2, alpha=1, target_modules=LAYERS, decompose_both=True, decompose_factor=8),
    "LoKr, Tucker": LoKrConfig(r=2, alpha=3, target_modules=LAYERS, use_effective_conv2d=True),
    "LoKr, full matrices": LoKrConfig(r=64, alpha=16, target_modules=LAYERS),
    "DoRA": LoraConfig(r=3, lora_alpha=5, target_modules=LAYERS, use_dora=True),
    "DoRA, rsLoRA": LoraConfig(r=3, lora_alpha=5, target_modules=LAYERS, use_dora=True, use_rslora=True),
}


def latents() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.inference_mode()
def predict(unet: nn.Module, context: Tensor) -> Tensor:
    output = unet(latents(), torch.tensor(500), context)
    return output if isinstance(output, Tensor) else output.sample


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.std())


@pytest.fixture
def context(ours: StableDiffusion) -> Tensor:
    return ours.encode_text("a red fox")


def randomise_adapter(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, value in model.named_parameters():
        if re.search("hada|lokr|lora_[AB]", name):
            with torch.no_grad():
                scale = torch.tensor(float(max(value[0].numel(), 1))).rsqrt()  # float32, as in files
                value.copy_(torch.randn(value.shape, generator=generator) * scale)
        elif "magnitude" in name:
            with torch.no_grad():
                value.copy_((value * (0.5 + torch.rand(value.shape, generator=generator))).float())


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_peft_writes(models, ours, context, tmp_path, kind):
    """Every layer's new weight, and the output of the whole UNet, attached and fused."""
    theirs = get_peft_model(copy.deepcopy(models[1].unet), copy.deepcopy(KINDS[kind]))
    randomise_adapter(theirs)
    expected, plain = predict(theirs, context), predict(ours.unet, context)
    theirs.save_pretrained(tmp_path / "style")
    before = {name: layer.weight.clone() for name, layer in layers_of({"unet": ours.unet}).items()}
    assert ours.load_lora(tmp_path / "style") == "style"
    assert difference(plain, expected) > 0.05
    assert difference(predict(ours.unet, context), expected) <= TOLERANCE
    merged = layers_of({"unet": theirs.merge_and_unload()})
    ours.fuse_lora()
    adapted = set(ours.adapters.loras["style"].names)
    for name, layer in layers_of({"unet": ours.unet}).items():
        assert difference(layer.weight, merged[name].weight) <= TOLERANCE, name
        assert torch.equal(layer.weight, before[name]) == (name not in adapted)
    assert difference(predict(ours.unet, context), expected) <= TOLERANCE
    ours.unfuse_lora()
    ours.set_adapters({})
    assert torch.equal(predict(ours.unet, context), plain)


# kohya's and LyCORIS' names, with numpy computing what the update must be

Factors = dict[str, np.ndarray]


def loha(rng: np.random.Generator, out: int, *rest: int) -> tuple[Factors, np.ndarray]:
    width = int(np.prod(rest))
    a1, b1, a2, b2 = (rng.normal(size=s) * s[1] ** -0.5 for s in ((out, 2), (2, width), (out, 2), (2, width)))
    factors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": np.array(3.0)}
    return factors, 3 / 2 * (a1 @ b1) * (a2 @ b2)


def lokr(rng: np.random.Generator, out: int, *rest: int) -> tuple[Factors, np.ndarray]:
    """Two full matrices: the right factor keeps the kernel. Their alpha means nothing."""
    w1, w2 = rng.normal(size=(4, 2)), rng.normal(size=(out // 4, rest[0] // 2, *rest[1:])) * rest[0] ** -0.5
    rows = [
        [w1[i // w2.shape[0], j // w2.shape[1]] * w2[i % w2.shape[0], j % w2.shape[1]] for j in range(rest[0])]
        for i in range(out)
    ]
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": np.array(4.0)}, np.array(rows)


def lokr_low_rank(rng: np.random.Generator, out: int, *rest: int) -> tuple[Factors, np.ndarray]:
    w1, a = rng.normal(size=(2, 2)), rng.normal(size=(out // 2, 3))
    b = rng.normal(size=(3, int(np.prod(rest)) // 2)) * rest[0] ** -0.5
    update = np.kron(w1, a @ b) * 1.5 / 3
    return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": np.array(1.5)}, update


def tucker(rng: np.random.Generator, out: int, *rest: int) -> tuple[Factors, np.ndarray]:
    """LoCon's, with a core tensor for convolutions."""
    down, up = rng.normal(size=(3, rest[0], *(1 for _ in rest[1:]))), rng.normal(size=(out, 3, *(1 for _ in rest[1:])))
    factors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.array(2.0)}
    if len(rest) == 1:
        return factors, 2 / 3 * up @ down / 10 * 10
    core = rng.normal(size=(3, 3, *rest[1:])) / 10
    update = sum(
        up[:, i, 0, 0, None, None, None] * core[i, j][None, None] * down[j, :, 0, 0][None, :, None, None]
        for i in range(3)
        for j in range(3)
    )
    return factors | {"lora_mid.weight": core}, 2 / 3 * update


def plain(rng: np.random.Generator, out: int, *rest: int) -> tuple[Factors, np.ndarray]:
    down, up = rng.normal(size=(2, *rest)), rng.normal(size=(out, 2, *(1 for _ in rest[1:])))
    update = 0.5 * np.einsum("or,r...->o...", up.reshape(out, 2), down)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.array(1.0)}, update


NAMES = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1", "conv_out")
FORMULAS: dict[str, Callable[..., tuple[Factors, np.ndarray]]] = {
    "loha": loha, "lokr": lokr, "lokr of low rank": lokr_low_rank, "tucker": tucker, "plain": plain,
}  # fmt: skip


def write_kohya(path: Path, ours: StableDiffusion, formula: str, norms: str = "") -> dict[str, Tensor]:
    """Write a file in kohya's spelling, and return the weights that numpy expects."""
    rng, tensors, expected = np.random.default_rng(0), {}, {}
    for name in NAMES:
        weight = ours.unet.get_submodule(name).weight.detach().numpy()
        factors, update = FORMULAS[formula](rng, *weight.shape)
        new = weight + update.reshape(weight.shape)
        if norms:
            axis = {"rows": 0, "columns": 1}[norms]
            scale = 0.5 + rng.random(weight.shape[axis])
            shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
            others = tuple(i for i in range(weight.ndim) if i != axis)
            new = new * scale.reshape(shape) / np.sqrt((new**2).sum(axis=others, keepdims=True))
            factors["dora_scale"] = scale.reshape(shape)
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{stem}.{key}": torch.from_numpy(np.asarray(value)).contiguous() for key, value in factors.items()}
        expected[name] = torch.from_numpy(new)
    save_file(tensors, path)
    return expected


@pytest.mark.parametrize("norms", ["", "rows", "columns"])
@pytest.mark.parametrize("formula", FORMULAS)
def test_kohyas_files_against_the_formulas(ours, context, tmp_path, formula, norms):
    expected = write_kohya(tmp_path / "style.safetensors", ours, formula, norms)
    before = {name: ours.unet.get_submodule(name).weight.clone() for name in NAMES}
    ours.load_lora(tmp_path / "style.safetensors", weight=0.5)
    attached = predict(ours.unet, context)
    ours.fuse_lora()
    for name, value in expected.items():
        half = (before[name] + value) / 2  # the whole update counts half
        # α and factors are read in float32
        torch.testing.assert_close(ours.unet.get_submodule(name).weight, half, rtol=2e-6, atol=2e-6)
        assert (before[name] - half).abs().max() > 0.01
    assert difference(predict(ours.unet, context), attached) <= TOLERANCE


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no partner": (lambda t: t.pop(next(k for k in t if k.endswith("hada_w2_b"))), "no matching hada_w2_b"),
    "another width": (
        lambda t: t.update({k: torch.ones(2, 7) for k in t if k.endswith("to_q.hada_w1_b")}), "does not fit a layer"
    ),
    "another rank": (
        lambda t: t.update({k: torch.ones(5, 32) for k in t if k.endswith("to_q.hada_w1_b")}), "does not fit a layer"
    ),
    "another layer": (lambda t: t.update({"lora_unet_x.hada_w1_a": torch.ones(1, 1)}), "belongs to no layer"),
    "two kinds": (
        lambda t: t.update({"lora_unet_conv_out.lora_up.weight": torch.ones(4, 2, 1, 1)}), "is beside factors of"
    ),
    "half of a Tucker": (
        lambda t: t.update({"lora_unet_conv_out.hada_t1": torch.ones(2, 2, 3, 3)}), "no matching hada_t2"
    ),
    "whole numbers": (
        lambda t: t.update({k: v.int() for k, v in t.items() if "to_q.hada_w1_a" in k}), "expected float16 to float64"
    ),
    "magnitude": (lambda t: t.update({"lora_unet_conv_out.dora_scale": torch.ones(7)}), "expected 4 or 32 values"),
}  # fmt: skip


@pytest.mark.parametrize("change", BROKEN)
def test_what_does_not_fit_is_named(ours, tmp_path, change):
    path = tmp_path / "style.safetensors"
    write_kohya(path, ours, "loha")
    tensors = load_file(path)
    BROKEN[change][0](tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=re.escape(BROKEN[change][1])):
        ours.load_lora(path)
    assert not ours.adapters.loras


@pytest.mark.parametrize(
    "key, kind",
    [
        ("lora_unet_conv_out.oft_blocks", "OFT"),
        ("base_model.model.conv_out.oft_R.weight", "OFT"),
        ("lora_unet_conv_out.on_input", "(IA)³"),
        ("base_model.model.conv_out.ia3_l", "(IA)³"),
        ("lora_unet_conv_out.a1.weight", "GLoRA"),
        ("lora_unet_conv_out.diff", "a full difference of weights"),
        ("lora_unet_conv_norm_out.w_norm", "a full difference of weights"),
        ("base_model.model.conv_out.vera_lambda_b", "VeRA"),
    ],
)
def test_other_adapters_are_refused_by_name(ours, tmp_path, key, kind):
    save_file({key: torch.ones(4)}, tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"It looks like {kind}, which is not supported")):
        ours.load_lora(tmp_path / "style.safetensors")


# Weights for each part, names, bundled words


def write_lora(path: Path, ours: StableDiffusion, seed: int = 0, words: dict[str, Tensor] | None = None) -> Path:
    generator = torch.Generator().manual_seed(seed)
    path.parent.mkdir(exist_ok=True)
    tensors = {}
    for name, layer in layers_of({"unet": ours.unet, "text_encoder": ours.text_encoder}).items():
        if re.search(r"to_q|q_proj", name):
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, layer.in_features, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 2, generator=generator)
    save_file(tensors | (words or {}), path, metadata={"format": "pt"})
    return path


def theirs_with(models: Any) -> StableDiffusionPipeline:
    pipe = models[1]
    parts = {"unet": copy.deepcopy(pipe.unet), "text_encoder": copy.deepcopy(pipe.text_encoder)}
    return StableDiffusionPipeline(**pipe.components | parts, requires_safety_checker=False)


@pytest.mark.parametrize(
    "weight", [0.5, {"unet": 0.8, "text_encoder": 0.3}, {"unet": 0.4}, {"text_encoder": 0.0}, {"unet": -1.0}]
)
def test_weights_for_each_part_as_in_diffusers(models, ours, tmp_path, weight):
    path = write_lora(tmp_path / "style.safetensors", ours)
    theirs = theirs_with(models)
    theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="style")
    full = {"unet": 1.0, "text_encoder": 1.0} | weight if isinstance(weight, dict) else weight
    theirs.set_adapters("style", full)
    ours.load_lora(path, weight=weight)
    with torch.inference_mode():
        expected = theirs.encode_prompt("a red fox", "cpu", 1, False)[0]
        context = ours.encode_text("a red fox")
        assert difference(context, expected) <= TOLERANCE
        assert difference(predict(ours.unet, context), predict(theirs.unet, expected)) <= TOLERANCE
    attached = predict(ours.unet, context)
    ours.fuse_lora()
    assert difference(predict(ours.unet, ours.encode_text("a red fox")), attached) <= TOLERANCE
    ours.unfuse_lora()
    ours.set_adapters({"style": 0.25})
    assert ours.adapters.weights == {"style": 0.25}
    ours.set_adapters({"style": {"unet": 2.0, "text_encoder": 0.0}})
    assert ours.adapters.weights == {"style": {"text_encoder": 0.0, "unet": 2.0}} and ours.adapters.active == ["style"]
    ours.set_adapters({})
    assert ours.adapters.active == []


@pytest.mark.parametrize("weight", [{"vae": 1.0}, {"unet": "1"}, {"unet": float("nan")}, "0.5", [0.5]])
def test_weights_that_are_none(ours, tmp_path, weight):
    path = write_lora(tmp_path / "style.safetensors", ours)
    with pytest.raises((TypeError, ValueError), match="weight of 'style'"):
        ours.load_lora(path, weight=weight)
    assert not ours.adapters.loras and not any(module._forward_hooks for module in ours.unet.modules())


def test_files_of_one_name(ours, tmp_path):
    paths = [write_lora(tmp_path / f / "pytorch_lora_weights.safetensors", ours, i) for i, f in enumerate("abc")]
    names = [ours.load_lora(path) for path in paths]
    assert names == ["pytorch_lora_weights", "b/pytorch_lora_weights", "c/pytorch_lora_weights"]
    with pytest.raises(ValueError, match="a LoRA named 'pytorch_lora_weights' is already loaded"):
        ours.load_lora(paths[1])
    assert ours.load_lora(paths[1], name="again") == "again"
    ours.unload_lora("b/pytorch_lora_weights")
    assert list(ours.adapters.loras) == ["pytorch_lora_weights", "c/pytorch_lora_weights", "again"]


def test_bundled_words(ours, tmp_path):
    words = {
        "bundle_emb.<style>.string_to_param.*": torch.randn(2, 32),
        "bundle_emb.my hero.emb_params": torch.randn(32),
        "bundle_emb.fox.emb_params": torch.randn(1, 32),
    }
    path = write_lora(tmp_path / "style.safetensors", ours, words=words)
    with pytest.warns(UserWarning, match="the word 'fox' bundled with .* is not used: 'fox' is already"):
        ours.load_lora(path)
    for index, text in ((0, "<style>"), (1, "my hero")):
        ids = ours.tokenizer.encode(text)
        expected = list(words.values())[index].reshape(-1, 32)
        assert torch.equal(ours.text_encoder.token_embedding.weight[ids].float(), expected)
    save_file(words | {"bundle_emb.<x>.emb_params": torch.randn(1, 7)}, tmp_path / "words.safetensors")
    with pytest.raises(CheckpointError, match="contains no LoRA"):
        ours.load_lora(tmp_path / "words.safetensors")


# The command


def test_the_command_takes_weights_names_and_words(run, small_model, tmp_path):
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    paths = [write_lora(Path(f) / "style.safetensors", sd, i) for i, f in enumerate("ab")]
    save_file({"<word>": torch.randn(1, 16)}, "hero.safetensors")
    options = ["--lora", f"{paths[0]}:0.5:0.8", "--lora", f"{paths[1]}:-0.2"]
    options += ["--textual-inversion", "hero.safetensors:<hero>"]
    code, files, err = run("generate", "a <hero> fox", "--seed", "3", "--steps", "2", *options)
    assert code == 0 and "hero.safetensors: the word for it is <hero>" in err
    sd.load_lora(paths[0], weight={"text_encoder": 0.5, "unet": 0.8})
    sd.load_lora(paths[1], weight=-0.2)
    sd.load_textual_inversion("hero.safetensors", "<hero>")
    from PIL import Image

    drawn = np.asarray(Image.open(files[0]))
    assert np.array_equal(drawn, np.asarray(sd("a <hero> fox", seed=3, num_inference_steps=2)))
    assert 'LoRA: "style 0.5:0.8, b/style -0.2"' in Image.open(files[0]).info["parameters"]
    bare = ["--lora", str(paths[0]), "--lora", str(paths[1]), "--textual-inversion", "hero.safetensors:<hero>"]
    code, again, err = run("generate", "--like", files[0], *bare, "-o", "again.png")
    assert code == 0 and np.array_equal(np.asarray(Image.open(again[0])), drawn), err
    code, _, err = run("generate", "--like", files[0], *bare[4:])
    assert code == 2 and "drawn with the LoRA 'style' at 0.5:0.8" in err


def test_vectors_in_a_parameter_dict(ours, tmp_path):
    """The first textual inversions were saved as torch's own class."""
    vectors = torch.randn(3, 32)
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"*": vectors})}
    torch.save(content, tmp_path / "my-style.pt")
    assert ours.load_textual_inversion(tmp_path / "my-style.pt") == "my-style"
    ids = ours.tokenizer.encode("my-style")
    assert torch.equal(ours.text_encoder.token_embedding.weight[ids].float(), vectors)
