"""Checkpoints against diffusers and transformers: the same files, the same tensors; and what must be refused."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import (
    SMALL,
    SMALL_2,
    Parts,
    age_autoencoder,
    compvis_state,
    make_parts,
    pickle_folder,
    prefix_text_encoder,
    write_folder,
)
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minisd.config import SD15, SD15_INPAINT, SD21, SD21_BASE, ModelConfig
from minisd.io.checkpoint import CheckpointError, Defaults, Loaded, describe, load, open_checkpoint, save
from minisd.io.diffusers_folder import read_index
from minisd.io.key_names import single_file_sources
from minisd.io.tensors import read_header


def assert_same_weights(loaded: Loaded, parts: Parts, dtype: torch.dtype = torch.float32) -> None:
    """Every tensor of diffusers' modules is in ours, bit for bit, and there is no other."""
    for ours, theirs in (
        (loaded.text_encoder, parts.text_encoder),
        (loaded.autoencoder, parts.vae),
        (loaded.unet, parts.unet),
    ):
        ours_state = {key.removeprefix("text_model."): value for key, value in ours.state_dict().items()}
        theirs_state = {key.removeprefix("text_model."): value for key, value in theirs.state_dict().items()}
        theirs_state.pop("embeddings.position_ids", None)
        assert ours_state.keys() == theirs_state.keys()
        for key, value in theirs_state.items():
            assert ours_state[key].dtype == dtype
            assert torch.equal(ours_state[key], value.to(dtype)), key
        assert not ours.training
        assert not any(parameter.requires_grad for parameter in ours.parameters())


def as_saved(config: ModelConfig) -> ModelConfig:
    """diffusers saves the default spacing of the class, DDIM, with the rest."""
    return replace(config, schedule=replace(config.schedule, timestep_spacing="leading"))


def same_shape(path: Path) -> Path:
    return path


def with_prefix(path: Path) -> Path:
    prefix_text_encoder(path)
    return path


def with_position_ids(path: Path) -> Path:
    prefix_text_encoder(path, position_ids=True)
    return path


def with_pickles(path: Path) -> Path:
    pickle_folder(path)
    return path


def with_old_names(path: Path) -> Path:
    age_autoencoder(path)
    return path


@pytest.mark.parametrize("change", [same_shape, with_prefix, with_position_ids, with_pickles, with_old_names])
def test_folder_layouts(folder, parts, change):
    loaded = load(change(folder))
    assert loaded.config == as_saved(SMALL)
    assert_same_weights(loaded, parts)


