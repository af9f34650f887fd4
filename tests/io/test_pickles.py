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

import numpy as np
import pytest
import torch
from hostile_pickles import REFUSED, archive, archives_read_in_two_ways, programs, text
from hunt_files import infect
from torch import nn

from minisd.io.adapter_files import read_textual_inversion
from minisd.io.checkpoint import CheckpointError, load
from minisd.io.tensors import read_header, read_pickle, read_tensors


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


def test_the_attacks_are_real(tmp_path):
    """Python's own unpickler carries each of them out, so a canary that stays away means something."""
    canary = tmp_path / "ran"
    for name, program in programs(canary).items():
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            pickle.loads(program)
        assert canary.exists(), name
        canary.unlink()


def test_the_attacks_of_the_hunt_are_real(tmp_path):
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


def test_archives_that_two_readers_read_in_two_ways(tmp_path):
    """What zipfile shows is what torch reads: an archive in which they could differ is rejected, in both directions."""
    canary, path, differ = tmp_path / "ran", tmp_path / "model.ckpt", 0
    harmless, bad = b"\x80\x02}.", programs(canary)["posix.system"]
    for pair in ((harmless, bad), (bad, harmless)):
        for name, data in archives_read_in_two_ways(*pair).items():
            path.write_bytes(data)
            with contextlib.suppress(Exception):
                shown = zipfile.ZipFile(path).read("model/data.pkl")
                differ += shown != bytes(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))
            with pytest.raises(CheckpointError):
                read_header(path)
            assert not canary.exists(), name
    assert differ >= 6  # the attacks are real


@pytest.mark.parametrize("container", CONTAINERS)
def test_no_pickle_runs(tmp_path, container):
    canary, path = tmp_path / "ran", tmp_path / "model.ckpt"
    for name, program in (programs(canary) | REFUSED).items():
        path.write_bytes(CONTAINERS[container](program))
        assert program in path.read_bytes()
        for read in (read_header, read_pickle, load, read_textual_inversion):
            with pytest.raises(CheckpointError) as caught:
                read(path)
            reason = str(caught.value)
            if name in programs(canary) and container in ("zip", "old") and "04" not in repr(program[:2]):
                assert re.search(r"could run code|not a torch checkpoint \(opcode", reason), name
            assert "from a source you trust" in reason, name
        assert not canary.exists(), name


def test_torch_refuses_them_too(tmp_path, monkeypatch):
    """The second wall alone: what would happen if the first had a hole."""
    monkeypatch.setattr("minisd.io.tensors.check_pickle", lambda path: None)
    canary, path = tmp_path / "ran", tmp_path / "model.ckpt"
    for name, program in programs(canary).items():
        path.write_bytes(archive(program))
        with pytest.raises(CheckpointError, match="corrupted or incomplete"):
            load(path)
        assert not canary.exists(), name


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K%ctQ"
TENSOR = (
    b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n(%bK\x00%b%b\x89ccollections\nOrderedDict\n)RtRs."
)


def tensor(count: int, shape: bytes = b"K\x04\x85", strides: bytes = b"K\x01\x85") -> bytes:
    """The pickle of {"a": a tensor}, by hand: 4 numbers in data/0, unless more are claimed."""
    return TENSOR % (STORAGE % count, shape, strides)


def test_archives_that_lie(tmp_path):
    path = tmp_path / "model.bin"
    numbers = struct.pack("<4f", 1, 2, 3, 4)
    path.write_bytes(archive(tensor(4), **{"data/0": numbers}))
    header = read_header(path)
    assert header == {"a": ((4,), "float32")}
    assert dict(read_tensors(path, header, "cpu", torch.float32))["a"].tolist() == [1, 2, 3, 4]
    lies: dict[str, tuple[bytes, str]] = {
        "compressed": (archive(tensor(4), zipfile.ZIP_DEFLATED), "contains 'model/data.pkl' in compressed form"),
        "too few bytes": (archive(tensor(4), **{"data/0": numbers[:8]}), "no storage has the 16 bytes"),
        "too many bytes": (archive(tensor(4), **{"data/0": numbers * 9}), "no storage has the 16 bytes"),
        "no bytes": (archive(tensor(4).replace(text("0"), text("1"))), "corrupted or incomplete"),
        "larger than its storage": (archive(tensor(4, b"K\xff\x85")), "corrupted or incomplete"),
        "one number as a million": (
            archive(tensor(4, b"M\xff\xffM\xff\xff\x86", b"K\x00K\x00\x86")),
            "repeats numbers",
        ),
        "TorchScript": (archive(tensor(4), **{"constants.pkl": b"."}), "TorchScript"),
        "17 MB of lists": (archive(b"\x80\x02" + b"]" * 17_000_000 + b"."), "a pickle of 17,000,003 bytes"),
        "another archive": (archive(tensor(4)).replace(b"data.pkl", b"data.txt"), "not an archive written by torch"),
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


def test_old_files_that_claim_more_than_they_hold(tmp_path):
    torch.save({"a": torch.arange(64.0)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    good = (tmp_path / "x.pt").read_bytes()
    assert good.count(b"K@") >= 2 and read_header(tmp_path / "x.pt") == {"a": ((64,), "float32")}
    (tmp_path / "x.pt").write_bytes(good.replace(b"K@", b"J\xff\xff\xff\x7f"))
    with pytest.raises(CheckpointError, match="need more bytes than the file has|allocate"):
        read_header(tmp_path / "x.pt")


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_what_published_checkpoints_hold_beside_tensors(tmp_path, module):
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
