"""Checks and copies that do not make Python wait for a GPU.

A GPU works through a queue of operations. To read a number, or to copy from ordinary memory, Python waits until the
queue is empty, and then the GPU waits for Python.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minisd.generate import NoiseSource
from minisd.guidance import Guidance


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
            _raise_unless(bool(finite), message)
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
        _raise_unless(flag.read(), message)


def _raise_unless(finite: bool, message: str) -> None:
    if not finite:
        raise FloatingPointError(message)


def queued(noise: NoiseSource, device: torch.device) -> NoiseSource:
    """Return a noise source on a device, given one on the CPU. To a GPU, the noise is copied in its queue."""

    def draw() -> Tensor:
        drawn = noise()
        if device.type in ("cpu", "mps"):  # MPS reads the source later, when it may be gone
            return drawn.to(device)
        return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)

    return draw


def guidance_on(guidance: Guidance, device: torch.device) -> Guidance:
    """Return a guidance with its scales per image as a tensor (n, 1, 1, 1) on a device, where each step needs them."""
    if type(guidance) is not Guidance or not isinstance(guidance.scale, tuple):
        return guidance
    scale: Any = torch.tensor(guidance.scale, dtype=torch.float32, device=device).view(-1, 1, 1, 1)
    return replace(guidance, scale=scale)
