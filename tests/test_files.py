"""Bad files and faults: nothing in a file runs, nothing damaged gets in, and no fault leaves half a file."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import SMALL, make_parts
from hunt_files import hunt
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from minisd import StableDiffusion, TextEncoder, UNet
from minisd.adapters import LoRA, LowRank, layers_of, read_lora, read_textual_inversion
from minisd.checkpoint import CheckpointError, load, open_checkpoint
from minisd.images import read_picture
from minisd.metadata import read_parameters, save_png
from minisd.training.loop import Options, Trainer
from minisd.weights import read_header, read_json, read_pickle, read_tensors, save_atomically

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def folder(small_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_model, tmp_path / "model"))


# Pickles: nothing runs


def text(value: str) -> bytes:
    """A string, as a pickle of protocol 2 has it."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def call(module: str, name: str, *arguments: str) -> bytes:
    """A pickle that calls a function with strings."""
    return f"\x80\x02c{module}\n{name}\n(".encode("latin-1") + b"".join(map(text, arguments)) + b"tR."


def programs(canary: Path) -> dict[str, bytes]:
    """Pickles that leave a file behind where they are carried out, each by another way to get at a function."""
    shell, python = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    system = b"cposix\nsystem\n"
    inner = call("posix", "system", shell)
    wrapped = io.BytesIO()
    torch.save(None, wrapped)
    return {
        "os.system": call("os", "system", shell),
        "posix.system": call("posix", "system", shell),
        "eval": call("builtins", "eval", python),
        "exec": call("builtins", "exec", python),
        "python 2 eval": call("__builtin__", "eval", python),
        "pty": call("subprocess", "getoutput", shell),
        "run": call("timeit", "timeit", python.replace("open", "import os; open")),
        "numpy": call("numpy.f2py.crackfortran", "myeval", python),
        "pickle in a pickle": b"\x80\x02cpickle\nloads\nC" + bytes([len(inner)]) + inner + b"\x85R.",
        "text of protocol 0": b"cposix\nsystem\n(V" + shell.encode() + b"\ntR.",
        "INST": b"(V" + shell.encode() + b"\niposix\nsystem\n.",
        "OBJ": b"(" + system + b"V" + shell.encode() + b"\no.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + text(shell) + b"\x85R.",
        "NEWOBJ_EX": b"\x80\x04cfunctools\npartial\n" + system + text(shell) + b"\x86}\x92)R.",
        "NEWOBJ": b"\x80\x02cfunctools\npartial\n" + system + text(shell) + b"\x86\x81)R.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\ncos\npath\n" + text("os") + b"\x86R0" + inner[2:],
        "dotted name": b"\x80\x04\x8c\x02os\x8c\x0bpath.os.sys\x930" + inner[2:],
        "map": b"\x80\x02cbuiltins\nlist\ncbuiltins\nmap\n" + system + text(shell) + b"\x85\x86R\x85R.",
        "BUILD": b"\x80\x02cfunctools\npartial\ncbuiltins\nprint\n\x85R(" + system + text(shell) + b"\x85}NtbN0)R.",
        "copyreg": b"\x80\x02ccopyreg\n__newobj__\ncfunctools\npartial\n" + system + text(shell) + b"\x87R)R.",
        "import": b"\x80\x02coperator\nmethodcaller\n" + text("system") + text(shell) + b"\x86R"
        + b"cbuiltins\n__import__\n" + text("os") + b"\x85R\x85R.",
        "in a dictionary": b"\x80\x02}" + text("state_dict") + b"}" + text("x") + inner[2:-1] + b"ss.",
        "as a key": b"\x80\x02}" + inner[2:-1] + b"Ns.",
        "twice, by the memo": b"\x80\x02" + system + b"q\x000h\x00" + text(shell) + b"\x85R.",
    }  # fmt: skip


