"""Where the parts of a model compute, and in how much memory: devices, offloading, advice when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from minisd.features.validate import is_out_of_memory
from minisd.unet import UNet

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
