"""Where randomness comes from: a CPU generator for each picture, so that neither batch nor device changes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minisd.pipeline.checks import whole

MAX_SEED = 2**63 - 1


def seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed per image: a number counts up, a list is taken as it is, None draws a first one at random.

    Seeds are whole numbers, Python's or numpy's, from 0 to 2⁶³ − 1: TypeError or ValueError for others.
    """
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    if isinstance(seed, Iterable) and not isinstance(seed, (str, bytes, Tensor)):
        numbers = list(seed)
    else:
        first = whole("seed", seed, 0, MAX_SEED)
        numbers = [first + i for i in range(count)]
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} seeds for {count} images; give one number, or one for each")
    return [whole("seed", number, 0, MAX_SEED) for number in numbers]


@dataclass(frozen=True)
class Noise:
    """A stream of unit Gaussian noise, (n, *shape) at each draw, that n generators make for n images."""

    generators: tuple[torch.Generator, ...]
    shape: tuple[int, int, int]
    device: torch.device

    @classmethod
    def seeded(cls, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device) -> Noise:
        """A stream that begins anew, the same for the same seeds."""
        return cls(tuple(torch.Generator().manual_seed(seed) for seed in seeds), shape, device)

    def draw(self) -> Tensor:
        """The next noise of every image, (n, *shape) float32."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)
