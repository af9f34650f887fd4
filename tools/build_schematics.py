"""Draw the schematics of the notebooks: `python tools/build_schematics.py` writes `notebooks/images/*.svg`.

One colour means one thing throughout: blue is an image or its latents, orange is noise, green is text, purple is what
is learned. The paths of `paths.svg` are computed, from the exact denoiser of two peaks on a line, those of
`lost-on-the-way.svg` from that of four clusters, the angles of `circle.svg` are those of the schedule, and the merges
of `byte-pairs.svg` are learned from notebook 03's toy text; the rest is drawn.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from html import escape
from itertools import pairwise
from pathlib import Path

import torch

from minisd.evaluation.metrics import wilson
from minisd.figures import BLUE, FAINT, GREEN, INK, ORANGE, PAPER, PURPLE
from minisd.schedule import Schedule

FOLDER = Path(__file__).parent.parent / "notebooks/images"
FILL = {BLUE: "#dcecf7", ORANGE: "#fcefd2", GREEN: "#d5f0e6", PURPLE: "#f6e3ee", FAINT: "#f1f1f1", INK: PAPER}
Point = tuple[float, float]


class Drawing:
    """An SVG picture, shape by shape. Coordinates are pixels at the size at which it is meant to be seen."""

    def __init__(self, width: int, height: int, alt: str) -> None:
        self.width, self.height, self.alt = width, height, alt
        self.shapes: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 14,
        color: str = INK,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """Words whose middle line is at y, with a_b for an index b; `anchor` is start, middle or end."""
        lowered = re.sub(r"_(\w)", r'<tspan dy="4" font-size="75%">\1</tspan>', escape(words))
        self.shapes.append(
            f'<text x="{x:g}" y="{y + size * 0.35:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}">'
            f"{lowered}</text>"
        )

    def rectangle(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str,
        stroke: str = "none",
        width: float = 1.0,
        corner: float = 0.0,
    ) -> None:
        """A rectangle, with an edge of so many pixels if `stroke` is a colour."""
        edge = f' stroke="{stroke}" stroke-width="{width:g}"' if stroke != "none" else ""
        rounded = f' rx="{corner:g}"' if corner else ""
        self.shapes.append(
            f'<rect x="{x:.5g}" y="{y:.5g}" width="{w:.4g}" height="{h:.4g}"{rounded} fill="{fill}"{edge}/>'
        )

    def box(self, x: float, y: float, w: float, h: float, words: str = "", color: str = FAINT, size: int = 14) -> None:
        """A rounded box around lines of words."""
        self.rectangle(x, y, w, h, FILL[color], color, 1.6, corner=7)
        lines = words.split("\n") if words else []
        for place, line in enumerate(lines):
            self.text(x + w / 2, y + h / 2 + (place - (len(lines) - 1) / 2) * size * 1.3, line, size)

    def shape(self, points: Sequence[Point], color: str) -> None:
        """A filled polygon."""
        listed = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.shapes.append(f'<polygon points="{listed}" fill="{FILL[color]}" stroke="{color}" stroke-width="1.6"/>')

    def line(self, points: Sequence[Point], color: str = FAINT, width: float = 1.8, dashed: bool = False) -> None:
        """A line through all points."""
        listed = " ".join(f"{x:.4g},{y:.4g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.shapes.append(f'<polyline points="{listed}" fill="none" stroke="{color}" stroke-width="{width:g}"{dash}/>')

    def arrow(self, *points: Point, color: str = FAINT, width: float = 1.8, dashed: bool = False) -> None:
        """A line through all points with a head at the last one."""
        (x0, y0), (x, y) = points[-2:]
        angle, head = math.atan2(y - y0, x - x0), 6 + 1.5 * width
        neck = (x - head * 0.8 * math.cos(angle), y - head * 0.8 * math.sin(angle))
        self.line([*points[:-1], neck], color, width, dashed)
        sides = [(x - head * math.cos(angle + turn), y - head * math.sin(angle + turn)) for turn in (0.42, -0.42)]
        listed = " ".join(f"{a:.4g},{b:.4g}" for a, b in [(x, y), *sides])
        self.shapes.append(f'<polygon points="{listed}" fill="{color}"/>')

    def circle(self, x: float, y: float, radius: float, words: str = "", color: str = FAINT, size: int = 14) -> None:
        """A circle around a word, such as a plus."""
        self.shapes.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{FILL[color]}" stroke="{color}" stroke-width="1.6"/>'
        )
        if words:
            self.text(x, y, words, size)

    def svg(self) -> str:
        """The whole file."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
                f' height="{self.height}" role="img" font-family="DejaVu Sans, Verdana, sans-serif">',
                f"<title>{escape(self.alt)}</title>",
                f'<rect width="{self.width}" height="{self.height}" fill="{PAPER}"/>',
                *self.shapes,
                "</svg>\n",
            ]
        )


def scene(
    d: Drawing, x: float, y: float, side: float, noise: float, seed: int, ground: tuple[int, int, int] = (60, 150, 90)
) -> None:
    """A little landscape under so much noise, 0 to 1."""
    rng = random.Random(seed)
    cells = 12
    size = side / cells
    for row in range(cells):
        for column in range(cells):
            u, v = (column + 0.5) / cells, (row + 0.5) / cells
            clean = (86, 180, 233) if v < 0.62 else ground
            if (u - 0.74) ** 2 + (v - 0.25) ** 2 < 0.018:
                clean = (240, 200, 60)
            if abs(u - 0.36) < (v - 0.2) * 0.42 and 0.2 < v < 0.72:
                clean = (0, 90, 70)
            mixed = [math.sqrt(1 - noise) * (c - 128) + math.sqrt(noise) * rng.gauss(0, 70) + 128 for c in clean]
            color = "#" + "".join(f"{min(255, max(0, round(c))):02x}" for c in mixed)
            d.rectangle(x + column * size, y + row * size, size + 0.3, size + 0.3, color)
    d.rectangle(x, y, side, side, "none", FAINT)


def diffusion() -> Drawing:
    """For 06: the way to noise and the way back."""
    alt = (
        "Five pictures, from a clear landscape x₀ to pure noise x_T. Arrows right: add a little noise. Arrows left: "
        "remove a little, with the network's help."
    )
    d = Drawing(760, 236, alt)
    levels = (0.0, 0.12, 0.4, 0.8, 1.0)
    names = ("x_0", "…", "x_t", "…", "x_T")
    for place, (level, name) in enumerate(zip(levels, names, strict=True)):
        x = 20 + place * 156
        scene(d, x, 66, 96, level, place)
        d.text(x + 48, 178, name, 16)
        if place < 4:
            d.arrow((x + 100, 92), (x + 152, 92), color=ORANGE, width=2.4)
            d.arrow((x + 152, 136), (x + 100, 136), color=PURPLE, width=2.4)
    d.text(380, 22, "forward: add noise — a formula, nothing to learn", 15, INK)
    d.arrow((180, 44), (580, 44), color=ORANGE)
    d.arrow((580, 202), (180, 202), color=PURPLE)
    d.text(380, 222, "backward: remove noise — the network is asked what the noise was", 15, INK)
    return d


