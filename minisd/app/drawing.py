"""What `minisd generate` does: settings for a picture, what draws it and where it goes, and drawing several."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import typer

from minisd import __version__

if TYPE_CHECKING:
    from PIL import Image

    from minisd.io.diffusers_folder import Defaults
    from minisd.pipeline.stable_diffusion import StableDiffusion
    from minisd.samplers import Sampler


GRID = 1000
LONGEST = 200  # bytes of a name, before seed, number and ending are added; a file system takes 255


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
        from minisd.pipeline import checks

        path = checks.path("--output", output or "")
        if output and path.suffix.lower() == ".png" and not path.is_dir():
            target = cls(path.parent, path.stem, several, overwrite)
        elif not output or path.is_dir() or output.endswith(("/", os.sep)):
            target = cls(path, slug(prompt), True, overwrite)
        else:
            raise typer.BadParameter(
                f"--output {output} is no .png file and no folder; end it in .png, or in / for a new folder"
            )
        if len(os.fsencode(target.stem)) > LONGEST:
            raise typer.BadParameter(f"--output {target.stem[:40]}… is too long; give {LONGEST} letters or fewer")
        checks.writable(target.folder)
        return target

    def save(self, picture: Image.Image, seed: int, text: str) -> None:
        """Write a picture and print its name."""
        from minisd.app.metadata import save_png

        name = f"{self.stem}-{seed}.png" if self.seeded else f"{self.stem}.png"
        print(save_png(picture, self.folder / name, text, self.overwrite), flush=True)


@dataclass(frozen=True)
class Means:
    """What draws: the model, what was loaded beside it, and where it computes.

    model: its name. weights: a fingerprint of all that was loaded. prediction: the UNet's prediction type. loras: names
    and weights. words: those that textual inversions brought.
    """

    model: str
    precision: str
    device: str
    prediction: str
    weights: str
    loras: str = ""
    words: str = ""

    @classmethod
    def of(cls, sd: StableDiffusion, model: str | None) -> Means:
        """The means that a loaded model is. model: as it was asked for."""
        return cls(
            model=display_name(model),
            weights=fingerprint(sd),
            precision=str(sd.dtype).removeprefix("torch."),
            device=sd.device.type,
            prediction=sd.schedule.config.prediction_type,
            loras=", ".join(f"{name} {number(weight)}" for name, weight in sd.adapters.weights.items()),
            words=", ".join(sd.tokenizer.added),
        )


@dataclass(frozen=True)
class Drawing:
    """All that decides how a picture looks, but for the means and the seed. The hashes are of the files' contents."""

    prompt: str
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float
    sampler: Sampler
    width: int | None = None
    height: int | None = None
    image: Path | None = None
    image_hash: str = ""
    mask: Path | None = None
    mask_hash: str = ""
    strength: float | None = None
    outpaint: tuple[int, int, int, int] | None = None
    guidance_rescale: float = 0.0
    clip_skip: int = 1
    guidance_interval: tuple[float, float] | None = None
    feature_reuse: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.image is None and (self.mask or self.outpaint):
            name = "--mask" if self.mask else "--outpaint"
            raise typer.BadParameter(f"{name} changes a picture; say which with --image")
        if self.image is None and self.strength is not None:
            raise typer.BadParameter("--strength says how much of a picture is redrawn; say which with --image")
        if self.mask and self.outpaint:
            raise typer.BadParameter("--outpaint makes its own mask; leave --mask out, or do one after the other")

    @classmethod
    def choose(cls, options: Mapping[str, Any], defaults: Defaults) -> Drawing:
        """A drawing from options, by the names of Python's arguments; what is None the preset or the model decides.

        A sampler that is named comes without the spacing and the noise levels of the model's own.
        """
        from minisd.features.presets import fill
        from minisd.samplers import Sampler

        given = {name: value for name, value in fill(options).items() if value is not None}
        given |= {name: tuple(given[name]) for name in ("guidance_interval", "feature_reuse") if name in given}
        changes = {name: given[name] for name in ("spacing", "karras", "eta") if name in given}
        base = Sampler(given["sampler"]) if "sampler" in given else defaults.sampler
        decided: dict[str, Any] = {
            "negative_prompt": "",
            "num_inference_steps": defaults.num_inference_steps,
            "guidance_scale": defaults.guidance_scale,
        }
        ours = {field.name: given[field.name] for field in fields(cls) if field.name in given}
        return cls(**decided | ours | {"sampler": replace(base, **changes)})

    @property
    def share(self) -> float:
        """How much of the picture that it begins with is drawn anew."""
        return self.strength if self.strength is not None else 1.0 if self.mask or self.outpaint else 0.8

    def choices(self) -> dict[str, Any]:
        """What the pipeline is told, whatever the picture begins with."""
        return {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "sampler": self.sampler,
            "guidance_rescale": self.guidance_rescale,
            "clip_skip": self.clip_skip,
            "guidance_interval": self.guidance_interval,
            "feature_reuse": self.feature_reuse,
        }

    def begin(self, sd: StableDiffusion) -> tuple[Image.Image | None, Image.Image | None]:
        """The picture to begin with and its mask, both scaled and cropped to the size asked for, and extended."""
        from minisd.editing import extend
        from minisd.io.pictures import read_picture

        if self.image is None:
            return None, None
        _, height, width = sd.latent_shape(self.height, self.width)
        factor = sd.autoencoder.config.downscale
        size = factor * width, factor * height
        start = read_picture(self.image, *size)
        if self.outpaint is not None:
            return extend(start, *self.outpaint)
        return start, None if self.mask is None else read_picture(self.mask, *size)

    def check(self, sd: StableDiffusion, seed: int = 0) -> None:
        """Raise what drawing would raise for a value out of range, without drawing."""
        start, mask = self.begin(sd)
        more: dict[str, Any] = {"strength": self.share} if start else {"width": self.width, "height": self.height}
        sd.denoise(self.prompt, start, mask, seed=seed, **more, **self.choices())

    def parameters(
        self,
        seed: int,
        size: tuple[int, int],
        means: Means,
        images: int = 1,
        place: tuple[int, int] | None = None,
        more: Mapping[str, object] = MappingProxyType({}),
    ) -> str:
        """The text for the picture's `parameters`: everything that changes a pixel.

        images: how many are in a grid. place: how many pictures were drawn at a time, and which of them it was.
        """
        from minisd.app.metadata import parameters_text, sampler_label

        settings: dict[str, Any] = {
            "Steps": self.num_inference_steps,
            "Sampler": sampler_label(self.sampler.name, self.sampler.karras),
            "CFG scale": number(self.guidance_scale),
            "Seed": seed,
            "Size": f"{size[0]}x{size[1]}",
            "Model": means.model,
            "Weights": means.weights,
        }
        usual = {"Precision": "float32", "Device": "cpu", "Prediction type": "epsilon", "Clip skip": 1, "Images": 1}
        unusual = {
            "Prediction type": means.prediction,
            "Precision": means.precision,
            "Device": means.device,
            "LoRA": means.loras,
            "Textual inversion": means.words,
            "Timestep spacing": self.sampler.spacing,
            "Eta": number(self.sampler.eta),
            "Guidance rescale": number(self.guidance_rescale),
            "Guidance interval": " ".join(map(number, self.guidance_interval or ())),
            "Feature reuse": " ".join(map(str, self.feature_reuse or ())),
            "Clip skip": self.clip_skip,
            "Denoising strength": self.image and number(self.share),
            "Mask": self.mask and self.mask.name,
            "Outpaint": " ".join(map(str, self.outpaint or ())),
            "Image": self.image and self.image.name,
            "Image hash": self.image_hash,
            "Mask hash": self.mask_hash,
            "Images": images,
            "Batch size": place and place[0],
            "Batch pos": place and place[1],
        } | dict(more)
        settings |= {name: x for name, x in unusual.items() if x not in (None, "", "0", usual.get(name))}
        return parameters_text(self.prompt, self.negative_prompt, settings | {"Version": f"minisd {__version__}"})


