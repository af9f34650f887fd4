"""Reading picture files, whatever is in them."""

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
    """Open a picture file within a block.

    Only the first frame of an animation is seen. Raises OSError, naming the file, for whatever goes wrong in the block,
    for pictures of more than 179 million pixels (Pillow's limit, before they are unpacked), and for formats whose
    readers start other programs, such as EPS.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # damaged metadata beside undamaged pixels
            with Image.open(path, formats=FORMATS) as picture:
                yield picture
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged or hostile file provokes in its reader
        raise OSError(f"{path} cannot be read as a picture ({error}); give a PNG, JPEG or WebP file") from error


def read_picture(path: Path, width: int, height: int) -> Image.Image:
    """Read a picture file as RGB, scaled and cropped to a size. Raises OSError, naming the file, for anything else."""
    with opened_picture(path) as opened:
        picture = to_rgb(opened)
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
