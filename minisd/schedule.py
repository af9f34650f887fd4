"""The noise schedule: how much signal and how much noise the latents hold at each timestep.

Latents at timestep t are a mixture of clean latents x₀ and Gaussian noise ε, and come in two scales:

    variance-preserving (what the UNet sees)    x = √ᾱ x₀ + √(1−ᾱ) ε
    σ-space (what the samplers speak)           x̄ = x / √ᾱ = x₀ + σ ε,   σ = √((1−ᾱ)/ᾱ),   √ᾱ = 1/√(σ²+1)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minisd.config import ScheduleConfig

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """The noise schedule of a model: tables over the training timesteps, and the conversions built on them.

    Tables are read-only float64 NumPy arrays of length `num_train_timesteps`. Tensors meet them as Python floats, or as
    float32 copies (float64 for float64 latents).
    Sources: Ho et al. 2020, "Denoising Diffusion Probabilistic Models"; Salimans and Ho 2022, "Progressive
    Distillation for Fast Sampling of Diffusion Models" (v-prediction).
    """

    config: ScheduleConfig = ScheduleConfig()

    @cached_property
    def betas(self) -> Table:
        """β: the variance of the noise that each timestep adds."""
        first, last, count = self.config.beta_start, self.config.beta_end, self.config.num_train_timesteps
        if self.config.beta_schedule == "linear":
            return _frozen(np.linspace(first, last, count))
        return _frozen(np.linspace(first**0.5, last**0.5, count) ** 2)

    @cached_property
    def alphas_cumprod(self) -> Table:
        """ᾱ: the share of the variance that is still signal, from almost 1 down to almost 0."""
        # ᾱ_t = ∏_{s≤t} (1 − β_s)
        return _frozen(np.cumprod(1 - self.betas))

    @cached_property
    def sigmas(self) -> Table:
        """σ: noise over signal, from 0.03 up to 14.6 for Stable Diffusion."""
        # σ_t = √((1 − ᾱ_t) / ᾱ_t)
        return _frozen(np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod))

    def sigma_at(self, t: float) -> float:
        """The σ of a timestep; a fractional one is interpolated linearly, as diffusers' Euler does."""
        return float(np.interp(t, np.arange(len(self.sigmas)), self.sigmas))

    def timestep_at(self, sigma: float) -> float:
        """The timestep, often fractional, of a σ: interpolated in log σ, clamped to the ends of the table."""
        return float(np.interp(np.log(max(sigma, 1e-10)), np.log(self.sigmas), np.arange(len(self.sigmas))))

    def timesteps(self, n: int, spacing: str | None = None, rounded: bool = True) -> tuple[float, ...]:
        """Choose n of the training timesteps, largest first.

        Only trailing and linspace begin at the last timestep, where latents are almost pure noise. With n = 1, leading
        and linspace give only the clean end (1 and 0).
        Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", table 2.

        Args:
            n: how many.
            spacing: "leading", "trailing" or "linspace"; None takes the configuration's.
            rounded: whether the timesteps of linspace are rounded to whole numbers.

        Raises:
            ValueError: n timesteps do not fit the schedule.
        """
        total, spacing = self.config.num_train_timesteps, spacing or self.config.timestep_spacing
        if not 1 <= n <= total:
            raise ValueError(f"{n} timesteps asked for; the schedule has {total}: choose from 1 to {total}")
        chosen: Table
        if spacing == "leading":
            chosen = np.arange(float(n))[::-1] * (total // n) + self.config.steps_offset
        elif spacing == "trailing":
            chosen = np.arange(total, 0, -total / n)[:n].round() - 1
        elif spacing == "linspace":
            chosen = np.linspace(0, total - 1, n)[::-1]
            chosen = chosen.round() if rounded else chosen
        else:
            raise ValueError(f"spacing={spacing!r}; expected 'leading', 'trailing' or 'linspace'")
        if chosen[0] > total - 1:
            raise ValueError(
                f"{n} timesteps with {spacing} spacing begin at {chosen[0]:g}, past the schedule's last, "
                f"{total - 1}; use fewer steps, or trailing spacing"
            )
        return tuple(float(t) for t in chosen)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Add unit Gaussian noise (n, …) to clean latents (n, …), as much as timesteps (n,) have."""
        signal, spread = self._signal_and_noise(latents, timesteps)
        # x = √ᾱ x₀ + √(1−ᾱ) ε                     (Ho et al. 2020, equation 4)
        return (signal * latents + spread * noise).to(latents.dtype)

    def to_v(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity v of clean latents (n, …) and noise (n, …) at timesteps (n,)."""
        signal, spread = self._signal_and_noise(latents, timesteps)
        # v = √ᾱ ε − √(1−ᾱ) x₀                     (Salimans and Ho 2022, appendix D)
        return (signal * noise - spread * latents).to(latents.dtype)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The training target of the UNet, by the prediction type: the noise, v, or the clean latents."""
        if self.config.prediction_type == "v_prediction":
            return self.to_v(latents, noise, timesteps)
        return noise if self.config.prediction_type == "epsilon" else latents

    def to_x0(self, prediction: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that a prediction at noisy latents (n, …) and timesteps (n,) implies."""
        signal, spread = self._signal_and_noise(latents, timesteps)
        return self._convert(prediction, latents, signal, spread)[0].to(latents.dtype)

    def to_epsilon(self, prediction: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that a prediction at noisy latents (n, …) and timesteps (n,) implies."""
        signal, spread = self._signal_and_noise(latents, timesteps)
        return self._convert(prediction, latents, signal, spread)[1].to(latents.dtype)

    def convert(self, prediction: Tensor, latents: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Split noisy latents (n, …) of level σ > 0, given the UNet's prediction, into (x0, epsilon)."""
        signal = (sigma**2 + 1) ** -0.5
        return self._convert(prediction, latents, signal, sigma * signal)

    def _convert(
        self, prediction: Tensor, x: Tensor, signal: Tensor | float, spread: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        # each case solves x = √ᾱ x₀ + √(1−ᾱ) ε, given one of x₀, ε, v = √ᾱ ε − √(1−ᾱ) x₀
        if self.config.prediction_type == "epsilon":
            return (x - spread * prediction) / signal, prediction
        if self.config.prediction_type == "v_prediction":
            return signal * x - spread * prediction, signal * prediction + spread * x
        return prediction, (x - signal * prediction) / spread

    def snr(self, timesteps: Tensor) -> Tensor:
        """The signal-to-noise ratio ᾱ/(1−ᾱ) = 1/σ² at timesteps (any shape), float32, on their device."""
        return _look_up(1 / self.sigmas**2, timesteps, torch.float32)

    def _signal_and_noise(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        # √ᾱ and √(1−ᾱ), shaped (n, 1, …) to scale `like`, in float32 at least
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = (-1, *(1,) * (like.ndim - 1))
        signal = _look_up(np.sqrt(self.alphas_cumprod), timesteps, dtype).reshape(shape)
        return signal, _look_up(np.sqrt(1 - self.alphas_cumprod), timesteps, dtype).reshape(shape)


def _look_up(table: Table, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    # cast before moving: Apple's MPS has no float64
    return torch.tensor(table, dtype=dtype).to(timesteps.device)[timesteps]


def _frozen(table: NDArray[Any]) -> Table:
    table.setflags(write=False)
    return table