# What no plain unpickler would carry out, or would but to another end: torch's own doors, persistent names, sizes.
REFUSED = {
    "torch.load": call("torch.serialization", "load", "x.pt"),
    "_load_from_bytes": b"\x80\x02ctorch.storage\n_load_from_bytes\nU\x03abc\x85R.",
    "from type": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nNNNtR.",
    "jit": call("torch.jit", "load", "x.pt"),
    "hub": call("torch.hub", "load", "a/b", "c"),
    "dynamic library": call("ctypes", "CDLL", "x.so"),
    "numpy array": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R.",
    "lambda": call("types", "LambdaType", "x"),
    "persistent module": b"\x80\x02(" + text("module") + b"NNNNtQ.",
    "persistent text": b"Pabc\n.",
    "EXT1": b"\x80\x02\x82\x01.",
    "another callback": b"\x80\x02cpytorch_lightning.callbacks.model_checkpoint\nOther\n.",
    "an attribute of the callback": b"\x80\x02cpytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint\n__init__\n.",
    "bytearray of 16 TB": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",
    "tensor of 16 TB": b"\x80\x02ctorch\nTensor\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",
    "text of 4 EB": b"\x80\x04\x8d\x00\x00\x00\x00\x00\x00\x00\x40.",
    "bytes of 4 EB": b"\x80\x04\x8e\x00\x00\x00\x00\x00\x00\x00\x40.",
    "frame of 4 EB": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x40.",
    "number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "memo without end": b"\x80\x02Nr\xff\xff\xff\xffj\xfe\xff\xff\xff.",
    "a million tuples in each other, as a key": b"\x80\x02}N" + b"\x85" * 10**6 + b"Ns.",
    "laughs": b"\x80\x02}N" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(45)) + b"Ns.",
    "mark alone": b"\x80\x02t.",
    "an empty stack": b"\x80\x02R.",
    "no end": b"\x80\x02}",
}  # fmt: skip


