"""Where the parts of a model compute, and in how much memory: devices, offloading, advice when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from minisd.config import ModelConfig
from minisd.features.validate import free_memory, is_out_of_memory
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
def on_device(part: nn.Module, offload_to: torch.device | None) -> Iterator[None]:
    """Within this block a part is on the device where it computes.

    Args:
        part: a network.
        offload_to: with offloading, the device that the part is moved to, and back to main memory at the end.

    Raises:
        MemoryError: memory ran out, whatever torch calls it; the message says what helps.
    """
    weights = None
    try:
        if offload_to is not None and next(part.parameters()).device != offload_to:
            weights = part.state_dict()
            move(part, offload_to)
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or not is_out_of_memory(error):
            raise
        raise MemoryError(f"out of memory in the {type(part).__name__}; {ADVICE} ({error})") from error
    finally:
        if weights is not None:
            part.load_state_dict(weights, assign=True)


def check_memory(
    config: ModelConfig,
    count: int,
    height: int,
    width: int,
    *,
    device: torch.device,
    itemsize: int,
    tiled: bool = False,
    encoding: bool = False,
) -> None:
    """Raise ValueError if so many pictures of so many pixels cannot fit into what the device has left.

    What is counted is a lower bound, so that nothing is refused that would have fitted.
    """
    widths, downscale = config.autoencoder.block_out_channels, config.autoencoder.downscale
    # the UNet holds two maps or more at the size of latents; the autoencoder three at full size: the input of a
    # residual block, its norm and its activation
    numbers = 2 * config.unet.block_out_channels[0] / downscale**2
    if not tiled:
        numbers = max(numbers, 3 * widths[0 if encoding else min(1, len(widths) - 1)])
    needed, free = count * height * width * numbers * itemsize, free_memory(device)
    if free is not None and needed > free:
        what = f"a picture of {width}×{height}" if count == 1 else f"{count} pictures of {width}×{height} at a time"
        raise ValueError(f"{what} would take {needed / 1e9:,.1f} GB, {free / 1e9:.1f} GB are free; {ADVICE}")
