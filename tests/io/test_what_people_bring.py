"""Published files as people have them: autoencoders on their own, stated prediction types, leftovers, wrong names."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
import yaml
from checkpoints import Parts, compvis_state, make_parts, randomise, write_folder
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from models import difference, noise
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from minisd import StableDiffusion
from minisd.app.prompts_file import read_prompts
from minisd.config import SD21, SD21_BASE, ScheduleConfig
from minisd.features.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from minisd.io.checkpoint import CheckpointError, load, open_checkpoint
from minisd.io.configs import read_json
from minisd.io.hub import choose_files
from minisd.io.key_names import is_leftover, single_file_sources
from minisd.io.tensors import is_safetensors, read_header
from minisd.training.adapting import read_examples

VAE = "diffusion_pytorch_model.safetensors"
State = dict[str, Tensor]

# One layer a block will do here: test_checkpoint.py reads the names of two.
SMALL = replace(
    checkpoints.SMALL,
    autoencoder=replace(checkpoints.SMALL.autoencoder, layers_per_block=1),
    unet=replace(checkpoints.SMALL.unet, layers_per_block=1),
)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts(SMALL)


@pytest.fixture(scope="module")
def other() -> AutoencoderKL:
    return make_parts(SMALL, seed=5).vae


@pytest.fixture(scope="module")
def taesd() -> AutoencoderTiny:
    module = AutoencoderTiny().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for name, value in module.named_parameters():
        randomise(name, value, 1.0, generator)
    return module


def compvis_vae(vae: AutoencoderKL, prefix: str = "") -> State:
    parts = make_parts(SMALL, meta=True)
    parts.vae = vae
    keys = {key: value for key, value in compvis_state(parts).items() if key.startswith("first_stage_model.")}
    return {prefix + key.removeprefix("first_stage_model."): value.contiguous() for key, value in keys.items()}


def write(path: Path, tensors: State) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path) if is_named_safetensors(path) else torch.save(tensors, path)
    return path


def is_named_safetensors(path: Path) -> bool:
    return path.suffix in (".safetensors", ".sft")


def kl_folder(at: Path, vae: AutoencoderKL, state: State) -> Path:
    vae.save_pretrained(at / "vae-ft-mse")
    return at / "vae-ft-mse"


KL: dict[str, Callable[[Path, AutoencoderKL, State], Path]] = {
    "diffusers' folder": kl_folder,
    "whole pipeline": lambda at, vae, state: write_folder(at / "other", replace(make_parts(SMALL), vae=vae)),
    "CompVis, .safetensors": lambda at, vae, state: write(at / "vae.safetensors", compvis_vae(vae)),
    "CompVis, .ckpt, with its training": lambda at, vae, state: write(
        at / "vae.ckpt", compvis_vae(vae) | {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    ),
    "diffusers' keys in a file": lambda at, vae, state: write(at / "vae.pt", dict(vae.state_dict())),
    "inside a whole checkpoint": lambda at, vae, state: write(
        at / "other.safetensors", state | compvis_vae(vae, "first_stage_model.")
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KL)
@pytest.mark.parametrize("model", ["folder", "single file without one"])
def test_an_autoencoder_of_its_own(folder, tmp_path, state, other, kind, model):
    (tmp_path / "vae").mkdir()
    source = KL[kind](tmp_path / "vae", other, state)
    options: dict[str, Any] = {}
    if model != "folder":
        folder = write(tmp_path / "noVAE.ckpt", {k: v for k, v in state.items() if not k.startswith("first_stage")})
        options["config"] = SMALL
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*belong to no part")
        loaded = load(folder, vae=source, **options)
    ours, theirs = loaded.autoencoder.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    plain = load(folder) if model == "folder" else None
    if plain is not None:
        assert torch.equal(plain.unet.conv_in.weight, loaded.unet.conv_in.weight)
        assert not torch.equal(plain.autoencoder.decoder.conv_in.weight, loaded.autoencoder.decoder.conv_in.weight)


def original(taesd: AutoencoderTiny, part: str, prefix: str = "") -> State:
    """The names of TAESD's own files, whose decoder begins with a clamp that has no weights."""
    shift = part == "decoder"
    found = {}
    for key, value in getattr(taesd, part).layers.state_dict().items():
        layer, _, rest = key.partition(".")
        found[f"{prefix}{int(layer) + shift}.{rest}"] = value
    return found