def slug(prompt: str) -> str:
    """The beginning of a prompt as the beginning of a file's name."""
    return "-".join(re.findall(r"\w+", prompt.lower()))[:40].strip("-") or "picture"


def number(value: float) -> str:
    """A number as short as it can be written without changing it: 4, 7.5, 0.30000000000000004."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def model_side(sd: StableDiffusion) -> int:
    """The width and height, in pixels, of the pictures that a model was made for."""
    return sd.unet.config.sample_size * sd.autoencoder.config.downscale


def display_name(model: str | None) -> str:
    """What `parameters` call a model: a file or folder by its name without ending, a hub id as it is."""
    return Path(model).stem if model and Path(model).exists() else model or "tiny"


def split_lora(given: str) -> tuple[str, float | None]:
    """FILE or FILE:WEIGHT, as --lora takes it, to the file and the weight, None where there is none."""
    match = None if Path(given).exists() else re.fullmatch(r"(.+):(-?\d*\.?\d+)", given)
    return (match[1], float(match[2])) if match else (given, None)


def file_hash(path: Path) -> str:
    """The first ten digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:10]


def fingerprint(sd: StableDiffusion) -> str:
    """Ten digits that differ where models or adapters do: a hash of the configuration and of some of the weights.

    Of each tensor the first and the last eight values count, so that it takes no time; training moves all of them.
    """
    import torch

    found = hashlib.sha256(repr(sd.config).encode())
    tensors = {
        f"{part}.{name}": tensor
        for part in ("text_encoder", "unet", "autoencoder")
        for name, tensor in getattr(sd, part).state_dict().items()
    }
    for name, lora in sd.adapters.loras.items():
        for layer, update in lora.items():
            found.update(f"{name} {layer} {update.scale}".encode())
            tensors |= {f"{name} {layer} A": update.lora_A.detach(), f"{name} {layer} B": update.lora_B.detach()}
    for name, tensor in sorted(tensors.items()):
        flat = tensor.reshape(-1)
        ends = torch.cat([flat[:8], flat[-8:]]).float().cpu()
        found.update(f"{name} {tuple(tensor.shape)}".encode() + ends.numpy().tobytes())
    return found.hexdigest()[:10]