def hourglass() -> Drawing:
    """For 02: encoder, latents, decoder."""
    alt = (
        "An hourglass on its side: a picture of 512 × 512 × 3 numbers narrows through the encoder to latents of "
        "64 × 64 × 4, and widens through the decoder to 512 × 512 × 3 again."
    )
    d = Drawing(760, 240, alt)
    scene(d, 16, 54, 120, 0, 0)
    scene(d, 624, 54, 120, 0, 0)
    for x, name in ((76, "512 × 512 × 3"), (684, "512 × 512 × 3"), (380, "64 × 64 × 4")):
        d.text(x, 202, name, 14, INK)
    d.text(76, 222, "786,432 numbers", 13, FAINT)
    d.text(380, 222, "16,384 numbers: 48 times fewer", 13, FAINT)
    d.shape([(164, 50), (314, 92), (314, 136), (164, 178)], PURPLE)
    d.shape([(596, 50), (446, 92), (446, 136), (596, 178)], PURPLE)
    d.text(234, 114, "encoder", 16)
    d.text(526, 114, "decoder", 16)
    for channel in range(4):
        d.rectangle(358 + channel * 9, 86 + channel * 7, 30, 30, FILL[BLUE], BLUE, 1.6)
    d.text(380, 60, "latents z", 15)
    d.arrow((140, 114), (164, 114))
    d.arrow((314, 114), (352, 114))
    d.arrow((420, 114), (446, 114))
    d.arrow((596, 114), (620, 114))
    d.text(380, 22, "here all the diffusion happens", 13, FAINT)
    d.arrow((380, 32), (380, 50))
    return d


def residual_block() -> Drawing:
    """For 02: two halves of three layers, and the bypass."""
    alt = (
        "The residual block from left to right: x passes norm, SiLU and a 3 × 3 convolution, twice, and becomes f(x). "
        "Below, a bypass carries x, through a 1 × 1 convolution where the number of channels changes. "
        "A plus adds both to y."
    )
    d = Drawing(760, 178, alt)
    d.text(24, 62, "x", 17)
    d.line([(36, 62), (64, 62)])
    x = 64.0
    for name, width, color in 2 * (("norm", 62, FAINT), ("SiLU", 62, FAINT), ("conv\n3 × 3", 76, PURPLE)):
        d.arrow((x, 62), (x + 22, 62))
        d.box(x + 22, 36, width, 52, name, color)
        x += 22 + width
    d.arrow((x, 62), (657, 62))
    d.text((x + 657) / 2, 46, "f(x)", 15)
    d.arrow((52, 62), (52, 138), (286, 138))
    d.box(286, 114, 94, 48, "conv\n1 × 1", PURPLE)
    d.arrow((380, 138), (674, 138), (674, 80))
    d.text(390, 154, "only if the channel count changes; else x as it is", 13, FAINT, "start")
    d.circle(674, 62, 17, "+")
    d.arrow((691, 62), (724, 62))
    d.text(738, 62, "y", 17)
    return d


def byte_pairs() -> Drawing:
    """For 03: the words of the toy text, merge by merge."""
    alt = (
        "Six words of the toy text, at first letter by letter. Each row joins one pair, and colours it: a + t in four "
        "of the words, then t + h in two. In the last row every word is one box. A bar, the length of the whole text, "
        "shrinks from 54 symbols to 26."
    )
    toy = "the cat sat on the mat the fat cat ate the rat and that rat sat on a hat"
    text = toy.split()
    shown = ("the", "that", "cat", "sat", "rat", "on")
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in text}
    letter, last, row = 22, 50, 33
    d = Drawing(896, 336, alt)
    d.text(8, 14, "joined", 13, FAINT, "start")
    d.text(842, 14, "symbols in all", 13, FAINT)
    for step in range(9):
        y, pair = 52 + row * step, ("", "")
        if step:
            pairs = Counter(pair for word in text for pair in pairwise(spelled[word]))
            pair = max(pairs, key=lambda one: (pairs[one], one))
            d.text(8, y, " + ".join(pair), 13, INK, "start")
            d.text(132, y, f"{pairs[pair]} ×", 13, INK, "end")
        for word, symbols in spelled.items():
            joined = symbols[:1]
            for symbol in symbols[1:]:
                joined[-1:] = [joined[-1] + symbol] if (joined[-1], symbol) == pair else [joined[-1], symbol]
            spelled[word] = joined
        x = 152.0
        for word in shown:
            width = letter * (len(word) - 1) + last
            if not step:
                d.text(x + width / 2, 14, f"{word} ({text.count(word)} ×)", 13)
            for symbol in spelled[word]:
                ends, fresh = symbol.endswith("</w>"), symbol == "".join(pair)
                wide = letter * len(symbol.removesuffix("</w>")) + (last - letter) * ends
                d.box(x, y - 12, wide - 3, 24, symbol, PURPLE if fresh else FAINT, 12)
                x += wide
            x += 12
        total = sum(len(spelled[word]) for word in text)
        d.text(794, y, str(total), 13, INK, "end")
        d.rectangle(800, y - 8, 1.6 * total, 16, GREEN)
    return d


def text_block() -> Drawing:
    """For 04: the text encoder, with one of its layers opened."""
    alt = (
        "Two tables turn ids into x. In each of four layers: norm, matrices for q, k and v, attention, out_proj; norm, "
        "MLP. Bypasses run around both halves. A final norm gives the context."
    )
    d = Drawing(896, 242, alt)
    d.rectangle(112, 26, 620, 186, "none", FAINT, 1.2, corner=10)
    d.text(18, 128, "ids", 15)
    d.arrow((32, 128), (46, 128), color=GREEN)
    d.box(46, 98, 54, 60, "two\ntables", PURPLE, 13)
    d.arrow((100, 128), (146, 128))
    d.text(118, 142, "x", 14)
    d.box(146, 104, 54, 48, "norm_1", FAINT, 13)
    for y, index in ((76, "q"), (128, "k"), (180, "v")):
        d.arrow((200, 128 + (y - 128) / 4), (226, y))
        d.box(226, y - 19, 42, 38, f"W_{index}", PURPLE)
        d.arrow((268, y), (284, y))
        d.box(284, y - 19, 34, 38, index, GREEN)
        d.arrow((318, y), (346, 128 + (y - 128) / 4))
    d.box(346, 96, 82, 64, "attention\n(4 heads)", FAINT, 13)
    d.arrow((428, 128), (442, 128))
    d.box(442, 104, 70, 48, "out\nproj", PURPLE, 13)
    d.arrow((512, 128), (526, 128))
    d.circle(539, 128, 13, "+")
    d.arrow((552, 128), (582, 128))
    d.box(582, 104, 54, 48, "norm_2", FAINT, 13)
    d.arrow((636, 128), (648, 128))
    d.box(648, 104, 44, 48, "MLP", PURPLE, 13)
    d.arrow((692, 128), (702, 128))
    d.circle(715, 128, 13, "+")
    d.arrow((124, 128), (124, 42), (539, 42), (539, 115))
    d.arrow((564, 128), (564, 42), (715, 42), (715, 115))
    d.text(422, 228, "each half reads x and adds to it; the bypass keeps x", 13, FAINT)
    d.text(116, 14, "a layer, one of four in a row", 13, FAINT, "start")
    d.arrow((728, 128), (748, 128))
    d.box(748, 104, 50, 48, "final\nnorm", FAINT, 13)
    d.arrow((798, 128), (814, 128), color=GREEN)
    d.box(814, 104, 76, 48, "context", GREEN)
    return d


