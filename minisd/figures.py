"""Figures of the notebooks, and their common setup: one style, small files, alternative text for each.

Figures are drawn pixel by pixel with Pillow, so that running a notebook again gives the same bytes. The colours are
safe for colour-blind readers (Okabe and Ito 2008; Nuñez et al. 2018 for "cividis").
"""

from __future__ import annotations

import io
import os
import random
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from minisd.images import to_pil
from minisd.pipeline.memory import best_device
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.tokenizer import Tokenizer, normalize, split_words

INK, FAINT, PAPER = "#1a1a1a", "#6b6b6b", "#ffffff"
BLUE, ORANGE, GREEN, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7"
STAGES = ("tokenizer", "text encoder", "noise", "unet", "sampler", "autoencoder")


def shipped() -> bool:
    """Whether the notebooks run on the tiny model of this package, because MINISD_MODEL is not set."""
    return not os.environ.get("MINISD_MODEL")


def model_source() -> str:
    """The notebooks' model: the hub id or folder in MINISD_MODEL, or else the folder of the tiny model."""
    return os.environ.get("MINISD_MODEL") or str(resources.files("minisd") / "assets/tiny")


def load_model() -> StableDiffusion:
    """Load the notebooks' model. The tiny one always runs on the CPU, so that all machines draw the same pictures.

    MINISD_DTYPE chooses the dtype of its weights: float32, float16 or bfloat16. Raises ValueError for any other.
    """
    name = os.environ.get("MINISD_DTYPE")
    if name and name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"MINISD_DTYPE={name!r}; expected float32, float16 or bfloat16")
    dtype = getattr(torch, name) if name else None
    return StableDiffusion.from_pretrained(model_source(), device="cpu" if shipped() else best_device(), dtype=dtype)


