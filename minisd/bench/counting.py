"""The tally of PyTorch's FLOP counter, added up by kind of operation and by level of a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

KINDS = {"convolution": "convolutions", "mm": "linear layers", "addmm": "linear layers", "bmm": "attention"}
RESAMPLING = ("upsamplers", "downsamplers")

Sides = Mapping[str, Sequence[int]]


def by_kind(counts: Mapping[Callable[..., Any], int]) -> Counter[str]:
    """FLOP of convolutions, linear layers and attention, from those of single operations (as on the meta device).

    Raises KeyError if an operation has no kind.
    """
    found = Counter(dict.fromkeys(KINDS.values(), 0))
    for operation, flop in counts.items():
        found[KINDS[operation.__name__]] += flop
    return found


def by_level(counter: FlopCounterMode, sides: Sides) -> dict[str, Counter[str]]:
    """FLOP by kind for the middle and for each size of map; `sides` are those of the blocks, for each list of blocks.

    The convolution that ends a block by resampling works at the next size already, so it is counted there.
    """
    found = {"middle": Counter[str]()} | {f"{side}²": Counter[str]() for side in sides["up_blocks"]}
    for name, counts in counter.get_flop_counts().items():
        _, *path = name.split(".")
        if path == ["mid_block"]:
            found["middle"].update(by_kind(counts))
        elif len(path) == 2 and path[0] in sides:
            found[f"{sides[path[0]][int(path[1])]}²"].update(by_kind(counts))
        elif len(path) == 4 and path[2] in RESAMPLING:
            here, there = sides[path[0]][int(path[1]) :][:2]
            found[f"{here}²"].subtract(by_kind(counts))
            found[f"{there}²"].update(by_kind(counts))
    return found