def two_towers() -> Drawing:
    """For 04: CLIP's towers and the matrix of similarities."""
    alt = (
        "Four pictures go through the image tower, four captions through the text tower; each becomes a unit vector. "
        "A 4 × 4 table holds the similarity of every picture (row) with every caption (column). Training raises the "
        "diagonal."
    )
    d = Drawing(760, 340, alt)
    d.box(150, 120, 108, 176, "image\ntower", BLUE, 16)
    d.box(326, 46, 296, 44, "text tower", GREEN, 16)
    captions = ("a red\nball", "a house\nat night", "two\ntrees", "a yellow\nkite")
    for row, caption in enumerate(captions):
        y = 142 + row * 44
        _thumbnail(d, 84, y - 18, row)
        d.arrow((124, y), (150, y), color=BLUE)
        d.arrow((258, y), (284, y), color=BLUE)
        d.text(300, y, f"p{'₁₂₃₄'[row]}", 15)
        x = 364 + row * 73
        for line, words in enumerate(caption.split("\n")):
            d.text(x, 10 + line * 15, words, 12, INK)
        d.arrow((x, 33), (x, 46), color=GREEN)
        d.arrow((x, 90), (x, 103), color=GREEN)
        d.text(x, 110, f"t{'₁₂₃₄'[row]}", 15)
        for column in range(4):
            same = row == column
            color = PURPLE if same else FAINT
            d.rectangle(330 + column * 73, y - 20, 68, 40, FILL[color], color, 2 if same else 1)
            d.text(364 + column * 73, y, f"p{'₁₂₃₄'[row]}·t{'₁₂₃₄'[column]}", 13)
    d.arrow((652, 264), (630, 272), color=PURPLE)
    d.text(644, 232, "the diagonal up,", 13, INK, "start")
    d.text(644, 252, "all others down", 13, INK, "start")
    d.text(473, 320, "every picture against every caption of the batch", 13, FAINT)
    return d


def _thumbnail(d: Drawing, x: float, y: float, number: int) -> None:
    """One of the four pictures of the towers, 36 pixels wide."""
    night = number == 1
    sky, ground = ("#1d2b53", "#3a4a3a") if night else ("#cfe8f7", "#7fbf7b")
    d.rectangle(x, y, 36, 36, sky)
    d.rectangle(x, y + 25, 36, 11, ground)

    def paint(color: str, *points: Point) -> None:
        listed = " ".join(f"{x + a:g},{y + b:g}" for a, b in points)
        d.shapes.append(f'<polygon points="{listed}" fill="{color}"/>')

    if number == 0:
        d.shapes.append(f'<circle cx="{x + 18:g}" cy="{y + 22:g}" r="8" fill="#d1322d"/>')
    elif night:
        paint("#b08968", (10, 18), (26, 18), (26, 30), (10, 30))
        paint("#8a3b2a", (7, 18), (18, 9), (29, 18))
        d.rectangle(x + 15, y + 21, 6, 6, "#f6d24a")
        d.shapes.append(f'<circle cx="{x + 29:g}" cy="{y + 7:g}" r="3" fill="#f4f1de"/>')
    elif number == 2:
        for left in (10, 26):
            d.rectangle(x + left - 1.5, y + 22, 3, 8, "#7a5230")
            paint("#1f6b3a", (left - 7, 23), (left, 6), (left + 7, 23))
    else:
        paint("#f0b400", (20, 4), (28, 13), (20, 24), (12, 13))
        d.line([(x + 20, y + 24), (x + 15, y + 28), (x + 19, y + 33)], INK, 1.2)
    d.rectangle(x, y, 36, 36, "none", FAINT)


def looking_back() -> Drawing:
    """For 04: one token takes in the values of those before it."""
    alt = (
        "Arrows lead to what car takes in: thin ones from a and car, weight 0.01, a thick one from red, 0.97. "
        "None comes from on, which stands after car."
    )
    d = Drawing(700, 190, alt)
    d.box(310, 14, 240, 44, "car takes in (0.01, 0.97)", GREEN)
    weights = ("0.01", 1.2, 330, (165, 95)), ("0.97", 8, 390, (350, 110)), ("0.01", 1.2, 430, (456, 98))
    for place, (word, value) in enumerate((("a", "(0, 0)"), ("red", "(0, 1)"), ("car", "(1, 0)"), ("on", ""))):
        x = 60 + 160 * place
        d.box(x, 136, 100, 44, f"{word}  {value}".strip(), GREEN if value else FAINT)
        if value:
            share, width, end, label = weights[place]
            d.arrow((x + 50, 136), (end, 60), color=PURPLE, width=width)
            d.text(*label, share, 14, INK)
    d.text(590, 122, "comes later: no arrow", 13, FAINT)
    return d


def attention() -> Drawing:
    """For 05: queries, keys and values."""
    alt = (
        "Pixels become queries Q, words keys K and values V. Q Kᵀ / √d is a table of scores: a row for each pixel, a "
        "column for each word. Softmax turns each row into weights that sum to 1; weights times V give one vector for "
        "each pixel."
    )
    d = Drawing(760, 290, alt)
    d.box(14, 40, 96, 62, "pixels\n(n, c)", BLUE)
    d.box(14, 176, 96, 62, "words\n(77, c′)", GREEN)
    for y, name, source in ((46, "W_q", 71), (158, "W_k", 200), (232, "W_v", 214)):
        d.arrow((110, source), (146, y + 24 if name != "W_q" else 71), color=FAINT)
        d.box(146, y, 56, 48, name, PURPLE)
    d.box(236, 40, 66, 62, "Q\n(n, d)", BLUE)
    d.box(236, 152, 66, 56, "K\n(77, d)", GREEN)
    d.box(236, 226, 66, 56, "V\n(77, d)", GREEN)
    d.arrow((202, 71), (236, 71))
    d.arrow((202, 182), (236, 182))
    d.arrow((202, 256), (236, 256))
    d.arrow((302, 71), (350, 100))
    d.arrow((302, 182), (350, 134))
    d.circle(366, 116, 17, "·")
    d.text(366, 84, "Q Kᵀ / √d", 13, INK)
    d.arrow((383, 116), (412, 116))
    rng = random.Random(3)
    scores = [[rng.gauss(0, 1.3) for _ in range(5)] for _ in range(6)]
    for row, some in enumerate(scores):
        total = sum(math.exp(s) for s in some)
        for column, score in enumerate(some):
            for x, strength in ((414, 1 / (1 + math.exp(-score))), (560, math.exp(score) / total)):
                shade = [round(255 - (255 - c) * strength) for c in (0, 114, 178)]
                d.rectangle(x + column * 18, 62 + row * 18, 18, 18, "rgb({},{},{})".format(*shade), "#fff")
    d.text(459, 184, "darker: larger", 12, FAINT)
    d.text(459, 46, "scores (n, 77)", 13)
    d.text(605, 46, "weights, rows sum to 1", 13)
    d.arrow((506, 116), (556, 116))
    d.text(531, 102, "softmax", 12, FAINT)
    d.line([(302, 254), (605, 254)], FAINT)
    d.arrow((605, 254), (605, 232))
    d.line([(605, 172), (605, 198)], FAINT)
    d.circle(605, 215, 17, "·")
    d.arrow((622, 215), (660, 215))
    d.box(660, 184, 86, 62, "answer\n(n, d)", BLUE)
    return d