def taesd_folder(at: Path, taesd: AutoencoderTiny) -> Path:
    taesd.save_pretrained(at)
    return at


def taesd_pair(at: Path, taesd: AutoencoderTiny, suffix: str, given: str) -> Path:
    for part in ("encoder", "decoder"):
        write(at / f"taesd_{part}{suffix}", original(taesd, part))
    return at / f"taesd_{given}{suffix}"


TAESD: dict[str, Callable[[Path, AutoencoderTiny], Path]] = {
    "diffusers' folder": taesd_folder,
    "decoder, encoder beside it": lambda at, taesd: taesd_pair(at, taesd, ".safetensors", "decoder"),
    "encoder, decoder beside it": lambda at, taesd: taesd_pair(at, taesd, ".pth", "encoder"),
    "diffusers' keys in a file": lambda at, taesd: write(at / "taesd.safetensors", dict(taesd.state_dict())),
    "both in one file": lambda at, taesd: write(
        at / "taesd.pth", original(taesd, "encoder", "encoder.") | original(taesd, "decoder", "decoder.")
    ),
    "both in one file, prefixed": lambda at, taesd: write(
        at / "taesd.safetensors",
        original(taesd, "encoder", "taesd_encoder.") | original(taesd, "decoder", "taesd_decoder."),
    ),
}


@pytest.mark.parametrize("kind", TAESD)
def test_taesd_of_every_layout_against_diffusers(folder, tmp_path, taesd, kind):
    (tmp_path / "vae").mkdir()
    loaded = load(folder, vae=TAESD[kind](tmp_path / "vae", taesd), dtype=torch.float64)
    assert isinstance(loaded.autoencoder, TinyAutoencoder) and loaded.config.autoencoder.scaling_factor == 1
    exact = AutoencoderTiny().double().eval()
    exact.load_state_dict({key: value.double() for key, value in taesd.state_dict().items()})
    latents, images = 2 * noise(2, 4, 5, 7), noise(2, 3, 24, 40)
    with torch.no_grad():
        assert difference(loaded.autoencoder.decode(latents), exact.decode(latents).sample) < 1e-12
        assert difference(loaded.autoencoder.encode(images).mean, exact.encode(images).latents) < 1e-12


def test_taesd_draws_as_in_diffusers(folder, tmp_path, taesd):
    taesd.save_pretrained(tmp_path / "taesd")
    ours = StableDiffusion.from_pretrained(folder, vae=tmp_path / "taesd", device="cpu")
    theirs = StableDiffusionPipeline.from_pretrained(folder, vae=taesd, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    latents = noise(1, 4, 8, 8, dtype=torch.float32)
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0}
    expected = theirs("a fox", latents=latents, output_type="np", **settings).images[0]
    *_, step = ours.denoise("a fox", latents=latents, sampler="ddim", spacing="leading", **settings)
    picture = ours.decode(step.latents)[0]
    assert picture.size == (64, 64)
    assert np.abs(np.asarray(picture) - 255 * expected).max() <= 1
    redrawn = ours.image_to_image("a fox", picture, 0.5, seed=1, num_inference_steps=2)
    assert redrawn.size == picture.size
    ours.save_pretrained(tmp_path / "saved")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert isinstance(again.vae, AutoencoderTiny)
    assert all(torch.equal(again.vae.state_dict()[key], value) for key, value in taesd.state_dict().items())
    assert isinstance(load(tmp_path / "saved").autoencoder, TinyAutoencoder)


def test_taesd_of_which_a_part_is_missing(folder, tmp_path, taesd):
    decoder = write(tmp_path / "taesd_decoder.safetensors", original(taesd, "decoder"))
    sd = StableDiffusion.from_pretrained(folder, vae=decoder, device="cpu")
    assert sd("a fox", seed=1, num_inference_steps=1).size == (64, 64)
    with pytest.raises(ValueError, match="only a decoder; put taesd_encoder beside it"):
        sd.image_to_image("a fox", Image.new("RGB", (64, 64)), seed=1)
    with pytest.raises(ValueError, match="only a decoder, and a model needs both"):
        sd.save_pretrained(tmp_path / "saved")
    encoder = write(tmp_path / "elsewhere" / "taesd_encoder.safetensors", original(taesd, "encoder"))
    with pytest.raises(CheckpointError, match="put its decoder, taesd_decoder, into the same folder"):
        load(folder, vae=encoder)