def archive(program: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """torch.save's zip archive around another pickle; more: contents of members, named with _ for / and for dots."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        members = {"data.pkl": program, "byteorder": b"little", "version": b"3\n", "data/0": bytes(16), **more}
        for name, content in members.items():
            file.writestr(f"model/{name}", content)
    return stream.getvalue()


def old_format(program: bytes) -> bytes:
    """The file of torch.save before 1.6 around another pickle, without storages."""
    stream = io.BytesIO()
    torch.save({}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue().replace(b"\x80\x02}q\x00.", program, 1)


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "zip": archive,
    "old": old_format,
    "bare": lambda program: program,
    "pickle and zip": lambda program: program + archive(b"\x80\x02}."),
    "zip in zip": lambda program: archive(program, **{"model.ckpt": archive(program)}),
}


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """Python's own unpickler carries each of them out, so a canary that stays away means something."""
    canary = tmp_path / "ran"
    for name, program in programs(canary).items():
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            pickle.loads(program)
        assert canary.exists(), name
        canary.unlink()


@pytest.mark.parametrize("container", CONTAINERS)
def test_no_pickle_runs(tmp_path: Path, container: str) -> None:
    canary, path = tmp_path / "ran", tmp_path / "model.ckpt"
    for name, program in (programs(canary) | REFUSED).items():
        path.write_bytes(CONTAINERS[container](program))
        assert program in path.read_bytes()
        for read in (read_header, read_pickle, load, read_textual_inversion):
            with pytest.raises(CheckpointError) as caught:
                read(path)
            reason = str(caught.value)
            if name in programs(canary) and container in ("zip", "old") and "04" not in repr(program[:2]):
                assert re.search(r"asks for code and was refused|no checkpoint of torch \(instruction", reason), name
            assert "from a source you trust" in reason, name
        assert not canary.exists(), name


def test_torch_refuses_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second wall alone: what would happen if the first had a hole."""
    monkeypatch.setattr("minisd.weights.check_pickle", lambda path: None)
    canary, path = tmp_path / "ran", tmp_path / "model.ckpt"
    for name, program in programs(canary).items():
        path.write_bytes(archive(program))
        with pytest.raises(CheckpointError, match="damaged or incomplete"):
            load(path)
        assert not canary.exists(), name


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K%ctQ"
TENSOR = (
    b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n(%bK\x00%b%b\x89ccollections\nOrderedDict\n)RtRs."
)


def tensor(count: int, shape: bytes = b"K\x04\x85", strides: bytes = b"K\x01\x85") -> bytes:
    """The pickle of {"a": a tensor}, by hand: 4 numbers in data/0, unless more are claimed."""
    return TENSOR % (STORAGE % count, shape, strides)


def test_archives_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    numbers = struct.pack("<4f", 1, 2, 3, 4)
    path.write_bytes(archive(tensor(4), **{"data/0": numbers}))
    header = read_header(path)
    assert header == {"a": ((4,), "float32")}
    assert dict(read_tensors(path, header, "cpu", torch.float32))["a"].tolist() == [1, 2, 3, 4]
    lies: dict[str, tuple[bytes, str]] = {
        "compressed": (archive(tensor(4), zipfile.ZIP_DEFLATED), "holds 'model/data.pkl' compressed"),
        "too few bytes": (archive(tensor(4), **{"data/0": numbers[:8]}), "data/0 has 8 bytes, not 16"),
        "too many bytes": (archive(tensor(4), **{"data/0": numbers * 9}), "data/0 has 144 bytes, not 16"),
        "no bytes": (archive(tensor(4).replace(text("0"), text("1"))), "data/1 has None bytes, not 16"),
        "larger than its storage": (archive(tensor(4, b"K\xff\x85")), "damaged or incomplete"),
        "one number as a million": (
            archive(tensor(4, b"M\xff\xffM\xff\xff\x86", b"K\x00K\x00\x86")),
            "repeats numbers",
        ),
        "TorchScript": (archive(tensor(4), **{"constants.pkl": b"."}), "TorchScript"),
        "17 MB of lists": (archive(b"\x80\x02" + b"]" * 17_000_000 + b"."), "lists 17,000,003 bytes of objects"),
        "another archive": (archive(tensor(4)).replace(b"data.pkl", b"data.txt"), "no archive as torch.save writes it"),
        "without its beginning": (archive(tensor(4))[5:], "without its beginning or its end"),
        "without its end": (archive(tensor(4))[:-30], "without its beginning or its end"),
    }
    for name, (content, message) in lies.items():
        path.write_bytes(content)
        for read in (read_header, read_pickle):
            if name != "one number as a million" or read is read_header:
                with pytest.raises(CheckpointError, match=message):
                    read(path)
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "pickle")
    with pytest.raises(CheckpointError, match="is a tar archive"):
        read_header(path)


def test_old_files_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(64.0)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    good = (tmp_path / "x.pt").read_bytes()
    assert good.count(b"K@") >= 2 and read_header(tmp_path / "x.pt") == {"a": ((64,), "float32")}
    (tmp_path / "x.pt").write_bytes(good.replace(b"K@", b"J\xff\xff\xff\x7f"))
    with pytest.raises(CheckpointError, match=r"need 8,589,934,588 bytes, more than it has"):
        read_header(tmp_path / "x.pt")


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_what_published_checkpoints_hold_beside_tensors(tmp_path: Path, module: str) -> None:
    """Steps and losses as numpy's numbers, counters, sets, attributes: read past, the tensors intact."""
    weights = nn.Linear(3, 2).state_dict()  # an OrderedDict with an attribute
    extra = {
        "global_step": np.int64(470_000),
        "loss": np.float32(0.5),
        "lr_schedulers": [{"milestones": __import__("collections").Counter([1, 2]), "betas": (0.9, 0.999)}],
        "hparams": {
            "names": {"a", "b"},
            "size": torch.Size([1, 2]),
            "half": torch.float16,
            "device": torch.device("cpu"),
        },
        "parameter": nn.Parameter(torch.ones(2)),
    }
    stream = io.BytesIO()
    torch.save({"state_dict": weights} | extra, stream)
    with zipfile.ZipFile(stream) as file:
        program = file.read("archive/data.pkl")
        members = {name.partition("/")[2]: file.read(name) for name in file.namelist() if "data.pkl" not in name}
    assert b"numpy._core.multiarray\nscalar" in program
    program = program.replace(b"numpy._core.multiarray", f"{module}.multiarray".encode())
    path = tmp_path / "model.ckpt"
    path.write_bytes(archive(program, **members))
    tensors = dict(read_tensors(path, read_header(path), "cpu", torch.float32))
    assert tensors.keys() == weights.keys() and all(torch.equal(tensors[key], weights[key]) for key in weights)
    step = read_pickle(path)["global_step"]
    assert type(step).__name__ == "_Inert" and not hasattr(step, "dtype") and vars(step) == {}


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
def test_broken_safetensors(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(BROKEN[name])
    for read in (read_header, load, read_textual_inversion, lambda path: read_lora(path, {})):
        with pytest.raises(CheckpointError, match="x.safetensors is damaged or incomplete"):
            read(path)


@pytest.mark.parametrize("dtype", ["I64", "I8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "C64", "U16"])
def test_dtypes_that_are_no_weights(tmp_path: Path, dtype: str) -> None:
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


def test_a_shape_of_nothing_that_overflows(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"<word>": entry((0, 2**63 - 1, 2**62), (0, 0))}, b""))
    with pytest.raises(CheckpointError, match="which torch cannot read"):
        read_textual_inversion(path)


def test_a_file_cut_anywhere(tmp_path: Path) -> None:
    """Every length of a small file, and flipped bits of its header: an error, or the same names and shapes."""
    save_file({"<word>": torch.randn(3, 4)}, tmp_path / "good.safetensors")
    torch.save({"<word>": torch.randn(3, 4)}, tmp_path / "good.bin")
    for good in (tmp_path / "good.safetensors", tmp_path / "good.bin"):
        data, path = good.read_bytes(), tmp_path / f"cut{good.suffix}"
        for length in range(0, len(data), 1 if good.suffix == ".safetensors" else 7):
            path.write_bytes(data[:length])
            with pytest.raises(CheckpointError, match="is empty|damaged or incomplete"):
                read_textual_inversion(path)
    header = 8 + int.from_bytes(data[:8], "little") if good.suffix == ".safetensors" else 0
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


def fake(kind: str) -> bytes:
    return {
        "empty": b"",
        "web page": b"\n<!DOCTYPE html><html><body>Please log in</body></html>",
        "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n",
        "git-annex": b"/annex/objects/SHA256E-s3438167540--4d7a.safetensors\n",
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [("empty", "is empty"), ("web page", "is a web page"), ("git-lfs", "git lfs pull"), ("git-annex", "git annex get")],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_what_is_no_weights_at_all(tmp_path: Path, kind: str, message: str, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(fake(kind))
    for read in (load, read_textual_inversion, lambda path: read_lora(path, {})):
        with pytest.raises(CheckpointError, match=message):
            read(path)


# Keys as they are published.
OTHERS = {
    "Stable Diffusion XL": ["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"]
    + ["model.diffusion_model.label_emb.0.0.weight", "model.diffusion_model.input_blocks.0.0.weight"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"],
    "Flux": ["double_blocks.0.img_attn.norm.key_norm.scale"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight"],
    "a textual inversion": ["emb_params"],
}


def test_another_model_is_called_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for part, module in make_parts(SMALL, meta=True).items():
        kind = {"unet": "a UNet alone", "vae": "an autoencoder alone", "text_encoder": "a text encoder alone"}[part]
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


def test_a_part_of_a_folder_is_called_by_its_name(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="only a part, UNet2DConditionModel; give the folder that holds all"):
        load(folder / "unet")
    with pytest.raises(CheckpointError, match=r"only a part, \['CLIPTextModel'\]"):
        load(folder / "text_encoder")
    (folder / "unet/config.json").unlink()
    with pytest.raises(CheckpointError, match="single file diffusion_pytorch_model.safetensors"):
        load(folder / "unet")
    with pytest.raises(CheckpointError, match="fetch the whole folder"):
        load(folder / "tokenizer")


def test_names_from_files_do_not_steer_the_terminal(tmp_path: Path) -> None:
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


def test_absurd_configurations_cost_neither_time_nor_memory(folder: Path) -> None:
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


def test_the_largest_configuration_that_is_allowed_takes_no_memory_before_it_fails(folder: Path) -> None:
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


def test_a_json_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10 * 2**30)  # takes no room on disk
    with pytest.raises(CheckpointError, match="has 10,737,418,240 bytes"):
        read_json(tmp_path / "config.json")


def test_damaged_tokenizers(folder: Path, tmp_path: Path) -> None:
    vocabulary, merges = folder / "tokenizer/vocab.json", folder / "tokenizer/merges.txt"
    words, lines = json.loads(vocabulary.read_text()), merges.read_text().splitlines()
    good = vocabulary.read_bytes(), merges.read_bytes()
    less = {token: i for token, i in words.items() if i < 49_000} | {"<|startoftext|>": 49_000, "<|endoftext|>": 49_001}
    cases: list[tuple[str, str, str]] = [
        (json.dumps(words | {"new": 49_408}), merges.read_text(), "is damaged"),
        (json.dumps(words | {"fox": "7"}), merges.read_text(), "is damaged"),
        (json.dumps(words | {"fox": 7.0}), merges.read_text(), "is damaged"),
        (json.dumps(words)[:-9], merges.read_text(), "is damaged"),
        ('{"a":' * 100_000, merges.read_text(), "is damaged"),
        ("[]", merges.read_text(), "is damaged"),
        ("", merges.read_text(), "is damaged"),
        (json.dumps(words), "\n".join(lines[:-1]), "is damaged"),
        (json.dumps(words), "\n".join([*lines, "a b c"]), "is damaged"),
        (json.dumps(words), "", "is damaged"),
        (json.dumps(less), "\n".join(lines[: 1 + 49_000 - 512]), "49002 tokens and the text encoder a table of 49408"),
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
        with pytest.raises(CheckpointError, match="is damaged"):
            open_checkpoint(folder)


def test_an_index_and_its_shards_must_agree(folder: Path) -> None:
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
    with pytest.raises(CheckpointError, match=f"disagree on {re.escape(keys[0])}; they are of different versions"):
        load(folder)
    listing.write_text(json.dumps({"weight_map": index | {keys[0]: "../unet/" + first}}))
    with pytest.raises(CheckpointError, match="shards must lie beside their index"):
        load(folder)


def test_a_number_that_is_none_is_found_when_it_is_used(folder: Path) -> None:
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


def test_alphas_that_are_no_numbers(tmp_path: Path) -> None:
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
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_lora(path, parts)
    save_file(weights | {"unet.conv_in.alpha": torch.tensor(float("inf"))}, path)
    with pytest.raises(CheckpointError, match="has no valid alpha"):
        read_lora(path, parts)


# Saving: whole or not at all


SAVERS = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from PIL import Image
from minisd import StableDiffusion
from minisd.adapters import LoRA, LowRank, layers_of
from minisd.metadata import save_png
from minisd.weights import save_atomically

torch.set_num_threads(1)
source, place, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
sd = StableDiffusion.from_pretrained(source, device="cpu")
lora = LoRA({name: LowRank(layer, 2) for name, layer in layers_of({"unet": sd.unet}).items()})

def fill(value):
    for part in (sd.unet, sd.text_encoder, sd.autoencoder, lora):
        for parameter in part.parameters():
            parameter.data.fill_(value)

def save(value):
    fill(float(value))
    sd.save_pretrained(place / "model")
    lora.save(place / "style.safetensors")
    save_atomically(lambda path: torch.save({"x": torch.full((50_000,), float(value))}, path), place / "checkpoint.pt")
    save_png(Image.effect_noise((200, 200), 50), place / "fox.png", str(value), overwrite=True)
    save_png(Image.effect_noise((200, 200), 50), place / "cat.png", str(value))
"""
KILLED = (
    SAVERS
    + """
rng = random.Random(0)
save(0)
for number in range(rounds):
    child = os.fork()
    if not child:
        for value in range(1, 1000):
            save(value)
        os._exit(1)
    time.sleep(rng.uniform(0.0, 0.6))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    print("killed", flush=True)
    sys.stdin.readline()  # the test looks at what is there
"""
)
TOGETHER = (
    SAVERS
    + """
children = []
for value in (1, 2, 3):
    children.append(os.fork())
    if not children[-1]:
        try:
            for _ in range(rounds):
                save(value)
            os._exit(0)
        finally:
            os._exit(1)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""
)
TEMPORARY = re.compile(
    r"\.(model|style\.safetensors|checkpoint\.pt)\.[0-9a-f]{8}(\.old)?\.tmp|\.[0-9a-f]{32}(\.png|\.tmp)"
)


def values_in(place: Path) -> set[float]:
    """All numbers in the weights of a folder, which was filled with one."""
    loaded = load(place)
    parts = loaded.text_encoder, loaded.autoencoder, loaded.unet
    return {value for part in parts for x in part.parameters() for value in (float(x.min()), float(x.max()))}


def check_whole(place: Path) -> None:
    assert len(values_in(place / "model")) == 1
    assert (place / "model/notes.txt").read_text() == "kept"
    lora = load_file(place / "style.safetensors")
    assert all(len(value.unique()) == 1 for value in lora.values())
    assert len(read_pickle(place / "checkpoint.pt")["x"].unique()) == 1
    for path in place.glob("[fc]*.png"):
        assert Image.open(path).size == (200, 200) and (read_parameters(path) or "").isdecimal()


def test_killed_while_saving(small_model: Path, tmp_path: Path) -> None:
    """SIGKILL at 25 moments: each file is whole, all parts of the model are of one version, the rest is named so."""
    place = Path(shutil.copytree(small_model, tmp_path / "place/model")).parent
    (place / "model/notes.txt").write_text("kept")
    arguments = [sys.executable, "-c", KILLED, str(small_model), str(place), "25"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    left = 0
    with subprocess.Popen(arguments, **pipes) as process:  # type: ignore[call-overload]
        while process.stdout.readline() == "killed\n":
            if not (place / "model").exists():  # killed between two renames: both versions are there, whole
                old, new = sorted(place.glob(".model.*"), key=lambda path: "old" not in path.name)
                assert len(values_in(old)) == len(values_in(new)) == 1
                old.rename(place / "model")
            check_whole(place)
            hidden = [path for path in place.iterdir() if path.name.startswith(".")]
            assert all(TEMPORARY.fullmatch(path.name) for path in hidden)
            left += len(hidden)
            for path in hidden:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0 and left > 5, "hardly any kill met a save"


def test_several_save_to_one_place(small_model: Path, tmp_path: Path) -> None:
    """Three processes, four times each: the last one wins, whole, and pictures without --overwrite are all there."""
    place = Path(shutil.copytree(small_model, tmp_path / "place/model")).parent
    (place / "model/notes.txt").write_text("kept")
    subprocess.run([sys.executable, "-c", TOGETHER, str(small_model), str(place), "4"], env=ENVIRONMENT, check=True)
    check_whole(place)
    names = {path.name for path in place.iterdir()}
    cats = {"cat.png", *(f"cat-{i}.png" for i in range(2, 13))}
    assert names == {"model", "style.safetensors", "checkpoint.pt", "fox.png"} | cats


def in_child(work: Callable[[], None], user: int | None = None, size: int | None = None) -> str:
    """Run something in a forked process, as another user or with a limit to the size of files; return its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            if user is not None and os.geteuid() == 0:
                os.setuid(user)
            if size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            try:
                work()
                answer = "done"
            except BaseException as error:
                answer = f"{type(error).__mro__} {error}"
            os.write(writing, answer.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@pytest.fixture
def savers(small_model: Path) -> dict[str, Callable[[Path], Any]]:
    """By the name that each is given, everything that writes for good."""
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    lora = LoRA({name: LowRank(layer, 64) for name, layer in layers_of({"unet": sd.unet}).items()})
    picture, numbers = Image.effect_noise((200, 200), 50), torch.rand(50_000)
    return {
        "model": sd.save_pretrained,
        "style.safetensors": lora.save,
        "checkpoint.pt": lambda path: save_atomically(lambda temporary: torch.save(numbers, temporary), path),
        "fox.png": lambda path: save_png(picture, path, "text", overwrite=True),
        "cat.png": lambda path: save_png(picture, path, "text"),
    }


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_old_files_whole(savers: dict[str, Callable[[Path], Any]], tmp_path: Path) -> None:
    for name, save in savers.items():
        for existing in (False, True):
            place = tmp_path / f"{name}-{existing}"
            place.mkdir()
            if existing:
                save(place / name)
            before = contents(place)
            assert bool(before) == existing
            answer = in_child(lambda save=save, place=place, name=name: save(place / name), size=10_000)
            assert "OSError" in answer, (name, answer)
            assert contents(place) == before and len(os.listdir(place)) == existing, name


def test_no_permission_leaves_the_old_files_whole(savers: dict[str, Callable[[Path], Any]]) -> None:
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(__import__("tempfile").TemporaryDirectory()))
        place.chmod(0o755)
        for name, save in savers.items():
            save(place / name)
        before = contents(place)
        place.chmod(0o555)
        for name, save in savers.items():
            answer = in_child(lambda save=save, name=name: save(place / name), user=65534)
            assert "PermissionError" in answer and str(place) in answer, (name, answer)
        assert contents(place) == before and len(os.listdir(place)) == len(savers)
        place.chmod(0o755)


def test_targets_that_are_links_or_folders(savers: dict[str, Callable[[Path], Any]], tmp_path: Path) -> None:
    for name, save in savers.items():
        (tmp_path / "real").mkdir()
        target, real = tmp_path / name, tmp_path / "real" / name
        save(real)
        before = contents(tmp_path / "real")
        target.symlink_to(real)
        save(target)
        if name == "model":  # the link stays, and what it names is replaced
            assert target.is_symlink() and load(target) and sorted(os.listdir(tmp_path)) == [name, "real"]
        elif name == "cat.png":  # a name that is taken, so the next
            assert target.is_symlink() and (tmp_path / "cat-2.png").is_file()
        else:  # the link is replaced, and what it named stays
            assert not target.is_symlink() and target.is_file()
        assert name == "model" or contents(tmp_path / "real") == before
        shutil.rmtree(tmp_path / "real")
        target.unlink()
        if name != "model":
            target.mkdir()
            (target / "note.txt").write_text("kept")
            with pytest.raises(OSError) if name != "cat.png" else contextlib.nullcontext():
                save(target)
            assert (target / "note.txt").read_text() == "kept"
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_saved_files_can_be_read_by_others(savers: dict[str, Callable[[Path], Any]], tmp_path: Path) -> None:
    """With the permissions that the umask gives, though some writers create them for the owner alone."""
    (tmp_path / "plain").touch()
    for name, save in savers.items():
        save(tmp_path / name)
    assert {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()} == {
        (tmp_path / "plain").stat().st_mode
    }


class Line:
    """The smallest training there is."""

    def __init__(self, width: int = 3) -> None:
        self.model = nn.Linear(width, 1)

    def loss(self, *_: Any) -> tuple[torch.Tensor, dict[str, float]]:
        return self.model(torch.ones(1, self.model.in_features)).square().sum(), {}

    def sheet(self, model: nn.Module) -> None: ...

    def export(self, model: nn.Module, folder: Path) -> None: ...


def test_damaged_training_checkpoints_are_not_resumed(tmp_path: Path) -> None:
    options = Options(tmp_path, steps=2)
    trainer = Trainer(Line(), options)
    trainer.run()
    path, resumed = tmp_path / "checkpoint.pt", replace(options, resume=True)
    good = path.read_bytes()
    again = Trainer(Line(), resumed)
    assert again.step == 2 and torch.equal(again.task.model.weight, trainer.task.model.weight)
    stream = io.BytesIO()
    torch.save({"model": {}}, stream)
    for content in (good[:-100], b"", b"no pickle", stream.getvalue(), archive(call("posix", "system", "true"))):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="(?s)checkpoint.pt cannot be resumed .*start without --resume"):
            Trainer(Line(), resumed)
    path.write_bytes(good)
    with pytest.raises(CheckpointError, match="(?s)cannot be resumed .*size mismatch"):
        Trainer(Line(4), resumed)
    (tmp_path / "losses.jsonl").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        Trainer(Line(), resumed)


# Pictures


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def empty_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is so large."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


SCENE = Image.fromarray(
    np.kron(np.array([[[250, 10, 10], [10, 250, 10]], [[10, 10, 250], [250, 250, 10]]]), np.ones((8, 8, 1))).astype(
        np.uint8
    )
)
CORNERS = {"left top": (2, 2), "right top": (13, 2), "left bottom": (2, 13), "right bottom": (13, 13)}


def corners(picture: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(round(x / 125) for x in picture.getpixel(place)) for place in CORNERS.values()]


READABLE: dict[str, bytes] = {
    "PNG": encoded(SCENE),
    "JPEG": encoded(SCENE, "JPEG", quality=95),
    "WebP": encoded(SCENE, "WEBP", lossless=True),
    "GIF": encoded(SCENE, "GIF"),
    "BMP": encoded(SCENE, "BMP"),
    "TIFF": encoded(SCENE, "TIFF"),
    "palette": encoded(SCENE.quantize(4)),
    "CMYK": encoded(SCENE.convert("CMYK"), "TIFF"),
    "alpha": encoded(SCENE.convert("RGBA")),
    "animated": encoded(SCENE, "GIF", save_all=True, append_images=[Image.new("RGB", SCENE.size)]),
    "animated PNG": encoded(SCENE, "PNG", save_all=True, append_images=[Image.new("RGB", SCENE.size)]),
    "turned by EXIF": encoded(SCENE.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=turned(6)),
    "unknown orientation": encoded(SCENE, "JPEG", quality=95, exif=turned(99)),
    "broken EXIF": encoded(SCENE, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"),
}


@pytest.mark.filterwarnings("error")
def test_pictures_of_every_kind_are_read(tmp_path: Path) -> None:
    """All of them show the same four corners, whatever the file is called."""
    assert corners(SCENE) == [(2, 0, 0), (0, 2, 0), (0, 0, 2), (2, 2, 0)]
    for name, content in READABLE.items():
        (tmp_path / "x.png").write_bytes(content)
        assert corners(read_picture(tmp_path / "x.png", 16, 16)) == corners(SCENE), name
        assert read_parameters(tmp_path / "x.png") is None
    (tmp_path / "x.png").write_bytes(encoded(Image.fromarray(np.full((5, 9), 32_768, np.uint16))))
    assert read_picture(tmp_path / "x.png", 16, 16).getpixel((3, 3)) == (128, 128, 128)
    (tmp_path / "x.png").write_bytes(encoded(Image.new("LA", (5, 9), (0, 128))))
    assert read_picture(tmp_path / "x.png", 16, 16).getpixel((3, 3)) == (127, 127, 127)
    for size in ((1, 1), (60_000, 1), (1, 60_000)):
        (tmp_path / "x.png").write_bytes(encoded(Image.new("RGB", size, "red")))
        assert read_picture(tmp_path / "x.png", 16, 24).getcolors() == [(384, (255, 0, 0))]


PNG = encoded(SCENE)
UNREADABLE: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(100),
    "a web page": b"<!DOCTYPE html><html></html>",
    "a vector drawing": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a PDF": b"%PDF-1.4\n1 0 obj",
    "PostScript, which Pillow would give to another program": encoded(SCENE, "EPS"),
    "2.5 billion pixels": empty_png(50_000, 50_000),
    "as many as can be written": empty_png(2**31 - 1, 2**31 - 1),
    "no width": empty_png(0, 5),
    "text that unpacks to 128 MB": PNG[:33] + chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(2**27))) + PNG[33:],
} | {
    f"{name}, cut to {share}": content[: int(share * len(content))]
    for name, content in READABLE.items()
    for share in (0.0, 0.05, 0.5)
    if (name, share) not in (("animated", 0.5), ("animated PNG", 0.5))  # whose first picture is whole
}  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_what_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, content in UNREADABLE.items():
        path.write_bytes(content)
        with pytest.raises(OSError, match=re.escape(str(path))) as caught:
            read_picture(path, 16, 16)
        assert "give a PNG, JPEG or WebP file" in str(caught.value), name
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 100e6
    for missing in (tmp_path / "none.png", tmp_path):
        with pytest.raises(OSError, match=re.escape(str(missing))):
            read_picture(missing, 16, 16)


# The hunt


def test_hunt(capsys: pytest.CaptureFixture[str]) -> None:
    """A sample of `python tests/hunt_files.py`; MINISD_HUNT sets how many."""
    found = hunt(int(os.environ.get("MINISD_HUNT", "150")))
    assert not any(name.startswith("FAILED") for name in found), capsys.readouterr().out
    assert found["refused"] > found["other"] > 0 and found["whole"] > 0