def block() -> Drawing:
    """For 05: the transformer block."""
    alt = (
        "The transformer block from left to right: x passes LayerNorm and self-attention and is added to itself; then "
        "LayerNorm and cross-attention, which also receives the words; then LayerNorm and the feed-forward network. "
        "Each of the three has its bypass."
    )
    d = Drawing(760, 190, alt)
    d.text(16, 112, "x", 16)
    x = 30.0
    for name, color in (("self-\nattention", BLUE), ("cross-\nattention", GREEN), ("feed-\nforward", PURPLE)):
        d.line([(x, 112), (x + 20, 112)])
        d.arrow((x + 10, 112), (x + 10, 52), (x + 208, 52), (x + 208, 98))
        d.arrow((x + 20, 112), (x + 34, 112))
        d.box(x + 34, 88, 52, 48, "norm", FAINT, 13)
        d.arrow((x + 86, 112), (x + 102, 112))
        d.box(x + 102, 84, 78, 56, name, color)
        d.arrow((x + 180, 112), (x + 194, 112))
        d.circle(x + 208, 112, 13, "+")
        d.line([(x + 221, 112), (x + 232, 112)])
        if name.startswith("cross"):
            d.arrow((x + 141, 178), (x + 141, 140), color=GREEN)
            d.text(x + 150, 170, "words", 13, INK, "start")
        x += 232
    d.arrow((x - 6, 112), (x + 22, 112))
    d.text(380, 30, "three residual branches: the bypass keeps x, each branch adds to it", 13, FAINT)
    return d


def unet() -> Drawing:
    """For 07: the U, its skips, the time and the words."""
    alt = (
        "A U with the sizes of Stable Diffusion 1: on the left four levels go down, 64, 32, 16 and 8 places wide, with "
        "320, 640, 1280 and 1280 channels; between the lowest two the middle block; on the right the same levels go "
        "up. Three dashed skips on each level carry maps from left to right. The time goes into every block, the words "
        "into all but the lowest level's."
    )
    d = Drawing(760, 330, alt)
    sizes = ((112, "64 × 64\n320 channels"), (96, "32 × 32\n640"), (82, "16 × 16\n1280"), (74, "8 × 8\n1280"))
    for level, (side, name) in enumerate(sizes):
        y = 24 + level * 72
        left, right = 150 + level * 46, 610 - level * 46
        color = FAINT if level == 3 else GREEN
        for x in (left, right):
            d.box(x - side / 2, y, side, 46, name, color, 12)
        if level < 3:
            d.arrow((left + side / 2, y + 23), (right - side / 2, y + 23), color=BLUE, dashed=True)
            d.text(380, y + 12, "3 skips", 13, FAINT)
            d.arrow((left + 14, y + 46), (left + 30, y + 72))
            d.arrow((right - 30, y + 72), (right - 14, y + 46))
    d.arrow((312, 240), (312, 218), (448, 218), (448, 240), color=BLUE, dashed=True)
    d.text(380, 207, "3 skips", 13, FAINT)
    d.box(345, 240, 70, 46, "middle\n8 × 8", GREEN, 12)
    d.arrow((325, 263), (345, 263))
    d.arrow((415, 263), (435, 263))
    d.arrow((38, 47), (94, 47), color=BLUE)
    d.text(10, 28, "latents x_t", 13, INK, "start")
    d.text(10, 66, "4 channels", 12, FAINT, "start")
    d.arrow((666, 47), (716, 47), color=PURPLE)
    d.text(752, 28, "prediction", 13, INK, "end")
    d.text(752, 66, "4 channels", 12, FAINT, "end")
    d.box(14, 182, 100, 36, "time t", ORANGE)
    d.text(14, 230, "into every block", 12, FAINT, "start")
    d.box(14, 260, 100, 36, "words", GREEN)
    d.text(14, 308, "into the green blocks", 12, FAINT, "start")
    return d


def guidance() -> Drawing:
    """For 09: two answers in a plane, and the line through them."""
    alt = (
        "From a noisy x arrows lead to two guesses, on a line that goes on beyond them: scales 0, 1, 2, 4. A negative "
        "prompt moves its start."
    )
    d = Drawing(760, 300, alt)
    d.circle(60, 236, 6, "", ORANGE)
    d.text(60, 260, "x, noisy", 14)
    start, words = (300.0, 196.0), (390.0, 164.0)
    d.arrow((66, 234), (start[0] - 6, start[1] + 1), color=FAINT, width=2.2)
    d.arrow((66, 232), (words[0] - 8, words[1] + 3), color=GREEN, width=2.2)
    step = (words[0] - start[0], words[1] - start[1])
    far = (start[0] + 4.5 * step[0], start[1] + 4.5 * step[1])
    d.arrow(start, far, color=PURPLE, width=2.2, dashed=True)
    for scale, name in (
        (0.0, "s = 0: without words"),
        (1.0, "s = 1: with the prompt"),
        (2.0, "s = 2"),
        (4.0, "s = 4"),
    ):
        x, y = start[0] + scale * step[0], start[1] + scale * step[1]
        d.circle(x, y, 6, "", FAINT if scale == 0 else GREEN if scale == 1 else PURPLE)
        d.text(x + 6, y + 22, name, 13, INK, "start")
    d.text(690, 30, "and on, past the guess with the prompt", 13, FAINT, "end")
    d.arrow((262, 268), (start[0] - 4, start[1] + 10), color=FAINT, dashed=True)
    d.text(262, 282, "a negative prompt moves this end", 13, FAINT)
    d.text(20, 30, "guess = without + s · (with − without)", 16, INK, "start")
    return d


