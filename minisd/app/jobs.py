"""Drawing jobs: the complete specification of one image each, and the functions that draw and save them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Any

import typer
from PIL import Image

from minisd import __version__
from minisd.app.options import PICTURES
from minisd.editing import extend_canvas
from minisd.features.distributed import show
from minisd.features.pictures import to_rgb
from minisd.features.prompt_syntax import TAG, plain
from minisd.features.prompts import parse
from minisd.features.validate import check_path, check_writable
from minisd.images import grid as lay_out
from minisd.io.diffusers_folder import Defaults
from minisd.io.pictures import opened_picture, read_picture
from minisd.pipeline.checks import check_margins, resolve_seeds
from minisd.pipeline.metadata import parameters_text, save_png
from minisd.pipeline.provenance import Provenance, file_hash
from minisd.pipeline.settings import SETTINGS, Settings, format_number
from minisd.pipeline.stable_diffusion import StableDiffusion

MAX_GRID = 1000  # images
MAX_NAME = 200  # bytes of a file name without seed, number and extension; file systems allow 255


@dataclass(frozen=True)
class Source:
    """The optional input image of a job, with its mask or outpainting margins, and the hashes of the files."""

    image: Path | None = None
    image_hash: str = ""
    mask: Path | None = None
    mask_hash: str = ""
    outpaint: tuple[int, int, int, int] | None = None

    @classmethod
    def read(
        cls,
        image: Path | None,
        mask: Path | None,
        outpaint: tuple[int, int, int, int] | None,
        strength: float | None = None,
    ) -> Source:
        """Build a source from command-line options. Raises BadParameter for incompatible options."""
        if image is None and (mask or outpaint or strength is not None):
            option = "--mask" if mask else "--outpaint" if outpaint else "--strength"
            raise typer.BadParameter(f"{option} requires an input picture; pass it with --image")
        if mask and outpaint:
            raise typer.BadParameter("--outpaint cannot be combined with --mask; omit one of them, or run twice")
        return cls(image, image and file_hash(image) or "", mask, mask and file_hash(mask) or "", outpaint)

    @property
    def default_strength(self) -> float:
        return 1.0 if self.mask or self.outpaint else 0.8

    def open(self, sd: StableDiffusion, settings: Settings) -> tuple[Image.Image | None, Image.Image | None]:
        """Load the image and its mask, scaled and cropped to the size in the settings, then extended.

        If only the masked area is drawn, the image keeps its size.
        """
        if self.image is None:
            return None, None
        if settings.padding_mask_crop is not None:
            with opened_picture(self.image) as opened:
                start = to_rgb(opened)
            return start, None if self.mask is None else read_picture(self.mask, *start.size)
        _, height, width = sd.latent_shape(settings.height, settings.width)
        factor = sd.autoencoder.config.downscale
        start = read_picture(self.image, factor * width, factor * height)
        if self.outpaint is not None:
            check_margins(*self.outpaint)
            return extend_canvas(start, *self.outpaint)
        return start, None if self.mask is None else read_picture(self.mask, *start.size)


@dataclass(frozen=True)
class Job:
    """The complete specification of one image, other than the model.

    Args:
        seed: The seed, or None until a random one is chosen.
        batch: The batch size and the position in the batch, which affect rounding.
        images: The number of images in a grid that starts with this one.
        interpolation: The seeds of the first and last image, for an interpolation grid.
        file: The file name, for jobs from a prompts file.
        where: The line of the prompts file, for error messages.
        seed_drawn: Whether the seed is chosen at random.
    """

    prompt: str
    negative_prompt: str
    seed: int | None
    settings: Settings
    source: Source = field(default_factory=Source)
    batch: tuple[int, int] = (1, 0)
    images: int = 1
    interpolation: tuple[int, int] | None = None
    file: str = ""
    where: str = ""
    seed_drawn: bool = False

    @classmethod
    def create(
        cls, values: Mapping[str, Any], defaults: Defaults | Settings, side: int, source: Source | None = None
    ) -> Job:
        """Create a job from values by argument name. Width and height default to `side`, in pixels."""
        changes = {name: values.get(name) for name in (*SETTINGS, "preset")}
        settings = Settings.choose(changes, defaults)
        sizes: dict[str, Any] = {name: side for name in ("width", "height") if getattr(settings, name) is None}
        negative_prompt, seed = values.get("negative_prompt") or "", values.get("seed")
        return cls(values["prompt"], negative_prompt, seed, replace(settings, **sizes), source or Source())

    @property
    def strength(self) -> float:
        """The image-to-image strength."""
        strength = self.settings.strength
        return self.source.default_strength if strength is None else strength

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments for the pipeline, without prompts, seed and images."""
        arguments = self.settings.arguments()
        if self.source.image is None:
            return arguments
        if self.settings.padding_mask_crop is not None:
            return arguments | {"strength": self.strength}
        without_size = {name: value for name, value in arguments.items() if name not in ("width", "height")}
        return without_size | {"strength": self.strength}

    def check(self, sd: StableDiffusion) -> None:
        """Raise the errors that drawing would raise for invalid values, without drawing."""
        start, mask = self.source.open(sd, self.settings)
        sd.denoise(self.prompt, start, mask, seed=self.seed or 0, **self.arguments)

    def record(self, provenance: Provenance) -> dict[str, Any]:
        """Return everything that determines the image, in JSON types, for the manifest and the PNG metadata."""
        record: dict[str, Any] = {"prompt": self.prompt, "negative_prompt": self.negative_prompt, "seed": self.seed}
        record |= self.settings.record() | vars(self.source)
        record |= {"batch_size": self.batch[0], "batch_pos": self.batch[1]}
        record |= {"images": self.images} if self.images > 1 else {}
        record |= {"interpolation": self.interpolation} if self.interpolation else {}
        record |= vars(provenance) | {"version": __version__}
        return {name: _to_json(value) for name, value in record.items()}

    def parameters(self, provenance: Provenance) -> str:
        """Return the `parameters` text for the PNG, with everything that affects the pixels."""
        source, texts = self.source, self.settings.texts()
        left, right, top, bottom = source.outpaint or (0, 0, 0, 0)
        width, height = (self.settings.width or 0) + left + right, (self.settings.height or 0) + top + bottom
        first = {name: texts.pop(name) for name in ("Steps", "Sampler", "CFG scale")}
        first |= {"Seed": str(self.seed), "Size": f"{width}x{height}"} | provenance.texts()
        size, position = self.batch
        sources = {
            "Denoising strength": format_number(self.strength) if source.image else "",
            "Mask": source.mask.name if source.mask else "",
            "Outpaint": " ".join(map(str, source.outpaint or ())),
            "Image": source.image.name if source.image else "",
            "Image hash": source.image_hash,
            "Mask hash": source.mask_hash,
            "Images": str(self.images) if self.images > 1 else "",
            "Batch size": str(size) if size > 1 else "",
            "Batch pos": str(position) if size > 1 else "",
            "Interpolation": "{} to {}".format(*self.interpolation) if self.interpolation else "",
        }
        texts |= {name: text for name, text in sources.items() if text}
        return parameters_text(self.prompt, self.negative_prompt, first | texts | {"Version": f"minisd {__version__}"})


