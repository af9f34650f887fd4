"""What `minisd generate` does: settings for a picture, where it goes, and drawing many of them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from minisd import __version__

if TYPE_CHECKING:
    from PIL import Image

    from minisd.pipeline import StableDiffusion
    from minisd.samplers import Sampler


GRID = 1000


@dataclass(frozen=True)
class Target:
    """Where pictures go: their folder and the beginning of their names; `seeded` names end in the seed."""

    folder: Path
    stem: str
    seeded: bool
    overwrite: bool

    @classmethod
    def parse(cls, output: str | None, prompt: str, several: bool, overwrite: bool) -> Target:
        """Read --output.

        Raises BadParameter for a name that is neither a .png nor a folder, OSError where nothing can be written.
        """
        path = Path(output or "")
        if output and path.suffix.lower() == ".png" and not path.is_dir():
            target = cls(path.parent, path.stem, several, overwrite)
        elif not output or path.is_dir() or output.endswith(("/", os.sep)):
            slug = "-".join(re.findall(r"\w+", prompt.lower()))[:40].strip("-")
            target = cls(path, slug or "picture", True, overwrite)
        else:
            raise typer.BadParameter(
                f"--output {output} is no .png file and no folder; end it in .png, or in / for a new folder"
            )
        absolute = target.folder.absolute()
        there = next(folder for folder in (absolute, *absolute.parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise OSError(f"--output: {there} is no folder, or is not writable; choose another place")
        return target

    def save(self, picture: Image.Image, seed: int, text: str) -> None:
        """Write a picture and print its name."""
        from minisd.metadata import save_png

        name = f"{self.stem}-{seed}.png" if self.seeded else f"{self.stem}.png"
        print(save_png(picture, self.folder / name, text, self.overwrite), flush=True)


@dataclass(frozen=True)
class Drawing:
    """All that decides how a picture looks, but for the model and the seed."""

    prompt: str
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float
    sampler: Sampler
    width: int | None
    height: int | None
    image: Path | None = None
    mask: Path | None = None
    strength: float | None = None
    outpaint: tuple[int, int, int, int] | None = None
    guidance_rescale: float = 0.0
    clip_skip: int = 1
    loras: str = ""

    def __post_init__(self) -> None:
        if self.image is None and (self.mask or self.outpaint):
            name = "--mask" if self.mask else "--outpaint"
            raise typer.BadParameter(f"{name} changes a picture; say which with --image")
        if self.image is None and self.strength is not None:
            raise typer.BadParameter("--strength says how much of a picture is redrawn; say which with --image")
        if self.mask and self.outpaint:
            raise typer.BadParameter("--outpaint makes its own mask; leave --mask out, or do one after the other")

    def draw(self, sd: StableDiffusion, seeds: list[int], progress: bool | None) -> list[Image.Image]:
        """Draw one picture for each seed."""
        choices: dict[str, Any] = {
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "sampler": self.sampler,
            "guidance_rescale": self.guidance_rescale,
            "clip_skip": self.clip_skip,
            "progress": progress,
        }
        if self.image is None:
            return sd([self.prompt] * len(seeds), width=self.width, height=self.height, seed=seeds, **choices)
        start = self._open(self.image, sd)
        if self.strength is not None:
            choices["strength"] = self.strength
        if self.outpaint is not None:
            sides = dict(zip(("left", "right", "top", "bottom"), self.outpaint, strict=True))
            return [sd.outpaint(self.prompt, start, **sides, seed=seed, **choices) for seed in seeds]
        if self.mask is None:
            return [sd.image_to_image(self.prompt, start, seed=seed, **choices) for seed in seeds]
        mask = self._open(self.mask, sd)
        return [sd.inpaint(self.prompt, start, mask, seed=seed, **choices) for seed in seeds]

    def _open(self, path: Path, sd: StableDiffusion) -> Image.Image:
        """Read a picture, and scale and crop it to the size asked for, by default the model's own."""
        from minisd.images import read_picture

        _, height, width = sd.latent_shape(self.height, self.width)
        factor = sd.autoencoder.config.downscale
        return read_picture(path, factor * width, factor * height)

    def parameters(self, seed: int, size: tuple[int, int], model: str, images: int = 1) -> str:
        """The text for the picture's `parameters` chunk."""
        from minisd.metadata import parameters_text, sampler_label

        settings: dict[str, Any] = {
            "Steps": self.num_inference_steps,
            "Sampler": sampler_label(self.sampler.name, self.sampler.karras),
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": seed,
            "Size": f"{size[0]}x{size[1]}",
            "Model": model,
        }
        if self.sampler.spacing:
            settings["Timestep spacing"] = self.sampler.spacing
        if self.loras:
            settings["LoRA"] = self.loras
        if self.image is not None and (self.outpaint is None or self.strength is not None):
            usual = 0.8 if self.mask is None else 1.0
            settings["Denoising strength"] = f"{usual if self.strength is None else self.strength:g}"
        if self.mask is not None:
            settings["Mask"] = self.mask.name
        if self.outpaint is not None:
            settings["Outpaint"] = " ".join(map(str, self.outpaint))
        if self.guidance_rescale:
            settings["Guidance rescale"] = f"{self.guidance_rescale:g}"
        if self.clip_skip != 1:
            settings["Clip skip"] = self.clip_skip
        if images > 1:
            settings["Images"] = images
        return parameters_text(self.prompt, self.negative_prompt, settings | {"Version": f"minisd {__version__}"})


def display_name(model: str | None) -> str:
    """What `parameters` call a model: a file or folder by its name without ending, a hub id as it is."""
    return Path(model).stem if model and Path(model).exists() else model or "tiny"


def draw_all(
    sd: StableDiffusion,
    drawing: Drawing,
    target: Target,
    *,
    seed: int | None,
    images: int,
    batch: int,
    grid: bool,
    model: str | None,
    quiet: bool,
    say: Callable[[str], None],
) -> None:
    """Draw a batch at a time, saving pictures as they come, or the grid of all of them at the end."""
    from minisd.images import grid as lay_out
    from minisd.noise import seeds

    if grid and images > GRID:
        raise typer.BadParameter(f"--grid lays out {GRID} pictures at most, not {images}; draw several grids")
    numbers = seeds(seed, images)
    sampler, name = drawing.sampler, display_name(model)
    say(
        f"seed {numbers[0]}{f' to {numbers[-1]}' if images > 1 else ''}, {drawing.num_inference_steps} steps of "
        f"{sampler.name}{' with Karras levels' if sampler.karras else ''}, guidance {drawing.guidance_scale:g}"
    )
    started, pictures = time.perf_counter(), []
    for first in range(0, images, batch):
        some = numbers[first : first + batch]
        drawn = drawing.draw(sd, some, progress=False if quiet else None)
        pictures += drawn if grid else []
        for number, picture in zip(some, [] if grid else drawn, strict=not grid):
            target.save(picture, number, drawing.parameters(number, picture.size, name))
    if grid:
        text = drawing.parameters(numbers[0], pictures[0].size, name, images)
        target.save(lay_out(pictures), numbers[0], text)
    say(f"drawn in {time.perf_counter() - started:.1f} s")
