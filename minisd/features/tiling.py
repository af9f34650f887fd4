"""Tiled processing of large images: run a network on overlapping tiles and blend the results, to save memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, zoom: float) -> Tensor:
    """Apply a network to x (n, c, h, w) tile by tile; return float32 (n, c', zoom · h, zoom · w).

    `tile` and `overlap` are in input pixels; overlapping tiles are blended linearly to hide seams. `zoom` is the scale
    factor of the network: 8 to decode, 1/8 to encode. The result differs slightly from an untiled one, because norms
    use the mean and standard deviation of a tile, so tiles should be large. Raises ValueError unless
    0 < overlap < tile.
    """
    if not 0 < overlap < tile:
        raise ValueError(f"tiles of {tile} pixels cannot overlap by {overlap}; expected 1 to {tile - 1}")
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
    """Return the start positions of tiles along one axis; the last tile is shifted to end at the border."""
    last = max(length - tile, 0)
    return [*range(0, last, tile - overlap), last]


def ramp(length: int, overlap: int, rises: bool, falls: bool) -> Tensor:
    """Return the blending weights along one axis of a tile, (length,): 1, falling linearly to 0 in overlaps."""
    weights = torch.ones(length)
    slope = (torch.arange(overlap) + 0.5) / overlap
    if rises:
        weights[:overlap] *= slope
    if falls:
        weights[-overlap:] *= slope.flip(0)
    return weights
