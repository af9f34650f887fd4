"""Random numbers that depend on seed and step alone, and the order in which training sees its data."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator whose state depends on all the given numbers, and on nothing else."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)


class Shuffled:
    """An endless stream of indices below `count`: every epoch is another permutation, any position can be asked for."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, positions: Iterable[int]) -> list[int]:
        return [self._index(position) for position in positions]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.count, generator=generator(self.seed, epoch))
        return int(self._order[place])
