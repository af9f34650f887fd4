"""Argument validation.

Each function returns the validated value. They raise TypeError for a value of the wrong type, ValueError for an invalid
value, and FloatingPointError for tensors with NaN or infinity.
"""

from __future__ import annotations

import operator
import os
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_int(name: str, value: Any, low: int, high: int) -> int:
    """Check for a Python or NumPy integer in [low, high]; True and 3.0 are rejected."""
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        kind = TypeError if number is None else ValueError
        raise kind(f"{name}={_shorten(value)}; expected an integer from {low} to {high}")
    return number


def check_float(name: str, value: Any, low: float = -float("inf"), high: float = float("inf"), hint: str = "") -> float:
    """Check for a finite number of any numeric type in [low, high]; True and "3" are rejected."""
    limits = "" if high == float("inf") else f" from {low:g} to {high:g}"
    message = f"{name}={_shorten(value)}; expected a finite number{limits}{hint}"
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__float__"):
        raise TypeError(message)
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # an array of several numbers
        raise TypeError(message) from error
    except OverflowError:
        number = float("inf")
    if not abs(number) < float("inf") or not low <= number <= high:
        raise ValueError(message)
    return number


def check_strings(name: str, value: Any) -> list[str]:
    """Check for a string or a non-empty list of strings in valid Unicode, and return a list."""
    strings = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not strings or not all(isinstance(string, str) for string in strings):
        raise TypeError(f"{name} must be a string or a non-empty list of strings, got {_shorten(value)}")
    for string in strings:
        try:
            string.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} has an unpaired surrogate in {_shorten(string)}; expected valid Unicode"
            ) from error
    return strings


def check_shape(name: str, value: Any, *shape: int | str) -> Tensor:
    """Check for a floating-point tensor of a given shape, where a string such as "n" matches any size above 0."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {found}")
    fits = len(shape) == value.dim() and all(
        size > 0 if isinstance(expected, str) else size == expected
        for expected, size in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected ({', '.join(map(str, shape))})")
    return value


def check_tensor(name: str, value: Any, *shape: int | str) -> Tensor:
    """Check for a finite floating-point tensor of a given shape, as in `check_shape`."""
    return check_finite_input(name, check_shape(name, value, *shape))


def check_finite_input(name: str, value: Tensor) -> Tensor:
    """Check an input for NaN and infinity."""
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(not_finite_input(name))
    return value


def not_finite_input(name: str) -> str:
    """Return the message for an input with NaN or infinity."""
    return f"{name} contains NaN or infinity; expected finite values"


def check_finite(output: Tensor, part: str) -> Tensor:
    """Check the output of a module for NaN and infinity."""
    if not bool(torch.isfinite(output).all()):
        raise FloatingPointError(not_finite(output.dtype, part))
    return output


def not_finite(dtype: torch.dtype, part: str) -> str:
    """Return the message for a module that returned NaN or infinity."""
    advice = "load the model in float32" if dtype == torch.float16 else "check the checkpoint"
    return f"the {part} returned NaN or infinity in {dtype}; {advice}"


class Flag:
    """A Boolean scalar on its way from a device. Only CUDA tells when it has arrived."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._event = value, None
        if value.is_cuda:
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(value.device))

    def has_arrived(self) -> bool:
        """Return whether the value can be read without waiting."""
        return self._event is not None and self._event.query()

    def read(self) -> bool:
        """Wait for the value, and return it."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._value)


class FiniteChecks:
    """Checks for NaN and infinity in the course of a run.

    On a CPU, `check` raises FloatingPointError at once. On a GPU it queues the check, and raises for an earlier one
    whose result has arrived; `settle` waits for the others.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Flag, str]] = deque()

    def check(self, value: Tensor, message: str) -> None:
        """Check a tensor for finite values; `message` is that of the error."""
        finite = torch.isfinite(value).all()
        if value.device.type == "cpu":
            if not bool(finite):
                raise FloatingPointError(message)
            return
        self._pending.append((Flag(finite), message))
        while self._pending and self._pending[0][0].has_arrived():
            self._read_first()

    def settle(self) -> None:
        """Wait for the results of all checks. Raises FloatingPointError for the first that failed."""
        while self._pending:
            self._read_first()

    def _read_first(self) -> None:
        flag, message = self._pending.popleft()
        if not flag.read():
            raise FloatingPointError(message)


def check_unit_range(name: str, value: Tensor) -> Tensor:
    """Check that images are roughly in [-1, 1]; values outside [-2, 2] raise ValueError, to catch pixels in 0…255."""
    low, high = map(float, value.aminmax())
    if low < -2 or high > 2:
        raise ValueError(
            f"{name} has values from {low:g} to {high:g}; expected [-1, 1]: divide pixels by 127.5 and subtract 1"
        )
    return value


def check_dtype(dtype: Any) -> torch.dtype:
    """Check for a dtype supported for weights."""
    if dtype not in DTYPES:
        kind = ValueError if isinstance(dtype, torch.dtype) else TypeError
        raise kind(f"dtype={_shorten(dtype)}; expected one of {', '.join(map(str, DTYPES))}")
    return dtype


def check_path(name: str, value: Any) -> Path:
    """Check for a valid path, which need not exist."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}={_shorten(value)}; expected a path, as a string or a Path")
    path = Path(value)
    if "\0" in str(path):
        raise ValueError(f"{name}={_shorten(value)} contains a null byte; remove it")
    try:
        path.exists()
    except PermissionError:
        return path
    except OSError as error:
        raise ValueError(f"{name}={_shorten(value)} is not a valid path ({error.strerror}); shorten it") from error
    return path


def check_inside(folder: Path, name: Any) -> Path:
    """Check for the name of a file in a folder or below it, as data files contain it, with / between folders.

    Raises ValueError for a path that leaves the folder on any system, also by a link, and unless it is a regular file.
    """
    windows = PureWindowsPath(name) if isinstance(name, str) else None
    path = folder / str(name)
    if windows is None or windows.anchor or {"..", ""} & {*windows.parts} or re.search(r"[\\:\0]", name):
        raise ValueError(f"{_shorten(name)} is not the name of a file in {folder}; expected one such as '00.png'")
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{_shorten(name)} is not a regular file in {folder}; copy it there, without links")
    return path


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a name such as "float32". Raises ValueError for one that weights cannot have."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if name not in known:
        raise ValueError(f"precision {_shorten(name)}; expected one of {', '.join(known)}")
    return known[name]


def check_writable(folder: Path) -> None:
    """Raise OSError unless files can be created in a folder, which need not exist."""
    absolute = check_path("folder", folder).absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is not a folder; choose another output folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write to {existing}; choose another output folder")


def _shorten(value: Any) -> str:
    """Format a value for an error message, truncated to 80 characters."""
    if isinstance(value, Tensor) and value.dim():
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} …"
