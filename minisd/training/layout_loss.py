"""A second question for the denoiser while it learns: which object is in each cell, and which part of it?

The denoising loss is a mean over cells, and most of it is about backgrounds and grain; that a fox has its ears on top
is a small share of it, learned last. The composer of the scenes knows where everything is, so a throw-away layer on
the UNet's features may be asked for it directly. Yu et al. 2025, "Representation Alignment for Generation", section 3,
ask for the features of a large pretrained network in the same way, and train much faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.training.backgrounds import FRAME, SIZE
from minisd.training.scenes import object_names
from minisd.training.sprites import atlas, extent
from minisd.unet import UNet

CELLS = SIZE // 8  # as many as the latents have


@dataclass(frozen=True)
class Layout:
    """For each scene and cell the object there and the place within it.

    kind: (n, 24, 24) int64, 0 where there is no object, else 1 + its number in the catalogue. place: (n, 2, 24, 24) in
    [-1, 1], from the object's left edge to its right (of the drawing that was not mirrored) and from top to bottom.
    """

    kind: Tensor
    place: Tensor

    def __getitem__(self, indices: Tensor) -> Layout:
        return Layout(self.kind[indices].long(), self.place[indices].float())


def layouts(descriptions: Sequence[Mapping[str, Any]]) -> Layout:
    """The layouts of described scenes (`scenes.jsonl`); where objects overlap, the one that was drawn last counts."""
    numbers = {noun: 1 + number for number, noun in enumerate(object_names())}
    kind = np.zeros((len(descriptions), CELLS, CELLS), np.int8)
    place = np.zeros((len(descriptions), 2, CELLS, CELLS), np.float16)
    centre = (np.arange(CELLS) + 0.5) * (FRAME / CELLS)
    for scene, description in enumerate(descriptions):
        for thing in description["things"]:
            width, height = extent(thing["noun"], thing["size"])
            across, down = (centre - thing["x"]) / (width / 2), (centre - thing["y"]) / (height / 2)
            rows, columns = np.flatnonzero(np.abs(down) < 1), np.flatnonzero(np.abs(across) < 1)
            v, u = down[rows], (-across if thing["flip"] else across)[columns]
            opacity = np.asarray(atlas()[thing["noun"]].getchannel("A"))
            ways = zip((v, u), opacity.shape, strict=True)
            # the rounding of (way + 1) can reach 2
            y, x = (((way + 1) / 2 * side).astype(int).clip(max=side - 1) for way, side in ways)
            solid = opacity[np.ix_(y, x)] > 127
            box = np.ix_(rows, columns)
            kind[scene][box] = np.where(solid, numbers[thing["noun"]], kind[scene][box])
            place[scene, 0][box] = np.where(solid, u, place[scene, 0][box])
            place[scene, 1][box] = np.where(solid, v[:, None], place[scene, 1][box])
    return Layout(torch.from_numpy(kind), torch.from_numpy(place))


class WithLayout(nn.Module):
    """A UNet with throw-away layers: 1×1 convolutions on what its first two levels of the way up return."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet
        answers = 1 + len(object_names()) + 2
        widths = unet.config.block_out_channels[:-3:-1]
        self.heads = nn.ModuleList(nn.Conv2d(width, answers, 1) for width in widths)
        self._features: list[Tensor] = []
        for block in unet.up_blocks[:2]:
            block.register_forward_hook(lambda module, inputs, output: self._features.append(output))

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The UNet's prediction, and the layers' answers, (n, 1 + objects + 2, h, w) each."""
        self._features.clear()
        prediction = self.unet(x, timesteps, context)
        answers = [head(feature) for head, feature in zip(self.heads, self._features, strict=True)]
        self._features.clear()
        return prediction, answers


def layout_loss(answer: Tensor, layout: Layout) -> Tensor:
    """Cross-entropy of the object in each cell plus, where there is one, the distance from the right place: (n,)."""
    if answer.shape[-1] != layout.kind.shape[-1]:
        answer = F.interpolate(answer, size=layout.kind.shape[-2:], mode="nearest")
    objects = F.cross_entropy(answer[:, :-2], layout.kind, reduction="none")
    there = (layout.kind > 0).float()
    distance = (answer[:, -2:] - layout.place).abs().sum(1) * there
    return objects.mean((1, 2)) + distance.mean((1, 2))