def unknown_words_warning(sd: StableDiffusion, prompts: Sequence[str]) -> str:
    """A warning about words that the model never learned, with some that it did; "" where it knows all.

    Prompts that cannot be read are passed over: whoever draws them says what is wrong.
    """
    from minisd.features.prompts import parse

    plain = []
    for prompt in dict.fromkeys(prompts):
        with suppress(ValueError):
            plain += [re.sub(r"[()\[\]\\]", " ", text) for text, _ in parse(prompt)]
    unknown = sd.unknown_words(" ".join(plain))
    if not unknown:
        return ""
    from minisd.training.captions import vocabulary
    from minisd.training.catalogue import CATALOGUE

    known = [word for word in vocabulary() if not sd.unknown_words(word)]
    close = [match for word in unknown[:12] for match in get_close_matches(word.lower(), known, n=1, cutoff=0.7)]
    nouns = [entry.noun for entry in CATALOGUE if entry.noun in known][::6]
    some = ", ".join(dict.fromkeys(close + nouns))
    quoted = ", ".join(f'"{word}"' for word in unknown[:12])
    quoted += f" and {len(unknown) - 12} more words" if len(unknown) > 12 else ""
    return f"warning: this model never learned {quoted}" + (f"; it knows, for example: {some}" if some else "")


def draw(
    sd: StableDiffusion, drawings: Sequence[Drawing], seeds: Sequence[int], progress: bool | None
) -> list[Image.Image]:
    """Draw a picture for each of the drawings, which differ in their prompts only, with its seed."""
    first = drawings[0]
    choices = first.choices() | {"progress": progress}
    if first.image is None:
        negatives = [drawing.negative_prompt for drawing in drawings]
        choices |= {"negative_prompt": negatives, "width": first.width, "height": first.height, "seed": seeds}
        return list(sd([drawing.prompt for drawing in drawings], **choices))
    start, mask = first.begin(sd)
    assert start is not None
    pictures = []
    for drawing, seed in zip(drawings, seeds, strict=True):
        choices |= {"negative_prompt": drawing.negative_prompt, "seed": seed, "strength": drawing.share}
        if mask is None:
            pictures.append(sd.image_to_image(drawing.prompt, start, **choices))
        else:
            pictures.append(sd.inpaint(drawing.prompt, start, mask, **choices))
    return pictures


def draw_all(
    sd: StableDiffusion,
    drawing: Drawing,
    target: Target,
    *,
    seed: int | None,
    images: int,
    batch: int,
    grid: bool,
    means: Means,
    quiet: bool,
    say: Callable[[str], None],
    place: tuple[int, int] | None = None,
) -> None:
    """Draw a batch at a time, saving pictures as they come, or the grid of all of them at the end.

    place: draw one picture alone as the one that it was of a batch, (size, number).
    """
    from minisd.images import grid as lay_out
    from minisd.noise import seeds

    if grid and images > GRID:
        raise typer.BadParameter(f"--grid lays out {GRID} pictures at most, not {images}; draw several grids")
    numbers, sampler = seeds(seed, images), drawing.sampler
    interval = " from {:.0%} to {:.0%}".format(*drawing.guidance_interval) if drawing.guidance_interval else ""
    whole = f", 1 call of the UNet in {drawing.feature_reuse[0]} whole" if drawing.feature_reuse else ""
    say(
        f"seed {numbers[0]}{f' to {numbers[-1]}' if images > 1 else ''}, {drawing.num_inference_steps} steps of "
        f"{sampler.name}{' with Karras levels' if sampler.karras else ''}, guidance {drawing.guidance_scale:g}"
        f"{interval}{whole}"
    )
    started, pictures = time.perf_counter(), []
    progress = False if quiet else None
    for first in range(0, images, batch):
        some = numbers[first : first + batch]
        # the rows of a batch are rounded alike whatever the other rows hold, and differently in a batch of another size
        rows = some * place[0] if place else some
        drawn = draw(sd, [drawing] * len(rows), rows, progress)
        drawn = drawn[place[1] : place[1] + 1] if place else drawn
        pictures += drawn if grid else []
        for at, (one, picture) in enumerate(zip(some, [] if grid else drawn, strict=not grid)):
            where = place or ((len(some), at) if len(some) > 1 and drawing.image is None else None)
            target.save(picture, one, drawing.parameters(one, picture.size, means, place=where))
    if grid:
        where = (min(batch, images), 0) if images > 1 and drawing.image is None else None
        text = drawing.parameters(numbers[0], pictures[0].size, means, images, where)
        target.save(lay_out(pictures), numbers[0], text)
    say(f"drawn in {time.perf_counter() - started:.1f} s")
