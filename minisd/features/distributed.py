"""Several processes at once, as `torchrun` starts them: which one this is, and what they tell each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def say(text: str) -> None:
    """Tell whoever started this process, on standard error: standard output is for the names of files."""
    print(text, file=sys.stderr, flush=True)


def rank() -> int:
    """This process's number under torchrun, else 0."""
    return int(os.environ.get("RANK", 0))


def processes() -> int:
    """How many processes torchrun started, else 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


def own_device(device: str | None) -> str | None:
    """The device of this process: under torchrun each has a GPU of its own, unless the caller names one by number."""
    if processes() == 1 or device not in (None, "cuda"):
        return device
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else device


@contextmanager
def process_group(device: torch.device | None = None) -> Iterator[None]:
    """Join the other processes of torchrun, if there are any: by nccl when they compute on CUDA, else by gloo."""
    if processes() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    cuda = device is not None and device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def first_alone(action: Callable[[], None]) -> None:
    """Run `action` in process 0, while the others wait. Where it fails there, the others end without a word."""
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


def total(*numbers: int) -> list[int]:
    """The sums of the numbers over all processes, which wait for each other here."""
    if processes() == 1:
        return list(numbers)
    import torch.distributed as dist

    shares: list[Any] = [None] * processes()
    dist.all_gather_object(shares, numbers)
    return [sum(each) for each in zip(*shares, strict=True)]


def _broadcast(values: list[bool]) -> None:
    if processes() > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(values, 0)
