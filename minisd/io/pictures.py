"""Safe reading of image files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from PIL import Image, ImageOps

from minisd.features.pictures import to_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@contextmanager
def opened_picture(path: str | PathLike[str]) -> Iterator[Image.Image]:
    """Open an image file as a context manager; of an animation, only the first frame.

    Raises OSError for any error inside the context, for images above Pillow's limit of 179 million pixels (before they
    are decompressed), and for formats whose readers run other programs, such as EPS.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # corrupted metadata with intact pixels
            with Image.open(path, formats=FORMATS) as picture:
                yield picture
    except FileNotFoundError:
        raise
    except Exception as error:  # corrupted or malicious files can raise anything
        raise OSError(f"{path} is not a valid image ({error}); use a PNG, JPEG or WebP file") from error


def read_picture(path: Path, width: int, height: int) -> Image.Image:
    """Read an image file as RGB, scaled and cropped to a size. Raises OSError for an invalid file."""
    with opened_picture(path) as opened:
        picture = to_rgb(opened)
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