def paths() -> Drawing:
    """For 08: the same start, with and without fresh noise, over the density that narrows to two peaks."""
    alt = (
        "A grey band parts into two, the data. Smooth blue paths lead there from noise. A jagged orange one, with "
        "fresh noise, starts where a blue one does and ends in the other peak."
    )
    d = Drawing(760, 354, alt)
    left, right, middle, scale = 50.0, 710.0, 184.0, 52.0
    peaks, width = torch.tensor([-1.0, 1.0]), 0.15
    steps = 120
    # a straight interpolation of noise and data: x = √(1 − t²) data + t noise, t from 1 to 0
    times = torch.linspace(0.999, 0.02, steps + 1).tolist()

    def guess(x: torch.Tensor, t: float) -> torch.Tensor:
        """E[data | x], exactly."""
        a, var = math.sqrt(1 - t * t), (1 - t * t) * width**2 + t * t
        share = torch.softmax(-((x[:, None] - a * peaks) ** 2) / (2 * var), dim=1)
        each = peaks + a * width**2 / var * (x[:, None] - a * peaks)
        return (share * each).sum(1)

    def at(t: float) -> float:
        return left + (right - left) * (1 - t)

    for column in range(40):
        t = 1 - (column + 0.5) / 40
        a, spread = math.sqrt(1 - t * t), math.sqrt((1 - t * t) * width**2 + t * t)
        for row in range(44):
            x = (row + 0.5) / 44 * 5.6 - 2.8
            p = sum(math.exp(-((x - a * m) ** 2) / (2 * spread**2)) for m in (-1, 1)) / (2 * spread)
            shade = round(255 - 110 * min(1.0, p * 0.55))
            if shade < 250:
                grey = "#" + f"{shade:02x}" * 3
                corner = left + column * (right - left) / 40, middle + (x - 2.8 / 44) * scale
                d.rectangle(*corner, 16.9, 7, grey)
    starts = torch.tensor([-2.0, -0.9, -0.25, 0.25, 0.9, 2.0])
    for fresh, color in ((0.0, BLUE), (1.0, ORANGE)):
        generator = torch.Generator().manual_seed(6)
        x = starts.clone()
        line = [x]
        for t, after in zip(times, times[1:], strict=False):
            data = guess(x, t)
            noise = (x - math.sqrt(1 - t * t) * data) / t
            sigma = fresh * (after / t) * math.sqrt(max(0.0, 1 - (1 - t * t) / (1 - after * after)))
            x = math.sqrt(1 - after * after) * data + math.sqrt(after**2 - sigma**2) * noise
            x = x + sigma * torch.randn(len(x), generator=generator)
            line.append(x)
        for place in range(len(starts)) if not fresh else (1,):
            d.line([(at(t), middle + scale * float(v[place])) for t, v in zip(times, line, strict=True)], color, 1.7)
    d.text(left, 342, "noise", 14, INK)
    d.text(right, 342, "data", 14, INK)
    d.arrow((left + 40, 342), (right - 40, 342))
    for start, color, words in (
        (50, BLUE, "no fresh noise (η = 0)"),
        (300, ORANGE, "fresh noise at every step (η = 1)"),
    ):
        d.line([(start, 14), (start + 28, 14)], color, 2.4)
        d.text(start + 36, 14, words, 13, INK, "start")
    return d


def fresh_noise() -> Drawing:
    """For 08: one step of DDPM and of DDIM, from σ = 5 to 4; lengths are standard deviations."""
    alt = (
        "A step from σ = 5 to 4. DDPM: 3.2 of old noise and, at a right angle, 2.4 of fresh noise, in all 4. "
        "DDIM: 4 of old noise."
    )
    d = Drawing(760, 236, alt)
    unit, base = 56.0, 186.0
    for left, name in ((50.0, "DDPM"), (430.0, "DDIM")):
        d.text(left, 22, name, 15, anchor="start")
        d.line([(left, base), (left + 5 * unit, base)], FAINT, 1.4, dashed=True)
        d.circle(left + 5 * unit, base, 5, "", FAINT)
        d.text(left + 5 * unit, base + 24, "x̄, σ = 5", 13, FAINT)
    left = 50.0
    corner, top = (left + 3.2 * unit, base), (left + 3.2 * unit, base - 2.4 * unit)
    d.line([(left, base), top], FAINT, 1.8, dashed=True)
    d.line([(corner[0] - 10, base), (corner[0] - 10, base - 10), (corner[0], base - 10)], FAINT, 1.4)
    d.arrow((left, base), corner, color=ORANGE, width=2.6)
    d.arrow(corner, top, color=ORANGE, width=2.6)
    d.text(left + 1.75 * unit, base + 24, "old noise 3.2", 13)
    d.text(corner[0] + 10, base - 1.2 * unit, "fresh noise 2.4", 13, anchor="start")
    d.text(left + 1.5 * unit - 8, base - 1.2 * unit - 16, "in all σ′ = 4", 13, anchor="end")
    d.text(top[0] + 12, top[1] - 8, "x̄′", 14, anchor="start")
    d.arrow((430, base), (430 + 4 * unit, base), color=ORANGE, width=2.6)
    d.text(430 + 2 * unit, base + 24, "old noise 4", 13)
    d.text(430 + 4 * unit, base - 20, "x̄′", 14)
    for left in (50.0, 430.0):
        d.circle(left, base, 6, "", BLUE)
        d.text(left, base + 24, "x̂₀", 14)
    return d


# Section 5 of 09 with COUNT = 48: at each scale pictures with all named colours, those with both objects, glare as a
# percentage of the values and half its 95% interval; and which share of 100 true scenes the judge reads right
SCALE_COUNTS = {
    0: (1, 0, 0.40, 0.24),
    1: (32, 27, 0.57, 0.31),
    1.5: (41, 33, 0.99, 0.46),
    2: (44, 35, 1.29, 0.54),
    4: (46, 38, 2.53, 0.82),
    8: (40, 26, 8.06, 2.23),
    15: (36, 9, 26.44, 3.79),
}
TRUE_SCENES = (0.97, 0.75)
Place = Callable[[float, float], Point]


def scale_counts() -> Drawing:
    """For 09: what 48 prompts gave at seven guidance scales."""
    alt = "Named colours and objects rise steeply up to scale 4 and fall beyond; glare rises all the way."
    d = Drawing(760, 290, alt)
    bottom, height, unit = 226.0, 176.0, 19.6

    def panel(left: float, top: float, ticks: Sequence[int], title: str) -> Place:
        d.text(left - 6, 22, title, 14, INK, "start")
        for tick in ticks:
            y = bottom - height * tick / top
            d.line([(left, y), (left + 15.4 * unit, y)], "#dddddd", 1)
            d.text(left - 8, y, f"{tick}", 12, FAINT, "end")
        for scale in (0, 1, 2, 4, 8, 15):
            d.text(left + scale * unit, bottom + 16, f"{scale}", 12, FAINT)
        d.text(left + 7.5 * unit, bottom + 38, "guidance scale s", 13)
        return lambda scale, value: (left + scale * unit, bottom - height * value / top)

    def curve(at: Place, rows: Sequence[tuple[float, float, float, float]], color: str) -> None:
        d.line([at(scale, value) for scale, value, _, _ in rows], color, 2)
        for scale, value, low, high in rows:
            d.line([at(scale, low), at(scale, high)], color, 1.4)
            d.circle(*at(scale, value), 4, "", color)

    at = panel(48, 48, (0, 12, 24, 36, 48), "of 48 pictures, those that show …")
    names = (("all named colours", PURPLE, 8.7, 32), ("both objects", GREEN, 10.2, 25.5))
    for kind, (name, color, x, y) in enumerate(names):
        ends = {scale: [48 * share for share in wilson(row[kind], 48)] for scale, row in SCALE_COUNTS.items()}
        curve(at, [(scale, row[kind], *ends[scale]) for scale, row in SCALE_COUNTS.items()], color)
        d.line([at(0, 48 * TRUE_SCENES[kind]), at(15.4, 48 * TRUE_SCENES[kind])], color, 1.4, dashed=True)
        d.text(*at(x, y), name, 13, color, "start")
    at = panel(436, 32, (0, 10, 20, 30), "glare, % of the values")
    curve(at, [(s, mean, max(0, mean - half), mean + half) for s, (_, _, mean, half) in SCALE_COUNTS.items()], ORANGE)
    d.text(42, 282, "dashed: what the judge finds in true scenes", 12, FAINT, "start")
    return d