def test_output_of_diffusers(folder, parts):
    loaded = load(folder)
    generator = torch.Generator().manual_seed(1)
    latents, context = (torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator))
    time = torch.tensor([900, 3])
    with torch.no_grad():
        expected = parts.unet(latents, time, context).sample
        assert (loaded.unet(latents, time, context) - expected).abs().max() <= 1e-5 * expected.abs().max()
        expected = parts.vae.decode(latents).sample
        assert (loaded.autoencoder.decode(latents) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_4d_and_2d_projections(folder, tmp_path):
    linear = parts_of(SMALL_2)
    as_convolutions = write_folder(tmp_path / "linear", linear)
    path = as_convolutions / "unet/diffusion_pytorch_model.safetensors"
    unet = load_file(path)
    changed = {k: v[:, :, None, None] if "proj_in.w" in k or "proj_out.w" in k else v for k, v in unet.items()}
    assert sum(value.ndim == 4 for value in changed.values()) > sum(value.ndim == 4 for value in unet.values())
    save_file({key: value.contiguous() for key, value in changed.items()}, path)
    assert_same_weights(load(as_convolutions), linear)


def test_variants(tmp_path, parts):
    folder = write_folder(tmp_path / "model", make_parts(SMALL, seed=5), torch.float16, variant="fp16")
    half = make_parts(SMALL, seed=5)
    for _, module in half.items():
        module.half()
    assert_same_weights(load(folder, dtype=torch.float16), half, torch.float16)  # alone, so it is used
    write_folder(folder, parts)
    assert_same_weights(load(folder), parts)  # beside a plain file only when asked for
    assert_same_weights(load(folder, variant="fp16"), half.__class__(*(m.float() for _, m in half.items())))
    assert "float16" in describe(folder, variant="fp16")
    assert "float16" not in describe(folder)


def test_sharded_folder(tmp_path, parts):
    folder = write_folder(tmp_path / "model", parts, max_shard_size="3MB")
    assert len(list(folder.glob("unet/*-of-*.safetensors"))) > 2
    assert_same_weights(load(folder), parts)


@cache
def parts_of(config: ModelConfig) -> Parts:
    """For tests that change none of it."""
    return make_parts(config)


@pytest.mark.parametrize("config, openclip", [(SMALL, False), (SMALL_2, True)], ids=["sd1", "sd2"])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_single_file(tmp_path, config, openclip, suffix):
    """diffusers reads the same file, through its own rules, to the same tensors."""
    parts = parts_of(config)
    folder, path = write_folder(tmp_path / "model", parts), tmp_path / f"model{suffix}"
    state = compvis_state(parts, openclip)
    if suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 1}, path)
    else:
        save_file(state, path)
    loaded = load(path, config=config)
    assert_same_weights(loaded, parts)
    theirs = StableDiffusionPipeline.from_single_file(
        str(path), config=str(folder), local_files_only=True, safety_checker=None
    )
    assert_same_weights(loaded, Parts(theirs.text_encoder, theirs.vae, theirs.unet))
    assert loaded.tokenizer.pad_token_id == (0 if openclip else 49407)


def test_old_pickle(tmp_path, parts, state):
    path = tmp_path / "model.ckpt"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert_same_weights(load(path, config=SMALL), parts)


def test_ignored_keys_of_published_single_files(tmp_path, parts, state):
    one = torch.zeros(1)
    names = [
        "model_ema.decay",
        "model_ema.num_updates",
        "model_ema.diffusion_modelinput_blocks00weight",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "cond_stage_model.logit_scale",
        "cond_stage_model.text_projection",
    ]
    path = tmp_path / "model.safetensors"
    save_file(state | {name: one.clone() for name in names}, path)
    assert_same_weights(load(path, config=SMALL), parts)


