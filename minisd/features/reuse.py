"""Feature reuse: between two steps the deep layers of the UNet change little, so most calls can do without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from minisd.pipeline.checks import whole


@dataclass(frozen=True, eq=False)
class Kept:
    """What a run remembers: the feature of the last whole call (`UNet.forward`), and how many calls ago that was."""

    feature: Tensor | None = None
    age: int = 0


@dataclass(frozen=True)
class Reuse:
    """Which calls of the UNet are whole: the first, and every so many after it; the others run `layers` layers.

    layers: of the way up, counted from its end (`UNet.layers` is all of them). every = 1 turns reuse off. A call with
    guidance needs a feature of both predictions: where the last whole call made one only, it is whole too.
    Raises ValueError for other numbers, TypeError for what is none.
    Source: Ma et al. 2024, "DeepCache: Accelerating Diffusion Models for Free", section 3.3 (1:N uniform).
    """

    every: int = 1
    layers: int = 1

    def __post_init__(self) -> None:
        whole("feature_reuse", self.every, 1, 1000)
        whole("feature_reuse", self.layers, 1, 1000)

    @classmethod
    def read(cls, value: tuple[int, int] | None, layers: int) -> Reuse:
        """(every, layers), or None for no reuse. layers: how many the UNet has."""
        if value is None:
            return cls()
        if not isinstance(value, Sequence) or len(value) != 2:
            raise TypeError(f"feature_reuse={value!r}; expected two numbers, (every, layers), such as (3, 1)")
        reuse = cls(*value)
        if reuse.layers > layers:
            raise ValueError(f"feature_reuse={value!r} ; expected 1 to {layers} layers, all that there are")
        return reuse

    def feature(self, kept: Kept, rows: int) -> Tensor | None:
        """The feature to begin a call of so many rows with, or None where it must be whole."""
        if kept.feature is None or kept.age >= self.every or len(kept.feature) < rows:
            return None
        # without guidance the second half is called alone, the predictions with the prompt
        return kept.feature[-rows:]

    def keep(self, kept: Kept, given: Tensor | None, returned: Tensor | None) -> Kept:
        """What is remembered after a call: its own feature if it was whole."""
        return Kept(returned, 1) if given is None else Kept(kept.feature, kept.age + 1)