CLUSTERS, SPREAD = torch.tensor([[-1.5, 0.7], [-0.1, -0.9], [1.4, -0.5], [0.9, 0.9]]), 0.35  # the toy of 09


@cache
def guided_walks(scale: float) -> tuple[torch.Tensor, list[float]]:
    """Walk the 4,000 points of 09, section 3, towards "bird": where they are at every noise level, and the levels."""
    levels = [*torch.logspace(math.log10(15), math.log10(0.02), 60).tolist(), 0.0]

    def noise(x: torch.Tensor, sigma: float, count: int) -> torch.Tensor:
        pull, variance = CLUSTERS[:count] - x[:, None], SPREAD**2 + sigma**2
        weight = (-pull.square().sum(-1) / (2 * variance)).softmax(1)
        return -sigma * (weight[..., None] * pull).sum(1) / variance

    seen = [levels[0] * torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))]
    for sigma, smaller in pairwise(levels):
        empty, words = noise(seen[-1], sigma, 4), noise(seen[-1], sigma, 2)
        seen.append(seen[-1] + (smaller - sigma) * (empty + scale * (words - empty)))
    return torch.stack(seen), levels


def lost_on_the_way() -> Drawing:
    """For 09: the first ten of the toy's points that glide at scale 1 and not at 7."""
    alt = (
        "Ten walks: at scale 1 they end among the gliding birds; at 7 they are driven left while σ > 1, and end near "
        "the branch."
    )
    d = Drawing(760, 320, alt)
    walks = {scale: guided_walks(scale) for scale in (1, 7)}
    glide = {s: torch.cdist(x[-1], CLUSTERS[:2]).argmin(1) == 1 for s, (x, _) in walks.items()}
    chosen = (glide[1] & ~glide[7]).nonzero()[:10, 0].tolist()
    low, high, unit = torch.tensor([-4.4, -2.9]), torch.tensor([2.8, 2.6]), 49.0
    for (scale, (x, levels)), left in zip(walks.items(), (12.0, 395.0), strict=True):

        def at(point: torch.Tensor, left: float = left) -> Point:
            return left + unit * float(point[0] - low[0]), 28 + unit * float(high[1] - point[1])

        d.rectangle(left, 28, *(unit * (high - low)).tolist(), "none", "#dddddd")
        d.text(left + unit * 3.6, 14, f"s = {scale}", 15)
        for center, name in zip(CLUSTERS, ("branch", "gliding", "planes", "planes"), strict=True):
            across, down = at(center)
            color, lower = (FAINT, 0) if name == "planes" else (BLUE, 2 * SPREAD * unit + 11)
            d.circle(across, down, 2 * SPREAD * unit, "", color)
            d.text(across, down + lower, name, 12, color)
        one = sum(level > 1 for level in levels)  # the first level that is not above 1
        for k in chosen:
            path = x[:, k]
            enters = int(((path < low) | (path > high)).any(1).nonzero()[-1])  # the last point outside the panel
            outer, inner = path[enters], path[enters + 1]
            edge = outer + (inner - outer) * ((outer.clamp(low, high) - outer) / (inner - outer)).max()
            d.line([at(point) for point in (edge, *path[enters + 1 : one + 1])], ORANGE, 1.4)
            d.line([at(point) for point in path[one:]], BLUE, 1.8)
            d.circle(*at(path[one]), 2.5, "", INK)
    d.text(12, 310, "orange: while σ > 1", 12, ORANGE, "start")
    d.text(152, 310, "blue: from there on", 12, BLUE, "start")
    return d


def remember() -> Drawing:
    """For 08: the guess of DPM++ 2M for a step, from the two before it, in the numbers of the text."""
    alt = "The guess rises from 0.6 at σ = 4 to 0.8 at σ = 2; the line through both gives D = 0.9 half-way to 1."
    d = Drawing(760, 262, alt)
    at = {4: 130.0, 2: 350.0, 1: 570.0}

    def height(guess: float) -> float:
        return 176 - (guess - 0.6) * 320

    d.arrow((60, 206), (730, 206))
    d.text(724, 226, "λ = −ln σ", 14, INK, "end")
    for sigma, x in at.items():
        d.line([(x, 201), (x, 211)])
        d.text(x, 226, f"σ = {sigma}", 14)
    d.text((at[4] + at[2]) / 2, 248, "step before, h = ln 2", 13, FAINT)
    d.text((at[2] + at[1]) / 2, 248, "this step, h = ln 2", 13, FAINT)
    d.line([(at[4], height(0.6)), (at[2], height(0.8))], BLUE, 2.2)
    d.line([(at[2], height(0.8)), (at[1], height(1.0))], BLUE, 2.2, dashed=True)
    d.line([(at[2], height(0.8)), (at[1], height(0.8))], FAINT, 1.8, dashed=True)
    for x, guess in ((at[4], 0.6), (at[2], 0.8)):
        d.circle(x, height(guess), 6, "", BLUE)
    d.circle((at[2] + at[1]) / 2, height(0.9), 7, "", INK)
    d.text(at[4] - 18, height(0.6) - 22, "x̂₀ before = 0.6", 14)
    d.text(at[2] - 8, height(0.8) - 22, "x̂₀ = 0.8", 14)
    d.text((at[2] + at[1]) / 2 - 14, height(0.9) - 22, "D = 0.9, half-way", 14, INK, "end")
    d.text(at[1] + 14, height(1.0), "x̂₀ moving on", 13, FAINT, "start")
    d.text(at[1] + 14, height(0.8), "standing still: DDIM", 13, FAINT, "start")
    return d


def training_step() -> Drawing:
    """For 12: one step of the UNet's training."""
    alt = (
        "A picture is encoded to latents x₀; random noise ε is mixed in, as much as a random time t says. The UNet "
        "sees the noisy latents x_t, the time, and the words of the caption, which is blanked one time in ten. It "
        "guesses v. The squared difference from the true v, weighted by w(t), is the loss; its gradient changes the "
        "weights."
    )
    return one_step(alt, "“in the snow”\n(1 in 10: “”)", "w(t) · ‖v − guess‖²", "v, from t, ε and x_0")


def simple_loss() -> Drawing:
    """For 06: the same step for any target, without weights and without captions left out."""
    alt = (
        "The latents x₀ of a picture, noise ε and a random t make x_t. The UNet sees x_t, t and the caption, and "
        "guesses the target: ε, x₀ or v; t says how they mix in v. The squared difference is the loss; its gradient "
        "changes the weights."
    )
    return one_step(alt, "“in the snow”", "‖target − guess‖²", "target: ε, x_0 or v")