@pytest.mark.parametrize(
    "config, prediction_type",
    [(SD15, None), (SD15_INPAINT, None), (SD21, "v_prediction"), (SD21_BASE, "epsilon")],
    ids=["SD15", "SD15_INPAINT", "SD21", "SD21_BASE"],
)
def test_full_size_single_file(tmp_path, config, prediction_type, monkeypatch):
    """A sparse file with the keys and shapes that diffusers' own modules give, under the reference's names."""
    openclip = config.text_encoder.hidden_size == 1024
    state = compvis_state(make_parts(config, meta=True), openclip)
    path = write_sparse(tmp_path / "model.safetensors", {key: tuple(value.shape) for key, value in state.items()})
    checkpoint = open_checkpoint(path, prediction_type=prediction_type)
    assert checkpoint.config == config
    if openclip:
        with pytest.raises(CheckpointError, match="prediction_type='v_prediction'"):
            open_checkpoint(path)


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of zeros that takes no room on disk."""
    header, offset = {}, 0
    for key, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return path


@pytest.mark.parametrize("config", [SD15, SD21, SMALL], ids=["SD15", "SD21", "small"])
def test_single_file_keys(config):
    parts = make_parts(config, meta=True)
    openclip = config.text_encoder.hidden_size == 1024
    theirs = {key for key in compvis_state(parts, openclip) if key.startswith(("model.", "first", "cond"))}
    ours = set()
    for part, module in parts.items():
        for name in module.state_dict():
            name = f"text_model.{name.removeprefix('text_model.')}" if part == "text_encoder" else name
            sources = single_file_sources(part, name, config)
            ours.add(sources[-1 if openclip or part != "text_encoder" else 0])
    assert len(ours) == sum(len(module.state_dict()) for _, module in parts.items())
    ignorable = {key for key in theirs if key.endswith(("position_ids", "logit_scale", "text_projection"))}
    assert {source.key for source in ours} == theirs - ignorable


def test_folder_keys_at_full_size():
    from minisd.autoencoder import Autoencoder
    from minisd.text_encoder import TextEncoder
    from minisd.unet import UNet

    parts = make_parts(SD15, meta=True)
    with torch.device("meta"):
        ours = {
            "text_encoder": TextEncoder(SD15.text_encoder),
            "vae": Autoencoder(SD15.autoencoder),
            "unet": UNet(SD15.unet),
        }
    for part, module in parts.items():
        shapes = {key.removeprefix("text_model."): value.shape for key, value in module.named_parameters()}
        assert shapes == {k.removeprefix("text_model."): v.shape for k, v in ours[part].state_dict().items()}
    assert [len(dict(module.named_parameters())) for _, module in parts.items()] == [196, 248, 686]


def test_prediction_type(folder):
    assert load(folder, prediction_type="v_prediction").config.schedule.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="prediction_type='noise'"):
        load(folder, prediction_type="noise")


@pytest.mark.parametrize(
    "name, options, sampler, steps",
    [
        ("PNDMScheduler", {}, "pndm", 50),
        ("DDIMScheduler", {}, "ddim", 50),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "euler", 50),
        ("EulerAncestralDiscreteScheduler", {}, "euler_a", 50),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, "dpmpp_2m", 25),
        ("LCMScheduler", {}, "lcm", 4),
        ("UniPCMultistepScheduler", {}, "unipc", 25),
    ],
)
def test_defaults_from_scheduler(folder, name, options, sampler, steps):
    path, index = folder / "scheduler/scheduler_config.json", folder / "model_index.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key != "timestep_spacing"}
    path.write_text(json.dumps(values | {"skip_prk_steps": True} | options))
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", name]}))
    defaults = open_checkpoint(folder).defaults
    assert (defaults.sampler.name, defaults.num_inference_steps, defaults.guidance_scale) == (
        sampler,
        steps,
        1.0 if sampler == "lcm" else 7.5,
    )
    assert defaults.sampler.karras == options.get("use_karras_sigmas", False)
    schedule = open_checkpoint(folder).config.schedule
    assert schedule.timestep_spacing == options.get("timestep_spacing")
    assert defaults.sampler.spacing is None  # so the schedule's own


def test_defaults_from_minisd_json(folder):
    sampler = {"name": "euler", "karras": True, "spacing": "trailing"}
    path = folder / "minisd.json"
    path.write_text(json.dumps({"sampler": sampler, "num_inference_steps": 7, "guidance_scale": 4.0}))
    defaults = open_checkpoint(folder).defaults
    assert (defaults.sampler.name, defaults.sampler.karras, defaults.sampler.spacing) == ("euler", True, "trailing")
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (7, 4.0)
    path.write_text(json.dumps({"sampler": sampler, "temperature": 1}))
    with pytest.raises(CheckpointError, match="minisd.json has no valid generation defaults"):
        open_checkpoint(folder)


@pytest.mark.parametrize("config", [SMALL, SMALL_2], ids=["sd1", "sd2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_folder_loads_in_diffusers(tmp_path, config, dtype):
    parts = parts_of(config)
    loaded = load(write_folder(tmp_path / "model", parts))
    defaults = Defaults(replace(loaded.defaults.sampler, name="dpmpp_2m", karras=True), 9, 3.0)
    save(replace(loaded, defaults=defaults), tmp_path / "saved", dtype)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    for (_, got), (_, given) in zip(
        Parts(theirs.text_encoder, theirs.vae, theirs.unet).items(), parts.items(), strict=True
    ):
        assert {value.dtype for value in got.parameters()} == {torch.float32}
        expected = {key: value.to(dtype).float() for key, value in given.named_parameters()}
        assert all(torch.equal(value, expected[key]) for key, value in got.named_parameters())
        assert len(expected) == len(dict(got.named_parameters()))
    assert type(theirs.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert theirs.scheduler.config.use_karras_sigmas
    assert theirs.tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    again = load(tmp_path / "saved")
    assert (again.config, again.defaults) == (as_saved(config), defaults)
    with safe_open(tmp_path / "saved/unet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_slice("conv_in.weight").get_dtype() == {torch.float32: "F32", torch.float16: "F16"}[dtype]


def test_saving_over_the_mapped_source(folder, parts):
    """The weights in use are maps of the files that are replaced; both must survive."""
    loaded = load(folder)
    save(loaded, folder)
    assert_same_weights(loaded, parts)
    assert_same_weights(load(folder), parts)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_weights_are_copies_on_write(folder, parts):
    load(folder).unet.conv_in.weight.data.zero_()
    assert_same_weights(load(folder), parts)


def test_saving_over_other_files(folder, tmp_path):
    loaded = load(folder)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "draft.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not a model"):
        save(loaded, other)
    with pytest.raises(FileExistsError, match="is not a model"):
        save(loaded, other / "draft.txt")
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"of another model")
    with pytest.raises(FileExistsError, match="fp16.safetensors"):
        save(loaded, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "thesis"]
    assert (other / "draft.txt").read_text() == "years of work"


UNET = "unet/diffusion_pytorch_model.safetensors"


def without(path: Path) -> None:
    path.unlink()


def misshaped(path: Path) -> None:
    state = load_file(path)
    save_file(state | {"conv_out.weight": torch.zeros(4, 16, 3, 3)}, path)


def unexpected(path: Path) -> None:
    save_file(load_file(path) | {"controlnet.weight": torch.zeros(3)}, path)


def lacking(path: Path) -> None:
    state = load_file(path)
    del state["mid_block.attentions.0.proj_in.bias"], state["conv_in.bias"]
    save_file(state, path)


def whole_numbers(path: Path) -> None:
    save_file(load_file(path) | {"conv_out.bias": torch.zeros(4, dtype=torch.int8)}, path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (without, "has no diffusion_pytorch_model.safetensors"),
        (misshaped, r"1 misshaped: unet.conv_out.weight \[4, 16, 3, 3\], expected \[4, 32, 3, 3\]"),
        (unexpected, "1 unexpected: unet.controlnet.weight"),
        (lacking, "2 missing: unet.conv_in.bias, unet.mid_block.attentions.0.proj_in.bias"),
        (whole_numbers, "unet.conv_out.bias of dtype I8"),
    ],
)
def test_damaged_folder(folder, damage, message):
    damage(folder / UNET)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"a": ' * 100_000])
def test_damaged_json(folder, name, content):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=Path(name).name):
        load(folder)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "is a StableDiffusionXLPipeline"),
        ("model_index.json", {"unet": [None, None]}, "expected a UNet2DConditionModel"),
        ("model_index.json", {"unet": []}, "expected a UNet2DConditionModel"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        (
            "unet/config.json",
            {"block_out_channels": [320, 640, 1280]},
            "unet/config.json describes an unsupported model",
        ),
        ("unet/config.json", {"cross_attention_dim": 64}, "misshaped: unet.down_blocks.0.attentions.0"),
    ],
)
def test_other_models(folder, name, change, message):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_missing_shard(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match="refers to model-00001-of-00002.safetensors, which is missing"):
        read_index(index)


def test_unknown_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="hub id 'owner/name'"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="expected a diffusers folder"):
        load("models/sd15.safetensors")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load(tmp_path / "picture.png")
    save_file({"lora_unet_down.alpha": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="found lora_unet_down.alpha"):
        load(tmp_path / "lora.safetensors")


def lightning_checkpoint(state: dict[str, torch.Tensor], module: str, name: str) -> bytes:
    """torch.save's archive with a class as key beside the weights, as in the original sd-v1-4.ckpt."""
    stand_in = type(name, (), {"__module__": module})
    fake = type(sys)(module)
    setattr(fake, name, stand_in)
    names = [module.rsplit(".", i)[0] for i in range(module.count(".") + 1)]
    added = {each: fake if each == module else type(sys)(each) for each in names}
    sys.modules.update(added)
    try:
        buffer = io.BytesIO()
        torch.save({"state_dict": state, "callbacks": {stand_in: {"best": stand_in()}}}, buffer)
        return buffer.getvalue()
    finally:
        for each in added:
            del sys.modules[each]


