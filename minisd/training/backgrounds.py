"""The backgrounds of scenes: plain colours and drawn places, as pictures that vary with a seed.

Places and sizes are given in units of a frame of 128 × 128, whatever the number of pixels that it is drawn with.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from minisd.training.catalogue import PLACES

FRAME = 128  # units from side to side of a scene
SIZE = 192  # pixels from side to side of its picture
PIXEL = FRAME / SIZE  # units from one pixel to the next
HORIZON = 74  # the row around which land meets sky

PLAIN = {
    "white": (246, 246, 248),
    "black": (26, 26, 32),
    "gray": (150, 152, 160),
    "red": (214, 62, 58),
    "orange": (246, 150, 66),
    "yellow": (250, 218, 92),
    "green": (104, 184, 98),
    "blue": (76, 142, 236),
    "purple": (152, 104, 212),
    "pink": (250, 170, 200),
}
TIMES = ("day", "sunset", "night")

SKIES = {
    "day": ((84, 164, 240), (200, 230, 252)),
    "sunset": ((98, 62, 140), (255, 162, 96)),
    "night": ((12, 16, 48), (50, 56, 110)),
}
# what daylight turns into: ground colours are multiplied by this
LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (0.86, 0.68, 0.7), "night": (0.3, 0.34, 0.5)}
GROUND = {
    "meadow": ((150, 204, 104), (98, 176, 76)),
    "desert": ((240, 190, 112), (228, 166, 88)),
    "beach": ((250, 224, 164), (240, 206, 140)),
    "snow": ((226, 236, 250), (248, 250, 255)),
    "mountains": ((128, 178, 110), (92, 146, 86)),
}


def background(name: str, time: str, seed: int) -> np.ndarray:
    """Draw a plain colour or a place; float32 (SIZE, SIZE, 3) in [0, 255].

    `time` is day, sunset or night and matters only on land. Raises ValueError for an unknown name.
    """
    rng = np.random.default_rng(seed)
    if name in PLAIN:
        return gradient(np.multiply(PLAIN[name], 1.02), np.multiply(PLAIN[name], 0.94))
    if name == "sea":
        return sea(rng)
    if name == "space":
        return space(rng)
    if name in GROUND:
        return land(name, time, rng)
    raise ValueError(f"unknown background {name!r}; known are {', '.join([*PLAIN, *PLACES])}")


def land(name: str, time: str, rng: np.random.Generator) -> np.ndarray:
    """Draw a sky and the ground beneath it."""
    picture = gradient(*SKIES[time], rows=HORIZON + 12)
    if time == "day" and name != "snow":
        for _ in range(rng.integers(1, 3)):
            cloud(picture, rng)
    if time == "sunset":
        sun = disc(rng.uniform(16, 112), HORIZON - rng.uniform(3, 9), 12, softness=2)
        blend(picture, (255, 224, 140), sun)
    if time == "night":
        stars(picture, rng, count=9, bottom=HORIZON - 22)
    light = np.array(LIGHT[time], dtype=np.float32)
    shine = np.maximum(light, (0.44, 0.5, 0.64)) if name == "snow" else light  # snow is pale even at night
    far, near = shine * GROUND[name][0], shine * GROUND[name][1]
    if name == "mountains":
        mountains(picture, light, rng)
    if name == "beach":
        water = light * (48, 150, 214)
        blend(picture, water, below(np.full(SIZE, HORIZON - 8.0)))
        blend(picture, 0.6 * water + 0.4 * far, below(waves(rng, HORIZON + 13, 2.5, 1.2)))
        blend(picture, far, below(waves(rng, HORIZON + 16, 2.5, 1.2)))
        return picture
    if name != "mountains":
        blend(picture, far, below(waves(rng, HORIZON - 3, 6, 1)))
    blend(picture, near, below(waves(rng, HORIZON + 9, 4, 1)))
    if name == "snow":
        for x, y in scattered(rng, 12, bottom=118):
            blend(picture, 255 * np.maximum(light, 0.8), disc(x, y, 1.8))
    return picture


def mountains(picture: np.ndarray, light: np.ndarray, rng: np.random.Generator) -> None:
    """Draw three snow-capped peaks onto the picture, in place."""
    columns = grid()[1][0]
    for x in np.array([18, 64, 110]) + rng.uniform(-10, 10, 3):
        top, slope = rng.uniform(20, 36), rng.uniform(1.15, 1.5)
        edge = top + np.abs(columns - x) * slope
        blend(picture, np.maximum(light, 0.55) * (112, 122, 160), below(edge))
        cap = np.minimum(top + 13 + 3 * np.cos((columns - x) * 0.8), FRAME)
        blend(picture, np.maximum(light, 0.75) * (246, 248, 255), below(edge) * (1 - below(cap)))


def sea(rng: np.random.Generator) -> np.ndarray:
    """Draw the sea from below: water, a sandy floor, a few bubbles."""
    picture = gradient((30, 150, 196), (8, 60, 120))
    rows, columns = grid()
    for x in rng.uniform(0, FRAME, 2):
        ray = np.clip(1 - np.abs(columns - x - (rows - 30) * 0.35) / (6 + rows * 0.1), 0, 1)
        blend(picture, (170, 230, 240), 0.35 * ray * np.clip(1 - rows / 90, 0, 1))
    blend(picture, (196, 178, 128), below(waves(rng, 112, 4, 1)))
    for x, y in scattered(rng, 6, bottom=104):
        radius = rng.uniform(2, 4)
        blend(picture, (190, 232, 246), 0.8 * (disc(x, y, radius) - 0.7 * disc(x, y, radius - 1.2)))
    return picture


def space(rng: np.random.Generator) -> np.ndarray:
    """Draw space: near-black, a coloured nebula, a few stars."""
    picture = gradient((14, 10, 36), (24, 14, 54))
    rows, columns = grid()
    for colour in ((110, 50, 150), (40, 70, 160)):
        x, y = rng.uniform(10, 118, 2)
        blend(picture, colour, 0.55 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 1400))
    stars(picture, rng, count=16, bottom=126)
    return picture


def cloud(picture: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a soft white cloud into the sky, in place."""
    x, y, size = rng.uniform(12, 116), rng.uniform(10, 38), rng.uniform(7, 10)
    mask = np.zeros((SIZE, SIZE), dtype=np.float32)
    for offset, radius in ((-1.1, 0.65), (0, 1), (1.2, 0.7)):
        puff = disc(x + offset * size, y + (1 - radius) * size, radius * size, softness=3, squash=0.7)
        mask = np.maximum(mask, puff)
    blend(picture, (255, 255, 255), 0.8 * mask)