@dataclass(frozen=True)
class Target:
    """The output folder and file name stem; with `seeded`, file names end in the seed."""

    folder: Path
    stem: str
    seeded: bool
    overwrite: bool

    @classmethod
    def parse(cls, output: str | None, prompt: str, several: bool, overwrite: bool) -> Target:
        """Parse --output.

        Raises BadParameter if it is neither a .png file nor a folder, and OSError if it is not writable.
        """
        path = check_path("--output", output or "")
        if output and path.suffix.lower() == ".png" and not path.is_dir():
            target = cls(path.parent, path.stem, several, overwrite)
        elif not output or path.is_dir() or output.endswith(("/", os.sep)):
            target = cls(path, slug(prompt), True, overwrite)
        else:
            raise typer.BadParameter(
                f"--output {output} is neither a .png file nor a folder; add .png, or / for a new folder"
            )
        if len(os.fsencode(target.stem)) > MAX_NAME:
            raise typer.BadParameter(f"--output {target.stem[:40]}… is too long; expected at most {MAX_NAME} bytes")
        check_writable(target.folder)
        return target

    def save(self, picture: Image.Image, job: Job, provenance: Provenance) -> None:
        """Save an image and print its file name."""
        name = f"{self.stem}-{job.seed}.png" if self.seeded else f"{self.stem}.png"
        text, record = job.parameters(provenance), job.record(provenance)
        show(save_png(picture, self.folder / name, text, self.overwrite, record))


