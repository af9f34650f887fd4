"""Checks at the door: what a caller hands over is looked at before work begins, and refused in one plain sentence.

Everywhere TypeError means another kind of value than expected, ValueError a value of that kind that cannot be used, and
FloatingPointError NaN or infinity where numbers should be.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|bad_alloc|ALLOC_FAILED|buffer size", re.IGNORECASE)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from low to high, of Python's or numpy's; neither True nor 3.0 is one."""
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        kind = TypeError if number is None else ValueError
        raise kind(f"{name}={_shown(value)}; expected a whole number from {low} to {high}")
    return number


def real(name: str, value: Any, low: float = -float("inf"), high: float = float("inf"), hint: str = "") -> float:
    """A finite number from low to high, of any numeric kind; neither True nor "3" is one."""
    limits = "" if high == float("inf") else f" from {low:g} to {high:g}"
    expected = f"{name}={_shown(value)}; expected a finite number{limits}{hint}"
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__float__"):
        raise TypeError(expected)
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # an array of several numbers
        raise TypeError(expected) from error
    except OverflowError:
        number = float("inf")
    if not abs(number) < float("inf") or not low <= number <= high:
        raise ValueError(expected)
    return number


def path(name: str, value: Any) -> Path:
    """The path of a file or folder, there or not; ValueError for what can be no name."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}={_shown(value)}; expected the path of a file or folder, as a string or a Path")
    found = Path(value)
    if "\0" in str(found):
        raise ValueError(f"{name}={_shown(value)} has a zero byte, which no name can have; leave it out")
    try:
        found.exists()
    except PermissionError:
        return found
    except OSError as error:
        raise ValueError(f"{name}={_shown(value)} cannot be a path ({error.strerror}); give a shorter one") from error
    return found


def writable(folder: Path) -> None:
    """Raise OSError where no file can be put into a folder, which need not be there yet."""
    absolute = path("folder", folder).absolute()
    there = next(each for each in (absolute, *absolute.parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is no folder, so nothing can be put into it; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} is a folder that you may not write into; choose another place")


def texts(name: str, value: Any) -> list[str]:
    """A string, or a list of them that is not empty, as a list; ValueError for text that is not valid Unicode."""
    listed = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not listed or not all(isinstance(one, str) for one in listed):
        raise TypeError(f"{name} must be a string or a non-empty list of strings; got {_shown(value)}")
    for one in listed:
        try:
            one.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} has half a surrogate pair in {_shown(one)}; expected valid Unicode") from error
    return listed


def shaped(name: str, value: Any, *shape: int | str) -> Tensor:
    """A tensor of floats; a letter in the shape stands for any length but 0."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of floats; got {what}")
    fits = len(shape) == value.dim() and all(
        length > 0 if isinstance(wanted, str) else length == wanted
        for wanted, length in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected ({', '.join(map(str, shape))})")
    return value


def finite_input(name: str, value: Tensor) -> Tensor:
    """A tensor without NaN and infinity."""
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(f"{name} holds NaN or infinity; expected finite numbers")
    return value


def floats(name: str, value: Any, *shape: int | str) -> Tensor:
    """A tensor of finite floats, of a shape as for `shaped`."""
    return finite_input(name, shaped(name, value, *shape))


def about_unit(name: str, value: Tensor) -> Tensor:
    """Images in [-1, 1], or a little beyond; ValueError from 2 on, which catches pixels from 0 to 255."""
    low, high = map(float, value.aminmax())
    if low < -2 or high > 2:
        raise ValueError(
            f"{name} has numbers from {low:g} to {high:g}; expected [-1, 1]: divide pixels by 127.5 and subtract 1"
        )
    return value


def precision(dtype: Any) -> torch.dtype:
    """A dtype that weights can have."""
    if dtype not in PRECISIONS:
        kind = ValueError if isinstance(dtype, torch.dtype) else TypeError
        raise kind(f"dtype={_shown(dtype)}; expected {', '.join(map(str, PRECISIONS))}")
    return dtype


def free_memory(device: torch.device) -> int | None:
    """How many bytes a device has left, or None where nobody says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) * 1024 if found else None
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out; torch raises a RuntimeError with one of many texts."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    )


def _shown(value: Any) -> str:
    """What a message says of a value: enough to recognise it."""
    if isinstance(value, Tensor) and value.dim():
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} …"