def stars(picture: np.ndarray, rng: np.random.Generator, count: int, bottom: float) -> None:
    """Draw stars above the row `bottom`, in place."""
    for x, y in scattered(rng, count, bottom):
        blend(picture, (255, 250, 220), disc(x, y, rng.uniform(1.2, 1.9)))


def scattered(rng: np.random.Generator, count: int, bottom: float) -> np.ndarray:
    """Positions (count, 2) as x, y, above the row `bottom`."""
    return rng.uniform((3, 3), (FRAME - 3, bottom), (count, 2))


@lru_cache(maxsize=1)
def grid() -> tuple[np.ndarray, np.ndarray]:
    """The rows (SIZE, 1) and columns (1, SIZE) of the pixels' centres, in units of the frame, float32."""
    axis = (np.arange(SIZE, dtype=np.float32) + 0.5) * PIXEL - 0.5
    return axis[:, None], axis[None, :]


def gradient(top: ArrayLike, bottom: ArrayLike, rows: int = FRAME) -> np.ndarray:
    """A picture that goes from one colour at the top to another at row `rows` and stays there."""
    share = np.clip(grid()[0] / rows, 0, 1)[..., None]
    line = np.asarray(top, dtype=np.float32) * (1 - share) + np.asarray(bottom, dtype=np.float32) * share
    return np.repeat(line, SIZE, axis=1)


def waves(rng: np.random.Generator, height: float, amplitude: float, frequency: float) -> np.ndarray:
    """A smooth skyline: one row for each column, around `height`, shape (SIZE,)."""
    turns = grid()[1][0] / FRAME * 2 * np.pi * frequency
    phases = rng.uniform(0, 2 * np.pi, 2)
    return height + amplitude * (0.7 * np.sin(turns + phases[0]) + 0.3 * np.sin(2.3 * turns + phases[1]))


def below(skyline: np.ndarray) -> np.ndarray:
    """A mask of what lies below a skyline (SIZE,), with an edge one pixel soft; shape (SIZE, SIZE)."""
    return np.clip((grid()[0] - skyline[None, :]) / PIXEL + 0.5, 0, 1).astype(np.float32)


def disc(x: float, y: float, radius: float, softness: float = PIXEL, squash: float = 1) -> np.ndarray:
    """A mask (SIZE, SIZE) of an ellipse, `squash` times as high as wide, its edge `softness` wide (one pixel)."""
    rows, columns = grid()
    distance = np.sqrt((columns - x) ** 2 + ((rows - y) / squash) ** 2)
    return np.clip((radius - distance) / softness + 0.5, 0, 1)


def blend(picture: np.ndarray, colour: ArrayLike, mask: np.ndarray) -> None:
    """Lay a colour over the picture where the mask (SIZE, SIZE) says so, in place."""
    picture += (np.asarray(colour, dtype=np.float32) - picture) * mask[..., None]
