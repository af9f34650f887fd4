"""Where the parts of a model compute, and in how much memory: devices, offloading, advice when memory runs out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from minisd.unet import UNet

OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|bad_alloc|ALLOC_FAILED|buffer size", re.IGNORECASE)
ADVICE = (
    "draw smaller pictures or fewer at a time, or load the model with tile=True, dtype=torch.float16 or offload=True"
)


def best_device() -> torch.device:
    """The fastest device of this machine: cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(name: str | torch.device) -> torch.device:
    """Check that a device computes on this machine. Raises ValueError if not, TypeError for other types."""
    if not isinstance(name, (str, torch.device)):
        raise TypeError(f'device={name!r}; expected a name, such as "cpu", or a torch.device')
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        best = best_device()
        raise ValueError(f"device {name} cannot be used on this machine; leave it out to take {best}") from error
    return device


def move(part: nn.Module, device: torch.device) -> None:
    """Move a part's weights to a GPU; those of the UNet's convolutions channels last, as tensor cores read them."""
    formats = {4: torch.channels_last} if isinstance(part, UNet) else {}
    weights = {
        key: value.to(device, memory_format=formats.get(value.dim(), torch.preserve_format))
        for key, value in part.state_dict().items()
    }
    part.load_state_dict(weights, assign=True)


@contextmanager
def offloaded(part: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a part to a device for the time of this block; afterwards its weights are back where they were."""
    if next(part.parameters()).device == device:
        yield
        return
    weights = part.state_dict()
    try:
        move(part, device)
        yield
    finally:
        part.load_state_dict(weights, assign=True)


def explain(error: RuntimeError, part: nn.Module) -> Exception:
    """Turn an error that says that memory ran out, whatever torch calls it, into a MemoryError that says what helps."""
    if not is_out_of_memory(error):
        return error
    return MemoryError(f"out of memory in the {type(part).__name__}; {ADVICE} ({error})")


def free_memory(device: torch.device) -> int | None:
    """The bytes that a device has left, or None where this is unknown."""
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
    """Whether an error means that memory ran out; torch raises a RuntimeError with one of many messages."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    )