def test_taesd_decodes_in_a_fraction_of_the_work(taesd):
    """Multiplications of decoding one 512×512 picture, counted by torch on diffusers' networks."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        networks = TinyAutoencoder(TinyAutoencoderConfig()), AutoencoderKL.from_config(AutoencoderKLConfig)
        latents = torch.empty(1, 4, 64, 64)
        counts = []
        for network in networks:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network.decode(latents)
            counts.append(counter.get_total_flops())
    assert 10 * counts[0] < counts[1]


AutoencoderKLConfig = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def test_autoencoders_that_do_not_fit(folder, tmp_path, state, parts):
    no_vae = write(tmp_path / "noVAE.safetensors", {k: v for k, v in state.items() if not k.startswith("first_stage")})
    with pytest.raises(CheckpointError, match=r"has no autoencoder .* pass one with vae= \(--vae\)"):
        load(no_vae, config=SMALL)
    shutil.rmtree(folder / "vae")
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text('{"block_out_channels": [16, 32, 32, 48], "norm_num_groups": 8}')
    with pytest.raises(CheckpointError, match=r"pass an autoencoder with vae= \(--vae\)"):
        load(folder)
    with pytest.raises(CheckpointError, match="missing"):
        load(folder, vae=write(tmp_path / "lora.safetensors", {"lora_unet_conv_in.lora_up.weight": torch.zeros(1)}))
    with pytest.raises(FileNotFoundError, match="no autoencoder at"):
        load(folder, vae=tmp_path / "nothing")
    for name, content in (
        ("AutoencoderKL", {"latent_channels": 16, "block_out_channels": [32] * 4}),
        ("AutoencoderKLWan", {}),
        ("AutoencoderTiny", {"act_fn": "silu"}),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": name} | content))
        save_file({"x": torch.zeros(1)}, tmp_path / VAE)
        expected = {"AutoencoderKL": "has 16 latent channels", "AutoencoderKLWan": "is a AutoencoderKLWan"}
        with pytest.raises(CheckpointError, match=expected.get(name, "unsupported act_fn")):
            load(folder, vae=tmp_path)


def test_what_is_downloaded_of_an_autoencoder():
    both = ["config.json", "diffusion_pytorch_model.bin", VAE, "README.md"]
    assert choose_files(both, vae=True) == ["config.json", VAE]
    taesd = ["config.json", VAE, "taesd_decoder.safetensors", "taesd_encoder.safetensors"]
    assert choose_files(taesd, vae=True) == ["config.json", VAE]
    model = ["model_index.json", "vae/config.json", f"vae/{VAE}", "vae/diffusion_pytorch_model.fp16.safetensors", VAE]
    assert choose_files(model, "fp16", vae=True) == [
        "model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors",
    ]  # fmt: skip
    assert choose_files(["config.json", "README.md"], vae=True) == []


# Prediction types

TRAINING = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n"
YAMLS = {
    'parameterization: "v"': TRAINING + '    parameterization: "v"\n    linear_start: 0.00085\n',
    "parameterization: v": TRAINING + "    timesteps: 1000\n    parameterization: v  # as in 768-v\n",
    "single quotes": TRAINING + "    parameterization: 'v'\n",
    "flow style": "model: {target: ldm.models.diffusion.ddpm.LatentDiffusion, params: {parameterization: v}}\n",
    "byte-order mark": "\ufeff" + TRAINING + "    parameterization: v\n",
    "eps": TRAINING + "    parameterization: eps\n",
    "nothing": TRAINING + "    linear_start: 0.00085\n",
    "commented out": TRAINING + '    # eps, parameterization: "v"\n    linear_start: 0.00085\n',
    "x0": TRAINING + '    parameterization: "x0"\n',
    "not a model": "a: 1\n",
}
NAMES = {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}


@pytest.mark.parametrize("name", YAMLS)
def test_the_yaml_beside_a_file(tmp_path, state, name):
    path = write(tmp_path / ("model.ckpt" if name == "eps" else "model.safetensors"), state)
    path.with_suffix(".yaml").write_text(YAMLS[name], encoding="utf-8")
    # PyYAML reads the file; CompVis' class predicts epsilon by default
    content = yaml.safe_load(YAMLS[name].removeprefix("\ufeff"))
    expected = NAMES[content.get("model", {}).get("params", {}).get("parameterization", "eps")]
    assert open_checkpoint(path, config=SMALL).config.schedule.prediction_type == expected
    explicit = open_checkpoint(path, config=SMALL, prediction_type="sample")
    assert explicit.config.schedule.prediction_type == "sample"


def test_a_yaml_with_another_prediction_type(tmp_path, state):
    path = write(tmp_path / "model.safetensors", state)
    path.with_suffix(".yaml").write_text(TRAINING + "    parameterization: u\n")
    with pytest.raises(CheckpointError, match=r"model.yaml states the prediction type 'u'; expected epsilon"):
        open_checkpoint(path, config=SMALL)


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of zeros, which takes no room on disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def meta_keys(config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a full-size checkpoint, by CompVis' keys, without the numbers."""
    shapes = {}
    for part, module in make_parts(config, meta=True).items():
        for name, value in module.state_dict().items():
            name = f"text_model.{name.removeprefix('text_model.')}" if part == "text_encoder" else name
            if not name.endswith("position_ids"):
                source = single_file_sources(part, name, config)[-1]
                three = source.qkv_index is not None
                shapes[source.key] = (3 * value.shape[0], *value.shape[1:]) if three else tuple(value.shape)
    return shapes


