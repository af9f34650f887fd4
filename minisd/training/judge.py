"""Training the judge: a small detector that says what a picture of the scenes' world shows.

It shrinks pictures to 128 × 128 pixels, looks for object centres on a 16 × 16 grid, names each one's noun and colour,
and names background and time of day of the whole picture; counts and relations follow from the centres. It is trained
apart from everything it judges, on scenes of its own stream, a quarter of them with held-out pairs: it must know a
purple bus to say that one was drawn.
Source: Zhou et al. 2019, "Objects as Points", of which this is a small version with fixed widths.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minisd.blocks import Downsample, ResBlock
from minisd.images import to_pixels
from minisd.io.atomic import save_atomically
from minisd.training.backgrounds import FRAME, TIMES
from minisd.training.data import pixels_of
from minisd.training.loop import channels_last, generator
from minisd.training.scenes import Mixture, Scene, colors, object_names, places, plain_backgrounds, scene
from minisd.training.sprites import entries

WEIGHTS = Path(__file__).parent.parent / "assets" / "judge"
TRAINING_SEED = 2_000_003
GRID = 16
CELL = FRAME // GRID
OWN = "own"  # the colour of an object that has none of the tints
NOT_SHOWN = -100  # what cross-entropy ignores


@dataclass(frozen=True)
class Vocabulary:
    """The names behind the judge's numbers."""

    nouns: tuple[str, ...]
    colors: tuple[str, ...]
    backgrounds: tuple[str, ...]
    times: tuple[str, ...]

    @classmethod
    def of_scenes(cls) -> Self:
        """The catalogue's words."""
        backgrounds = (*plain_backgrounds(), *places())
        return cls(tuple(object_names()), (*colors(), OWN), backgrounds, TIMES)


@dataclass(frozen=True)
class JudgeConfig:
    """The judge's shape: channels at 32 × 32, 16 × 16 and 8 × 8 cells, and the words it knows."""

    vocabulary: Vocabulary
    widths: tuple[int, int, int] = (48, 96, 160)
    groups: int = 16


class Found(NamedTuple):
    """An object seen in a picture: its noun and colour, and its centre in units of the scene's frame."""

    noun: str
    color: str
    x: float
    y: float


class Verdict(NamedTuple):
    """What a picture shows: a plain colour or a place, the time of day, the objects."""

    background: str
    time: str
    things: tuple[Found, ...]


class Answers(NamedTuple):
    """The judge's outputs, or what they should be.

    heat (n, 16, 16): how near a cell is to an object's centre, as a logit; noun (n, nouns, 16, 16), color
    (n, colours, 16, 16), background (n, backgrounds), time (n, times): logits. As targets the last four are class
    numbers without their axis of classes, NOT_SHOWN where there is nothing to say, and heat is in [0, 1].
    """

    heat: Tensor
    noun: Tensor
    color: Tensor
    background: Tensor
    time: Tensor


