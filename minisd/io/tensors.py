"""Memory-mapped reading of tensors from safetensors and pickle files, without running any code in them."""

from __future__ import annotations

import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisd.io.pickles import INERT, PickleError, check_pickle, record_sizes

SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
BATCH_BYTES = 2**28
# The beginnings of files that are not weights.
NOT_WEIGHTS = {
    rb"$": "is empty; download it again",
    rb"version https://git-lfs": "is a git-lfs pointer, not the weights; run `git lfs pull` in its folder",
    rb"[^\n]*annex/objects/": "is a git-annex pointer, not the weights; run `git annex get` in its folder",
    rb"\s*<(!doctype|html|\?xml)": "is a web page, not weights; download it again, using the download link",
}
ADVICE = "download it again from a source you trust, preferably as .safetensors"


class CheckpointError(ValueError):
    """Raised for a checkpoint or adapter file that is invalid, unsupported or unsafe."""


class TensorInfo(NamedTuple):
    """The shape and dtype name (such as "float32") of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """The size in bytes; dtypes unknown to torch count as 1 byte per element."""
        return math.prod(self.shape) * (getattr(torch, self.dtype).itemsize if hasattr(torch, self.dtype) else 1)


class _Inert:
    """Inert stand-in for the non-tensor classes in old checkpoints."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class ParameterDict(_Inert):
    """Inert stand-in for torch's class, which keeps only the parameters, by name."""

    def __init__(self) -> None:
        self.parameters: dict[str, Tensor] = {}

    def __setstate__(self, state: object) -> None:
        found = state.get("_parameters") if isinstance(state, dict) else None
        self.parameters = found if isinstance(found, dict) else {}


def is_safetensors(path: Path) -> bool:
    """Return whether a file is in safetensors format: by its first bytes or, if they are unclear, by its name."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # the header in JSON, after its length
        return True
    # otherwise a zip archive or a pickle, as torch.save writes, or a damaged file
    is_pickle = start[:4] == b"PK\3\4" or re.match(rb"\x80[\1-\5]", start)
    return not is_pickle and path.suffix in (".safetensors", ".sft")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the shape and dtype of each tensor in a safetensors or pickle file, without reading the data.

    Raises:
        CheckpointError: If the file is corrupted, is not a weight file, or could run code.
    """
    _check_start(path)
    if not is_safetensors(path):
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
        raise CheckpointError(f"{path} is corrupted or incomplete ({error}); download it again") from error


def read_tensors(
    path: Path, header: Mapping[str, TensorInfo], device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors listed in `header` from a file, on a device and in a dtype.

    Tensors that need no conversion are private (copy-on-write) memory maps, so there is no second copy in memory and
    the file is never modified. Others are converted in batches, closing the memory map in between.
    """
    same = str(dtype).removeprefix("torch.")
    mapped = torch.device(device).type == "cpu" and all(info.dtype == same for info in header.values())
    # old pickles, which are not zip archives, can only be read at once
    at_once = mapped or not (is_safetensors(path) or zipfile.is_zipfile(path))
    for keys in [list(header)] if at_once else _batches(header):
        with _open(path) as read:
            for key in keys:
                yield key, read(key).to(device, dtype)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty for other files."""
    if not is_safetensors(path):
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_pickle(path: Path) -> Any:
    """Load the content of a .ckpt, .bin or .pt file. Raises CheckpointError if it is corrupted or could run code."""
    _check_start(path)
    _check_pickle(path)
    return _unpickle(path)


def plain_tensor(value: Tensor, path: Path) -> Tensor:
    """Detach a tensor from a pickle. Raises CheckpointError if it is larger than its storage."""
    tensor = Tensor.detach(value)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path} has a tensor of shape {list(tensor.shape)} in a storage of {tensor.untyped_storage().nbytes()} "
            "bytes, which repeats numbers, unlike any checkpoint; do not trust it"
        )
    return tensor


def same_shape(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether shapes match, treating a linear layer (c, d) as a 1×1 convolution (c, d, 1, 1)."""
    return shape in (expected, (*expected, 1, 1)) or (*shape, 1, 1) == expected


def printable(name: str) -> str:
    """Format a name from a file for an error message: truncated, and without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:120]) + ("…" if len(name) > 120 else "")


def _batches(header: Mapping[str, TensorInfo]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for key, info in header.items():
        batch.append(key)
        size += info.nbytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


@contextmanager
def _open(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Open a file, and yield a function that reads one tensor."""
    if not is_safetensors(path):
        yield _load_pickle(path).pop
        return

    def read(key: str) -> Tensor:
        try:
            return file.get_tensor(key)  # type: ignore[no-any-return]
        except (SafetensorError, AttributeError, RuntimeError) as error:  # an unknown dtype or invalid shape
            message = f"{path} has {printable(key)}, which torch cannot read ({error}); download it again"
            raise CheckpointError(message) from error

    with safe_open(path, framework="pt") as file:
        yield read


def _check_start(path: Path) -> None:
    """Reject files that are not weights, based on their first bytes."""
    if not path.is_file():  # reading a pipe or device could block forever
        raise CheckpointError(f"{path} is missing or not a regular file; expected a file on disk")
    with path.open("rb") as file:
        start = file.read(200)
    for pattern, fault in NOT_WEIGHTS.items():
        if re.match(pattern, start, re.IGNORECASE):
            raise CheckpointError(f"{path} {fault}")


def _check_pickle(path: Path) -> None:
    try:
        check_pickle(path)
    except PickleError as error:
        raise CheckpointError(f"{path} {error}; {ADVICE}") from error


def _unpickle(path: Path) -> Any:
    zipped, sizes = zipfile.is_zipfile(path), Counter[int]()

    def on_cpu(storage: Any, location: str) -> Any:
        sizes[storage.nbytes()] += 1
        if sum(size * count for size, count in sizes.items()) > path.stat().st_size:
            raise ValueError("its tensors need more bytes than the file has")
        return storage

    try:
        inert: list[Any] = [(ParameterDict if name.endswith(".ParameterDict") else _Inert, name) for name in INERT]
        misnamed = path.suffix == ".safetensors"  # a path of this name is not given to torch's unpickler
        with path.open("rb") as file, torch.serialization.safe_globals(inert):
            source = file if misnamed else path
            content = torch.load(source, map_location=on_cpu, weights_only=True, mmap=zipped and not misnamed)
        if zipped and (missing := sizes - Counter(record_sizes(path))):
            raise ValueError(f"no storage has the {min(missing):,} bytes that a tensor needs")
    except Exception as error:  # corrupted or malicious pickles can raise anything
        raise CheckpointError(f"{path} is corrupted or incomplete ({error}); {ADVICE}") from error
    return content


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a pickle, or of its "state_dict" entry."""
    loaded = _unpickle(path)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} contains a {type(loaded).__name__}; expected a dictionary of tensors")
    return {str(key): plain_tensor(value, path) for key, value in state.items() if isinstance(value, Tensor)}