def test_lightning_callback(tmp_path, parts, state):
    path = tmp_path / "sd-v1-4.ckpt"
    module = "pytorch_lightning.callbacks.model_checkpoint"
    path.write_bytes(lightning_checkpoint(state, module, "ModelCheckpoint"))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert_same_weights(load(path, config=SMALL), parts)
    for other, name in ((module, "Other"), ("pytorch_lightning.callbacks.other", "ModelCheckpoint")):
        path.write_bytes(lightning_checkpoint(state, other, name))
        with pytest.raises(CheckpointError, match=f"could run code.*{name}"):
            load(path, config=SMALL)


def test_pickles_of_other_things(tmp_path):
    path = tmp_path / "model.ckpt"
    for value in ([1, 2], torch.zeros(3), {"state_dict": [1]}):
        torch.save(value, path)
        with pytest.raises(CheckpointError, match="expected a dictionary of tensors"):
            load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.txt", "no model")
    with pytest.raises(CheckpointError, match="corrupted or incomplete"):
        load(path)


def test_describe(folder, monkeypatch):
    def refuse(*args: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("minisd.io.checkpoint.read_tensors", refuse)
    text = describe(folder)
    for expected in ("diffusers folder", "epsilon", "1,600,672", "670,663", "2,783,076", "5,054,411", "float32"):
        assert expected in text


def test_header_of_a_pickle(tmp_path):
    torch.save({"a": torch.zeros(2, 3, dtype=torch.float16), "step": 3}, tmp_path / "x.bin")
    assert read_header(tmp_path / "x.bin") == {"a": ((2, 3), "float16")}


MEASURE = """
import os, sys, time
from pathlib import Path
import torch
from minisd.io.checkpoint import load
status = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
for path, dtype in zip(sys.argv[1::2], sys.argv[2::2]):
    if child := os.fork():  # a process of its own, that need not import torch again
        assert os.waitpid(child, 0)[1] == 0
        continue
    start = time.perf_counter()
    loaded = load(Path(path), dtype=getattr(torch, dtype))
    seconds = time.perf_counter() - start
    modules = (loaded.text_encoder, loaded.autoencoder, loaded.unet)
    touched = sum(float(p.sum()) for module in modules for p in module.parameters())
    assert touched == touched
    print(status(), seconds, flush=True)
    break
"""


@pytest.mark.full
def test_peak_memory_of_a_full_size_checkpoint(full_checkpoints):
    """VmHWM of a fresh process, mapped pages and libraries included, after reading every weight."""
    folder, file = full_checkpoints
    cases = [(folder, "float32"), (file, "float32"), (folder, "float16")]
    arguments = [str(word) for case in cases for word in case]
    result = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    for (path, dtype), line in zip(cases, result.stdout.splitlines(), strict=True):
        files = path.rglob("*.safetensors") if path.is_dir() else [path]
        size = sum(each.stat().st_size for each in files)
        assert size > 4.2e9
        whole, seconds = (float(word) for word in line.split())
        print(f"{path.name} {dtype}: {seconds:.1f} s, peak {whole / size:.3f} of {size / 1e9:.2f} GB", end="; ")
        assert whole <= 1.1 * size
