"""Classifier-free guidance: exaggerate the difference that the prompt makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from minisd.pipeline.checks import real

MAX_SCALE = 1000.0  # far beyond anything that is still a picture, and far below what overflows


@dataclass(frozen=True)
class Guidance:
    """How the prediction with the prompt and the one against it are put together, and when.

    scale: 1 follows the prompt alone, 0 the negative prompt alone, more (up to 1000) exaggerates the difference. One
    for all images, or a tuple of one for each.
    rescale: how far the result is brought back to the spread of the prediction with the prompt, from 0 to 1.
    interval: the part of the run, from 0 (noise) to 1 (picture), in which guidance acts; outside, the prompt alone. (A
    scale of 0 or 1 needs one prediction only, and knows no interval.)
    Raises ValueError for other numbers, TypeError for what is none.
    Sources: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", equation 6; Lin et al. 2023, "Common Diffusion
    Noise Schedules and Sample Steps are Flawed", equations 14 to 16; Kynkäänniemi et al. 2024, "Applying Guidance in a
    Limited Interval Improves Sample and Distribution Quality in Diffusion Models", section 3.
    """

    scale: float | tuple[float, ...]
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for scale in self.scale if isinstance(self.scale, tuple) else (self.scale,):
            real("guidance_scale", scale, -MAX_SCALE, MAX_SCALE, ", such as 7.5")
        real("guidance_rescale", self.rescale, 0, 1, ": 0 is off")
        ends = self.interval if isinstance(self.interval, Sequence) and len(self.interval) == 2 else ()
        begin, end = (real("guidance_interval", one, 0, 1) for one in ends) if ends else (1.0, 0.0)
        if begin > end:
            raise ValueError(f"guidance_interval={self.interval!r}; expected two numbers, 0 ≤ begin ≤ end ≤ 1")

    def acts(self, share: float) -> bool:
        """Whether guidance acts at a call that begins at this share of the run."""
        return self.interval[0] <= share < self.interval[1]

    def scales(self, count: int) -> tuple[float, ...]:
        """The scale of each of so many images. Raises ValueError where there are more or fewer."""
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,) * count
        if len(scales) != count:
            raise ValueError(f"{len(scales)} guidance scales for {count} images; give one number, or one for each")
        return scales

    def combine(self, negative: Tensor, positive: Tensor) -> Tensor:
        """The guided prediction, from the one against the prompt and the one with it, each (n, 4, h/8, w/8)."""
        scale = positive.new_tensor(self.scale).view(-1, 1, 1, 1) if isinstance(self.scale, tuple) else self.scale
        # ε = ε_negative + s (ε_positive − ε_negative)
        guided = negative + scale * (positive - negative)
        if self.rescale == 0:
            return guided
        # ε' = φ ε · std(ε_positive) / std(ε) + (1 − φ) ε
        ratio = positive.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        return (self.rescale * ratio + 1 - self.rescale) * guided
