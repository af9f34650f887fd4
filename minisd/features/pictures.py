"""Conversion of PIL images of any mode to RGB and to grayscale arrays."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image, ImageOps


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a PIL image to RGB.

    Applies the EXIF orientation and composites transparency over white. White is 65535 in mode I;16, and in mode I if
    any value exceeds 255; in mode F it is the maximum, but at least 1.

    Raises:
        TypeError: If the argument is not a PIL image.
        ValueError: If the image is empty, or Pillow cannot convert its mode.
        FloatingPointError: If the image contains NaN or infinity.
    """
    picture = _upright(picture)
    if {"A", "a"} & {*picture.getbands()} or "transparency" in picture.info:
        picture = picture.convert("LA") if picture.mode == "La" else picture
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return _to_eight_bits(picture, "RGB")


def to_brightness(picture: Image.Image) -> np.ndarray:
    """Convert a PIL image to grayscale, (h, w) in [0, 1], like `to_rgb` but ignoring alpha."""
    picture = _upright(picture)
    if "a" in picture.getbands():
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    return np.asarray(_to_eight_bits(picture, "L"), dtype=np.float32) / 255


def to_gray(picture: Image.Image) -> Image.Image:
    """Convert a PIL image to mode L, like `to_brightness`."""
    return Image.fromarray((to_brightness(picture) * 255).round().astype(np.uint8))


def _upright(picture: Image.Image) -> Image.Image:
    if not isinstance(picture, Image.Image):
        raise TypeError(f"expected a PIL image, got {type(picture).__name__}; open files with PIL.Image.open(path)")
    if not picture.width or not picture.height:
        raise ValueError(f"the image is {picture.width}×{picture.height}; expected at least one pixel")
    turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(picture) if turned else picture  # without a copy


def _to_eight_bits(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float32)
        if not np.isfinite(values).all():
            raise FloatingPointError("the image contains NaN or infinity; expected finite values")
        eight = picture.mode == "I" and values.max() <= 255
        scale = max(float(values.max()), 1.0) if picture.mode == "F" else 255 if eight else 65535
        values = values / scale
        values *= 255
        picture = Image.fromarray(values.clip(0, 255, out=values).round(out=values).astype(np.uint8))
    try:
        return picture.convert(mode)
    except ValueError as error:
        raise ValueError(f"unsupported image mode {picture.mode} ({error}); convert the image to RGB") from error
