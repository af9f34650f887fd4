"""Drawings that one notebook alone needs: the U of 07, and the losses of 12."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from minisd.figures import BLUE, plot_picture, show


def draw_u(maps: Mapping[str, Tensor], popped: Sequence[tuple[str, str]], width: float) -> Image.Image:
    """The feature maps of a UNet as a U: a column for each call, in order, and a row for each size.

    Args:
        maps: What each station returned, (1, channels, h, w), in the order of the calls. Its most varied channel is
            drawn. What follows the last comma of the name is written below it, without a number.
        popped: For each skip the station that takes it and the one that made it; the innermost of each row first.
        width: Of the figure, in inches.
    """
    names, sides = list(maps), [one.shape[-1] for one in maps.values()]
    depths = [math.log2(max(sides) / side) for side in sides]  # how often each has been halved
    y, half = [-2.15 * depth for depth in depths], [0.41 * 0.9**depth for depth in depths]
    wires = Counter(y[names.index(skip)] for _, skip in popped)
    top, bottom = 0.65 + 0.27 * wires[0], min(y) - 1.25
    figure = plt.figure(figsize=(width, width * (top - bottom) / (len(names) + 0.4)))
    axes = figure.add_axes((0, 0, 1, 1))
    for x, (name, one) in enumerate(maps.items()):
        _draw_map(axes, name, one[0], (x, y[x]), half[x])
        if x:
            _draw_arrow(axes, (x - 1 + half[x - 1], y[x - 1]), (x - half[x], y[x]), "#555555")
    nested: Counter[float] = Counter()
    for consumer, skip in popped:
        a, b = names.index(skip), names.index(consumer)
        nested[y[a]] += 1
        over = y[a] + half[a] + 0.27 * nested[y[a]]
        axes.plot([a, a, b], [y[a] + half[a], over, over], color=BLUE, linewidth=1.5)
        _draw_arrow(axes, (b, over), (b, y[b] + half[b]), BLUE)
        axes.text(b, over + 0.02, f"+{maps[skip].shape[1]}", ha="right", va="bottom", fontsize=11, color=BLUE)
    axes.set(xlim=(-0.7, len(names) - 0.3), ylim=(bottom, top), aspect="equal")
    axes.axis("off")
    return plot_picture(figure, 32)


def _draw_map(axes: Axes, name: str, one: Tensor, place: tuple[float, float], half: float) -> None:
    (x, y), flat = place, one.flatten(1)
    face = one[(flat.amax(1) - flat.amin(1)).argmax()]
    axes.imshow(face, cmap="cividis", extent=(x - half, x + half, y - half, y + half), zorder=2)
    text = "{}\n{}\n{}×{}".format(name.split(", ")[-1].split()[0], *one.shape)
    axes.text(x, y - half - 0.08, text, ha="center", va="top", fontsize=11)


def _draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    style = {"arrowstyle": "-|>", "color": color, "mutation_scale": 10, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.5}
    axes.annotate("", end, start, arrowprops=style)


def plot_losses(lines: Sequence[Mapping[str, float]], name: str, alt: str, levels: Mapping[str, float]) -> None:
    """Show a training run's `name` at every step, in grey, its mean over ten steps, and dashed lines at `levels`."""
    values = np.array([line[name] for line in lines])
    figure, axes = plt.subplots(figsize=(5, 2))
    axes.plot(values, color="0.8")
    axes.plot(np.arange(9, len(values)), np.convolve(values, np.ones(10) / 10, "valid"))
    for label, level in levels.items():
        axes.axhline(level, color="0.3", linestyle="dashed", linewidth=1)
        axes.text(len(values), level, label, ha="right", va="bottom")
    axes.set(xlabel="step", ylabel=name)
    show(plot_picture(figure, 16), alt=alt)
