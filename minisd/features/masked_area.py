"""Blurred masks, and "only masked" inpainting: the area around a mask, drawn at full size and pasted back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from minisd.editing import paste


@dataclass(frozen=True, eq=False)
class MaskedArea:
    """The area of an image that is drawn on its own.

    Attributes:
        mask: The mask of the whole image, (1, 1, h, w) in [0, 1].
        box: The area: left, top, right and bottom in pixels.
        size: Width and height to draw it at.
    """

    mask: Tensor
    box: tuple[int, int, int, int]
    size: tuple[int, int]

    def cut(self, picture: Image.Image) -> Image.Image:
        """Return the area of an image, scaled to the size to draw it at."""
        return picture.crop(self.box).resize(self.size, Image.Resampling.LANCZOS)

    def cut_mask(self) -> Tensor:
        """Return the area of the mask, scaled likewise."""
        return _to_tensor(self.cut(_to_pil(self.mask)))

    def paste(self, drawn: Image.Image, original: Image.Image) -> Image.Image:
        """Return the original with the drawn area scaled back and pasted through the mask."""
        left, top, right, bottom = self.box
        small = drawn.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        result = original.convert("RGB")
        result.paste(paste(small, original.crop(self.box), self.mask[:, :, top:bottom, left:right]), self.box)
        return result


def blur_mask(mask: Tensor, radius: float) -> Tensor:
    """Blur the edges of a mask (1, 1, h, w) in [0, 1] with a Gaussian whose standard deviation is `radius` pixels."""
    return _to_tensor(_to_pil(mask).filter(ImageFilter.GaussianBlur(radius))) if radius else mask


def find_area(mask: Tensor, padding: int, width: int, height: int, multiple: int) -> MaskedArea:
    """Return the area around the pixels of a mask above 0, with padding, in the shape of width × height.

    The box is extended to that shape as far as the image reaches. Where it does not, the area is drawn smaller than
    width × height instead of being distorted, with sides that are multiples of `multiple`.
    """
    rows, columns = (mask[0, 0].any(dim=dim).nonzero().flatten() for dim in (1, 0))
    bounds = mask.shape[-1], mask.shape[-2]
    spans = [
        (max(int(inside[0]) - padding, 0), min(int(inside[-1]) + 1 + padding, bound))
        for inside, bound in zip((columns, rows), bounds, strict=True)
    ]
    (left, right), (top, bottom) = spans
    # the side that is too short for the shape grows
    if (right - left) * height > width * (bottom - top):
        top, bottom = _grow(top, bottom, (right - left) * height // width, bounds[1])
    else:
        left, right = _grow(left, right, (bottom - top) * width // height, bounds[0])
    scale = min(width / (right - left), height / (bottom - top))
    sides = [max(round(side * scale / multiple), 1) * multiple for side in (right - left, bottom - top)]
    drawn = min(sides[0], width), min(sides[1], height)
    return MaskedArea(mask, (left, top, right, bottom), drawn)


def _grow(start: int, end: int, length: int, bound: int) -> tuple[int, int]:
    """Extend a span on both sides to a length, shifted to stay within 0 and `bound`."""
    length = min(max(length, end - start), bound)
    start = min(max(start - (length - (end - start)) // 2, 0), bound - length)
    return start, start + length


def _to_pil(mask: Tensor) -> Image.Image:
    return Image.fromarray((mask[0, 0] * 255).round().byte().numpy())


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None, None]
