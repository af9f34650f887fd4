"""The roofline of a machine: how fast it can be, by how many operations there are for each byte that is moved.

Source: Williams, Waterman and Patterson 2009, "Roofline: An Insightful Visual Performance Model".
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from minisd.figures import BLUE, FAINT, INK, ORANGE, PAPER, plot_picture

Point = tuple[float, float]


def plot_roof(
    peak: float, bandwidth: float, pairs: Mapping[str, tuple[Point, Point]], others: Mapping[str, Point], title: str
) -> Image.Image:
    """Draw the roofline of a machine, and points (FLOP per byte, FLOP a second) below it.

    Args:
        peak: FLOP a second.
        bandwidth: Bytes a second.
        pairs: Convolutions, with their weights reordered beforehand (hollow) and as torch runs them, an arrow between.
        others: Whole networks, for example.
        title: Says what is measured.
    """
    figure, axes = plt.subplots(figsize=(9, 4.4), layout="constrained")
    reach, edge = np.geomspace(0.4, 1500, 200), peak / bandwidth
    axes.loglog(reach, np.minimum(bandwidth * reach, peak) / 1e9, color=INK, linewidth=2.5)
    axes.axvline(edge, color=FAINT, linewidth=1, linestyle=":")
    (hollow, full), blue = np.array(list(pairs.values())).transpose(1, 2, 0), np.array(list(others.values())).T
    for (x, y), color, fill, name in (
        (hollow, ORANGE, PAPER, "convolution, weights reordered beforehand"),
        (full, ORANGE, ORANGE, "the same, as torch runs it"),
        (blue, BLUE, BLUE, "a whole network"),
    ):
        axes.loglog(x, y / 1e9, "o", color=color, markerfacecolor=fill, markeredgewidth=2, markersize=9, label=name)
    for label, start, end in zip(pairs, hollow.T, full.T, strict=True):
        (x0, y0), (x1, y1) = start * (1, 1e-9), end * (1, 1e-9)
        axes.annotate(
            "", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": ORANGE, "shrinkA": 6, "shrinkB": 6}
        )
        axes.annotate(label, (x1, y1), (0, -16), textcoords="offset points", ha="center", va="center", color=INK)
    for place, (label, (x, y)) in enumerate(others.items()):
        at, offset, side = (x, y / 1e9), (0, -16), "center"
        if x > edge:  # above the roof, with a line down to the dot; to the left of it and to the right in turn
            axes.plot([x, x], [y / 1e9, 1.5 * peak / 1e9], color=BLUE, linewidth=1)
            at = (x, 1.4 * peak / 1e9)
            offset, side = ((4, 0), "left") if place % 2 else ((-4, 0), "right")
        axes.annotate(label, at, offset, textcoords="offset points", ha=side, va="center", color=BLUE)
    axes.text(0.5, peak / 4e9, "memory-bound:\nmove less", color=FAINT)
    axes.text(1.15 * edge, peak / 17e9, "compute-bound:\ncompute less", color=FAINT)
    axes.set(xlabel="FLOP per byte", ylabel="GFLOP/s", title=title, ylim=(peak / 60e9, 1.8 * peak / 1e9))
    axes.legend(frameon=False, loc="lower right", fontsize=10)
    return plot_picture(figure)
