"""Device selection, CPU offloading, out-of-memory errors, and use of one model by several threads."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minisd.unet import UNet

if TYPE_CHECKING:
    from minisd.pipeline.stable_diffusion import StableDiffusion

OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|bad_alloc|ALLOC_FAILED|buffer size", re.IGNORECASE)
ADVICE = "draw smaller images or fewer at a time, or load the model with tile=True, dtype=torch.float16 or offload=True"


def best_device() -> torch.device:
    """Return the first available device of cuda, mps and cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(name: str | torch.device) -> torch.device:
    """Return a device after checking that it works. Raises TypeError or ValueError if it does not."""
    if not isinstance(name, (str, torch.device)):
        raise TypeError(f'device={name!r}; expected a torch.device or a string such as "cpu"')
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        best = best_device()
        raise ValueError(f"device {name} is not available on this machine; omit it to use {best}") from error
    return device


def move(part: nn.Module, device: torch.device) -> None:
    """Move a module's weights to a GPU, with the UNet's convolutions in channels_last for the tensor cores."""
    formats = {4: torch.channels_last} if isinstance(part, UNet) else {}
    weights = {
        key: value.to(device, memory_format=formats.get(value.dim(), torch.preserve_format))
        for key, value in part.state_dict().items()
    }
    part.load_state_dict(weights, assign=True)


@contextmanager
def offloaded(part: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a module to a device inside a `with` block, and restore its original weights afterwards."""
    if next(part.parameters()).device == device:
        yield
        return
    weights = part.state_dict()
    try:
        move(part, device)
        yield
    finally:
        part.load_state_dict(weights, assign=True)


def free_memory(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes, or None if unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
        return int(found[1]) * 1024 if found else None
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error is an out-of-memory error, including torch's many plain RuntimeErrors."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    )


def check_memory(sd: StableDiffusion, count: int, height: int, width: int, encoding: bool = False) -> None:
    """Raise ValueError if `count` images of this size cannot fit into the free device memory.

    The estimate is a lower bound, so a request that fits is never rejected.
    """
    widths = sd.config.autoencoder.block_out_channels
    # the UNet holds at least two feature maps at latent resolution, the autoencoder three at full resolution: the
    # input of a residual block, its norm and its activation
    numbers = 2 * sd.config.unet.block_out_channels[0] / sd.downscale**2
    if sd.tile is None:
        numbers = max(numbers, 3 * widths[0 if encoding else min(1, len(widths) - 1)])
    needed, free = count * height * width * numbers * sd.dtype.itemsize, free_memory(sd.device)
    if free is not None and needed > free:
        batch = f"{count} image{'' if count == 1 else 's'} of {width}×{height}"
        raise ValueError(f"{batch} would need {needed / 1e9:,.1f} GB, but only {free / 1e9:.1f} GB are free; {ADVICE}")


class Usage:
    """The drawings in progress, so that no thread changes a model with which another one draws."""

    def __init__(self) -> None:
        self._lock, self._drawings = threading.RLock(), dict[object, int]()

    def __reduce__(self) -> Any:  # a copy of a model is not in use
        return Usage, ()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Mark a drawing as in progress in this thread, once no other thread changes the model."""
        drawing = object()
        with self._lock:
            self._drawings[drawing] = threading.get_ident()
        try:
            yield
        finally:
            del self._drawings[drawing]

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Keep other threads from starting to draw. Raises RuntimeError if one does already."""
        with self._lock:
            if {*self._drawings.values()} - {threading.get_ident()}:
                raise RuntimeError(
                    "another thread is drawing with this model; change it afterwards, or load another one"
                )
            yield
