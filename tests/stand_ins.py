"""What the tests of the samplers share: a stand-in for the UNet, and a Gaussian whose score is known."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from minisd.config import ScheduleConfig
from minisd.samplers import Plan, State
from minisd.schedule import Schedule

SHAPE = (2, 4, 3, 5)
SPACINGS = ("leading", "trailing", "linspace")
MU = 0.7


def unet(x: Tensor, t: float) -> Tensor:
    """Stands in for the UNet: a smooth, nonlinear function of latents and timestep."""
    return torch.tanh(1.3 * x.roll(1, -1) + math.sin(t / 150)) + 0.3 * torch.cos(2 * x) - 0.2


def gaussian(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def schedule_for(prediction_type: str = "epsilon", spacing: str | None = "leading", **more: Any) -> Schedule:
    return Schedule(ScheduleConfig(prediction_type=prediction_type, timestep_spacing=spacing, **more))


# A Gaussian, whose score is known. For x₀ ~ N(μ, c²) the noise that the best denoiser predicts in σ-space is
# ε = σ (x̄ − μ) / (c² + σ²), and dx̄/dσ = ε is solved by x̄ − μ ∝ √(c² + σ²).


def predict_gaussian(plan: Plan, state: State, c: float) -> Tensor:
    sigma = plan.sigmas[state.index]
    return sigma * (state.sample - MU) / (c**2 + sigma**2)
