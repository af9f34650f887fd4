"""For notebook 04: the shipped CLIP, scenes for it to name, and a wheel of colour words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisd.io.diffusers_folder import load_text_encoder
from minisd.training.clip import CLIP
from minisd.training.scenes import Scene, scene


def shipped_clip() -> CLIP:
    """Both towers of the tiny model's CLIP, in float32 on the CPU; folders of other models hold no image tower."""
    tiny = Path(str(resources.files("minisd"))) / "assets/tiny"
    with torch.random.fork_rng(devices=[]):  # a new text encoder draws weights, which the file's then replace
        return CLIP.load(tiny / "clip", load_text_encoder(tiny / "text_encoder"))


def one_thing_each(total: int) -> tuple[list[Scene], list[Scene]]:
    """The first so many scenes of a stream that show a single thing: those in its own colours, and the recoloured."""
    singles = (one for one in map(partial(scene, 5), count()) if len(one.things) == 1)
    alone = list(islice(singles, total))
    own, recolored = ([one for one in alone if bool(one.things[0].color) == new] for new in (False, True))
    return own, recolored


def plane(points: Tensor) -> tuple[Tensor, float]:
    """Put points (n, width) into the plane of their first two principal components.

    Returns their places there (n, 2), from their mean, turned until the first is to the right of it, and mirrored if
    that brings the third above it; and the plane's share of their variance.
    """
    u, s, _ = torch.linalg.svd(points - points.mean(dim=0), full_matrices=False)
    x, y = u[:, 0] * s[0], u[:, 1] * s[1]
    angle = torch.atan2(y[0], x[0])
    x, y = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    share = (s[:2] ** 2).sum() / (s**2).sum()
    return torch.stack([x, y if y[2] > 0 else -y], dim=1), share.item()


def color_wheel(
    axes: Any, words: Tensor, title: str, colors: Mapping[str, Sequence[float]], pictures: Tensor | None = None
) -> None:
    """Draw words (n, 2) as dots around a centre, and pictures (n, 2), if any, as bars.

    Args:
        axes: matplotlib's axes.
        words, pictures: a row for each colour.
        title: stands above the wheel.
        colors: name to red, green and blue in [0, 1], in the order of the rows.
    """
    radius = words.norm(dim=1).max().item()
    for (x, y), color in zip([] if pictures is None else pictures.tolist(), colors.values(), strict=False):
        axes.plot([0, x], [0, y], color=color, linewidth=5, zorder=1)
    angles = _spread([math.atan2(y, x) for x, y in words.tolist()])
    for (x, y), angle, (name, color) in zip(words.tolist(), angles, colors.items(), strict=True):
        axes.plot([0, x], [0, y], color="lightgray", zorder=0)
        axes.scatter([x], [y], s=140, color=[color], edgecolor="black", zorder=2)
        far = math.hypot(x, y) + 0.14 * radius
        side = math.cos(angle)
        beside = "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
        above = "center" if abs(side) > 0.3 else "bottom" if math.sin(angle) > 0 else "top"
        axes.annotate(name, (far * side, far * math.sin(angle)), ha=beside, va=above)
    limits = (-1.7 * radius, 1.7 * radius)
    axes.set(xlim=limits, ylim=limits, aspect="equal", title=title)
    axes.axis("off")


def _spread(angles: list[float], apart: float = 0.3) -> list[float]:
    """The angles, with close neighbours pushed apart to about this distance, so that labels don't cover each other."""
    found = list(angles)
    for _ in range(20):
        order = sorted(range(len(found)), key=lambda i: found[i])
        for i, j in zip(order, order[1:], strict=False):
            lack = max(0.0, apart - (found[j] - found[i])) / 2
            found[i], found[j] = found[i] - lack, found[j] + lack
    return found
