"""What `minisd serve` does, without the page: check settings, draw with previews, and find where words were looked for.

Nothing is shared between drawings but the model, which drawing does not change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from minisd.app.drawing import Drawing, Means, slug, unknown_words_warning
from minisd.app.metadata import save_png
from minisd.features.prompts import TOKENS_PER_CHUNK, read
from minisd.features.wordmaps import Word, WordMaps, split
from minisd.noise import seeds

if TYPE_CHECKING:
    from torch import Tensor

    from minisd.pipeline.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class Wish:
    """What somebody asks for, as a page hands it over; None, and a seed of "", leave the choice to the model."""

    prompt: str
    negative_prompt: str = ""
    seed: str = ""
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None


@dataclass(frozen=True, eq=False)
class Preview:
    """The picture that the UNet predicts after one of its calls, at the latents' own small size."""

    picture: Image.Image
    call: int
    calls: int


@dataclass(frozen=True, eq=False)
class Drawn:
    """A finished picture. file: the bytes of the PNG that `minisd generate` would write; name: what it calls it."""

    picture: Image.Image
    seed: int
    file: bytes
    name: str
    notes: list[str]
    words: list[Word]
    maps: WordMaps
    calls: int
    seconds: float


def draw(sd: StableDiffusion, means: Means, wish: Wish) -> Iterator[Preview | Drawn]:
    """Draw what was wished for: a preview after each call of the UNet, then the picture, that of `minisd generate`.

    Raises ValueError or TypeError, before any work is done, for settings that cannot be used; later what `denoise` and
    `decode` raise.
    """
    started = time.perf_counter()
    seed = _read_seed(wish.seed)
    if not wish.prompt.strip():
        raise ValueError("the prompt is empty; say in words what to draw, such as: a fox in the snow")
    options = {
        "prompt": wish.prompt,
        "negative_prompt": wish.negative_prompt,
        "num_inference_steps": wish.steps,
        "guidance_scale": wish.guidance,
        "sampler": wish.sampler or None,
    }
    drawing = Drawing.choose(options, sd.defaults)
    _, height, width = sd.latent_shape()
    chunks = read(wish.prompt, sd.tokenizer)
    maps = WordMaps(sd.unet, height, width, rows=(TOKENS_PER_CHUNK + 2) * len(chunks))
    steps = sd.denoise(drawing.prompt, negative_prompt=drawing.negative_prompt, seed=seed, **drawing.choices())
    while True:
        with maps.watch():  # for one call at a time: the next one may come from another thread
            step = next(steps, None)
        if step is None:
            break
        latents, calls = step.latents, step.calls
        yield Preview(sd.preview(step.x0)[0], step.index + 1, calls)
    picture = sd.decode(latents)[0]
    text = drawing.parameters(seed, picture.size, means)
    # at guidance 0 the negative prompt is drawn, and the words of the prompt are not read
    words = split(wish.prompt, sd.tokenizer) if drawing.guidance_scale else []
    name = f"{slug(wish.prompt)}-{seed}.png"
    notes, seconds = _notes(sd, wish, chunks), time.perf_counter() - started
    yield Drawn(picture, seed, _file(picture, text), name, notes, words, maps, calls, seconds)


def overlay(picture: Image.Image, weights: Tensor, strength: float = 0.55) -> Image.Image:
    """Lay a word's map (h/8, w/8) over its picture: dark blue where it is 0, yellow where it is largest.

    The colours are the ends and the middle of "cividis", which anybody can tell apart (Nuñez et al. 2018).
    """
    unit = weights / weights.max().clamp(min=1e-12)
    grey = Image.fromarray((255 * unit).round().byte().numpy()).resize(picture.size, Image.Resampling.BICUBIC)
    heat = ImageOps.colorize(grey, black="#00224e", mid="#7d7c78", white="#fee838")
    return Image.blend(picture.convert("L").convert("RGB"), heat, strength)


def _read_seed(text: str) -> int:
    try:
        given = int(text) if text.strip() else None
    except ValueError:
        raise ValueError(f"seed {text[:40]!r} is no whole number; expected one from 0 on, or none at all") from None
    return seeds(given, 1)[0]


def _notes(sd: StableDiffusion, wish: Wish, chunks: list[list[tuple[int, float]]]) -> list[str]:
    """What `minisd generate` would warn of."""
    unknown = unknown_words_warning(sd, [wish.prompt, wish.negative_prompt])
    notes = [unknown.removeprefix("warning: ")] if unknown else []
    if len(chunks) > 1:
        count = sum(map(len, chunks))
        notes.append(f"the prompt has {count} tokens: it is read in {len(chunks)} chunks of at most {TOKENS_PER_CHUNK}")
    return notes


def _file(picture: Image.Image, text: str) -> bytes:
    with TemporaryDirectory() as folder:
        return save_png(picture, Path(folder) / "picture.png", text).read_bytes()
