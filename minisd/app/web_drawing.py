"""What `minisd serve` does, without the page: check a request, draw with previews, and map the attention to words.

Requests share nothing but the model, which drawing does not change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from minisd.app.jobs import Job, model_side, slug, unknown_words_warning
from minisd.app.metadata import save_png
from minisd.app.provenance import Provenance
from minisd.features.attention_maps import Word, WordMaps, split_words
from minisd.features.prompts import TOKENS_PER_CHUNK, Chunk, read
from minisd.pipeline.checks import resolve_seeds
from minisd.pipeline.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class Request:
    """What a page asks for. A seed of "" and settings that are None or missing leave the choice to the model."""

    prompt: str
    negative_prompt: str = ""
    seed: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Preview:
    """The picture that the UNet predicts at one of its calls, of the latents' own small size."""

    picture: Image.Image
    call: int
    num_calls: int


@dataclass(frozen=True, eq=False)
class Result:
    """A finished picture. file: the PNG that `minisd generate` would write, and its name."""

    picture: Image.Image
    seed: int
    file: bytes
    name: str
    notes: list[str]
    words: list[Word]
    maps: WordMaps
    num_calls: int
    seconds: float


def draw(sd: StableDiffusion, provenance: Provenance, request: Request) -> Iterator[Preview | Result]:
    """Draw a request: a preview after each call of the UNet, then the picture, the same as that of `minisd generate`.

    Raises ValueError or TypeError for invalid settings, before any work is done; later what `denoise` and `decode` do.
    """
    started = time.perf_counter()
    seed = _read_seed(request.seed)
    if not request.prompt.strip():
        raise ValueError("the prompt is empty; say in words what to draw, such as: a fox in the snow")
    values = {"prompt": request.prompt, "negative_prompt": request.negative_prompt, "seed": seed, **request.settings}
    job = Job.create(values, sd.defaults, model_side(sd))
    _, height, width = sd.latent_shape(job.settings.height, job.settings.width)
    chunks = read(job.prompt, sd.tokenizer)
    maps = WordMaps(sd.unet, height, width, rows=(TOKENS_PER_CHUNK + 2) * len(chunks))
    steps = sd.denoise(job.prompt, negative_prompt=job.negative_prompt, seed=seed, **job.arguments)
    while True:
        with maps.watch():  # for one call at a time: the next one may come from another thread
            step = next(steps, None)
        if step is None:
            break
        latents, num_calls = step.latents, step.num_calls
        yield Preview(sd.preview(step.x0)[0], step.index + 1, num_calls)
    picture = sd.decode(latents)[0]
    # at guidance 0 only the negative prompt is drawn
    words = split_words(job.prompt, sd.tokenizer) if job.settings.guidance_scale else []
    file, name = _png(picture, job, provenance), f"{slug(job.prompt)}-{seed}.png"
    notes, seconds = _notes(sd, job, chunks), time.perf_counter() - started
    yield Result(picture, seed, file, name, notes, words, maps, num_calls, seconds)


def overlay(picture: Image.Image, weights: Tensor, strength: float = 0.55) -> Image.Image:
    """Lay a word's map (h/8, w/8) over its picture: dark blue at 0, yellow at the largest weight.

    The colours are the ends and the middle of "cividis", which the colour-blind can tell apart (Nuñez et al. 2018).
    """
    unit = weights / weights.max().clamp(min=1e-12)
    gray = Image.fromarray((255 * unit).round().byte().numpy()).resize(picture.size, Image.Resampling.BICUBIC)
    heat = ImageOps.colorize(gray, black="#00224e", mid="#7d7c78", white="#fee838")
    return Image.blend(picture.convert("L").convert("RGB"), heat, strength)


def _read_seed(text: str) -> int:
    try:
        seed = int(text) if text.strip() else None
    except ValueError:
        raise ValueError(f"seed {text[:40]!r} is not a whole number; expected one from 0 on, or none") from None
    return resolve_seeds(seed, 1)[0]


def _notes(sd: StableDiffusion, job: Job, chunks: list[Chunk]) -> list[str]:
    """The warnings of `minisd generate`."""
    unknown = unknown_words_warning(sd, [job.prompt, job.negative_prompt])
    notes = [unknown.removeprefix("warning: ")] if unknown else []
    if len(chunks) > 1:
        count = sum(map(len, chunks))
        notes.append(f"the prompt has {count} tokens: it is read in {len(chunks)} chunks of at most {TOKENS_PER_CHUNK}")
    return notes


def _png(picture: Image.Image, job: Job, provenance: Provenance) -> bytes:
    text, record = job.parameters(provenance), job.record(provenance)
    with TemporaryDirectory() as folder:
        return save_png(picture, Path(folder) / "picture.png", text, record=record).read_bytes()
