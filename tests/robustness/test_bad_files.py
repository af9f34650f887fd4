"""Bad files: what is damaged, absurd or of another model is refused, by name, before it costs anything."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SMALL, make_parts
from hunt_files import NO_WEIGHTS, hunt
from safetensors.torch import load_file, save_file

from minisd import StableDiffusion, TextEncoder, UNet
from minisd.features.adapters import layers_of
from minisd.io.adapter_files import read_lora, read_textual_inversion
from minisd.io.checkpoint import CheckpointError, load, open_checkpoint
from minisd.io.configs import read_json
from minisd.io.tensors import read_header, read_tensors


@pytest.fixture
def folder(small_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_model, tmp_path / "model"))


# safetensors


def safetensors(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(shape: Any = (2,), offsets: tuple[int, int] = (0, 8), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN: dict[str, bytes] = {
    "overlapping": safetensors({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "the same bytes twice": safetensors({"a": entry(), "b": entry()}),
    "a hole": safetensors({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "bytes left over": safetensors({"a": entry()}, bytes(12)),
    "backwards": safetensors({"a": entry(offsets=(8, 0))}),
    "beyond the end": safetensors({"a": entry(offsets=(0, 2**40))}),
    "negative offset": safetensors({"a": entry(offsets=(-8, 0))}),
    "more numbers than bytes": safetensors({"a": entry((3,))}),
    "shape that overflows": safetensors({"a": entry((2**40, 2**40))}),
    "negative shape": safetensors({"a": entry((-2,))}),
    "fractional shape": safetensors({"a": entry((2.0,))}),
    "unknown dtype": safetensors({"a": entry(dtype="X9")}),
    "header longer than the file": safetensors({}, length=99_000_000),
    "header of 4 EB": safetensors({}, length=2**62),
    "negative length": safetensors({}, length=2**64 - 5),
    "no header": safetensors(b""),
    "no object": safetensors(b"[]"),
    "deep": safetensors(b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep, unfinished": safetensors(b'{"a":' * 100_000),
    "metadata that are no texts": safetensors({"__metadata__": {"a": 1}, "a": entry()}),
    "one name for two places": safetensors(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        bytes(16),
    ),
    "cut in the length": b"\x08\0\0",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_safetensors(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(BROKEN[name])
    for read in (read_header, load, read_textual_inversion, lambda path: read_lora(path, {})):
        with pytest.raises(CheckpointError, match="x.safetensors is corrupted or incomplete"):
            read(path)


@pytest.mark.parametrize("dtype", ["I64", "I8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "C64", "U16"])
def test_dtypes_that_are_no_weights(tmp_path, dtype):
    bits = {"I64": 64, "C64": 64, "U16": 16, "F4": 4, "F6_E2M3": 6}.get(dtype, 8)
    count = 8
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"<word>": entry((count,), (0, count * bits // 8), dtype)}, bytes(count * bits // 8)))
    assert list(read_header(path)) == ["<word>"]
    with pytest.raises(CheckpointError, match="of dtype .*; expected float16"):
        read_textual_inversion(path)
    for destination in (torch.float32, torch.float16):
        with contextlib.suppress(CheckpointError, NotImplementedError):  # who asks for them gets what torch can do
            list(read_tensors(path, read_header(path), "cpu", destination))


def test_a_shape_of_nothing_that_overflows(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"<word>": entry((0, 2**63 - 1, 2**62), (0, 0))}, b""))
    with pytest.raises(CheckpointError, match="which torch cannot read"):
        read_textual_inversion(path)


def test_a_file_cut_anywhere(tmp_path):
    """Every length of a small file, and flipped bits of its header: an error, or the same names and shapes."""
    save_file({"<word>": torch.randn(3, 4)}, tmp_path / "good.safetensors")
    torch.save({"<word>": torch.randn(3, 4)}, tmp_path / "good.bin")
    for good in (tmp_path / "good.safetensors", tmp_path / "good.bin"):
        data, path = good.read_bytes(), tmp_path / f"cut{good.suffix}"
        for length in range(0, len(data), 1 if good.suffix == ".safetensors" else 7):
            path.write_bytes(data[:length])
            with pytest.raises(CheckpointError, match="is empty|corrupted or incomplete"):
                read_textual_inversion(path)
    data = (tmp_path / "good.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    outcomes = {"refused": 0, "renamed": 0}
    for at in range(header):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            (tmp_path / "flipped.safetensors").write_bytes(changed)
            try:
                _, vectors = read_textual_inversion(tmp_path / "flipped.safetensors")
            except CheckpointError:
                outcomes["refused"] += 1
            else:
                assert vectors.shape == (3, 4)
                outcomes["renamed"] += 1
    assert outcomes["refused"] > 8 * outcomes["renamed"] > 0  # in the word, or the blanks after the header


# Other files under the name of weights, other models


@pytest.mark.parametrize(
    ("kind", "message"),
    [("empty", "is empty"), ("web page", "is a web page"), ("git-lfs", "git lfs pull"), ("git-annex", "git annex get")],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_what_is_no_weights_at_all(tmp_path, kind, message, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(NO_WEIGHTS[kind])
    for read in (load, read_textual_inversion, lambda path: read_lora(path, {})):
        with pytest.raises(CheckpointError, match=message):
            read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes named pipes")
def test_what_is_no_file_on_a_disk(folder, tmp_path):
    """Pipes, devices, folders, and links to them, to themselves or to nothing: refused, and neither waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    targets = [tmp_path / "pipe", tmp_path / "folder", tmp_path / "none", Path("/dev/zero"), Path("/dev/null")]
    for suffix in (".safetensors", ".ckpt", ".bin"):
        link = tmp_path / f"x{suffix}"
        for target in (*targets, link):
            link.symlink_to(target)
            for read in (load, read_textual_inversion, lambda path: read_lora(path, {})):
                with pytest.raises((CheckpointError, OSError), match="x|folder"):
                    read(link)
            link.unlink()
    for name in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "model_index.json"):
        good = (folder / name).rename(tmp_path / "good")
        for target in (*targets, folder / name):
            (folder / name).symlink_to(target)
            with pytest.raises((CheckpointError, OSError)):
                load(folder)
            (folder / name).unlink()
        good.rename(folder / name)
    (tmp_path / "link").symlink_to(folder)
    assert load(tmp_path / "link")  # a link to what is good is as good


