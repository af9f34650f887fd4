"""Memorisation or composition: which sprite, in which colour, is nearest to a drawn object?"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd.training.backgrounds import FRAME, PIXEL, background
from minisd.training.scenes import Scene, Thing, held_out_pairs, render
from minisd.training.sprites import entries, extent, sprite

SIZES = range(56, 105, 4)
STEP = 2  # sprites are moved by 2 units of the frame, and pictures compared as coarsely
POOLED = round(STEP / PIXEL)  # pixels
REACH = 32  # how far from the middle centres are searched


class Match(NamedTuple):
    """A sprite laid over a picture: its placement, and the root mean square error of the picture, in [0, 1]."""

    thing: Thing
    error: float

    @property
    def trained(self) -> bool:
        """Whether training pictures have this object in this colour."""
        return (self.thing.color, self.thing.noun) not in held_out_pairs()


def suits(scene: Scene) -> bool:
    """Whether a scene can be tested: one object on a plain background, in a colour held out of training."""
    thing = scene.things[0]
    return not scene.place and len(scene.things) == 1 and (thing.color, thing.noun) in held_out_pairs()


@torch.inference_mode()
def nearest_sprites(pixels: np.ndarray, scene: Scene) -> tuple[Match, Match]:
    """Find the sprite nearest to a drawn picture, and the nearest one that training had.

    Every object is tried in all its colours, in several sizes and places, mirrored and not, on the scene's background.
    If the nearest is the object's own sprite in the held-out colour, which the model has not seen, the object was
    composed; if a sprite from training is nearer, it was memorised.

    Args:
        pixels: the picture, (192, 192, 3) uint8.
        scene: what it was to show.
    """
    behind = torch.from_numpy(background(scene.background, scene.time, scene.seed) / 255).float().permute(2, 0, 1)
    drawn = F.avg_pool2d(torch.from_numpy(pixels / 255).float().permute(2, 0, 1) - behind, POOLED)
    plain = behind.mean((1, 2))
    matches = [match for size in SIZES for match in _best_of_size(drawn, plain, size)]
    matches.sort(key=lambda match: match.error)
    return matches[0], next(match for match in matches if match.trained)


def shown(match: Match, scene: Scene) -> np.ndarray:
    """Render the scene with the match's sprite in place of its object, (192, 192, 3) uint8."""
    return render(Scene(scene.caption, (match.thing,), scene.background, False, scene.time, None, 1, scene.seed))


def _best_of_size(drawn: Tensor, plain: Tensor, size: int) -> list[Match]:
    """Find the best place of every sprite of one size over `drawn` (3, 64, 64), the picture minus its background."""
    things, kernels, alphas = _sprites(size)
    # what the sprite adds to the background: d = α (s − b) = αs − αb
    added = kernels - alphas * plain[:, None, None]
    side, reach, middle = size // STEP, REACH // STEP, FRAME // STEP // 2
    first = middle - reach - side // 2
    window = F.pad(drawn, (side,) * 4)[:, first + side :, first + side :][:, : 2 * reach + side, : 2 * reach + side]
    # ‖q − d‖² = ‖q‖² − 2 q·d + ‖d‖², for all places at once
    agreement = F.conv2d(window[None], added)[0]
    squared = drawn.square().sum() - 2 * agreement + added.square().sum((1, 2, 3))[:, None, None]
    best, place = squared.flatten(1).min(1)
    errors = (best.clamp(min=0) / drawn.numel()).sqrt().tolist()
    matches = []
    for thing, error, index in zip(things, errors, place.tolist(), strict=True):
        row, column = divmod(index, agreement.shape[-1])
        x, y = (STEP * (first + step) + size / 2 for step in (column, row))
        matches.append(Match(Thing(thing.noun, thing.color, x, y, float(size), thing.flip), error))
    return matches


@lru_cache(maxsize=len(SIZES))
def _sprites(size: int) -> tuple[list[Thing], Tensor, Tensor]:
    """All objects in all colours, mirrored and not, centred in squares: premultiplied RGB, and opacity."""
    things, squares = [], []
    side = round(size / PIXEL)
    for entry in entries().values():
        for color in (None, *entry.colors):
            width, height = (max(1, round(length / PIXEL)) for length in extent(entry.noun, size))
            drawn = np.asarray(sprite(entry.noun, color).resize((width, height), Image.Resampling.BICUBIC))
            square = np.zeros((side, side, 4), np.float32)
            left, top = round(side / 2 - width / 2), round(side / 2 - height / 2)
            square[top : top + height, left : left + width] = drawn / 255
            for flip in (False, True):
                things.append(Thing(entry.noun, color, 0, 0, size, flip))
                squares.append(square[:, ::-1] if flip else square)
    planes = F.avg_pool2d(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2), POOLED)
    return things, planes[:, :3].contiguous(), planes[:, 3:]