def one_step(alt: str, caption: str, loss: str, target: str) -> Drawing:
    """A step of the UNet's training, with these words in its boxes."""
    d = Drawing(760, 306, alt)
    scene(d, 16, 34, 84, 0, 0, ground=(245, 248, 252))
    d.text(58, 132, "picture", 13)
    d.arrow((104, 76), (130, 76))
    d.box(130, 52, 84, 48, "encoder", FAINT)
    d.line([(232, 76), (232, 226), (700, 226)], BLUE)
    d.arrow((700, 226), (700, 194), color=BLUE)
    d.arrow((214, 76), (276, 76), color=BLUE)
    d.text(244, 62, "x_0", 14)
    d.circle(292, 76, 16, "+")
    d.arrow((308, 76), (380, 76), color=BLUE)
    d.text(342, 62, "x_t", 14)
    d.box(250, 146, 84, 44, "noise ε", ORANGE)
    d.arrow((292, 146), (292, 92), color=ORANGE)
    d.arrow((292, 190), (292, 210), (600, 210), (600, 194), color=ORANGE)
    d.box(350, 146, 74, 44, "random t", FAINT, 13)
    d.arrow((362, 146), (305, 88))
    d.arrow((402, 146), (402, 108))
    d.arrow((424, 168), (560, 168))
    d.box(380, 44, 110, 64, "UNet", PURPLE, 17)
    d.box(16, 250, 150, 44, caption, GREEN, 12)
    d.arrow((166, 272), (196, 272), color=GREEN)
    d.box(196, 250, 104, 44, "text encoder", FAINT, 13)
    d.arrow((300, 272), (460, 272), (460, 108), color=GREEN)
    d.arrow((490, 76), (560, 76), color=PURPLE)
    d.text(524, 62, "guess", 13)
    d.box(560, 46, 184, 60, f"loss\n{loss}", FAINT)
    d.arrow((652, 150), (652, 106))
    d.box(560, 150, 184, 44, target, FAINT, 13)
    d.arrow((600, 46), (600, 20), (435, 20), (435, 44), color=PURPLE, dashed=True)
    d.text(518, 10, "gradient", 12, FAINT)
    return d


def circle() -> Drawing:
    """For 06: x_t on its quarter circle from x₀ to ε, and v along it; the angles are those of the schedule."""
    alt = (
        "A quarter circle from the clean picture x₀ up to the noise ε. The arrow x_t makes the angle φ with x₀; v "
        "starts at its tip, along the circle, towards the noise."
    )
    d = Drawing(760, 396, alt)
    x0, y0, radius, side = 120.0, 340.0, 260.0, 60
    levels = Schedule().alphas_cumprod

    def place(angle: float, far: float = radius) -> Point:
        return x0 + far * math.cos(angle), y0 - far * math.sin(angle)

    def arc(angle: float, far: float) -> list[Point]:
        return [place(angle * i / 60, far) for i in range(61)]

    d.line(arc(math.pi / 2, radius), FAINT, 2.2)
    d.arrow((x0, y0), (x0 + radius, y0), color=BLUE, width=2.4)
    d.arrow((x0, y0), (x0, y0 - radius), color=ORANGE, width=2.4)
    scene(d, x0 + radius + 14, y0 - side / 2, side, 0, 0)
    scene(d, x0 - 74, y0 - radius - side / 2, side, 1, 4)
    d.text(x0 + radius + 14 + side / 2, y0 + 44, "x_0", 16)
    d.text(x0 - 74 + side / 2, y0 - radius + 46, "ε", 16)
    for t in (250, 500):
        angle = math.acos(math.sqrt(levels[t]))
        x, y = place(angle, radius + 50)
        scene(d, x - side / 2, y - side / 2, side, 1 - levels[t], 2)
        d.text(x + side / 2 + 8, y, f"t = {t}, φ = {math.degrees(angle):.0f}°", 14, INK, "start")
        d.circle(*place(angle), 4, "", INK)
    tip = place(angle)
    d.line([tip, (tip[0], y0)], FAINT, 1.6, dashed=True)
    d.line([tip, (x0, tip[1])], FAINT, 1.6, dashed=True)
    d.arrow((x0, y0), tip, color=INK, width=2.4)
    d.arrow(tip, (tip[0] - 110 * math.sin(angle), tip[1] - 110 * math.cos(angle)), color=PURPLE, width=2.4)
    d.line(arc(angle, 54), INK, 1.4)
    d.text(x0 + 66, y0 - 30, "φ", 16)
    d.text(tip[0] - 22, tip[1] + 66, "x_t", 16, INK, "end")
    d.text(tip[0] - 100, tip[1] - 74, "v", 17, PURPLE)
    d.text((x0 + tip[0]) / 2, y0 + 18, "√ᾱ = cos φ", 14)
    d.text(x0 - 10, (y0 + tip[1]) / 2, "√(1−ᾱ)", 14, INK, "end")
    d.text(x0 - 10, (y0 + tip[1]) / 2 + 20, "= sin φ", 14, INK, "end")
    for y, name, color, equals in (
        (226, "x_t", INK, "=    cos φ · x₀ + sin φ · ε"),
        (256, "v", PURPLE, "= − sin φ · x₀ + cos φ · ε"),
    ):
        d.text(524, y, name, 15, color, "start")
        d.text(548, y, equals, 15, color, "start")
    return d


def lora() -> Drawing:
    """For 13: a thin correction beside a frozen matrix."""
    alt = (
        "The input x goes through the frozen square W, and beside it through A, as wide as W with r rows, and B, as "
        "tall with r columns. Both results are added. Only A and B are trained."
    )
    d = Drawing(760, 276, alt)
    d.text(30, 134, "x", 17)
    d.arrow((44, 134), (90, 134), (90, 70), (190, 70))
    d.arrow((44, 134), (90, 134), (90, 204), (190, 204))
    d.box(190, 8, 124, 124, "W, frozen:\n768 × 768\n= 589,824", FAINT)
    d.rectangle(190, 200, 124, 8, FILL[PURPLE], PURPLE, 1.6)
    d.text(252, 186, "A: 8 × 768", 14)
    d.text(190, 226, "trained: 12,288 in A and B", 13, FAINT, "start")
    d.arrow((314, 204), (380, 204))
    d.text(344, 190, "8", 13, FAINT)
    d.rectangle(380, 142, 8, 124, FILL[PURPLE], PURPLE, 1.6)
    d.text(398, 252, "B: 768 × 8", 14, INK, "start")
    d.arrow((388, 204), (530, 204), (530, 152), color=PURPLE)
    d.arrow((314, 70), (530, 70), (530, 116))
    d.text(540, 180, "× α / r", 13, FAINT, "start")
    d.circle(530, 134, 17, "+")
    d.arrow((547, 134), (594, 134))
    d.text(602, 134, "W x + (α / r) B A x", 14, INK, "start")
    return d


