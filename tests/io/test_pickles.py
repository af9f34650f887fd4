"""Pickles: whatever they ask for, nothing runs, and none holds less than it says."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import re
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hunt_files import infect
from torch import nn

from minisd.io.adapter_files import read_textual_inversion
from minisd.io.checkpoint import CheckpointError, load
from minisd.io.tensors import read_header, read_pickle, read_tensors


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
        "pager": call("pydoc", "pipepager", "", shell),
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
    "part of the callback": b"\x80\x02cpytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint\n__init__\n.",
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
    """torch.save's zip archive around another pickle; more: other members, or another content, by their names."""
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


def test_the_attacks_of_the_hunt_are_real(tmp_path: Path) -> None:
    """As `hunt_files.py` puts them into a checkpoint, torch carries them out where it is told to trust the file."""
    canary, path, rng, ran = tmp_path / "ran", tmp_path / "model.ckpt", random.Random(0), Counter[str]()
    for new in (True, False):
        torch.save({"a": torch.ones(3), "step": 3}, path, _use_new_zipfile_serialization=new)
        good = path.read_bytes()
        for name, program in programs(canary).items():
            for _ in range(5):
                path.write_bytes(infect(good, program, rng))
                with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
                    torch.load(path, weights_only=False)
                ran[name] += canary.exists()
                canary.unlink(missing_ok=True)
    assert len(ran) == len(programs(canary)) and min(ran.values()) >= 3, ran


@pytest.mark.parametrize("container", CONTAINERS)
def test_no_pickle_runs(tmp_path: Path, container: str, tally: Counter[str]) -> None:
    canary, path = tmp_path / "ran", tmp_path / "model.ckpt"
    for name, program in (programs(canary) | REFUSED).items():
        path.write_bytes(CONTAINERS[container](program))
        assert program in path.read_bytes()
        for read in (read_header, read_pickle, load, read_textual_inversion):
            with pytest.raises(CheckpointError) as caught:
                read(path)
            tally["refused"] += 1
            reason = str(caught.value)
            if name in programs(canary) and container in ("zip", "old") and "04" not in repr(program[:2]):
                assert re.search(r"asks for code and was refused|not a checkpoint of torch \(instruction", reason), name
            assert "from a source you trust" in reason, name
        tally["executed"] += canary.exists()
        assert not canary.exists(), name


def test_torch_refuses_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Counter[str]) -> None:
    """The second wall alone: what would happen if the first had a hole."""
    monkeypatch.setattr("minisd.io.tensors.check_pickle", lambda path: None)
    canary, path = tmp_path / "ran", tmp_path / "model.ckpt"
    for name, program in programs(canary).items():
        path.write_bytes(archive(program))
        with pytest.raises(CheckpointError, match="damaged or incomplete"):
            load(path)
        tally.update(refused=1, executed=int(canary.exists()))
        assert not canary.exists(), name


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K%ctQ"
TENSOR = (
    b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n(%bK\x00%b%b\x89ccollections\nOrderedDict\n)RtRs."
)


def tensor(count: int, shape: bytes = b"K\x04\x85", strides: bytes = b"K\x01\x85") -> bytes:
    """The pickle of {"a": a tensor}, by hand: 4 numbers in data/0, unless more are claimed."""
    return TENSOR % (STORAGE % count, shape, strides)


def test_archives_that_lie(tmp_path: Path, tally: Counter[str]) -> None:
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
        "another archive": (archive(tensor(4)).replace(b"data.pkl", b"data.txt"), "not an archive as torch.save"),
        "without its beginning": (archive(tensor(4))[5:], "without its beginning or its end"),
        "without its end": (archive(tensor(4))[:-30], "without its beginning or its end"),
    }
    for name, (content, message) in lies.items():
        path.write_bytes(content)
        for read in (read_header, read_pickle):
            if name != "one number as a million" or read is read_header:
                with pytest.raises(CheckpointError, match=message):
                    read(path)
        tally["refused"] += 1
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "pickle")
    with pytest.raises(CheckpointError, match="is a tar archive"):
        read_header(path)
    tally["refused"] += 1


def test_old_files_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(64.0)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    good = (tmp_path / "x.pt").read_bytes()
    assert good.count(b"K@") >= 2 and read_header(tmp_path / "x.pt") == {"a": ((64,), "float32")}
    (tmp_path / "x.pt").write_bytes(good.replace(b"K@", b"J\xff\xff\xff\x7f"))
    with pytest.raises(CheckpointError, match=r"need 8,589,934,588 bytes, more than it has"):
        read_header(tmp_path / "x.pt")


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_what_published_checkpoints_hold_beside_tensors(tmp_path: Path, module: str, tally: Counter[str]) -> None:
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
    tally["whole"] += 1