# Keys as they are published.
OTHERS = {
    "Stable Diffusion XL": ["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"]
    + ["model.diffusion_model.label_emb.0.0.weight", "model.diffusion_model.input_blocks.0.0.weight"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"],
    "Flux": ["double_blocks.0.img_attn.norm.key_norm.scale"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight"],
    "a textual inversion": ["emb_params"],
}


def test_another_model_is_called_by_its_name(tmp_path):
    path = tmp_path / "x.safetensors"
    for part, module in make_parts(SMALL, meta=True).items():
        kind = {"unet": "a UNet only", "vae": "an autoencoder only", "text_encoder": "a text encoder only"}[part]
        for prefix in ("",) if part != "text_encoder" else ("", "text_model."):
            save_file({prefix + key: torch.zeros(1) for key in module.state_dict()}, path)
            with pytest.raises(CheckpointError, match=f"It looks like {kind}, which cannot be loaded as a model"):
                load(path)
    for kind, keys in OTHERS.items():
        save_file({key: torch.zeros(1) for key in keys}, path)
        with pytest.raises(CheckpointError, match=f"It looks like {kind}, which cannot be loaded as a model"):
            load(path)
        if kind != "a textual inversion":
            with pytest.raises(CheckpointError, match=f"It looks like {kind}. Use a LoRA"):
                read_lora(path, {})
    for name in ("lora_unet_conv_in.lora_down.weight", "unet.conv_in.lora_A.weight"):
        save_file({name: torch.zeros(1)}, path)
        with pytest.raises(CheckpointError, match="It looks like a LoRA, which cannot be loaded as a model"):
            load(path)


def test_a_part_of_a_folder_is_called_by_its_name(folder):
    with pytest.raises(CheckpointError, match="only one module, UNet2DConditionModel; pass the parent folder"):
        load(folder / "unet")
    with pytest.raises(CheckpointError, match=r"only one module, \['CLIPTextModel'\]"):
        load(folder / "text_encoder")
    (folder / "unet/config.json").unlink()
    with pytest.raises(CheckpointError, match="single file diffusion_pytorch_model.safetensors"):
        load(folder / "unet")
    with pytest.raises(CheckpointError, match="download the entire folder"):
        load(folder / "tokenizer")


def test_names_from_files_do_not_steer_the_terminal(tmp_path):
    save_file({"\x1b[2J" + "x" * 10_000: torch.zeros(1)}, tmp_path / "x.safetensors")
    for read in (load, lambda path: read_lora(path, {})):
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path / "x.safetensors")
        assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000


# Configurations: limits before memory is asked for


CONFIGS: list[tuple[str, str, Any]] = [
    ("text_encoder/config.json", "hidden_size", 10**9),
    ("text_encoder/config.json", "hidden_size", -16),
    ("text_encoder/config.json", "hidden_size", "16"),
    ("text_encoder/config.json", "hidden_size", 16.0),
    ("text_encoder/config.json", "hidden_size", True),
    ("text_encoder/config.json", "num_hidden_layers", 10**9),
    ("text_encoder/config.json", "num_attention_heads", 0),
    ("text_encoder/config.json", "vocab_size", 10**9),
    ("text_encoder/config.json", "layer_norm_eps", float("nan")),
    ("text_encoder/config.json", "layer_norm_eps", "small"),
    ("text_encoder/config.json", "hidden_act", ["gelu"]),
    ("text_encoder/config.json", "model_type", {"a": "b" * 10**6}),
    ("vae/config.json", "block_out_channels", []),
    ("vae/config.json", "block_out_channels", [8] * 1000),
    ("vae/config.json", "block_out_channels", [[8], [8], [8], [8]]),
    ("vae/config.json", "block_out_channels", 8),
    ("vae/config.json", "layers_per_block", 10**9),
    ("vae/config.json", "norm_num_groups", -4),
    ("vae/config.json", "scaling_factor", 0),
    ("vae/config.json", "scaling_factor", float("inf")),
    ("unet/config.json", "block_out_channels", [2**62, 8, 8]),
    ("unet/config.json", "layers_per_block", 10**9),
    ("unet/config.json", "sample_size", 10**9),
    ("unet/config.json", "attention_head_dim", {"a": 1}),
    ("unet/config.json", "attention_head_dim", []),
    ("unet/config.json", "down_block_types", [None, None, None]),
    ("unet/config.json", "upcast_attention", "yes"),
    ("unet/config.json", "norm_eps", -1),
    ("unet/config.json", "cross_attention_dim", 10**400),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 10**12),
    ("scheduler/scheduler_config.json", "beta_start", 2.0),
    ("scheduler/scheduler_config.json", "beta_end", float("nan")),
    ("scheduler/scheduler_config.json", "beta_schedule", {}),
    ("minisd.json", "num_inference_steps", 10**9),
    ("minisd.json", "num_inference_steps", "20"),
    ("minisd.json", "guidance_scale", float("nan")),
    ("minisd.json", "guidance_scale", None),
    ("minisd.json", "sampler", "ddim"),
    ("minisd.json", "preview", [[1, 2]]),
    ("minisd.json", "preview", [["a", "b", "c"]]),
    ("model_index.json", "_class_name", ["StableDiffusionPipeline"]),
    ("model_index.json", "unet", "UNet2DConditionModel"),
]