@pytest.mark.parametrize("parameterization, config", [("v", SD21), (None, SD21_BASE)])
def test_a_yaml_tells_the_kinds_of_stable_diffusion_2_apart(tmp_path, parameterization, config):
    path = write_sparse(tmp_path / "v2.safetensors", meta_keys(config))
    with pytest.raises(CheckpointError, match="neither in the file nor in a .yaml"):
        open_checkpoint(path)
    line = f"    parameterization: {parameterization}\n" if parameterization else ""
    path.with_suffix(".yaml").write_text(TRAINING + line)
    assert open_checkpoint(path).config == config


def test_keys_and_metadata_that_state_the_prediction(tmp_path, state):
    empty = torch.zeros(0)
    path = write(tmp_path / "marked.safetensors", state | {"v_pred": empty})
    assert open_checkpoint(path, config=SMALL).config.schedule.prediction_type == "v_prediction"
    assert open_checkpoint(path, config=SMALL, prediction_type="epsilon").config.schedule.prediction_type == "epsilon"
    write(tmp_path / "marked.ckpt", state | {"v_pred": empty})
    assert open_checkpoint(tmp_path / "marked.ckpt", config=SMALL).config.schedule.prediction_type == "v_prediction"
    for value, expected in (("v", "v_prediction"), ("epsilon", "epsilon")):
        save_file(state, tmp_path / "spec.safetensors", metadata={"modelspec.prediction_type": value})
        found = open_checkpoint(tmp_path / "spec.safetensors", config=SMALL).config.schedule.prediction_type
        assert found == expected
    path = write(tmp_path / "zero.safetensors", state | {"v_pred": empty, "ztsnr": empty})
    if hasattr(ScheduleConfig(), "rescale_betas_zero_snr"):
        schedule = open_checkpoint(path, config=SMALL).config.schedule
        assert schedule.rescale_betas_zero_snr and schedule.prediction_type == "v_prediction"
    else:
        with pytest.raises(CheckpointError, match="zero terminal SNR"):
            open_checkpoint(path, config=SMALL)


# Leftovers

