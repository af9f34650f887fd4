"""Captioned scenes of 192 × 192 pixels, composed from sprites: what the tiny model learns from.

A scene is first described (`sample_scene`, cheap) and then drawn (`render`), both deterministically.
About a tenth of the (colour, object) and (object, place) pairs are held out: training never sees them,
evaluation asks for nothing else.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from minisd.training import backgrounds, captions
from minisd.training.backgrounds import FRAME, HORIZON, PIXEL, PLAIN, SIZE
from minisd.training.catalogue import CATALOGUE, PLACES, Entry
from minisd.training.sprites import COLORS, entries, extent, sprite

RELATIONS = ("left", "right", "above", "next")
HELD_OUT_PERCENT = 10
HELD_OUT_SALT = 2974  # spreads the held-out pairs evenly over objects, colours and places
KEPT = frozenset(
    {  # pairs that examples need
        ("fox", "snow"),
        ("panda", "snow"),
        ("penguin", "snow"),
        ("red", "car"),
        ("car", "beach"),
        ("rocket", "space"),
        ("blue", "balloon"),
        ("dolphin", "sea"),
        ("fish", "sea"),
        ("cat", "beach"),
        *(("castle", place) for place in PLACES),
    }
)


@dataclass(frozen=True)
class Thing:
    """An object in a scene: noun, tint or None, centre and longer side in the frame's units, whether it is mirrored."""

    noun: str
    color: str | None
    x: float
    y: float
    size: float
    flip: bool


@dataclass(frozen=True)
class Scene:
    """A described picture.

    `background` is a plain colour, or with `place` a place of the catalogue; `time` is day, sunset or night
    (day where time does not show). `relation` says where the first thing is, seen from the second: left,
    right, above, next, or None. `count` is how many of a kind there are (1 with a relation). `seed` varies
    the background's details; `mirrored` turns the whole picture around, after drawing.
    """

    caption: str
    things: tuple[Thing, ...]
    background: str
    place: bool
    time: str
    relation: str | None
    count: int
    seed: int
    mirrored: bool = False


@dataclass(frozen=True)
class Mixture:
    """Relative weights of the kinds of scene: one object, two objects in a relation, several of a kind."""

    single: float = 0.6
    relation: float = 0.25
    count: float = 0.15

    def __post_init__(self) -> None:
        weights = (self.single, self.relation, self.count)
        if not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
            raise ValueError(f"mixture weights must be finite, ≥ 0 and not all zero, got {weights}")


DEFAULT_MIXTURE = Mixture()


def scene(seed: int, index: int, *, held_out: bool = False, mixture: Mixture = DEFAULT_MIXTURE) -> Scene:
    """The index-th scene of the endless stream that a seed names: random access, so runs can resume."""
    return sample_scene(np.random.default_rng((seed, index)), held_out=held_out, mixture=mixture)


def sample_scene(rng: np.random.Generator, *, held_out: bool = False, mixture: Mixture = DEFAULT_MIXTURE) -> Scene:
    """Describe a random scene: one without any held-out pair, or with `held_out` one that has at least one.

    Held-out scenes always carry the canonical caption; others sometimes a looser one.
    """
    while True:
        described = _describe(rng, held_out, mixture)
        if bool(pairs(described) & held_out_pairs()) == held_out:
            return described


def render(scene: Scene) -> np.ndarray:
    """Draw a scene; (192, 192, 3) uint8, the same pixels for the same scene."""
    if scene.mirrored:
        return np.ascontiguousarray(render(flipped(scene))[:, ::-1])
    picture = backgrounds.background(scene.background, scene.time, scene.seed)
    for thing in scene.things:
        if scene.place and not _floats(entries()[thing.noun], scene.background):
            _cast_shadow(picture, thing)
        _paste(picture, thing)
    return picture.clip(0, 255).round().astype(np.uint8)


def flipped(scene: Scene) -> Scene:
    """The mirror image of a scene, with left and right exchanged in its caption."""
    things = tuple(replace(thing, x=FRAME - thing.x, flip=not thing.flip) for thing in scene.things)
    relation = captions.MIRROR.get(scene.relation, scene.relation) if scene.relation else None
    caption = captions.mirrored(scene.caption)
    return replace(scene, things=things, caption=caption, relation=relation, mirrored=not scene.mirrored)


def recolored(scene: Scene, color: str) -> Scene:
    """The same scene with its things in another tint; the caption stays."""
    return replace(scene, things=tuple(replace(thing, color=color) for thing in scene.things))


def pairs(scene: Scene) -> set[tuple[str, str]]:
    """The (colour, object) and (object, place) pairs in a scene."""
    found = {(thing.color, thing.noun) for thing in scene.things if thing.color}
    if scene.place:
        found |= {(thing.noun, scene.background) for thing in scene.things}
    return found