class Judge(nn.Module):
    """Square images (n, 3, h, h) in [-1, 1], at least 128 pixels wide, to `Answers`."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config, words = config, config.vocabulary
        fine, middle, coarse = config.widths

        def block(before: int, after: int) -> ResBlock:
            return ResBlock(before, after, config.groups, 1e-5)

        self.patch = nn.Conv2d(3, fine, 4, stride=4)
        self.fine = nn.Sequential(nn.SiLU(), nn.Conv2d(fine, middle, 3, stride=2, padding=1))
        self.middle = block(middle, middle)
        self.coarse = nn.Sequential(Downsample(middle, padding=1), block(middle, coarse), block(coarse, coarse))
        self.narrow = nn.Conv2d(coarse, middle, 1)
        self.merge = nn.Sequential(block(middle, middle), nn.GroupNorm(config.groups, middle), nn.SiLU())
        self.cells = nn.Conv2d(middle, 1 + len(words.nouns) + len(words.colors), 1)
        self.norm = nn.GroupNorm(config.groups, coarse)
        self.whole = nn.Linear(coarse, len(words.backgrounds) + len(words.times))
        assert self.cells.bias is not None
        nn.init.constant_(self.cells.bias[:1], -3.0)  # most cells hold no centre

    def forward(self, images: Tensor) -> Answers:
        words = self.config.vocabulary
        middle = self._middle(images)
        coarse = self.coarse(middle)
        cells = self.cells(self.merge(middle + F.interpolate(self.narrow(coarse), scale_factor=2)))
        heat, noun, color = cells.split([1, len(words.nouns), len(words.colors)], dim=1)
        pooled = self._pooled(coarse)
        background, time = self.whole(pooled).split([len(words.backgrounds), len(words.times)], dim=1)
        return Answers(heat[:, 0], noun, color, background, time)

    def _middle(self, images: Tensor) -> Tensor:
        return self.middle(self.fine(self.patch(shrunk(images))))

    def _pooled(self, coarse: Tensor) -> Tensor:
        return F.silu(self.norm(coarse)).mean((2, 3))

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Vectors (n, widths[2]) of images (n, 3, h, h): the last feature map, averaged, for a Fréchet distance."""
        return self._pooled(self.coarse(self._middle(images)))

    @torch.inference_mode()
    def verdicts(self, images: Tensor) -> list[Verdict]:
        """Say what each of the images (n, 3, h, h) in [-1, 1] shows, from it and its mirror image together."""
        ahead, mirrored = self(images), self(images.flip(-1))
        # only cells have sides: heat, noun and color are turned back
        turned = Answers(*(answer.flip(-1) if answer.ndim > 2 else answer for answer in mirrored))
        heat, noun, color, background, time = (one + other for one, other in zip(ahead, turned, strict=True))
        best = Answers((heat / 2).sigmoid(), noun.argmax(1), color.argmax(1), background.argmax(1), time.argmax(1))
        return decode(best, self.config.vocabulary)

    def save(self, folder: Path) -> None:
        """Write config.json and the weights, float16."""
        weights = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_atomically(lambda path: save_file(weights, path), folder / "model.safetensors")
        text = json.dumps(asdict(self.config), indent=2) + "\n"
        save_atomically(lambda path: path.write_text(text, encoding="utf-8"), folder / "config.json")

    @classmethod
    def load(cls, folder: Path = WEIGHTS) -> Self:
        """Read what `save` wrote; by default the judge that ships. Raises FileNotFoundError when there is none."""
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"no judge in {folder}; make one with: minisd train judge")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        words = Vocabulary(**{name: tuple(value) for name, value in config["vocabulary"].items()})
        model = cls(JudgeConfig(words, tuple(config["widths"]), config["groups"]))
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict({name: value.float() for name, value in weights.items()})
        return model.eval().requires_grad_(False)


def encode(scenes: list[Scene], words: Vocabulary) -> Answers:
    """The targets for these scenes; heat falls off around each centre as a Gaussian one cell wide."""
    shape = (len(scenes), GRID, GRID)
    heat = torch.zeros(shape)
    noun, color = torch.full(shape, NOT_SHOWN), torch.full(shape, NOT_SHOWN)
    middle = (torch.arange(GRID) + 0.5) * CELL
    for index, described in enumerate(scenes):
        for thing in described.things:
            # h = exp(−d² / 2σ²), with σ one cell
            squared = (middle[:, None] - thing.y).square() + (middle - thing.x).square()
            warmth = torch.exp(-squared / (2 * CELL**2))
            nearest = (warmth > heat[index]) & (warmth > 0.1)
            noun[index][nearest] = words.nouns.index(thing.noun)
            shown = shown_color(thing.noun, thing.color)
            color[index][nearest] = NOT_SHOWN if shown is None else words.colors.index(shown)
            heat[index] = torch.maximum(heat[index], warmth)
    background = torch.tensor([words.backgrounds.index(described.background) for described in scenes])
    time = torch.tensor([words.times.index(one.time) if tells_time(one) else NOT_SHOWN for one in scenes])
    return Answers(heat, noun, color, background, time)


def shown_color(noun: str, color: str | None) -> str | None:
    """The colour that an object shows, or None where one can't say: untinted, but near one of its own tints."""
    entry = entries()[noun]
    if color is not None:
        return color
    return None if set(entry.own) & set(entry.colors) else OWN


def tells_time(described: Scene) -> bool:
    """Whether the scene looks different by day, at sunset and at night."""
    return described.place and described.background not in ("sea", "space")


def decode(answers: Answers, words: Vocabulary, threshold: float = 0.4, apart: float = 3.5) -> list[Verdict]:
    """Read heat in [0, 1] and class numbers: an object is a cell warmer than `threshold` and all cells near it.

    apart: the smallest distance between two objects' cells. Cells where nothing is shown must have no heat.
    """
    verdicts = []
    for heat, noun, color, background, time in zip(*(answer.cpu() for answer in answers), strict=True):
        rows, columns = (heat > threshold).nonzero(as_tuple=True)
        order = heat[rows, columns].argsort(descending=True, stable=True)
        kept: list[tuple[int, int]] = []
        for y, x in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
            if all((y - row) ** 2 + (x - column) ** 2 >= apart**2 for row, column in kept):
                kept.append((y, x))
        things = tuple(
            Found(
                words.nouns[int(noun[y, x])],
                OWN if color[y, x] == NOT_SHOWN else words.colors[int(color[y, x])],
                (x + 0.5) * CELL,
                (y + 0.5) * CELL,
            )
            for y, x in kept
        )
        day = words.times[0] if time == NOT_SHOWN else words.times[int(time)]
        verdicts.append(Verdict(words.backgrounds[int(background)], day, things))
    return verdicts


