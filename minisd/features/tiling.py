"""Large pictures in little memory: run a network over overlapping tiles, and blend what it returns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, zoom: float) -> Tensor:
    """Apply a network to a map (n, c, h, w) tile by tile; returns (n, c', zoom · h, zoom · w), float32.

    tile: side of a tile. overlap: how many cells neighbours share; across them the weight of the one falls linearly
    while that of the other rises, so that no seam shows. zoom: pixels for each cell: 8 to decode, 1/8 to encode.
    Not the same as without tiles: norms see one tile's mean and spread, not the picture's, so tiles should be large.
    Raises ValueError for an overlap that leaves no way to go.
    """
    if not 0 < overlap < tile:
        raise ValueError(f"tiles of {tile} cells cannot overlap by {overlap}; expected from 1 to {tile - 1}")
    height, width = x.shape[-2:]
    total, weights = torch.zeros(()), torch.zeros(round(height * zoom), round(width * zoom), device=x.device)
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            out = function(x[..., top : top + tile, left : left + tile]).float()
            if not total.dim():
                total = out.new_zeros(*out.shape[:2], *weights.shape)
            rows = ramp(out.shape[-2], round(overlap * zoom), top > 0, top + tile < height)
            columns = ramp(out.shape[-1], round(overlap * zoom), left > 0, left + tile < width)
            weight = (rows[:, None] * columns).to(out.device)
            y, x0 = round(top * zoom), round(left * zoom)
            area = (..., slice(y, y + out.shape[-2]), slice(x0, x0 + out.shape[-1]))
            total[area] += weight * out
            weights[area] += weight
    return total / weights


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: at equal steps, the last moved back so that it ends where the side does."""
    last = max(length - tile, 0)
    return [*range(0, last, tile - overlap), last]


def ramp(length: int, overlap: int, rises: bool, falls: bool) -> Tensor:
    """Weights along a side of a tile, (length,): 1, and towards 0 across the overlap with a neighbour."""
    weights = torch.ones(length)
    slope = (torch.arange(overlap) + 0.5) / overlap
    if rises:
        weights[:overlap] *= slope
    if falls:
        weights[-overlap:] *= slope.flip(0)
    return weights
