"""The back end of `minisd serve`: request validation, drawing with previews, and attention maps.

Requests share only the model, which drawing does not modify.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from minisd.app.jobs import Job, model_side, slug, unknown_words_warning
from minisd.features.attention_maps import Word, WordMaps, split_words
from minisd.features.prompt_syntax import AND, split_loras, texts_by_step
from minisd.features.prompts import BREAK, TOKENS_PER_CHUNK, Chunk, read
from minisd.pipeline.checks import resolve_seeds
from minisd.pipeline.metadata import write_png
from minisd.pipeline.provenance import Provenance
from minisd.pipeline.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class Request:
    """A request from the page. An empty seed means a random one; None or missing settings use the model's defaults."""

    prompt: str
    negative_prompt: str = ""
    seed: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Preview:
    """A preview of the predicted image after one UNet call, at latent resolution."""

    picture: Image.Image
    call: int
    num_calls: int


@dataclass(frozen=True, eq=False)
class Result:
    """A finished image. `file` and `name` are the PNG that `minisd generate` would write."""

    picture: Image.Image
    seed: int
    file: bytes
    name: str
    notes: list[str]
    words: list[Word]
    maps: WordMaps
    num_calls: int
    seconds: float


def draw(sd: StableDiffusion, provenance: Provenance, request: Request) -> Generator[Preview | Result, None, None]:
    """Yield a preview after each UNet call, then the result, which is identical to that of `minisd generate`.

    Raises ValueError or TypeError for invalid settings before any computation, later those of `denoise` and `decode`.
    """
    started = time.perf_counter()
    seed = _read_seed(request.seed)
    if not request.prompt.strip():
        raise ValueError("the prompt is empty; describe a picture, such as: a fox in the snow")
    values = {"prompt": request.prompt, "negative_prompt": request.negative_prompt, "seed": seed, **request.settings}
    job = Job.create(values, sd.defaults, model_side(sd))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # checks the rest
        steps = sd.denoise(job.prompt, negative_prompt=job.negative_prompt, seed=seed, **job.arguments)
    _, height, width = sd.latent_shape(job.settings.height, job.settings.width)
    texts = texts_by_step(split_loras(job.prompt)[0], job.settings.num_inference_steps)
    prompt = texts[-1]
    chunks = read(prompt, sd.tokenizer)
    # attention is mapped to the words of the last step, unless prompts are composed or change their number of chunks
    mapped = {len(read(text, sd.tokenizer)) for text in set(texts)} == {len(chunks)} and not AND.search(prompt)
    maps = WordMaps(sd.unet, height, width, rows=(TOKENS_PER_CHUNK + 2) * len(chunks))
    while True:
        # one call at a time, since the next one may run in another thread
        with maps.watch() if mapped else nullcontext():
            step = next(steps, None)
        if step is None:
            break
        latents, num_calls = step.latents, step.num_calls
        yield Preview(sd.preview(step.x0)[0], step.index + 1, num_calls)
    picture = sd.decode(latents)[0]
    # at guidance 0 the image follows the negative prompt alone
    words = split_words(prompt, sd.tokenizer) if mapped and job.settings.guidance_scale else []
    file, name = _png(picture, job, provenance), f"{slug(job.prompt)}-{seed}.png"
    notes = [*_notes(sd, job, chunks), *dict.fromkeys(str(each.message) for each in caught)]
    seconds = time.perf_counter() - started
    yield Result(picture, seed, file, name, notes, words, maps, num_calls, seconds)


def overlay(picture: Image.Image, weights: Tensor, strength: float = 0.55) -> Image.Image:
    """Overlay a word's attention map (h/8, w/8) on the image, from dark blue at 0 to yellow at the maximum.

    The colors are the ends and the middle of the colorblind-safe colormap "cividis" (Nuñez et al. 2018).
    """
    unit = weights / weights.max().clamp(min=1e-12)
    gray = Image.fromarray((255 * unit).round().byte().numpy()).resize(picture.size, Image.Resampling.BICUBIC)
    heat = ImageOps.colorize(gray, black="#00224e", mid="#7d7c78", white="#fee838")
    return Image.blend(picture.convert("L").convert("RGB"), heat, strength)


def _read_seed(text: str) -> int:
    try:
        seed = int(text) if text.strip() else None
    except ValueError:
        raise ValueError(f"seed {text[:40]!r} is not an integer; expected one from 0 on, or an empty field") from None
    return resolve_seeds(seed, 1)[0]


def _notes(sd: StableDiffusion, job: Job, chunks: list[Chunk]) -> list[str]:
    """Return the warnings of `minisd generate`."""
    unknown = unknown_words_warning(sd, [job.prompt, job.negative_prompt])
    notes = [unknown.removeprefix("warning: ")] if unknown else []
    if len(chunks) > 1 + len(BREAK.findall(job.prompt)):
        count = sum(map(len, chunks))
        notes.append(f"the prompt has {count} tokens: it is read in {len(chunks)} chunks of at most {TOKENS_PER_CHUNK}")
    return notes


def _png(picture: Image.Image, job: Job, provenance: Provenance) -> bytes:
    file = BytesIO()
    write_png(picture, file, job.parameters(provenance), job.record(provenance))
    return file.getvalue()
