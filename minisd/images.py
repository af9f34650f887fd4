"""Image conversions between PIL images, uint8 pixels and tensors in [-1, 1], and image grids."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def to_images(pixels: np.ndarray) -> Tensor:
    """Convert pixels (n, h, w, 3) uint8 to images (n, 3, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """Clip images (n, 3, h, w) to [-1, 1] and convert them to pixels (n, h, w, 3) uint8."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert images (n, 3, h, w) in [-1, 1] to n PIL images."""
    return [Image.fromarray(pixels) for pixels in to_pixels(images)]


def from_pil(picture: Image.Image) -> Tensor:
    """Convert a PIL image to an image tensor (1, 3, h, w) in [-1, 1]; modes other than RGB are converted by Pillow."""
    return to_images(np.array(picture.convert("RGB"))[None])


def grid(
    pictures: Sequence[Image.Image], columns: int | None = None, captions: Sequence[str] | None = None
) -> Image.Image:
    """Arrange PIL images of equal size in a grid, as square as possible by default.

    Captions are wrapped to the image width, in a font that scales with it, and placed below the images. Raises
    ValueError if there are no images, if their sizes differ, or if there are not as many captions as images.
    """
    if not pictures:
        raise ValueError("a grid requires at least one image")
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"all images in a grid must have the same size, got {sorted(sizes)}")
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"expected one caption per image, got {len(captions)} captions for {len(pictures)} images")
    columns = columns or int(np.ceil(np.sqrt(len(pictures))))
    width, height = pictures[0].size
    letter = max(11, width // 24)
    texts = [textwrap.fill(caption, max(11 * width // (6 * letter), 8)) for caption in captions or ()]
    pitch = height + (6 + (letter + 2) * max(text.count("\n") + 1 for text in texts) if texts else 0)
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * pitch), "white")
    for place, picture in enumerate(pictures):
        corner = place % columns * width, place // columns * pitch
        sheet.paste(picture, corner)
        if texts:
            middle = corner[0] + width // 2, corner[1] + height + 2
            ImageDraw.Draw(sheet).multiline_text(
                middle, texts[place], "black", ImageFont.load_default(letter), anchor="ma", align="center", spacing=2
            )
    return sheet
