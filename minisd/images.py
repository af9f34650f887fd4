"""Pictures in and out: PIL images, pixels, and the tensors the networks see."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
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
    """A PIL picture to an image (1, 3, h, w) in [-1, 1].

    The camera's rotation (EXIF) is applied, and transparency is laid over white. White is 65535 in mode I;16, and in
    mode I where a number exceeds 255; in mode F it is the largest number, but at least 1. Raises TypeError for what is
    no PIL picture, ValueError for a mode that PIL cannot turn into RGB, and FloatingPointError for NaN.
    """
    picture = upright(picture)
    if {"A", "a"} & {*picture.getbands()} or "transparency" in picture.info:
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA").convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return to_images(np.array(_eight_bits(picture, "RGB"))[None])


def upright(picture: Image.Image) -> Image.Image:
    """A PIL picture as the camera's rotation (EXIF) wants it; TypeError for anything else."""
    if not isinstance(picture, Image.Image):
        raise TypeError(f"expected a PIL picture, got {type(picture).__name__}; open files with PIL.Image.open(path)")
    if not picture.width or not picture.height:
        raise ValueError(f"the picture is {picture.width}×{picture.height}; expected at least one pixel")
    return ImageOps.exif_transpose(picture)


def gray(picture: Image.Image) -> np.ndarray:
    """The brightness of a PIL picture of any mode, (h, w) in [0, 1], read as by `from_pil`; alpha is ignored."""
    picture = upright(picture)
    if "a" in picture.getbands():
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    return np.asarray(_eight_bits(picture, "L"), dtype=np.float32) / 255


def _eight_bits(picture: Image.Image, mode: str) -> Image.Image:
    """A picture in mode L or RGB."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float32)
        if not np.isfinite(values).all():
            raise FloatingPointError("the picture holds NaN or infinity; expected finite numbers")
        eight = picture.mode == "I" and values.max() <= 255
        scale = max(float(values.max()), 1.0) if picture.mode == "F" else 255 if eight else 65535
        picture = Image.fromarray((values / scale * 255).clip(0, 255).round().astype(np.uint8))
    try:
        return picture.convert(mode)
    except ValueError as error:
        raise ValueError(f"a picture of mode {picture.mode} cannot be used ({error}); convert it to RGB") from error


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