HARMLESS = [
    "model_ema.diffusion_modelinput_blocks00weight",
    "bundle_emb.style.string_to_param.*",
    "bundle_emb.style.emb_params",
    "first_stage_model.loss.discriminator.main.0.weight",
    "first_stage_model.loss.logvar",
    "loss.logvar",
    "cond_stage_model.transformer.vision_model.embeddings.class_embedding",
    "cond_stage_model.model.visual.proj",
    "optimizer.state.0.exp_avg",
    "global_step",
    "denoiser.sigmas",
    "embedding_manager.initial_embeddings.*",
    "safety_checker.concept_embeds",
    "unet_ema.conv_in.weight",
]
ARCHITECTURES = [
    "model.diffusion_model.label_emb.0.0.weight",
    "model.diffusion_model.position_net.null_feature",
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.fuser.alpha_attn",
    "model.diffusion_model.input_blocks.1.2.motion_modules.0.pe",
    "cond_stage_model.transformer.text_model.encoder.layers.12.mlp.fc1.weight",
    "first_stage_model.decoder.up.4.block.0.conv1.weight",
    "control_model.input_blocks.0.0.weight",
    "depth_model.model.scratch.weight",
    "noise_augmentor.data_mean",
    "edm_vpred.sigma_max",
]


def test_leftovers_are_named_in_one_line(tmp_path, parts, state, recwarn):
    extra = {key: torch.zeros(2) for key in HARMLESS}
    path = write(tmp_path / "model.safetensors", state | extra)
    loaded = load(path, config=SMALL)
    assert torch.equal(loaded.unet.conv_in.weight, parts.unet.conv_in.weight)
    (warning,) = [str(each.message) for each in recwarn if "belong to no part" in str(each.message)]
    assert f"{len(HARMLESS)} keys" in warning and "\n" not in warning
    for key in HARMLESS:
        assert is_leftover(key)


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_keys_of_another_architecture_stop(tmp_path, state, key):
    path = write(tmp_path / "model.safetensors", state | {key: torch.zeros(2)})
    with pytest.raises(CheckpointError, match="1 unexpected: ") as caught:
        load(path, config=SMALL)
    assert key in str(caught.value)


def test_leftovers_in_folders(folder, parts):
    for part, stem, key in (
        ("text_encoder", "model", "vision_model.embeddings.class_embedding"),
        ("text_encoder", "model", "visual_projection.weight"),
        ("vae", "diffusion_pytorch_model", "loss.logvar"),
        ("unet", "diffusion_pytorch_model", "global_step"),
        ("unet", "diffusion_pytorch_model", "model_ema.decay"),
    ):
        path = folder / part / f"{stem}.safetensors"
        kept = load_file(path)
        save_file(kept | {key: torch.zeros(2)}, path, metadata={"format": "pt"})
        with pytest.warns(UserWarning, match=f"{part}.{key}"):
            loaded = load(folder)
        assert torch.equal(loaded.unet.conv_in.weight, parts.unet.conv_in.weight)
        save_file(kept, path, metadata={"format": "pt"})


# Wrong names


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "model.pt", "model.sft", "model.bin"])
@pytest.mark.parametrize("content", ["safetensors", "zip", "old pickle"])
def test_files_are_read_by_their_content(tmp_path, parts, state, name, content):
    path = tmp_path / name
    if content == "safetensors":
        save_file(state, path, metadata={"modelspec.prediction_type": "v"})
    else:
        torch.save(state, path, _use_new_zipfile_serialization=content == "zip")
    assert is_safetensors(path) == (content == "safetensors")
    loaded = load(path, config=SMALL)
    ours = loaded.unet.state_dict()
    for key, value in parts.unet.state_dict().items():
        assert torch.equal(ours[key], value)
    is_v = loaded.config.schedule.prediction_type == "v_prediction"
    assert is_v == (content == "safetensors")


def test_a_header_whose_length_looks_like_a_pickle(tmp_path):
    """Header lengths are padded to multiples of 8, so that 0x0180 and 0x0280 bytes occur."""
    lengths = set()
    for count in range(1, 200):
        save_file({"x": torch.zeros(1)}, tmp_path / "x.ckpt", metadata={"a": "b" * 4 * count})
        lengths.add((tmp_path / "x.ckpt").read_bytes()[:2])
        assert is_safetensors(tmp_path / "x.ckpt")
    assert {b"\x80\x01", b"\x80\x02"} <= lengths