def notebook_setup(seed: int = 0) -> None:
    """Set up a notebook: fix the seeds and the style of plots, and print which model it runs on."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    matplotlib.rcParams.update({"figure.dpi": 72, "savefig.dpi": 72, "font.size": 12, "axes.grid": True})
    matplotlib.rcParams.update({"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    matplotlib.rcParams["axes.prop_cycle"] = plt.cycler(color=[BLUE, ORANGE, GREEN, PURPLE, SKY])
    if shipped():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        print("Model: the tiny one that comes with minisd, on the CPU. Nothing is downloaded.")
    else:
        print(f"Model: {Path(model_source()).name} (MINISD_MODEL), on {best_device()}.")
        print("It draws other pictures than those stored, and what is said of the tiny model need not hold for it.")


def show(picture: Image.Image | Figure, alt: str) -> None:
    """Show a PIL picture, or a plot, which is closed, with its alternative text. Raises ValueError if `alt` is empty.

    Pictures of few colours are stored as PNG, without loss; others as JPEG, which takes a fifth of the space.
    """
    if not alt.strip():
        raise ValueError("the picture has no text; say in `alt` what it shows")
    buffer, kind = io.BytesIO(), "png"
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=72, bbox_inches="tight", metadata={"Software": None})
        plt.close(picture)
    elif picture.mode != "RGB" or picture.getcolors(4096):
        picture.save(buffer, format="PNG", optimize=True)
    else:
        kind = "jpeg"
        picture.save(buffer, format="JPEG", quality=84, subsampling=2, optimize=True)
    data = {f"image/{kind}": b64encode(buffer.getvalue()).decode(), "text/plain": alt}
    display(data, metadata={f"image/{kind}": {"alt": alt}}, raw=True)


def enlarge(picture: Image.Image, side: int = 256, shrink: bool = False) -> Image.Image:
    """Scale a picture up by an integer factor, until its longer side is about `side` pixels; down only if asked to."""
    if shrink and max(picture.size) > side:
        return ImageOps.contain(picture, (side, side), Image.Resampling.LANCZOS)
    factor = max(1, round(side / max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def film_strip(rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str] = (), side: int = 120) -> Image.Image:
    """Arrange pictures in a table; larger ones than its cells are shrunk, smaller ones are scaled up.

    Args:
        rows: the pictures of each row, all of one size, by the row's name.
        columns: the names of the columns, if any.
        side: the approximate side of a picture in the table, in pixels.

    Raises:
        ValueError: the rows differ in length, or the columns do not match them.
    """
    lengths = {len(row) for row in rows.values()}
    if len(lengths) != 1 or 0 in lengths or (columns and len(columns) not in lengths):
        raise ValueError(f"rows of {sorted(lengths)} pictures under {len(columns)} column names; make them match")
    table = {name: [enlarge(picture.convert("RGB"), side, True) for picture in row] for name, row in rows.items()}
    width, height = next(iter(table.values()))[0].size
    left = max((int(_font(13).getlength(line)) for name in rows for line in name.split("\n")), default=0)
    left, top, gap = left + 10 if left else 0, 22 if columns else 0, 4
    across, down = lengths.pop() * (width + gap) - gap, len(table) * (height + gap) - gap
    sheet = Image.new("RGB", (left + across, top + down), PAPER)
    draw = ImageDraw.Draw(sheet)
    for x, name in enumerate(columns):
        draw.text((left + x * (width + gap) + width / 2, top / 2), name, INK, _font(13), anchor="mm")
    for y, (name, row) in enumerate(table.items()):
        draw.multiline_text((0, top + y * (height + gap) + height / 2), name, INK, _font(13), anchor="lm")
        for x, picture in enumerate(row):
            sheet.paste(picture, (left + x * (width + gap), top + y * (height + gap)))
    return sheet


def paint(values: Tensor, low: float | None = None, high: float | None = None, colors: str = "cividis") -> Image.Image:
    """Map a matrix (h, w) to a picture of h × w pixels: the darkest colour is `low`, the brightest is `high`."""
    table = values.detach().float().cpu().numpy()
    low, high = float(table.min()) if low is None else low, float(table.max()) if high is None else high
    unit = np.clip((table - low) / max(high - low, 1e-12), 0, 1)
    return Image.fromarray((matplotlib.colormaps[colors](unit)[..., :3] * 255).round().astype(np.uint8))


def channels(latents: Tensor) -> list[Image.Image]:
    """The channels of latents (1, c, h, w) as grey pictures: black is −3, white is 3, about the range of unit noise."""
    return [paint(channel, -3, 3, "gray") for channel in latents[0]]


def heat_over(picture: Image.Image, weights: Tensor, strength: float = 0.65) -> Image.Image:
    """Overlay a picture with weights (h, w) ≥ 0 as a heat map: bright where they are large."""
    heat = paint(weights, 0).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.blend(picture.convert("L").convert("RGB"), heat, strength)


def token_row(
    tokens: Sequence[str], below: Sequence[object] = (), weights: Iterable[float] = (), framed: Sequence[bool] = ()
) -> Image.Image:
    """Draw tokens in boxes, each with a note below, such as its id; weights in [0, 1] colour the boxes.

    Boxes that are `framed` have a thick orange edge.
    """
    shares = [float(weight) for weight in weights] or [0.0] * len(tokens)
    notes = [str(note) for note in below] or [""] * len(tokens)
    names = [token.replace("</w>", "") for token in tokens]
    widths = [int(max(_font(14).getlength(a), _font(12).getlength(b))) + 20 for a, b in zip(names, notes, strict=True)]
    sheet = Image.new("RGB", (sum(widths) + 6 * len(widths), 58 if below else 36), PAPER)
    draw, x = ImageDraw.Draw(sheet), 0
    edges = [(ORANGE, 3) if frame else (BLUE, 1) for frame in framed or [False] * len(names)]
    for name, note, share, width, edge in zip(names, notes, shares, widths, edges, strict=True):
        fill = tuple(round(255 * (1 - share) + share * part) for part in (0x56, 0xB4, 0xE9))
        draw.rounded_rectangle((x, 2, x + width, 34), 6, fill, *edge)
        draw.text((x + width / 2, 18), name, INK, _font(14), anchor="mm")
        draw.text((x + width / 2, 46), note, FAINT, _font(12), anchor="mm")
        x += width + 6
    return sheet


def you_are_here(*lit: str, from_picture: bool = False) -> Image.Image:
    """Draw the pipeline with the named `STAGES` (or all) lit; with `from_picture`, a picture enters as well."""
    if unknown := set(lit) - set(STAGES):
        raise ValueError(f"no part is called {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
    sheet = Image.new("RGB", (880, 204 if from_picture else 132), PAPER)
    draw = ImageDraw.Draw(sheet)
    rows = {8: {"tokenizer": (90, 190), "text encoder": (260, 370)}}
    rows[156] = {"encoder": (90, 190)} if from_picture else {}
    rows[84] = {"noise": (90, 190), "unet": (300, 400), "sampler": (490, 590), "autoencoder": (680, 800)}
    boxes = {name: (left, y, right, y + 40) for y, row in rows.items() for name, (left, right) in row.items()}
    for name, box in boxes.items():
        on = not lit or ("autoencoder" if name == "encoder" else name) in lit
        draw.rounded_rectangle(box, 8, SKY if on else "#eeeeee", BLUE if on else "#bbbbbb", 2)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        draw.text(middle, "UNet" if name == "unet" else name, INK if on else FAINT, _font(14), anchor="mm")
    arrows = [
        ((62, 28), (90, 28), ""),
        ((190, 28), (260, 28), "ids"),
        ((190, 104), (300, 104), "" if from_picture else "latents"),
        ((400, 104), (490, 104), "prediction"),
        ((590, 104), (680, 104), "latents"),
        ((800, 104), (828, 104), ""),
    ] + [((62, 176), (90, 176), "")] * from_picture
    for start, end, label in arrows:
        _arrow(draw, start, end)
        draw.text(((start[0] + end[0]) / 2 - 3, start[1] - 10), label, FAINT, _font(12), anchor="mm")
    draw.line([(370, 28), (385, 28), (385, 78)], FAINT, 2)
    _arrow(draw, (385, 70), (385, 84))
    draw.text((394, 42), "context: what the words mean", FAINT, _font(12), anchor="lm")
    draw.line([(540, 84), (540, 66), (330, 66)], FAINT, 2)
    _arrow(draw, (330, 66), (330, 84))
    draw.text((550, 70), "again and again, with less noise each time", FAINT, _font(12), anchor="lm")
    draw.text((4, 28), "prompt", INK, _font(14), anchor="lm")
    draw.text((832, 104), "picture", INK, _font(13), anchor="lm")
    if from_picture:
        draw.text((4, 176), "picture", INK, _font(14), anchor="lm")
        draw.line([(190, 176), (220, 176), (220, 104)], FAINT, 2)
        draw.ellipse((211, 95, 229, 113), PAPER, FAINT, 2)
        draw.text((220, 104), "+", FAINT, _font(14), anchor="mm")
        draw.text((263, 94), "latents", FAINT, _font(12), anchor="mm")
        draw.text((230, 168), "latents of the picture", FAINT, _font(12), anchor="lm")
    return sheet.quantize(32)


def slider(draw: Callable[[int], Image.Image], name: str, count: int, alt: str) -> None:
    """Show a slider over the pictures draw(0) … draw(count − 1), in a running notebook only; it is not stored."""
    from ipywidgets import HTML, IntSlider, VBox
    from ipywidgets import Image as Frame

    def encode(value: int) -> bytes:
        buffer = io.BytesIO()
        enlarge(draw(value)).save(buffer, format="PNG")
        return buffer.getvalue()

    handle = IntSlider(value=0, min=0, max=count - 1, description=name, continuous_update=False)
    frame = Frame(value=encode(0), format="png")
    handle.observe(lambda change: setattr(frame, "value", encode(change["new"])), names="value")
    display(VBox([handle, frame, HTML(f"<small>{alt}</small>")]))


def _arrow(draw: ImageDraw.ImageDraw, start: tuple[int, int], end: tuple[int, int]) -> None:
    (x, y), down = end, end[1] > start[1]
    draw.line([start, end], FAINT, 2)
    draw.polygon([end, (x - 4, y - 8), (x + 4, y - 8)] if down else [end, (x - 8, y - 4), (x - 8, y + 4)], FAINT)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # DejaVu Sans comes with matplotlib, so text looks the same on every machine
    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def merge_tree(tokenizer: Tokenizer, prompt: str) -> Image.Image:
    """Draw how the bytes of a prompt are merged into tokens: a tree per word, a rank at each merge, the ids on top."""
    words = [_word_tree(tokenizer.merge_steps(word)) for word in split_words(normalize(prompt))]
    top = max(level for nodes in words for _, level, *_ in nodes)
    pitch, gap, bottom = 54, 16, 66 * top + 46
    leaves = sum(node[1] == 0 for nodes in words for node in nodes)
    sheet = Image.new("RGB", (pitch * leaves + gap * (len(words) - 1), bottom + 22), PAPER)
    draw, left = ImageDraw.Draw(sheet), pitch / 2
    for nodes in words:
        places = [(left + pitch * x, bottom - 66 * level) for x, level, *_ in nodes]
        below = {child for *_, children in nodes for child in children}
        for place, (*_, children) in zip(places, nodes, strict=True):
            for child in children:
                draw.line([place, places[child]], FAINT, 2)
        for number, ((x, y), (_, _, symbol, children)) in enumerate(zip(places, nodes, strict=True)):
            rank = f"rank {tokenizer.ranks[nodes[children[0]][2], nodes[children[1]][2]]:,}" if children else ""
            half = max(_font(13).getlength(symbol), _font(11).getlength(rank)) / 2 + 5
            box = (x - half, y - 14, x + half, y + (22 if rank else 13))
            draw.rounded_rectangle(box, 5, PAPER if number in below else SKY, FAINT if number in below else BLUE)
            draw.text((x, y), symbol, INK, _font(13), anchor="mm")
            draw.text((x, y + 14), rank, FAINT if number in below else INK, _font(11), anchor="mm")
            if number not in below:
                draw.text((x, y - 26), str(tokenizer.vocabulary[symbol]), BLUE, _font(14), anchor="mm")
        left += pitch * sum(node[1] == 0 for node in nodes) + gap
    return sheet.quantize(32)


def _word_tree(steps: list[list[str]]) -> list[tuple[float, int, str, tuple[int, ...]]]:
    """The nodes of a word's tree: (x, level, symbol, indices of the two children)."""
    nodes: list[tuple[float, int, str, tuple[int, ...]]] = [(x, 0, symbol, ()) for x, symbol in enumerate(steps[0])]
    row = list(range(len(nodes)))
    for symbols in steps[1:]:
        for at, symbol in enumerate(symbols):  # a step may merge the same pair in several places
            if symbol != nodes[row[at]][2]:
                (left, low, *_), (right, high, *_) = nodes[row[at]], nodes[row[at + 1]]
                nodes.append(((left + right) / 2, max(low, high) + 1, symbol, (row[at], row[at + 1])))
                row[at : at + 2] = [len(nodes) - 1]
    return nodes


