"""Safe reading of image files."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from PIL import Image, ImageOps

from minisd.features.pictures import to_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 2**25  # an image of 8 kB can have as many; conversions take up to 16 bytes for each


@contextmanager
def opened_picture(path: str | PathLike[str], data: bytes | None = None) -> Iterator[Image.Image]:
    """Open an image file, or the content of one with that name, as a context manager; of an animation the first frame.

    A JPEG of 34 to 179 million pixels, which is Pillow's limit, is decoded at a fraction of its size.

    Raises OSError for any error inside the context, for other images of more than 34 million pixels (before they are
    decompressed), for anything but a regular file, and for formats whose readers run other programs, such as EPS.
    """
    # reading a pipe or device could block forever
    if data is None and os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is not a regular file; use a PNG, JPEG or WebP file")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # corrupted metadata with intact pixels
            with Image.open(path if data is None else io.BytesIO(data), formats=FORMATS) as picture:
                for factor in (2, 4, 8):
                    if picture.width * picture.height > MAX_PIXELS:
                        picture.draft(None, (picture.width // factor, picture.height // factor))
                if picture.width * picture.height > MAX_PIXELS:
                    size = f"{picture.width}×{picture.height}"
                    raise ValueError(f"it is {size}; expected at most {MAX_PIXELS:,} pixels: scale it down")
                yield picture
    except FileNotFoundError:
        raise
    except Exception as error:  # corrupted or malicious files can raise anything
        raise OSError(f"{path} is not a valid image ({error}); use a PNG, JPEG or WebP file") from error


def read_picture(
    path: Path, width: int, height: int, centering: tuple[float, float] = (0.5, 0.5), data: bytes | None = None
) -> Image.Image:
    """Read an image file as RGB, scaled and cropped to a size. Raises OSError for an invalid file.

    centering: Where the crop lies between left and right, and between top and bottom, from 0 to 1. data: the content.
    """
    with opened_picture(path, data) as opened:
        picture = to_rgb(opened)
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS, centering=centering)