@lru_cache(maxsize=1)
def all_pairs() -> frozenset[tuple[str, str]]:
    """Every (colour, object) and (object, place) pair that scenes can have."""
    tinted = {(color, entry.noun) for entry in CATALOGUE for color in entry.colors}
    return frozenset(tinted | {(entry.noun, place) for entry in CATALOGUE for place in entry.places})


@lru_cache(maxsize=1)
def held_out_pairs() -> frozenset[tuple[str, str]]:
    """The pairs that never occur in training, chosen by a hash of their words."""

    def drawn(pair: tuple[str, str]) -> bool:
        digest = hashlib.sha256(f"{HELD_OUT_SALT}|{pair[0]}|{pair[1]}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT

    return frozenset(pair for pair in all_pairs() - KEPT if drawn(pair))


def object_names() -> list[str]:
    """The nouns of the catalogue, in its order."""
    return [entry.noun for entry in CATALOGUE]


def colors() -> list[str]:
    """The colours that objects can take."""
    return list(COLORS)


def plain_backgrounds() -> list[str]:
    """The colours of plain backgrounds."""
    return list(PLAIN)


def places() -> list[str]:
    """The drawn places."""
    return list(PLACES)


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    return captions.vocabulary()


def _describe(rng: np.random.Generator, held_out: bool, mixture: Mixture) -> Scene:
    """Describe a scene of a random kind; without `held_out`, avoid held-out pairs where that is cheap."""
    avoid = frozenset() if held_out else held_out_pairs()
    weights = np.array([mixture.single, mixture.relation, mixture.count])
    kind = ("single", "relation", "count")[rng.choice(3, p=weights / weights.sum())]
    chosen = [CATALOGUE[i] for i in rng.choice(len(CATALOGUE), 2 if kind == "relation" else 1, replace=False)]
    relation = RELATIONS[rng.integers(4)] if kind == "relation" else None
    count = int(rng.integers(2, 4)) if kind == "count" else 1

    place = _choose_place(rng, chosen, relation, avoid) if rng.random() < 0.5 else None
    time = ("day", "sunset", "night")[rng.choice(3, p=(0.5, 0.25, 0.25))]
    if place in (None, "sea", "space"):
        time = "day"
    tints = [_choose_color(rng, entry, place, time, avoid) for entry in chosen]
    background = place or _choose_plain(rng, chosen, tints)

    things = _arrange(rng, chosen, tints, place, relation, count)
    nouns = list(zip(tints, chosen, strict=True))
    in_place = place is not None
    caption = captions.caption(nouns, background, in_place, time, relation, count, None if held_out else rng)
    return Scene(caption, things, background, in_place, time, relation, count, seed=int(rng.integers(2**31)))


def _choose_place(
    rng: np.random.Generator, chosen: list[Entry], relation: str | None, avoid: frozenset[tuple[str, str]]
) -> str | None:
    """A place that suits all the objects, or None; the sea and space, where few belong, are preferred."""
    fitting = [
        place
        for place in PLACES
        if all(place in entry.places and (entry.noun, place) not in avoid for entry in chosen)
        and (relation != "above" or _floats(chosen[0], place))
    ]
    if not fitting:
        return None
    weights = np.array([2.0 if place in ("sea", "space") else 1.0 for place in fitting])
    return fitting[rng.choice(len(fitting), p=weights / weights.sum())]


def _choose_color(
    rng: np.random.Generator, entry: Entry, place: str | None, time: str, avoid: frozenset[tuple[str, str]]
) -> str | None:
    """A tint for three quarters of the objects that take one, never one that the place hides."""
    hidden = {"sea": "blue", "snow": "white", "space": "black"}.get(place or "")
    options = [
        color
        for color in entry.colors
        if (color, entry.noun) not in avoid and color != hidden and not (color == "black" and time == "night")
    ]
    if not options or rng.random() < 0.25:
        return None
    return options[rng.integers(len(options))]


def _choose_plain(rng: np.random.Generator, chosen: list[Entry], tints: list[str | None]) -> str:
    """A plain colour that none of the objects has."""
    shown = [(tint,) if tint else entry.own for entry, tint in zip(chosen, tints, strict=True)]
    taken = {color for colors in shown for color in colors}
    options = [color for color in PLAIN if color not in taken]
    return options[rng.integers(len(options))]


def _floats(entry: Entry, place: str | None) -> bool:
    """Whether an object hangs in air, water or space there, rather than standing on the ground."""
    if place == "sea":
        return entry.noun not in ("crab", "robot")
    return entry.flies or place in (None, "space")


def _arrange(
    rng: np.random.Generator,
    chosen: list[Entry],
    tints: list[str | None],
    place: str | None,
    relation: str | None,
    count: int,
) -> tuple[Thing, ...]:
    """Put the objects into the picture: sizes, positions, mirroring."""
    if relation:
        order = list(zip(chosen, tints, strict=True))
        return _arrange_pair(rng, order, place, relation)
    low, high = {1: (60, 100), 2: (42, 50), 3: (30, 37)}[count]
    size = float(rng.integers(low, high + 1))
    centres = {1: (64,), 2: (34, 94), 3: (22, 64, 106)}[count]
    jitter = (FRAME - size) / 2 - 4 if count == 1 else (3 if count == 2 else 1.5)
    flip = bool(rng.random() < 0.5)
    base = _height(rng, chosen[0], size, place)
    things = []
    for centre in centres:
        x = centre + rng.uniform(-jitter, jitter)
        y = _keep_inside(base + (rng.uniform(-5, 5) if count > 1 else 0), chosen[0], size)
        things.append(Thing(chosen[0].noun, tints[0], _pixel(x), _pixel(y), size, flip))
    return tuple(things)


def _arrange_pair(
    rng: np.random.Generator, order: list[tuple[Entry, str | None]], place: str | None, relation: str
) -> tuple[Thing, ...]:
    """Put two objects beside or above each other, the first where the relation says."""
    size = [float(rng.integers(44, 58)) for _ in order]
    if relation == "above":
        middle = 64 + rng.uniform(-14, 14)
        xs = [middle + rng.uniform(-8, 8) for _ in order]
        ys = [33 + rng.uniform(-3, 3), 95 + rng.uniform(-3, 3)]
        if place and not _floats(order[1][0], place):
            ys[1] = max(ys[1], _height(rng, order[1][0], size[1], place))
    else:
        first_left = relation == "left" or (relation == "next" and rng.random() < 0.5)
        xs = [x + rng.uniform(-3, 3) for x in ((34, 94) if first_left else (94, 34))]
        ys = [_height(rng, entry, s, place) for (entry, _), s in zip(order, size, strict=True)]
        if place is None:
            ys[1] = ys[0] + rng.uniform(-8, 8)
    return tuple(
        Thing(entry.noun, tint, _pixel(x), _pixel(_keep_inside(y, entry, s)), s, bool(rng.random() < 0.5))
        for (entry, tint), x, y, s in zip(order, xs, ys, size, strict=True)
    )


def _height(rng: np.random.Generator, entry: Entry, size: float, place: str | None) -> float:
    """The row of an object's centre: anywhere if it floats, in the sky if it flies, else on the ground."""
    height = extent(entry.noun, size)[1]
    if place is None or place == "space" or (place == "sea" and _floats(entry, place)):
        room = min((FRAME - height) / 2 - 4, 24)
        return 64 + rng.uniform(-room, room)
    if entry.flies:
        return rng.uniform(height / 2 + 4, max(HORIZON - 6, height / 2 + 8))
    foot = rng.uniform(112, 122) if place == "sea" else rng.uniform(HORIZON + 26, 121)
    return foot - height / 2


def _keep_inside(y: float, entry: Entry, size: float) -> float:
    """The row moved so that the object ends at least 3 units inside the picture."""
    half = extent(entry.noun, size)[1] / 2 + 3
    return float(np.clip(y, half, FRAME - half))


def _pixel(position: float) -> float:
    return float(round(position))


def _paste(picture: np.ndarray, thing: Thing) -> None:
    """Draw a thing onto the picture (192, 192, 3), in place; what lies outside is cut off."""
    width, height = (max(1, round(side / PIXEL)) for side in extent(thing.noun, thing.size))
    drawn = sprite(thing.noun, thing.color).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(drawn, dtype=np.float32)
    if thing.flip:
        pixels = pixels[:, ::-1]
    left, top = round(thing.x / PIXEL - width / 2), round(thing.y / PIXEL - height / 2)
    cut = pixels[max(0, -top) : SIZE - top, max(0, -left) : SIZE - left]
    area = picture[max(0, top) : top + height, max(0, left) : left + width]
    area *= 1 - cut[..., 3:] / 255
    area += cut[..., :3]


def _cast_shadow(picture: np.ndarray, thing: Thing) -> None:
    """Darken the ground beneath a standing thing, in place."""
    width, height = extent(thing.noun, thing.size)
    foot = thing.y + height / 2 - 2
    shade = backgrounds.disc(thing.x, foot, width * 0.46, softness=width * 0.2, squash=0.16)
    picture *= 1 - 0.35 * shade[..., None]
