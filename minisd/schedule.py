"""The noise schedule: the amounts of signal and noise in the latents at each timestep.

Noisy latents at timestep t are a mixture of clean latents x₀ and Gaussian noise ε, at one of two scales:

    variance-preserving (UNet input)    x = √ᾱ x₀ + √(1−ᾱ) ε
    σ-space (samplers)                  x̄ = x / √ᾱ = x₀ + σ ε,   σ = √((1−ᾱ)/ᾱ),   √ᾱ = 1/√(σ²+1)
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
    """Noise schedule of a model: tables indexed by training timestep, and conversions between predictions.

    Tables are read-only float64 NumPy arrays of length `num_train_timesteps`. They are converted to float32 (float64
    for float64 latents) before they are combined with tensors.
    Sources: Ho et al. 2020, "Denoising Diffusion Probabilistic Models"; Salimans and Ho 2022, "Progressive
    Distillation for Fast Sampling of Diffusion Models" (v-prediction).
    """

    config: ScheduleConfig = ScheduleConfig()

    @cached_property
    def betas(self) -> Table:
        """Variance β of the noise added at each timestep, before `rescale_betas_zero_snr`."""
        first, last, count = self.config.beta_start, self.config.beta_end, self.config.num_train_timesteps
        if self.config.beta_schedule == "linear":
            return _frozen(np.linspace(first, last, count))
        if self.config.beta_schedule == "scaled_linear":
            return _frozen(np.linspace(first**0.5, last**0.5, count) ** 2)
        raise ValueError(f"unknown beta_schedule {self.config.beta_schedule!r}; expected 'linear' or 'scaled_linear'")

    @cached_property
    def alphas_cumprod(self) -> Table:
        """Signal variance ᾱ at each timestep, decreasing from nearly 1 to nearly 0."""
        # ᾱ_t = ∏_{s≤t} (1 − β_s)
        alphas_cumprod = np.cumprod(1 - self.betas)
        if self.config.rescale_betas_zero_snr:
            # √ᾱ' = (√ᾱ − √ᾱ_T) √ᾱ_0 / (√ᾱ_0 − √ᾱ_T)   (Lin et al. 2023, algorithm 1), ending at 2⁻²⁴, not 0
            signal = np.sqrt(alphas_cumprod)
            alphas_cumprod = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
            alphas_cumprod[-1] = 2.0**-24
        return _frozen(alphas_cumprod)

    @cached_property
    def sigmas(self) -> Table:
        """Noise-to-signal amplitude ratio σ at each timestep, increasing from 0.03 to 14.6 for Stable Diffusion."""
        # σ_t = √((1 − ᾱ_t) / ᾱ_t)
        return _frozen(np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod))

    def sigma_at(self, t: float) -> float:
        """Return σ at a timestep, linearly interpolated for fractional timesteps, as in diffusers' Euler sampler."""
        return float(np.interp(t, np.arange(len(self.sigmas)), self.sigmas))

    def timestep_at(self, sigma: float) -> float:
        """Return the fractional timestep at noise level σ, interpolated in log σ and clamped to the table."""
        return float(np.interp(np.log(max(sigma, 1e-10)), np.log(self.sigmas), np.arange(len(self.sigmas))))

    def timesteps(self, n: int, spacing: str | None = None, rounded: bool = True) -> tuple[float, ...]:
        """Return n of the training timesteps, in decreasing order.

        "trailing", and "linspace" for n > 1, include the last timestep, where latents are nearly pure noise. For n = 1,
        "leading" and "linspace" return a timestep at the clean end (`steps_offset` and 0).
        Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", table 2.

        Args:
            n: Number of timesteps.
            spacing: "leading", "trailing" or "linspace"; None uses the configured one, or "leading".
            rounded: Whether to round "linspace" timesteps to integers.

        Raises:
            ValueError: If the spacing is unknown, or the schedule has too few timesteps.
        """
        total, spacing = self.config.num_train_timesteps, spacing or self.config.timestep_spacing or "leading"
        if not 1 <= n <= total:
            raise ValueError(f"the number of timesteps must be between 1 and {total}, got {n}")
        chosen: Table
        if spacing == "leading":
            chosen = np.arange(float(n))[::-1] * (total // n) + self.config.steps_offset
        elif spacing == "trailing":
            chosen = np.arange(total, 0, -total / n)[:n].round() - 1
        elif spacing == "linspace":
            chosen = np.linspace(0, total - 1, n)[::-1]
            chosen = chosen.round() if rounded else chosen
        else:
            raise ValueError(f"unknown spacing {spacing!r}; expected 'leading', 'trailing' or 'linspace'")
        if chosen[0] > total - 1:
            raise ValueError(f"{n} {spacing} timesteps go past timestep {total - 1}; use fewer, or trailing spacing")
        return tuple(float(t) for t in chosen)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Add unit Gaussian noise (n, …) to clean latents (n, …) at timesteps (n,)."""
        signal, std = self._signal_and_noise(latents, timesteps)
        # x = √ᾱ x₀ + √(1−ᾱ) ε                     (Ho et al. 2020, equation 4)
        return (signal * latents + std * noise).to(latents.dtype)

    def to_v(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the velocity v for clean latents (n, …) and noise (n, …) at timesteps (n,)."""
        signal, std = self._signal_and_noise(latents, timesteps)
        # v = √ᾱ ε − √(1−ᾱ) x₀                     (Salimans and Ho 2022, appendix D)
        return (signal * noise - std * latents).to(latents.dtype)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the training target of the UNet: the noise, v or the clean latents, depending on `prediction_type`."""
        kind = self.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.to_v(latents, noise, timesteps)
        if kind == "sample":
            return latents
        raise ValueError(f"unknown prediction_type {kind!r}; expected 'epsilon', 'v_prediction' or 'sample'")

    def to_x0(self, prediction: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Convert a prediction for noisy latents (n, …) at timesteps (n,) to clean latents x0."""
        signal, std = self._signal_and_noise(latents, timesteps)
        return self._convert(prediction, latents, signal, std)[0].to(latents.dtype)

    def to_epsilon(self, prediction: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Convert a prediction for noisy latents (n, …) at timesteps (n,) to noise epsilon."""
        signal, std = self._signal_and_noise(latents, timesteps)
        return self._convert(prediction, latents, signal, std)[1].to(latents.dtype)

    def convert(self, prediction: Tensor, latents: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Convert a prediction for noisy latents (n, …) at noise level σ > 0 to (x0, epsilon)."""
        signal = (sigma**2 + 1) ** -0.5
        return self._convert(prediction, latents, signal, sigma * signal)

    def _convert(
        self, prediction: Tensor, x: Tensor, signal: Tensor | float, std: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        # solve x = √ᾱ x₀ + √(1−ᾱ) ε for x₀ and ε, given ε, v = √ᾱ ε − √(1−ᾱ) x₀ or x₀
        kind = self.config.prediction_type
        if kind == "epsilon":
            return (x - std * prediction) / signal, prediction
        if kind == "v_prediction":
            return signal * x - std * prediction, signal * prediction + std * x
        if kind == "sample":
            return prediction, (x - signal * prediction) / std
        raise ValueError(f"unknown prediction_type {kind!r}; expected 'epsilon', 'v_prediction' or 'sample'")

    def snr(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio ᾱ/(1−ᾱ) = 1/σ² at timesteps of any shape, float32, on the same device."""
        return _look_up(1 / self.sigmas**2, timesteps, torch.float32)

    def _signal_and_noise(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        # √ᾱ and √(1−ᾱ), reshaped to (n, 1, …) to broadcast over `like`, at least float32
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = (-1, *(1,) * (like.ndim - 1))
        signal = _look_up(np.sqrt(self.alphas_cumprod), timesteps, dtype).reshape(shape)
        return signal, _look_up(np.sqrt(1 - self.alphas_cumprod), timesteps, dtype).reshape(shape)


def _look_up(table: Table, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    # cast before moving: MPS does not support float64
    return torch.tensor(table, dtype=dtype).to(timesteps.device)[timesteps]


def _frozen(table: NDArray[Any]) -> Table:
    table.setflags(write=False)
    return table
