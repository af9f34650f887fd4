"""Output to the terminal, and multi-process utilities for `torchrun`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import torch


# Control characters, except line breaks and tabs, and those that reorder text: all that steers a terminal.
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def log(text: str) -> None:
    """Print a line to stderr; stdout is reserved for file names."""
    show(text, sys.stderr)


def show(text: object, file: TextIO | None = None) -> None:
    """Print a line in a single write, so that lines from several processes do not interleave.

    Characters that steer the terminal are escaped as in Python: \\x1b.
    """
    line = CONTROLS.sub(lambda match: ascii(match[0])[1:-1], str(text))
    print(f"{line}\n", end="", file=file, flush=True)


def child_environment(**variables: object) -> dict[str, str]:
    """Return the environment for Python processes, which then import no modules from the working folder."""
    return os.environ | {"PYTHONSAFEPATH": "1"} | {name: str(value) for name, value in variables.items()}


def rank() -> int:
    """Return the rank of this process under torchrun, else 0."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes under torchrun, else 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_device(device: str | None) -> str | None:
    """Return the device of this process: under torchrun its own GPU, unless one is given by index."""
    if world_size() == 1 or device not in (None, "cuda"):
        return device
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else device


@contextmanager
def process_group(device: torch.device | None = None) -> Iterator[None]:
    """Join torchrun's process group, if any and not joined yet: NCCL on CUDA, Gloo elsewhere."""
    if world_size() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    cuda = device is not None and device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_zero_first(action: Callable[[], None]) -> None:
    """Run `action` on rank 0 while the other ranks wait. If it fails, the other ranks exit silently."""
    failed = [False]
    if rank() == 0:
        try:
            action()
        except Exception:
            failed = [True]
            raise
        finally:
            _broadcast(failed)
    else:
        _broadcast(failed)
        if failed[0]:
            raise SystemExit(1)


def sum_over_ranks(*numbers: int) -> list[int]:
    """Return the sum of each number over all ranks. Acts as a barrier."""
    if world_size() == 1:
        return list(numbers)
    import torch.distributed as dist

    shares: list[Any] = [None] * world_size()
    dist.all_gather_object(shares, numbers)
    return [sum(values) for values in zip(*shares, strict=True)]


def _broadcast(values: list[bool]) -> None:
    if world_size() > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(values, 0)