def folder_sources(
    image: Path, mask: Path | None, outpaint: tuple[int, int, int, int] | None, strength: float | None
) -> list[Source]:
    """Return a source for each picture of a folder, with the mask of the same stem if `mask` is a folder.

    Raises BadParameter if the folder has no pictures, or a mask is missing.
    """
    pictures = sorted(path for path in image.iterdir() if path.suffix.lower() in PICTURES)
    if not pictures:
        raise typer.BadParameter(f"--image {image} is a folder without pictures; expected {', '.join(PICTURES)} files")
    sources = []
    for picture in pictures:
        own = mask
        if mask is not None and mask.is_dir():
            own = next((path for path in sorted(mask.iterdir()) if path.stem == picture.stem), None)
            if own is None:
                raise typer.BadParameter(f"--mask {mask} has no mask for {picture.name}; expected {picture.stem}.png")
        sources.append(Source.read(picture, own, outpaint, strength))
    return sources


def _to_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value.name if isinstance(value, Path) else value


def slug(prompt: str) -> str:
    """Convert the beginning of a prompt to a file name stem."""
    return "-".join(re.findall(r"\w+", prompt.lower()))[:40].strip("-") or "picture"


def model_side(sd: StableDiffusion) -> int:
    """Return the native image size of a model, in pixels."""
    return sd.unet.config.sample_size * sd.autoencoder.config.downscale


def assign_batches(jobs: Sequence[Job], size: int) -> list[Job]:
    """Group consecutive jobs into batches of at most `size`, with equal settings and no input image."""
    assigned: list[Job] = []
    for (_, source, _), group in groupby(jobs, lambda job: (job.settings, job.source, TAG.findall(job.prompt))):
        neighbours = list(group)
        most = size if source.image is None else 1
        for first in range(0, len(neighbours), most):
            batch = neighbours[first : first + most]
            assigned += [replace(job, batch=(len(batch), at)) for at, job in enumerate(batch)]
    return assigned


def batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Yield the batches of jobs, in order."""
    batch: list[Job] = []
    for job in jobs:
        if batch and job.batch[1] == 0:
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def draw(sd: StableDiffusion, jobs: Sequence[Job], progress: bool | None) -> list[Image.Image]:
    """Draw a batch of jobs that differ only in prompts and seeds, or reproduce a single job of a batch.

    The progress bar is shown on a terminal only, unless `progress` is set.
    """
    first, (size, position) = jobs[0], jobs[0].batch
    arguments = first.arguments | {"progress": progress}
    if first.source.image is None:
        # the rounding of a row depends on the batch size, but not on the content of the other rows
        rows = list(jobs) * size if len(jobs) < size else jobs
        negatives, seeds = [job.negative_prompt for job in rows], [job.seed or 0 for job in rows]
        pictures = list(sd([job.prompt for job in rows], negative_prompt=negatives, seed=seeds, **arguments))
        return pictures[position : position + 1] if len(jobs) < size else pictures
    start, mask = first.source.open(sd, first.settings)
    assert start is not None
    pictures = []
    for job in jobs:
        arguments |= {"negative_prompt": job.negative_prompt, "seed": job.seed}
        if mask is None:
            pictures.append(sd.image_to_image(job.prompt, start, **arguments))
        else:
            pictures.append(sd.inpaint(job.prompt, start, mask, **arguments))
    return pictures


def draw_images(
    sd: StableDiffusion,
    job: Job,
    target: Target,
    *,
    images: int,
    batch: int,
    grid: bool,
    provenance: Provenance,
    quiet: bool,
    log: Callable[[str], None],
) -> None:
    """Draw a job with one or more seeds, saving each image as it is finished, or all of them as a grid at the end."""
    if grid and images > MAX_GRID:
        raise typer.BadParameter(f"--grid supports at most {MAX_GRID} pictures, got {images}; draw several grids")
    numbers, started = resolve_seeds(job.seed, images), time.perf_counter()
    log(f"seed {numbers[0]}{f' to {numbers[-1]}' if images > 1 else ''}, {describe(job.settings)}")
    pictures: list[Image.Image] = []
    for first in range(0, images, batch):
        jobs = [replace(job, seed=number) for number in numbers[first : first + batch]]
        jobs = assign_batches(jobs, batch) if images > 1 else jobs
        for group in batches(jobs):
            drawn = draw(sd, group, False if quiet else None)
            if grid:
                pictures += drawn
                continue
            for finished, picture in zip(group, drawn, strict=True):
                target.save(picture, finished, provenance)
    if grid:
        size = min(batch, images) if job.source.image is None else 1
        first_job = replace(job, seed=numbers[0], images=images, batch=(size, 0))
        target.save(lay_out(pictures), first_job, provenance)
    log(f"drawn in {time.perf_counter() - started:.1f} s")


def draw_folder(
    sd: StableDiffusion,
    jobs: Sequence[Job],
    folder: Path,
    *,
    overwrite: bool,
    provenance: Provenance,
    quiet: bool,
    log: Callable[[str], None],
) -> None:
    """Draw one job per input picture, named after it, with consecutive seeds. All are checked before the first."""
    numbers = resolve_seeds(jobs[0].seed, len(jobs))
    jobs = [replace(job, seed=number) for job, number in zip(jobs, numbers, strict=True)]
    for job in jobs:
        job.check(sd)
    log(f"{len(jobs)} pictures, seed {numbers[0]} to {numbers[-1]}, {describe(jobs[0].settings)}")
    for job in jobs:
        assert job.source.image is not None
        picture = draw(sd, [job], False if quiet else None)[0]
        Target(folder, job.source.image.stem, False, overwrite).save(picture, job, provenance)


def describe(settings: Settings) -> str:
    """Format settings as one line for the log."""
    texts = settings.texts()
    steps, sampler, guidance = (texts.pop(name) for name in ("Steps", "Sampler", "CFG scale"))
    more = "".join(f", {name.lower()} {text}" for name, text in texts.items())
    return f"{steps} steps of {sampler}, guidance {guidance}{more}"


def unknown_words_warning(sd: StableDiffusion, prompts: Sequence[str]) -> str:
    """Return a warning about words unknown to the model, with examples of known ones, or "" if all are known.

    Invalid prompts are skipped; drawing them raises an error.
    """
    texts = []
    for prompt in dict.fromkeys(prompts):
        with suppress(ValueError):
            texts += [re.sub(r"[()\[\]\\]", " ", text) for text, _ in parse(plain(prompt))]
    unknown = sd.unknown_words(" ".join(texts))
    if not unknown:
        return ""
    from minisd.training.captions import vocabulary
    from minisd.training.catalogue import CATALOGUE

    some, known = unknown[:12], [word for word in vocabulary() if not sd.unknown_words(word)]
    close = [match for word in some for match in get_close_matches(word.lower(), known, n=1, cutoff=0.7)]
    nouns = [entry.noun for entry in CATALOGUE if entry.noun in known][::6]
    quoted = ", ".join(f'"{word}"' for word in some)
    more = f" and {len(unknown) - len(some)} more words" if len(unknown) > len(some) else ""
    examples = f"; it knows, for example: {', '.join(dict.fromkeys(close + nouns))}" if close or nouns else ""
    return f"warning: this model never learned {quoted}{more}{examples}"
