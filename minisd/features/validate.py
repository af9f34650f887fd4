"""Checks of arguments, made before any work begins.

Each returns the value it checked. TypeError stands for a value of the wrong type, ValueError for one of the right type
that cannot be used, FloatingPointError for NaN or infinity.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_int(name: str, value: Any, low: int, high: int) -> int:
    """An integer of Python or numpy from low to high; True and 3.0 are not integers."""
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        kind = TypeError if number is None else ValueError
        raise kind(f"{name}={_shorten(value)}; expected a whole number from {low} to {high}")
    return number


def check_float(name: str, value: Any, low: float = -float("inf"), high: float = float("inf"), hint: str = "") -> float:
    """A finite number of any numeric type from low to high; True and "3" are not numbers."""
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
    """A string or a non-empty list of strings, as a list; ValueError for invalid Unicode."""
    strings = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not strings or not all(isinstance(string, str) for string in strings):
        raise TypeError(f"{name} must be a string or a non-empty list of strings; got {_shorten(value)}")
    for string in strings:
        try:
            string.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} has half a surrogate pair in {_shorten(string)}; expected valid Unicode"
            ) from error
    return strings


def check_shape(name: str, value: Any, *shape: int | str) -> Tensor:
    """A tensor of floats of this shape; a string such as "n" stands for any size but 0."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of floats; got {found}")
    fits = len(shape) == value.dim() and all(
        size > 0 if isinstance(expected, str) else size == expected
        for expected, size in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected ({', '.join(map(str, shape))})")
    return value


def check_tensor(name: str, value: Any, *shape: int | str) -> Tensor:
    """A tensor of finite floats, of a shape as in `check_shape`."""
    return check_finite_input(name, check_shape(name, value, *shape))


def check_finite_input(name: str, value: Tensor) -> Tensor:
    """A tensor without NaN or infinity."""
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(f"{name} holds NaN or infinity; expected finite numbers")
    return value


def check_finite(output: Tensor, part: str) -> Tensor:
    """The output of a part of the model, without NaN or infinity."""
    if not bool(torch.isfinite(output).all()):
        advice = "load the model in float32" if output.dtype == torch.float16 else "check the checkpoint"
        raise FloatingPointError(f"the {part} returned NaN or infinity in {output.dtype}; {advice}")
    return output


def check_unit_range(name: str, value: Tensor) -> Tensor:
    """Images in [-1, 1], or a little outside; ValueError beyond [-2, 2], which catches pixels from 0 to 255."""
    low, high = map(float, value.aminmax())
    if low < -2 or high > 2:
        raise ValueError(
            f"{name} has numbers from {low:g} to {high:g}; expected [-1, 1]: divide pixels by 127.5 and subtract 1"
        )
    return value


def check_dtype(dtype: Any) -> torch.dtype:
    """A dtype that weights can have."""
    if dtype not in DTYPES:
        kind = ValueError if isinstance(dtype, torch.dtype) else TypeError
        raise kind(f"dtype={_shorten(dtype)}; expected {', '.join(map(str, DTYPES))}")
    return dtype


def check_path(name: str, value: Any) -> Path:
    """The path of a file or folder, which need not exist; ValueError for an impossible name."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}={_shorten(value)}; expected the path of a file or folder, as a string or a Path")
    path = Path(value)
    if "\0" in str(path):
        raise ValueError(f"{name}={_shorten(value)} has a zero byte, which paths cannot have; leave it out")
    try:
        path.exists()
    except PermissionError:
        return path
    except OSError as error:
        raise ValueError(f"{name}={_shorten(value)} cannot be a path ({error.strerror}); give a shorter one") from error
    return path


def check_writable(folder: Path) -> None:
    """Raise OSError unless files can be created in a folder, which need not exist yet."""
    absolute = check_path("folder", folder).absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is not a folder, so no file can be written there; choose another place")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"you may not write to the folder {existing}; choose another place")


def _shorten(value: Any) -> str:
    """A value as a message shows it: enough to recognise it."""
    if isinstance(value, Tensor) and value.dim():
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} …"
