"""Copies that do not make Python wait for a GPU; `validate.FiniteChecks` are checks that do not.

A GPU works through a queue of operations. To read a number, or to copy from ordinary memory, Python waits until the
queue is empty, and then the GPU waits for Python.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minisd.generate import NoiseSource
from minisd.guidance import Guidance


def queued(noise: NoiseSource, device: torch.device) -> NoiseSource:
    """Return a noise source that copies the noise of one on the CPU to a GPU in the GPU's queue."""

    def draw() -> Tensor:
        drawn = noise()
        if device.type == "mps":  # reads the source later, when it may be gone
            return drawn.to(device)
        return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)

    return draw


def guidance_on(guidance: Guidance, device: torch.device) -> Guidance:
    """Return a guidance with its scales, one per image, as a tensor (n, 1, 1, 1) where each step needs them."""
    if type(guidance) is not Guidance:
        return guidance
    scale: Any = torch.tensor(guidance.scale, dtype=torch.float32, device=device).view(-1, 1, 1, 1)
    return replace(guidance, scale=scale)
