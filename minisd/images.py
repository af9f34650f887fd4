"""Pictures in and out: PIL images, pixels, and the tensors the networks see."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def to_images(pixels: np.ndarray) -> Tensor:
    """Pixels (n, h, w, 3) uint8 to images (n, 3, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (n, 3, h, w) in [-1, 1], clipped to that range, to pixels (n, h, w, 3) uint8."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (n, 3, h, w) in [-1, 1] to n PIL pictures."""
    return [Image.fromarray(pixels) for pixels in to_pixels(images)]


def from_pil(picture: Image.Image) -> Tensor:
    """An RGB picture to an image (1, 3, h, w) in [-1, 1]; other modes are converted as Pillow does."""
    return to_images(np.array(picture.convert("RGB"))[None])


def grid(
    pictures: Sequence[Image.Image], columns: int | None = None, captions: Sequence[str] | None = None
) -> Image.Image:
    """Lay pictures of one size side by side, by default in a shape that is as square as it gets.

    captions: a text under each picture, broken into lines that fit its width. Raises ValueError when there is no
    picture, the sizes differ, or there is not one caption for each.
    """
    if not pictures:
        raise ValueError("a grid needs at least one picture")
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"pictures of one size make a grid; these have {sorted(sizes)}")
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"{len(captions)} captions for {len(pictures)} pictures; give one for each")
    columns = columns or int(np.ceil(np.sqrt(len(pictures))))
    width, height = pictures[0].size
    texts = [textwrap.fill(caption, max(width // 6, 8)) for caption in captions or ()]
    pitch = height + (6 + 13 * max(text.count("\n") + 1 for text in texts) if texts else 0)
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * pitch), "white")
    for place, picture in enumerate(pictures):
        corner = place % columns * width, place // columns * pitch
        sheet.paste(picture, corner)
        if texts:
            middle = corner[0] + width // 2, corner[1] + height + 2
            ImageDraw.Draw(sheet).multiline_text(
                middle, texts[place], "black", ImageFont.load_default(11), anchor="ma", align="center", spacing=2
            )
    return sheet