def pipeline() -> Drawing:
    """For 10: the wires of text to image, and the four lines that the reader writes."""
    alt = (
        "Two texts become a context (1). The schedule gives t, ᾱ and ᾱ′ (2). The UNet gets x twice and gives two "
        "answers (3), which are guided; the step makes x′. The last x′ is divided by the factor (4) and decoded."
    )
    d = Drawing(760, 344, alt)
    d.box(14, 26, 112, 48, "negative,\nprompt", GREEN, 13)
    d.arrow((126, 50), (150, 50), color=GREEN)
    d.box(150, 26, 84, 48, "tokenizer", FAINT, 13)
    d.arrow((234, 50), (296, 50), color=GREEN)
    d.text(264, 36, "(2, 77)", 12, FAINT)
    d.box(296, 26, 100, 48, "text\nencoder", FAINT, 13)
    d.arrow((396, 50), (444, 50), color=GREEN)
    d.box(444, 26, 72, 48, "final\nnorm", FAINT, 13)
    d.arrow((480, 74), (480, 100), (330, 100), (330, 140), color=GREEN)
    d.text(402, 89, "context (2, 77, width)", 12, FAINT)
    d.box(600, 26, 146, 48, "schedule:\nt, ᾱ, next ᾱ′", ORANGE, 13)
    d.arrow((620, 74), (620, 122), (362, 122), (362, 140), color=ORANGE)
    d.text(500, 112, "t", 13, FAINT)
    d.arrow((680, 74), (680, 140), color=ORANGE)
    d.text(690, 112, "ᾱ, ᾱ′", 13, FAINT, "start")
    d.box(14, 140, 72, 60, "seed,\nnoise", ORANGE, 13)
    d.arrow((86, 170), (112, 170), color=ORANGE)
    d.box(112, 140, 122, 60, "latents x\n(1, 4, h/8, w/8)", BLUE, 13)
    d.arrow((234, 170), (304, 170), color=BLUE)
    d.text(268, 158, "x, x", 13)
    d.text(268, 184, "(2, 4, …)", 12, FAINT)
    d.box(304, 140, 84, 60, "UNet", PURPLE, 16)
    for y, beside, name in ((154, 143, "without"), (188, 200, "with")):
        d.arrow((388, y), (474, y), color=PURPLE)
        d.text(430, beside, name, 12)
    d.box(474, 140, 106, 60, "guidance,\nscale s", FAINT, 13)
    d.arrow((580, 170), (616, 170), color=PURPLE)
    d.box(616, 140, 130, 60, "x̂₀, ε̂;\nstep to x′", FAINT, 13)
    d.arrow((210, 200), (210, 224), (640, 224), (640, 200), color=BLUE)
    d.text(426, 236, "x", 13)
    d.arrow((672, 200), (672, 256), (150, 256), (150, 200), color=BLUE)
    d.text(400, 268, "x′, less noisy: the x of the next call", 13, FAINT)
    d.arrow((722, 200), (722, 312), (664, 312), color=BLUE)
    d.text(714, 286, "last x′", 13, FAINT, "end")
    d.box(560, 288, 104, 48, "÷ scaling\nfactor", FAINT, 13)
    d.arrow((560, 312), (500, 312), color=BLUE)
    d.box(404, 288, 96, 48, "decoder", FAINT, 14)
    d.arrow((404, 312), (368, 312), color=BLUE)
    d.box(256, 288, 112, 48, "image\n(1, 3, h, w)", BLUE, 13)
    for x, y, number in ((330, 119, "1"), (650, 98, "2"), (430, 171, "3"), (694, 312, "4")):
        d.circle(x, y, 10, number, INK, 13)
    return d


def inpainting() -> Drawing:
    """For 11: after each step, what is to be kept is put back."""
    alt = (
        "In each step the UNet denoises everything; then the kept part of the original, noised to the same level, is "
        "put back outside the mask, and the mask's inside keeps what was drawn. The result goes into the next step."
    )
    d = Drawing(760, 236, alt)
    d.box(20, 74, 96, 54, "latents x̄,\nlevel σ", BLUE, 13)
    d.arrow((116, 101), (150, 101))
    d.box(150, 74, 130, 54, "UNet and\nsampler's step", PURPLE, 13)
    d.arrow((280, 101), (336, 101))
    d.text(308, 88, "drawn", 12, FAINT)
    d.box(20, 170, 96, 54, "original x₀", BLUE, 13)
    d.arrow((116, 197), (150, 197))
    d.box(150, 170, 130, 54, "noised to level σ′:\nx₀ + σ′ε", ORANGE, 13)
    d.arrow((280, 197), (392, 197), (392, 128), color=ORANGE)
    d.text(336, 184, "kept", 12, FAINT)
    d.rectangle(461, 170, 54, 54, INK)
    d.circle(488, 197, 21, color=INK)
    d.arrow((488, 170), (488, 128))
    d.text(524, 188, "mask: white is redrawn,", 12, FAINT, "start")
    d.text(524, 205, "black is kept", 12, FAINT, "start")
    d.box(336, 74, 208, 54, "mask · drawn\n+ (1 − mask) · kept", FAINT)
    d.arrow((544, 101), (596, 101))
    d.box(596, 74, 110, 54, "latents x̄,\nlevel σ′", BLUE, 13)
    d.arrow((651, 74), (651, 34), (68, 34), (68, 74), dashed=True)
    d.text(360, 20, "next step, with less noise", 13, FAINT)
    return d


def reuse() -> Drawing:
    """For 14: a full and a shallow call of the UNet."""
    alt = (
        "Two Us. In the full call all blocks are coloured. In the shallow call only the two at the top are; a dashed "
        "arrow brings the right one what the deep blocks gave in the full call."
    )
    d = Drawing(760, 300, alt)
    for left, full in ((0, True), (392, False)):
        d.text(left + 176, 16, "full call: every block runs" if full else "shallow call: only the top runs", 15)
        for level in range(3):
            y, color = 44 + 58 * level, PURPLE if full or not level else FAINT
            for x in (left + 70 + 30 * level, left + 282 - 30 * level):
                d.box(x - 36, y, 72, 36, "" if full or not level else "not run", color, 12)
            ends = (left + 106 + 30 * level, y + 18), (left + 246 - 30 * level, y + 18)
            if full or not level:
                d.arrow(*ends, color=ORANGE, dashed=True)
            if level < 2 and full:
                x = left + 78 + 30 * level
                d.arrow((x, y + 36), (x + 18, y + 58))
                d.arrow((left + 352 - x + left - 18, y + 58), (left + 352 - x + left, y + 36))
        d.box(left + 140, 218, 72, 36, "" if full else "not run", PURPLE if full else FAINT, 12)
        if full:
            d.arrow((148, 196), (158, 218))
            d.arrow((194, 218), (204, 196))
        d.arrow((left + 4, 62), (left + 34, 62), color=BLUE)
        d.arrow((left + 318, 62), (left + 348, 62), color=BLUE)
    d.line([(265, 91), (362, 91), (362, 286), (698, 286)], BLUE, 2.4, dashed=True)
    d.arrow((698, 286), (698, 80), color=BLUE, width=2.4, dashed=True)
    d.text(530, 271, "kept from the call before", 13, INK)
    return d


SCHEMATICS: dict[str, Callable[[], Drawing]] = {
    "diffusion": diffusion,
    "hourglass": hourglass,
    "residual-block": residual_block,
    "byte-pairs": byte_pairs,
    "looking-back": looking_back,
    "text-block": text_block,
    "two-towers": two_towers,
    "attention": attention,
    "transformer-block": block,
    "unet": unet,
    "circle": circle,
    "paths": paths,
    "fresh-noise": fresh_noise,
    "remember": remember,
    "guidance": guidance,
    "scale-counts": scale_counts,
    "lost-on-the-way": lost_on_the_way,
    "pipeline": pipeline,
    "inpainting": inpainting,
    "training-step": training_step,
    "simple-loss": simple_loss,
    "lora": lora,
    "reuse": reuse,
}


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in SCHEMATICS.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
