"""The roofline of a machine: how fast it can be, by how many operations there are for each byte that is moved.

Source: Williams, Waterman and Patterson 2009, "Roofline: An Insightful Visual Performance Model".
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from minisd.figures import BLUE, FAINT, INK, ORANGE, PAPER, plot_picture

Points = Mapping[str, tuple[float, float]]


def plot_roof(peak: float, bandwidth: float, computed: Points, measured: Points) -> Image.Image:
    """Draw the roofline of a machine, and points (FLOP per byte, FLOP a second): computed ones hollow, measured full.

    Args:
        peak: FLOP a second.
        bandwidth: Bytes a second.
        computed, measured: Points by their names.
    """
    figure, axes = plt.subplots(figsize=(9, 4.4), layout="constrained")
    reach = np.geomspace(0.4, 1500, 200)
    axes.loglog(reach, np.minimum(bandwidth * reach, peak) / 1e9, color=INK, linewidth=2.5)
    for points, full in ((computed, False), (measured, True)):
        x, y = np.array(list(points.values())).T
        color, name = (BLUE, "measured") if full else (ORANGE, "computed, with reordering")
        fill, ink = (color, color) if full else (PAPER, INK)
        axes.loglog(x, y / 1e9, "o", color=color, markerfacecolor=fill, markeredgewidth=2, markersize=9, label=name)
        labels = list(points)
        for place in range(len(labels) - 1, 0, -1):
            if not full and abs(math.log(x[place] / x[place - 1])) < 0.1:  # dots that hide each other: one label
                labels[place - 1 : place + 1] = [f"{labels[place - 1]}, {labels[place]}", ""]
        for place, label in enumerate(labels):
            at, offset, side = (x[place], y[place] / 1e9), (0, -18), "center"
            if full:  # above the roof, with a line down to the dot; to the left of it and to the right in turn
                axes.plot(x[[place, place]], (y[place] / 1e9, 1.6 * peak / 1e9), color=color, linewidth=1)
                at = (x[place], 1.4 * peak / 1e9)
                offset, side = ((4, 0), "left") if place % 2 else ((-4, 0), "right")
            elif x[place] < peak / bandwidth:  # beside the slope
                offset, side = (10, -8), "left"
            axes.annotate(label, at, offset, textcoords="offset points", ha=side, va="center", color=ink)
    axes.text(0.5, 90, "memory-bound:\nmove less", color=FAINT)
    axes.text(24, 25, "compute-bound:\ncompute less", color=FAINT)
    axes.axvline(peak / bandwidth, color=FAINT, linewidth=1, linestyle=":")
    axes.set(
        xlabel="FLOP per byte",
        ylabel="GFLOP/s",
        ylim=(7, 700),
        title=f"level: measured; slope: {bandwidth / 1e9:.0f} GB/s, assumed; only full dots are measured",
    )
    axes.legend(frameon=False, loc="lower right")
    return plot_picture(figure)