def test_absurd_configurations_cost_neither_time_nor_memory(folder):
    load(folder)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for name, key, value in CONFIGS:
        good = (folder / name).read_text()
        (folder / name).write_text(json.dumps(json.loads(good) | {key: value}))
        with pytest.raises(CheckpointError, match=re.escape(str(folder))) as caught:
            open_checkpoint(folder)
        assert Path(name).name in str(caught.value) or name == "model_index.json"
        assert len(str(caught.value)) < 600, (name, key)
        (folder / name).write_text(good)
    open_checkpoint(folder)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 200e6 and time.process_time() - started < 20


def test_the_largest_configuration_that_is_allowed_takes_no_memory_before_it_fails(folder):
    """All limits at once: the parts are built without memory for their weights, and the file has none such."""
    path = folder / "unet/config.json"
    largest = {"block_out_channels": [2**20] * 3, "layers_per_block": 16, "cross_attention_dim": 2**20}
    path.write_text(
        json.dumps(json.loads(path.read_text()) | largest | {"norm_num_groups": 2, "attention_head_dim": 1})
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="missing"):
        load(folder)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 300e6


def test_a_json_file_of_gigabytes_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10 * 2**30)  # takes no room on disk
    with pytest.raises(CheckpointError, match="has 10,737,418,240 bytes"):
        read_json(tmp_path / "config.json")


def test_damaged_tokenizers(folder, tmp_path):
    vocabulary, merges = folder / "tokenizer/vocab.json", folder / "tokenizer/merges.txt"
    words, lines = json.loads(vocabulary.read_text()), merges.read_text().splitlines()
    good = vocabulary.read_bytes(), merges.read_bytes()
    less = {token: i for token, i in words.items() if i < 49_000} | {"<|startoftext|>": 49_000, "<|endoftext|>": 49_001}
    cases: list[tuple[str, str, str]] = [
        (json.dumps(words | {"new": 49_408}), merges.read_text(), "is corrupted"),
        (json.dumps(words | {"fox": "7"}), merges.read_text(), "is corrupted"),
        (json.dumps(words | {"fox": 7.0}), merges.read_text(), "is corrupted"),
        (json.dumps(words)[:-9], merges.read_text(), "is corrupted"),
        ('{"a":' * 100_000, merges.read_text(), "is corrupted"),
        ("[]", merges.read_text(), "is corrupted"),
        ("", merges.read_text(), "is corrupted"),
        (json.dumps(words), "\n".join(lines[:-1]), "is corrupted"),
        (json.dumps(words), "\n".join([*lines, "a b c"]), "is corrupted"),
        (json.dumps(words), "", "is corrupted"),
        (json.dumps(less), "\n".join(lines[: 1 + 49_000 - 512]), "49002 tokens, but the text encoder has 49408"),
    ]
    for text_of_vocabulary, text_of_merges, message in cases:
        vocabulary.write_text(text_of_vocabulary)
        merges.write_text(text_of_merges)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(folder)
    vocabulary.write_bytes(good[0])
    merges.write_bytes(good[1])
    for name, content in (("special_tokens_map.json", "[]"), ("special_tokens_map.json", '{"pad_token": "<none>"}')):
        (folder / "tokenizer" / name).write_text(content)
        with pytest.raises(CheckpointError, match="is corrupted"):
            open_checkpoint(folder)


