"""The sprites: reading the atlas, and giving an object another colour."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from minisd.training.catalogue import CATALOGUE, Entry, Paint

ATLAS = Path(__file__).parent.parent / "assets" / "sprites" / "sprites.webp"
CELL = 160  # pixels; the largest object in a scene is 156
COLUMNS = 8

COLORS = {
    "red": (222, 38, 42),
    "orange": (245, 130, 28),
    "yellow": (250, 208, 40),
    "green": (62, 168, 70),
    "blue": (40, 104, 226),
    "purple": (128, 70, 198),
    "pink": (246, 132, 182),
    "white": (244, 244, 248),
    "black": (48, 48, 56),
}


@lru_cache(maxsize=1)
def atlas() -> dict[str, Image.Image]:
    """The sprites by noun, as RGBA pictures cut to their visible box.

    Raises ValueError when the file does not hold the catalogue's sprites.
    """
    rows = -(-len(CATALOGUE) // COLUMNS)
    with Image.open(ATLAS) as picture:
        if picture.size != (COLUMNS * CELL, rows * CELL):
            raise ValueError(
                f"{ATLAS} measures {picture.size}, but {len(CATALOGUE)} sprites need "
                f"{(COLUMNS * CELL, rows * CELL)}: rebuild it with tools/build_atlas.py"
            )
        sheet = picture.convert("RGBA")
    sprites = {}
    for index, entry in enumerate(CATALOGUE):
        x, y = index % COLUMNS * CELL, index // COLUMNS * CELL
        cell = sheet.crop((x, y, x + CELL, y + CELL))
        sprites[entry.noun] = cell.crop(cell.getchannel("A").getbbox())
    return sprites


@lru_cache(maxsize=1)
def entries() -> dict[str, Entry]:
    """The catalogue by noun."""
    return {entry.noun: entry for entry in CATALOGUE}


def extent(noun: str, size: float) -> tuple[float, float]:
    """Width and height of a sprite whose longer side is `size`."""
    width, height = atlas()[noun].size
    scale = size / max(width, height)
    return width * scale, height * scale


@lru_cache(maxsize=512)
def sprite(noun: str, color: str | None) -> Image.Image:
    """An object in its own colours (None) or tinted, premultiplied by its opacity (mode RGBa)."""
    picture = atlas()[noun]
    if color is not None:
        paint = entries()[noun].paint
        if paint is None:
            raise ValueError(f"a {noun} takes no colour; tinted objects have `paint` in the catalogue")
        picture = tint(picture, paint, COLORS[color])
    return picture.convert("RGBa")


def tint(picture: Image.Image, paint: Paint, color: tuple[int, int, int]) -> Image.Image:
    """Give the painted pixels of an RGBA picture another colour, keeping their light and shade."""
    rgba = np.asarray(picture, dtype=np.float32)
    rgb, alpha = rgba[..., :3] / 255, rgba[..., 3:] / 255
    mask = paint_mask(rgb, paint)[..., None]
    light = rgb @ np.array([0.35, 0.5, 0.15], dtype=np.float32)
    weight = mask[..., 0] * alpha[..., 0]
    ratio = light / np.median(light[weight > 0.8])
    target = np.array(color, dtype=np.float32) / 255
    # darker than the middle: scale the colour; lighter: move it towards white
    shade = np.clip(1 - 0.6 * (1 - ratio), 0.45, 1)[..., None]
    gleam = np.clip(0.55 * (ratio - 1), 0, 0.45)[..., None]
    painted = target * shade + (1 - target) * gleam
    mixed = rgb * (1 - mask) + painted * mask
    whole = np.concatenate([mixed * 255, rgba[..., 3:]], -1)
    return Image.fromarray(whole.clip(0, 255).round().astype(np.uint8))


def paint_mask(rgb: np.ndarray, paint: Paint) -> np.ndarray:
    """How far each pixel of (h, w, 3) in [0, 1] belongs to the paint, in [0, 1], edges soft; shape (h, w)."""
    value = rgb.max(-1)
    chroma = value - rgb.min(-1)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    safe = np.maximum(chroma, 1e-6)
    hue = (
        np.where(
            value == red,
            (green - blue) / safe,
            np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
        )
        * 60
        % 360
    )
    saturation = chroma / np.maximum(value, 1e-6)
    low, high = paint.hue
    half = ((high - low) % 360 or 360) / 2
    offset = np.abs((hue - (low + half) + 180) % 360 - 180)
    mask = np.clip((half - offset) / 10 + 0.5, 0, 1) if half < 180 else np.ones_like(value)
    for channel, (bottom, top) in ((saturation, paint.saturation), (value, paint.value)):
        mask = mask * np.clip((channel - bottom) / 0.08 + 0.5, 0, 1)
        mask = mask * np.clip((top - channel) / 0.08 + (1 if top >= 1 else 0.5), 0, 1)
    return mask.astype(np.float32)
