"""Tensors in files: safetensors and pickles are opened as memory maps, and nothing in a file can run code."""

from __future__ import annotations

import json
import math
import os
import re
import uuid
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisd.io.pickles import INERT, PickleError, check_pickle

SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAFE_TORCH = (2, 10)  # before it, weights_only=True could be made to run code: CVE-2025-32434, CVE-2026-24747
JSON_BYTES = 2**26  # far more than the largest vocabulary or index of shards
BATCH_BYTES = 2**28
ADVICE = "fetch it again from a source you trust, best as .safetensors"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says what was wrong, what was expected and what to do."""


class TensorInfo(NamedTuple):
    """What a file says of a tensor before it is read: its shape and the name of its dtype, such as "float32"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (getattr(torch, self.dtype).itemsize if hasattr(torch, self.dtype) else 1)


class _Inert:
    """Stands in for what old checkpoints hold beside tensors: it can be named and built, and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor in a .safetensors, .ckpt, .bin or .pt file, without reading the tensors.

    Raises CheckpointError when the file is damaged, is not what its name says, or would run code.
    """
    _check_start(path)
    if path.suffix != ".safetensors":
        _check_pickle(path)
        tensors = _load_pickle(path)
        return {key: TensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in tensors.items()}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is not a mapping)
            return {
                key: TensorInfo(tuple(item.get_shape()), SAFETENSORS_DTYPES.get(item.get_dtype(), item.get_dtype()))
                for key, item in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete ({error}); fetch it again") from error


def read_tensors(
    path: Path, header: Mapping[str, TensorInfo], device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file named in `header`, on the device and in the dtype asked for.

    A tensor that needs no conversion stays a private, lazy map of the file: no second copy in memory, and writing to
    it does not write to the file. The others are converted a few at a time, the map being closed in between.
    """
    same = str(dtype).removeprefix("torch.")
    copies = torch.device(device).type != "cpu" or any(info.dtype != same for info in header.values())
    # An old pickle, not a zip archive, can only be read as a whole.
    batches = (
        _batches(header) if copies and (path.suffix == ".safetensors" or zipfile.is_zipfile(path)) else [list(header)]
    )
    for batch in batches:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for key in batch:
                    yield key, _read_tensor(file, key, path, device, dtype)
        else:
            tensors = _load_pickle(path)
            for key in batch:
                yield key, tensors.pop(key).to(device, dtype)


def read_metadata(path: Path) -> dict[str, str]:
    """The free texts that a .safetensors file carries beside its tensors; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_pickle(path: Path) -> Any:
    """Whatever a .ckpt, .bin or .pt file holds, as long as reading it runs no code; CheckpointError otherwise."""
    _check_start(path)
    _check_pickle(path)
    return _unpickle(path)


def pick_weights(names: Collection[str], stem: str, variant: str | None = None) -> list[str]:
    """Of the file names in a part's folder, those to read: one file, or an index of shards and the shards.

    The variant asked for comes first, then plain files, then fp16; safetensors before pickles. `stem` is "model" for
    the text encoder and "diffusion_pytorch_model" for the others. Empty when the folder holds no weights.
    """
    for wanted in (f".{variant}" if variant else "", "", ".fp16"):
        for first, suffix in ((stem, ".safetensors"), ("pytorch_model" if stem == "model" else stem, ".bin")):
            if (name := f"{first}{wanted}{suffix}") in names:
                return [name]
            index = f"{first}{suffix}.index{wanted}.json"
            if index in names:
                shard = re.compile(rf"{first}({re.escape(wanted)})?-\d+-of-\d+({re.escape(wanted)})?{suffix}")
                return [index, *sorted(filter(shard.fullmatch, names))]
    return []


def shards(index: Path) -> list[Path]:
    """The files named by an index of shards, which must lie beside it; CheckpointError where they do not."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files; fetch it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name) is None:
            raise CheckpointError(
                f"{index} names the file {name!r}; shards must lie beside their index. Do not trust it"
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is missing; fetch it")
    return [index.parent / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is missing or something else."""
    try:
        if path.stat().st_size > JSON_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; no such file is so large. Fetch it again")
        if not path.is_file():
            raise CheckpointError(f"{path} is no regular file; expected JSON. Fetch it again")
        value = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; fetch the whole folder") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object. Fetch it again")
    return value


def save_atomically(write: Any, path: Path) -> None:
    """Call `write(temporary path)`, then move the finished file to `path`, so that a kill leaves the old one whole.

    A kill may leave the temporary file, hidden and ending in .tmp; it can be deleted. A link is replaced, not followed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors leaves its files to the owner alone
        os.replace(temporary, path)
    except (SafetensorError, RuntimeError) as error:  # as safetensors and torch tell of a full disk
        raise OSError(f"{path} could not be written ({error}); is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


def shown(name: str) -> str:
    """A name from a file, fit for a message: not endless, and without characters that steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:120]) + ("…" if len(name) > 120 else "")


def _batches(header: Mapping[str, TensorInfo]) -> Iterable[list[str]]:
    batch: list[str] = []
    size = 0
    for key, info in header.items():
        batch.append(key)
        size += info.nbytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _check_start(path: Path) -> None:
    if not path.is_file():  # a pipe would be waited for, a device read for ever
        raise CheckpointError(f"{path} is missing or no regular file; fetch it, or give a file on a disk")
    with path.open("rb") as file:
        start = file.read(200)
    if not start:
        raise CheckpointError(f"{path} is empty; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
    if start.startswith(b"/annex/objects/") or b"annex/objects/" in start.partition(b"\n")[0]:
        raise CheckpointError(f"{path} is a git-annex pointer, not the weights; run `git annex get` in its folder")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not weights; fetch it again, from the download link")


def _read_tensor(file: Any, key: str, path: Path, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    try:
        tensor = file.get_tensor(key)
    except (SafetensorError, AttributeError, RuntimeError) as error:  # a dtype that torch has not, an absurd shape
        message = f"{path} holds {shown(key)}, which torch cannot read ({error}); fetch it again"
        raise CheckpointError(message) from error
    return tensor.to(device, dtype)  # type: ignore[no-any-return]


def _check_pickle(path: Path) -> None:
    try:
        check_pickle(path)
    except PickleError as error:
        raise CheckpointError(f"{path} {error}; {ADVICE}") from error


def _unpickle(path: Path) -> Any:
    release = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if release < SAFE_TORCH:
        raise CheckpointError(
            f"{path} is a pickle, and torch {torch.__version__} cannot read pickles safely; "
            "install torch 2.10 or newer, or use the .safetensors file"
        )
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in INERT]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a hostile or damaged pickle provokes
        raise CheckpointError(f"{path} is damaged or incomplete ({error}); {ADVICE}") from error


def _load_pickle(path: Path) -> dict[str, Tensor]:
    loaded = _unpickle(path)
    nested = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(nested, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; expected a dictionary of tensors")
    return {str(key): plain_tensor(value, path) for key, value in nested.items() if isinstance(value, Tensor)}


def plain_tensor(value: Tensor, path: Path) -> Tensor:
    """A tensor from a pickle, without gradient; CheckpointError where a few numbers pretend to be many."""
    tensor = Tensor.detach(value)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path} holds a tensor of shape {list(tensor.shape)} in {tensor.untyped_storage().nbytes()} bytes, which "
            "repeats numbers to look large; no checkpoint does. Do not trust it"
        )
    return tensor