def judge_loss(answers: Answers, targets: Answers) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of every answer; nouns and colours count the more, the nearer a cell is to the centre."""

    def at_centres(logits: Tensor, classes: Tensor) -> Tensor:
        weight = targets.heat * (classes != NOT_SHOWN)
        loss = F.cross_entropy(logits, classes, ignore_index=NOT_SHOWN, reduction="none")
        return (weight * loss).sum() / weight.sum().clamp(min=1)

    parts = {
        "heat": F.binary_cross_entropy_with_logits(answers.heat, targets.heat) * 20,
        "noun": at_centres(answers.noun, targets.noun),
        "color": at_centres(answers.color, targets.color),
        "background": F.cross_entropy(answers.background, targets.background),
        # a sum over a clamped count, since a batch may hold no scene that tells the time
        "time": F.cross_entropy(answers.time, targets.time, ignore_index=NOT_SHOWN, reduction="sum")
        / (targets.time != NOT_SHOWN).sum().clamp(min=1),
    }
    return torch.stack(list(parts.values())).sum(), {name: float(part.detach()) for name, part in parts.items()}


def shrunk(images: Tensor) -> Tensor:
    """Images (n, c, h, h) at the size the judge looks at: (n, c, 128, 128), pixels averaged."""
    if images.shape[-1] == FRAME:
        return images
    return F.interpolate(images, size=(FRAME, FRAME), mode="bilinear", antialias=True)


def roughen(images: Tensor, rng: torch.Generator) -> Tensor:
    """Blur each image by its own amount, shift light and colour a little, add fine and coarse noise.

    This is what drawn and decoded pictures suffer from; no shift is large enough to change a colour's name.
    """

    def each(*shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=rng)

    def noise(side: int) -> Tensor:
        return torch.randn(len(images), 3, side, side, generator=rng)

    for factor in (2, 4):
        soft = F.interpolate(F.avg_pool2d(images, factor), scale_factor=factor, mode="bilinear")
        images = torch.lerp(images, soft, each(1, 1, 1) ** factor)
    gain = 1 + 0.1 * (each(1, 1, 1) - 0.5) + 0.06 * (each(3, 1, 1) - 0.5)
    shift = 0.08 * (each(1, 1, 1) - 0.5)
    coarse = F.interpolate(noise(GRID), scale_factor=CELL, mode="bilinear")
    images = images * gain + shift + 0.08 * each(1, 1, 1) * noise(FRAME) + 0.08 * each(1, 1, 1) * coarse
    return images.clamp(-1, 1)


class JudgeTask:
    """What `loop.train` needs to train the judge on scenes drawn on the fly."""

    def __init__(self, config: JudgeConfig | None = None, seed: int = 0) -> None:
        self.seed, self.mixture = seed, Mixture(single=0.4, relation=0.35, count=0.25)
        torch.manual_seed(seed)
        self.model: nn.Module = channels_last(Judge(config or JudgeConfig(Vocabulary.of_scenes())))

    def loss(self, step: int, positions: range, local: slice, progress: float) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(self.model, Judge)
        described = [
            scene(TRAINING_SEED + self.seed, position, held_out=position % 4 == 0, mixture=self.mixture)
            for position in positions[local]
        ]
        images = shrunk(pixels_of(described))
        images = roughen(images, generator(self.seed, step, local.start))
        answers = self.model(images.contiguous(memory_format=torch.channels_last))
        return judge_loss(answers, encode(described, self.model.config.vocabulary))

    def sheet(self, model: nn.Module) -> Image.Image:
        """Pictures as the judge sees them in training."""
        seen = shrunk(pixels_of(scene(TRAINING_SEED + self.seed, index) for index in range(8)))
        rows = (np.hstack(list(to_pixels(images))) for images in (seen, roughen(seen, generator(self.seed, 0))))
        return Image.fromarray(np.vstack(list(rows)))

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write `judge/`."""
        assert isinstance(model, Judge)
        model.save(folder / "judge")
