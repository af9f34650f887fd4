"""Classifier-free guidance: extrapolate from the unconditional to the conditional prediction."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Parameters of classifier-free guidance.

    Args:
        scale: Guidance scale, or one per image: 1 is the conditional prediction, 0 the unconditional one, and values
            above 1 extrapolate.
        rescale: Strength of guidance rescaling, which matches the standard deviation of the guided prediction to that
            of the conditional one, from 0 (off) to 1.
        interval: Part of the run in which guidance is applied, from 0 (noise) to 1 (image); outside of it, only the
            conditional prediction is used.

    Sources: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", equation 6, where w = s − 1; Lin et al. 2023,
    "Common Diffusion Noise Schedules and Sample Steps are Flawed", equations 14 to 16; Kynkäänniemi et al. 2024,
    "Applying Guidance in a Limited Interval …", section 3, where the interval is one of noise levels.
    """

    scale: float | tuple[float, ...] = 7.5
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def is_active(self, progress: float) -> bool:
        """Return whether guidance is applied at this point of the run, from 0 to 1."""
        return self.interval[0] <= progress < self.interval[1]

    def combine(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """Return the guided prediction, given predictions of any type (epsilon, v or x0), (n, 4, h/8, w/8)."""
        scale = cond.new_tensor(self.scale).view(-1, 1, 1, 1) if isinstance(self.scale, tuple) else self.scale
        # p = p_uncond + s (p_cond − p_uncond)
        guided = uncond + scale * (cond - uncond)
        if self.rescale == 0:
            return guided
        # p' = φ p · std(p_cond) / std(p) + (1 − φ) p
        ratio = cond.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        return (self.rescale * ratio + 1 - self.rescale) * guided