@pytest.mark.parametrize("name", ["style.pt", "style.safetensors"])
def test_adapters_are_read_by_their_content(tmp_path, name):
    from minisd.io.adapter_files import read_textual_inversion

    vectors = {"<word>": torch.randn(2, 32)}
    save_file(vectors, tmp_path / name) if name.endswith(".pt") else torch.save(vectors, tmp_path / name)
    word, found = read_textual_inversion(tmp_path / name)
    assert word == "<word>" and torch.equal(found, vectors["<word>"])
    assert read_header(tmp_path / name).keys() == vectors.keys()


# Words inside a pipeline folder


def add_words(folder: Path, words: list[str], layout: str, rows: int | None = None) -> Tensor:
    """What users do with transformers: add tokens, enlarge the text encoder, save both."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    count = len(tokenizer)
    tokenizer.add_tokens(words)
    if layout == "transformers 5":
        shutil.rmtree(folder / "tokenizer")
        tokenizer.save_pretrained(folder / "tokenizer")
    elif layout == "added_tokens.json":
        ids = {word: count + i for i, word in enumerate(words)}
        (folder / "tokenizer/added_tokens.json").write_text(json.dumps(ids))
    elif layout == "tokenizer_config.json":
        path = folder / "tokenizer/tokenizer_config.json"
        decoder = {str(count + i): {"content": word, "special": False} for i, word in enumerate(words)}
        special = {"49406": {"content": "<|startoftext|>"}, "49407": {"content": "<|endoftext|>"}}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": special | decoder}))
    path, rows = folder / "text_encoder/model.safetensors", len(words) if rows is None else rows
    weights = load_file(path)
    (key,) = [key for key in weights if key.endswith("token_embedding.weight")]
    weights[key] = torch.cat([weights[key], torch.randn(rows, 32, generator=torch.Generator().manual_seed(9))])
    save_file(weights, path, metadata={"format": "pt"})
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": count + rows}))
    return weights[key]


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("added_tokens.json", ["<word>"]),
        ("added_tokens.json", ["Sks", "two words"]),
        ("tokenizer_config.json", ["<word>", "<word>_1"]),
        ("transformers 5", ["<word>"]),
        ("transformers 5", ["<word>", "<word>_1", "<word>_2"]),
    ],
)
def test_words_inside_a_folder(folder, tmp_path, layout, words):
    add_words(folder, words, layout)
    sd = StableDiffusion.from_pretrained(folder, device="cpu")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    if layout == "tokenizer_config.json":  # transformers 5 reads tokenizer.json only; 4.x reads this file
        pipe.tokenizer.add_tokens(words)
    for prompt in (f"a {words[0]} in the snow", f"{words[-1].upper()}fox", "a fox"):
        expected = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
        assert (sd.encode_text(prompt) - expected).abs().max() <= 1e-5, prompt
    assert (sd.encode_text("a <other> in the snow") - sd.encode_text(f"a {words[0]} in the snow")).abs().max() > 0.1
    sd.save_pretrained(tmp_path / "saved")
    again = StableDiffusion.from_pretrained(tmp_path / "saved", device="cpu")
    assert torch.equal(again.encode_text(words[0]), sd.encode_text(words[0]))
    assert CLIPTokenizer.from_pretrained(tmp_path / "saved/tokenizer")(words[0]).input_ids[1] == 49408


def test_rows_without_a_word(folder, parts):
    add_words(folder, [], "added_tokens.json", rows=64)
    with pytest.warns(UserWarning, match="49408 tokens, so the last 64 embeddings are ignored"):
        sd = StableDiffusion.from_pretrained(folder, device="cpu")
    assert len(sd.text_encoder.token_embedding.weight) == 49408
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    expected = pipe.encode_prompt("a fox", "cpu", 1, False)[0]
    assert (sd.encode_text("a fox") - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("words", [{"<word>": 49409}, {"<word>": "49408"}, {"": 49408}, {"<a>": 49408, "<b>": 49408}])
def test_words_whose_ids_do_not_follow(folder, words):
    add_words(folder, ["<word>"], "added_tokens.json")
    (folder / "tokenizer/added_tokens.json").write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match="tokenizer"):
        open_checkpoint(folder)


def test_more_words_than_rows(folder):
    add_words(folder, ["<a>", "<b>"], "added_tokens.json", rows=1)
    with pytest.raises(CheckpointError, match="has 49410 tokens, but the text encoder has 49409 embeddings"):
        open_checkpoint(folder)


def test_a_word_that_was_loaded_is_saved(folder, tmp_path):
    save_file({"<new>": torch.randn(2, 32)}, tmp_path / "new.safetensors")
    sd = StableDiffusion.from_pretrained(folder, device="cpu")
    sd.load_textual_inversion(tmp_path / "new.safetensors")
    expected = sd.encode_text("a <new> fox")
    sd.save_pretrained(tmp_path / "saved")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    ids = pipe.tokenizer(pipe.maybe_convert_prompt("a <new> fox", pipe.tokenizer)).input_ids
    assert ids[2:4] == [49408, 49409]
    assert (pipe.encode_prompt("a <new> fox", "cpu", 1, False)[0] - expected).abs().max() <= 1e-5


# The command


def test_the_option_vae(run, small_model, tmp_path):
    small_model_vae = StableDiffusion.from_pretrained(small_model, device="cpu")
    other = {k: v + 0.01 * torch.randn(v.shape) for k, v in small_model_vae.autoencoder.state_dict().items()}
    save_file(other, "vae-ft.safetensors")
    code, files, err = run("generate", "red fox", "--seed", "7", "--steps", "2", "--vae", "vae-ft.safetensors")
    assert code == 0, err
    expected = StableDiffusion.from_pretrained(small_model, vae="vae-ft.safetensors", device="cpu")
    drawn = expected("red fox", seed=7, num_inference_steps=2)
    assert np.array_equal(np.asarray(Image.open(files[0])), np.asarray(drawn))
    assert "VAE: vae-ft" in Image.open(files[0]).info["parameters"]
    code, _, err = run("generate", "--like", files[0])
    assert code == 2 and "drawn with the autoencoder vae-ft; pass it with --vae" in err
    code, again, err = run("generate", "--like", files[0], "--vae", "vae-ft.safetensors", "-o", "again.png")
    assert code == 0 and Image.open("again.png").tobytes() == Image.open(files[0]).tobytes(), err
    code, lines, _ = run("info", str(small_model), "--vae", "vae-ft.safetensors")
    assert code == 0 and any("vae-ft.safetensors" in line for line in lines)


CAPTIONS = ["a fox", "Füchsin\u2028im Schnee", "狐狸"]
EDITORS = {
    "plain": ("utf-8", "\n", "\n"), "byte-order mark": ("utf-8-sig", "\n", ""), "old Mac": ("utf-8", "\r", ""),
    "Windows": ("utf-8-sig", "\r\n", "\r\n"), "blank lines": ("utf-8", "\n \n\n", "\n\n"),
    "UTF-16": ("utf-16", "\r\n", ""), "UTF-16 without a mark": ("utf-16-le", "\n", ""), "Latin-1": ("cp1252", "\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("editor", EDITORS)
def test_text_files_of_editors(tmp_path, editor):
    """Lists of pictures and prompts, and configurations, as editors of several systems save them."""
    coding, end, last = EDITORS[editor]
    captions = CAPTIONS[:1] + ["Füchsin"] if coding == "cp1252" else CAPTIONS
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    texts = [json.dumps({"file_name": "0.png", "text": text}, ensure_ascii=False) for text in captions]
    (tmp_path / "metadata.jsonl").write_bytes((end.join(texts) + last).encode(coding))
    (tmp_path / "prompts.txt").write_bytes((end.join(captions) + last).encode(coding))
    (tmp_path / "config.json").write_bytes(json.dumps({"a": captions}, ensure_ascii=False).encode(coding))
    if coding.startswith("utf-8"):
        assert read_examples(tmp_path, 8)[1] == captions
        assert [prompt.values["prompt"] for prompt in read_prompts(tmp_path / "prompts.txt")] == captions
        assert read_json(tmp_path / "config.json") == {"a": captions}
        return
    for read in (partial(read_examples, tmp_path, 8), partial(read_prompts, tmp_path / "prompts.txt")):
        with pytest.raises(ValueError, match="UTF-8|null"):
            read()
    with pytest.raises(CheckpointError, match="config.json is not JSON in UTF-8"):
        read_json(tmp_path / "config.json")