def token_rows(tokenizer: Tokenizer, prompts: Sequence[str], length: int = 77) -> Image.Image:
    """Draw the tokens of prompts in a context of `length`; those behind the bar are cut off."""
    kinds = {"start": INK, "text": SKY, "end": ORANGE, "padding": "#e2e2e2", "cut off": PURPLE}
    counts = [len(tokenizer.encode(prompt)) for prompt in prompts]
    side, pitch = 9, 52
    extra = max(0, max(counts) - (length - 2))
    sheet = Image.new("RGB", (side * (length + extra) + 10, pitch * len(prompts) + 24), PAPER)
    draw = ImageDraw.Draw(sheet)
    for y, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        kept, y0 = min(count, length - 2), pitch * y + 20
        cells = ["start", *["text"] * kept, "end", *["padding"] * (length - 2 - kept), *["cut off"] * (count - kept)]
        name = prompt if len(prompt) < 70 else prompt[:66] + " …"
        draw.text((0, y0 - 10), f"{name}   ({count} tokens)", INK, _font(12), anchor="lm")
        for x, kind in enumerate(cells):
            left = side * x + (8 if x >= length else 0)
            draw.rectangle((left, y0, left + side - 2, y0 + 18), kinds[kind])
        draw.line([(side * length + 2, y0 - 3), (side * length + 2, y0 + 21)], INK, 2)
    x = 0
    for kind, color in kinds.items():
        draw.rectangle((x, sheet.height - 16, x + 12, sheet.height - 4), color)
        draw.text((x + 18, sheet.height - 10), kind, INK, _font(12), anchor="lm")
        x += 34 + int(_font(12).getlength(kind))
    return sheet.quantize(32)


