"""The evaluation as one picture: shares with their intervals, samples with their verdicts, the nearest sprites."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from minisd.evaluation import memory
from minisd.evaluation.attributes import in_words, marks
from minisd.training.judge import Verdict
from minisd.training.scenes import Scene, Thing

COLUMNS, ROWS = 8, 3
KINDS = {"real": "#9aa5b1", "reconstructed": "#5b8db8", "drawn": "#e07a3f"}
RIGHT, WRONG = "#2e7d32", "#c62828"


def picture(result: dict[str, Any], scenes: list[Scene], drawn: np.ndarray, verdicts: list[Verdict]) -> Image.Image:
    """Draw the report. The samples are the first ones, not cherry-picked."""
    samples = min(COLUMNS * ROWS, len(scenes))
    rows, sprites = -(-samples // COLUMNS), result["nearest_sprites"][:COLUMNS]
    figure = Figure(figsize=(16, 5.2 + 2.9 * rows + (4.4 if sprites else 0)), layout="constrained")
    heights = [5.2, 2.9 * rows] + ([4.4] if sprites else [])
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _bars(parts[0].subplots(), result)
    for axes, index in zip(parts[1].subplots(rows, COLUMNS, squeeze=False).flat, range(rows * COLUMNS), strict=True):
        if index >= samples:
            axes.axis("off")
        else:
            _sample(axes, drawn[index], scenes[index], verdicts[index])
    if sprites:
        parts[2].suptitle("a colour new to the object: drawn, and below it the nearest sprite that training had")
        grid = parts[2].subplots(2, COLUMNS)
        for column in range(COLUMNS):
            _nearest(grid[:, column], sprites[column] if column < len(sprites) else None, scenes, drawn)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _bars(axes: Axes, result: dict[str, Any]) -> None:
    """Draw a group of bars for every attribute that the prompts name, with goals as black lines."""
    names = [name for name, figures in result["attributes"].items() if figures["drawn"]["of"]]
    for shift, (kind, color) in enumerate(KINDS.items()):
        figures = [result["attributes"][name][kind] for name in names]
        figures = [one if one["of"] else one | {"share": 0, "low": 0, "high": 0} for one in figures]
        share, low, high = (np.array([one[key] for one in figures], float) for key in ("share", "low", "high"))
        error = np.abs(np.stack([share - low, high - share]))
        axes.bar(
            np.arange(len(names)) + 0.27 * (shift - 1), share, 0.25, yerr=error, color=color, label=kind, capsize=3
        )
    for place, name in enumerate(names):
        goal = result["attributes"][name]["goal"]
        if goal:
            axes.plot([place - 0.42, place + 0.42], [goal, goal], color="black", linewidth=1.5)
    labels = [name + ("" if result["attributes"][name]["quoted"] else "\n(not quoted)") for name in names]
    axes.set_xticks(range(len(names)), [label.replace("_", " ") for label in labels])
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share that is right, 95% interval")
    axes.legend(loc="lower left", ncols=3, framealpha=1)
    settings, fidelity = result["settings"], result["autoencoder"]
    title = (
        f"{settings['count']} prompts, {settings['steps']} steps, guidance {settings['guidance']:g} | "
        f"autoencoder {fidelity['psnr']:.1f} dB, SSIM {fidelity['ssim']:.3f}"
    )
    if result["clip"]:
        score = result["clip"]["score"]
        title += f" | CLIP {score['drawn']:.3f} (real {score['real']:.3f}, shuffled {score['shuffled']:.3f})"
    axes.set_title(title)


def _sample(axes: Axes, pixels: np.ndarray, scene: Scene, verdict: Verdict) -> None:
    """Draw a sample between its prompt and its verdict, in green, or in red with the attributes that are wrong."""
    wrong = [name for name, cases in marks(scene, verdict).items() if not all(cases) and name != "everything"]
    words = [in_words(verdict)] if not wrong else [f"wrong: {', '.join(wrong)}".replace("_", " "), in_words(verdict)]
    axes.imshow(pixels)
    axes.set(xticks=[], yticks=[])
    axes.set_title(_wrapped(scene.caption), fontsize=8)
    axes.set_xlabel("\n".join(map(_wrapped, words)), fontsize=8, color=WRONG if wrong else RIGHT)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 28))


def _nearest(column: np.ndarray, found: dict[str, Any] | None, scenes: list[Scene], drawn: np.ndarray) -> None:
    for axes in column:
        axes.axis("off")
    if found is None:
        return
    match = {key: value for key, value in found["nearest_in_training"].items() if key != "rmse"}
    scene = scenes[found["index"]]
    column[0].imshow(drawn[found["index"]])
    column[0].set_title(_wrapped(found["prompt"]), fontsize=8)
    column[1].imshow(memory.shown(memory.Match(Thing(**match), 0.0), scene))
    nearest = found["nearest"]
    words = " ".join(filter(None, (nearest["color"], nearest["noun"])))
    column[1].set_title(f"nearest of all: {words}", fontsize=8, color=RIGHT if found["composed"] else WRONG)
