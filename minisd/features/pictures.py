"""PIL pictures of any kind, whatever camera or program made them, as RGB and as brightness."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a PIL picture to RGB.

    The camera's rotation (EXIF) is applied, and transparency is laid over white. White is 65535 in mode I;16, and in
    mode I if a number exceeds 255; in mode F it is the largest number, but at least 1.

    Raises:
        TypeError: not a PIL picture.
        ValueError: the picture is empty, or Pillow cannot convert its mode.
        FloatingPointError: it holds NaN or infinity.
    """
    picture = _upright(picture)
    if {"A", "a"} & {*picture.getbands()} or "transparency" in picture.info:
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA").convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return _to_eight_bits(picture, "RGB")


def to_brightness(picture: Image.Image) -> np.ndarray:
    """The brightness of a PIL picture of any mode, (h, w) in [0, 1], read as by `to_rgb`; alpha is ignored."""
    picture = _upright(picture)
    if "a" in picture.getbands():
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    return np.asarray(_to_eight_bits(picture, "L"), dtype=np.float32) / 255


def _upright(picture: Image.Image) -> Image.Image:
    if not isinstance(picture, Image.Image):
        raise TypeError(f"expected a PIL picture, got {type(picture).__name__}; open files with PIL.Image.open(path)")
    if not picture.width or not picture.height:
        raise ValueError(f"the picture is {picture.width}×{picture.height}; expected at least one pixel")
    return ImageOps.exif_transpose(picture)


def _to_eight_bits(picture: Image.Image, mode: str) -> Image.Image:
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