def shape_ladder(maps: Mapping[str, Tensor], sheets: int = 2, side: int = 96) -> Image.Image:
    """Draw feature maps (1, c, h, w) from left to right, each as a column of its channels with the largest range.

    All are drawn `side` pixels wide, so that the small ones show how coarse they are. Maps of three channels are drawn
    as images in [-1, 1]. Below each stand its name, its shape and its element count.
    """
    gap, foot, width = 4, 58, max(side, 96) + 10
    sheet = Image.new("RGB", (width * len(maps), sheets * (side + gap) + foot), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (name, x) in enumerate(maps.items()):
        _, c, h, w = x.shape
        if c == 3:
            faces = to_pil(x)[:1]
        else:
            low, high = x[0].flatten(1).quantile(torch.tensor([0.01, 0.99]), dim=1)  # robust to single outliers
            order = (high - low).argsort(descending=True)[:sheets].tolist()
            faces = [paint(x[0, channel], low[channel].item(), high[channel].item()) for channel in order]
        method = Image.Resampling.BOX if w > side else Image.Resampling.NEAREST
        for row, face in enumerate(faces):
            place = column * width + (width - side) // 2, row * (side + gap)
            sheet.paste(face.resize((side, round(side * h / w)), method), place)
        texts = (name, INK), (f"{c} × {h} × {w}", BLUE), (f"{x.numel():,}", FAINT)
        for line, (text, color) in enumerate(texts):
            draw.text(
                ((column + 0.5) * width, sheet.height - foot + 14 + 16 * line), text, color, _font(12), anchor="mm"
            )
    return sheet


def heat_map(
    values: Tensor,
    rows: Sequence[str | Image.Image],
    columns: Sequence[str | Image.Image],
    low: float | None = None,
    high: float | None = None,
    digits: int | None = 2,
    cell: int = 40,
) -> Image.Image:
    """Draw a matrix as a table of coloured cells.

    Args:
        values: (rows, columns).
        rows, columns: a label for each, a word or a picture.
        low, high: the values of the darkest and the brightest colour; by default those of the matrix.
        digits: decimals of the numbers in the cells; None writes no numbers.
        cell: the side of a cell, in pixels.

    Raises:
        ValueError: the labels do not match the matrix.
    """
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"a matrix of {tuple(values.shape)} with {len(rows)} row and {len(columns)} column names")
    left, top = (8 + max(_label(name, cell).width for name in names) for names in (rows, columns))
    cells = paint(values, low, high).resize((cell * len(columns), cell * len(rows)), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (left + cells.width, top + cells.height), PAPER)
    sheet.paste(cells, (left, top))
    draw = ImageDraw.Draw(sheet)
    for y, name in enumerate(rows):
        label = _label(name, cell)
        sheet.paste(label, (left - 6 - label.width, top + cell * y + (cell - label.height) // 2))
    for x, name in enumerate(columns):
        label = _label(name, cell)
        label = label.rotate(90, expand=True) if isinstance(name, str) else label
        sheet.paste(label, (left + cell * x + (cell - label.width) // 2, top - 6 - label.height))
    for (y, x), value in np.ndenumerate(values.detach().float().cpu().numpy()) if digits is not None else ():
        middle = (left + cell * x + cell // 2, top + cell * y + cell // 2)
        red, green, blue = sheet.getpixel(middle)  # type: ignore[misc]
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 128
        draw.text(middle, f"{value:.{digits}f}", PAPER if dark else INK, _font(11), anchor="mm")
    return sheet


def _label(name: str | Image.Image, side: int) -> Image.Image:
    """A name as a picture of its letters, or a picture resized to fit a cell."""
    if isinstance(name, Image.Image):
        return name.convert("RGB").resize((side - 4, side - 4), Image.Resampling.LANCZOS)
    label = Image.new("RGB", (int(_font(12).getlength(name)) + 2, 16), PAPER)
    ImageDraw.Draw(label).text((0, 8), name, INK, _font(12), anchor="lm")
    return label


def plot_picture(figure: Figure, colors: int = 64) -> Image.Image:
    """Convert a plot to a picture of few colours, which takes a third of the space in a notebook, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=72, bbox_inches="tight")
    plt.close(figure)
    return Image.open(buffer).convert("RGB").quantize(colors)
