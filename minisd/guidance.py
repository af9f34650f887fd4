"""Classifier-free guidance: exaggerate the difference that the prompt makes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How conditional and unconditional predictions are combined, and when.

    Args:
        scale: 1 follows the prompt alone, 0 the negative prompt alone, more exaggerates the difference. A tuple gives
            every image its own.
        rescale: how far the result is scaled back to the spread of the conditional prediction, 0 (off) to 1.
        interval: the part of the run, from 0 (noise) to 1 (picture), in which guidance is applied; outside, the
            conditional prediction is used alone.

    Sources: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", equation 6; Lin et al. 2023, "Common Diffusion
    Noise Schedules and Sample Steps are Flawed", equations 14 to 16; Kynkäänniemi et al. 2024, "Applying Guidance in a
    Limited Interval Improves Sample and Distribution Quality in Diffusion Models", section 3.
    """

    scale: float | tuple[float, ...] = 7.5
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def is_active(self, progress: float) -> bool:
        """Whether guidance is applied at a call that begins at this part of the run."""
        return self.interval[0] <= progress < self.interval[1]

    def combine(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """Return the guided prediction, from predictions (n, 4, h/8, w/8) without and with the prompt."""
        scale = cond.new_tensor(self.scale).view(-1, 1, 1, 1) if isinstance(self.scale, tuple) else self.scale
        # ε = ε_uncond + s (ε_cond − ε_uncond)
        guided = uncond + scale * (cond - uncond)
        if self.rescale == 0:
            return guided
        # ε' = φ ε · std(ε_cond) / std(ε) + (1 − φ) ε
        ratio = cond.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        return (self.rescale * ratio + 1 - self.rescale) * guided