def test_an_index_and_its_shards_must_agree(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    path.unlink()
    first, second = (f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))
    keys = sorted(state)
    half = len(keys) // 2
    index = dict.fromkeys(keys[:half], first) | dict.fromkeys(keys[half:], second)
    save_file({key: state[key] for key in keys[:half]}, path.with_name(first))
    save_file({key: state[key] for key in keys[half:]}, path.with_name(second))
    listing = path.with_name("diffusion_pytorch_model.safetensors.index.json")
    listing.write_text(json.dumps({"weight_map": index}))
    loaded = load(folder)
    assert all(torch.equal(loaded.unet.state_dict()[key], value) for key, value in state.items())
    save_file({key: state[key] for key in [keys[0], *keys[half:]]}, path.with_name(second))  # one comes twice
    with pytest.raises(CheckpointError, match=f"disagree on {re.escape(keys[0])}; download all"):
        load(folder)
    outside = ("../unet/", "/etc/", "..\\", "a/", "./", "\0", "C:", "~/", "../../" * 20)
    for prefix in outside:
        listing.write_text(json.dumps({"weight_map": index | {keys[0]: prefix + first}}))
        with pytest.raises(CheckpointError, match="shards must be in the folder of the index"):
            load(folder)


def test_a_number_that_is_none_is_found_when_it_is_used(folder):
    """Flipped bits in weights cannot be seen in a file; what becomes NaN is found while drawing, by the part's name."""
    names = {"text_encoder/model": "text encoder", "unet/diffusion_pytorch_model": "UNet"}
    names["vae/diffusion_pytorch_model"] = "autoencoder's decoder"
    for name, part in names.items():
        path = folder / f"{name}.safetensors"
        good = path.read_bytes()
        state = load_file(path)
        key = next(key for key in sorted(state, reverse=True) if "decoder" in key or "vae" not in name)
        state[key] = torch.full_like(state[key], float("nan"))
        save_file(state, path)
        with pytest.raises(FloatingPointError, match=f"the {part} returned NaN"):
            StableDiffusion.from_pretrained(folder, device="cpu")("fox", seed=0, num_inference_steps=1)
        path.unlink()
        path.write_bytes(good)


def test_alphas_that_are_no_numbers(tmp_path):
    parts = {"unet": UNet(SMALL.unet), "text_encoder": TextEncoder(SMALL.text_encoder)}
    layer = layers_of(parts)["unet.conv_in"]
    weights = {"unet.conv_in.lora_A.weight": torch.zeros(1, *layer.weight.shape[1:])}
    weights["unet.conv_in.lora_B.weight"] = torch.zeros(len(layer.weight), 1, 1, 1)
    path = tmp_path / "x.safetensors"
    bad: list[Any] = [
        {"lora_alpha": "many"}, {"lora_alpha": float("nan")}, {"lora_alpha": [1]}, {"alpha_pattern": [1]},
        {"alpha_pattern": {"(a+)+$": 1}}, {"alpha_pattern": {"conv_(": 1}}, {"alpha_pattern": {"*": 1}},
        {"alpha_pattern": {"conv_in": "x"}}, {"lora_alpha": 10**400},
    ]  # fmt: skip
    for settings in bad:
        save_file(weights, path, {"lora_adapter_metadata": json.dumps(settings)})
        started = time.process_time()
        with pytest.raises(CheckpointError, match="has no valid alpha for unet.conv_in"):
            read_lora(path, parts)
        assert time.process_time() - started < 2
    save_file(weights, path, {"lora_adapter_metadata": '{"a":' * 100_000})
    with pytest.raises(CheckpointError, match="is not JSON|invalid lora_adapter_metadata"):
        read_lora(path, parts)
    save_file(weights | {"unet.conv_in.alpha": torch.tensor(float("inf"))}, path)
    with pytest.raises(CheckpointError, match="has no valid alpha"):
        read_lora(path, parts)


def test_hunt(capsys):
    """Some of the damaged files of `hunt.py`."""
    found = hunt(150)
    assert not any(name.startswith("FAILED") for name in found), capsys.readouterr().out
    assert found["refused"] > found["other"] > 0 and found["whole"] > 0
