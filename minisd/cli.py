"""The `minisd` command: draw pictures, look into models and pictures, train the tiny model.

Whatever takes long to import is imported by the command that needs it, so that `--help` answers at once.
File names go to standard output, everything else to standard error. Exit codes: 0 done, 1 failed, 2 asked for
something that cannot be, 130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minisd import __version__
from minisd.drawing import Drawing, Target, display_name, draw_all
from minisd.training.commands import app as training

if TYPE_CHECKING:
    import torch

    from minisd.pipeline import StableDiffusion
    from minisd.samplers import Sampler

SamplerName = Literal["ddpm", "ddim", "pndm", "euler", "euler_a", "heun", "dpmpp_2m"]
Spacing = Literal["leading", "trailing", "linspace"]
Precision = Literal["float32", "float16", "bfloat16"]
Prediction = Literal["epsilon", "v_prediction", "sample"]
MOST = 1_000_000
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")

app = typer.Typer(
    name="minisd",
    help="Draw pictures from words with Stable Diffusion.",
    epilog='Start with: minisd generate "a fox in the snow"',
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(training, name="train")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; errors become one message, or with MINISD_DEBUG=1 a traceback."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = app(arguments, prog_name="minisd", standalone_mode=False) or 0
        except Exception as error:
            if os.environ.get("MINISD_DEBUG") == "1":
                raise
            code, message = _explain(error)
            _say(message)
    if code == 130:
        _say("interrupted")
    return code


@app.callback(invoke_without_command=True)
def minisd(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"minisd {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw, in words.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="A .png file or a folder. [default: named after the prompt]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files, instead of numbering.")] = False,
    images: Annotated[int, typer.Option("--images", "-n", min=1, max=MOST, help="How many; each the next seed.")] = 1,
    grid: Annotated[bool, typer.Option("--grid", help="Lay the pictures out in one file.")] = False,
    seed: Annotated[int | None, typer.Option(help="Draws the same picture again. [default: random]")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strongly to follow the prompt; 1 is plain.")] = None,
    negative: Annotated[str, typer.Option(help="What to keep away from, in words.")] = "",
    sampler: Annotated[SamplerName | None, typer.Option(help="How to walk from noise to a picture.")] = None,
    spacing: Annotated[Spacing | None, typer.Option(help="Which timesteps the steps visit.")] = None,
    karras: Annotated[
        bool | None, typer.Option("--karras/--no-karras", help="Karras' noise levels (euler, heun, dpmpp_2m).")
    ] = None,
    width: Annotated[int | None, typer.Option(help="In pixels, a multiple of 8.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels, a multiple of 8.")] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Start from this picture, scaled and cropped to the size.", exists=True, dir_okay=False),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="Redraw only what is white in this picture of --image's size.", exists=True, dir_okay=False),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of --image is redrawn, above 0 to 1. [default: 0.8, with --mask 1]")
    ] = None,
    outpaint: Annotated[
        tuple[int, int, int, int] | None,
        typer.Option(help="Draw beyond --image's edges: pixels left, right, top, bottom.", metavar="L R T B"),
    ] = None,
    rescale: Annotated[float, typer.Option(help="Tame strong guidance, 0 (off) to 1.")] = 0.0,
    clip_skip: Annotated[int, typer.Option(help="Which layer of the text encoder, counted from its end.")] = 1,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="Load this LoRA, at this strength. May be repeated.", metavar="FILE[:WEIGHT]"),
    ] = None,
    inversion: Annotated[
        list[Path] | None, typer.Option("--textual-inversion", help="Load this word. May be repeated.", metavar="FILE")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder, .safetensors or .ckpt. [default: the tiny one]")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Of the model's files, such as fp16.")] = None,
    prediction: Annotated[
        Prediction | None, typer.Option("--prediction-type", help="What a single file of SD 2 predicts.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu. [default: the first there is]")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="[default: float16 on cuda, else float32]")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep each part on the GPU only while it computes, to save memory.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="How many pictures are drawn at a time.")] = 4,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the file names only.")] = False,
) -> None:
    """Draw pictures from words. What is left out comes from the model's own defaults.

    \b
    Examples:
      minisd generate "a fox in the snow"
      minisd generate "a castle at night" --seed 7 --output castle.png
      minisd generate "a red car" --images 9 --grid --steps 30 --sampler euler
      minisd generate "a snowman" --image photo.jpg --strength 0.6
      minisd generate "a snowman" --image photo.jpg --mask mask.png
      minisd generate "a fox" --model stable-diffusion-v1-5/stable-diffusion-v1-5
    """
    target = Target.parse(output, prompt, several=images > 1 and not grid, overwrite=overwrite)
    say: Callable[[str], None] = _ignore if quiet else _say
    started = time.perf_counter()
    sd = _load(model, device, dtype, variant=variant, prediction_type=prediction, offload=offload)
    say(f"{model or 'tiny'} on {sd.device} in {str(sd.dtype).removeprefix('torch.')}, "
        f"loaded in {time.perf_counter() - started:.1f} s")
    _load_adapters(sd, lora or [], inversion or [])
    if unknown := _unknown_words(sd, f"{prompt} {negative}"):
        _say(unknown)
    drawing = Drawing(
        prompt=prompt,
        negative_prompt=negative,
        num_inference_steps=sd.defaults.num_inference_steps if steps is None else steps,
        guidance_scale=sd.defaults.guidance_scale if guidance is None else guidance,
        sampler=_choose_sampler(sd.defaults.sampler, sampler, spacing, karras),
        width=width,
        height=height,
        image=image,
        mask=mask,
        strength=strength,
        outpaint=outpaint,
        guidance_rescale=rescale,
        clip_skip=clip_skip,
        loras=" ".join(f"{name} {weight:g}" for name, weight in sd.adapters.weights.items()),
    )
    choices: dict[str, Any] = {"seed": seed, "images": images, "batch": batch, "grid": grid, "model": model}
    draw_all(sd, drawing, target, **choices, quiet=quiet, say=say)


@app.command()
def interpolate(
    start: Annotated[str, typer.Argument(help="The first picture, in words.")],
    end: Annotated[str, typer.Argument(help="The last picture, in words.")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="A .png file or a folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files, instead of numbering.")] = False,
    count: Annotated[int, typer.Option("--images", "-n", min=2, max=MOST, help="How many, both ends included.")] = 8,
    seeds: Annotated[tuple[int, int], typer.Option(help="Of the first and of the last picture.")] = (0, 1),
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strongly to follow the prompts; 1 is plain.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder, .safetensors or .ckpt. [default: the tiny one]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu. [default: the first there is]")] = None,
) -> None:
    """Draw the pictures on the way from one prompt and seed to another, side by side in one file.

    \b
    Example:
      minisd interpolate "a red car on the beach" "a blue car in the snow" --seeds 3 3
    """
    from minisd.images import grid

    target = Target.parse(output, f"{start} to {end}", several=False, overwrite=overwrite)
    sd = _load(model, device, None)
    if unknown := _unknown_words(sd, f"{start} {end}"):
        _say(unknown)
    drawing = Drawing(
        prompt=f"{start} to {end}",
        negative_prompt="",
        num_inference_steps=sd.defaults.num_inference_steps if steps is None else steps,
        guidance_scale=sd.defaults.guidance_scale if guidance is None else guidance,
        sampler=sd.defaults.sampler,
        width=None,
        height=None,
    )
    pictures = sd.interpolate(
        (start, end),
        seeds,
        count,
        num_inference_steps=drawing.num_inference_steps,
        guidance_scale=drawing.guidance_scale,
    )
    text = drawing.parameters(seeds[0], pictures[0].size, display_name(model), count)
    target.save(grid(pictures, columns=count), seeds[0], text)


@app.command()
def info(
    source: Annotated[str, typer.Argument(metavar="MODEL|PICTURE", help="A hub id, folder or file.")] = "tiny",
    variant: Annotated[str | None, typer.Option(help="Of the model's files, such as fp16.")] = None,
    prediction: Annotated[
        Prediction | None, typer.Option("--prediction-type", help="What a single file of SD 2 predicts.")
    ] = None,
) -> None:
    """Say what a model consists of, or how a picture was drawn.

    \b
    Examples:
      minisd info tiny
      minisd info v1-5-pruned-emaonly.safetensors
      minisd info fox.png
    """
    if not source.lower().endswith(PICTURES):
        from minisd.checkpoint import open_checkpoint

        print(open_checkpoint(source, variant=variant, prediction_type=prediction).describe())
        return
    from minisd.metadata import read_parameters

    text = read_parameters(source)
    if text is None:
        raise OSError(f"{source} does not say how it was drawn; expected a `parameters` text, as in a PNG of minisd")
    print(text)


@app.command()
def evaluate(
    model: Annotated[Path | None, typer.Option(help="Model folder. [default: the tiny one]")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report and the pictures.")] = Path(
        "runs/evaluation"
    ),
    count: Annotated[int, typer.Option(min=1, help="How many held-out prompts are drawn.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 20,
    guidance: Annotated[float | None, typer.Option(help="[default: the model's]")] = None,
) -> None:
    """Draw prompts whose combinations were held out of training, and judge what came of them.

    Writes evaluation.json and evaluation.png. Called again after a break, it goes on where it stopped.
    """
    from minisd.evaluation import evaluate_model
    from minisd.evaluation.measure import Settings

    result = evaluate_model(model, output, Settings(count=count, steps=steps, guidance=guidance))
    for name, shares in result["attributes"].items():
        drawn, real = ("{share} [{low}, {high}] of {of}".format(**shares[kind]) for kind in ("drawn", "real"))
        _say(f"{name:<12} drawn {drawn:<32} real scenes {real}" + ("" if shares["quoted"] else "  (judge below 97%)"))
    print(output / "evaluation.json")


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help='A model folder, "tiny", or "full": Stable Diffusion 1.5 with random weights.')
    ] = "full",
    output: Annotated[Path, typer.Option("--output", "-o", help="A .json file; a picture is drawn beside it.")] = Path(
        "runs/bench.json"
    ),
    size: Annotated[
        list[int] | None, typer.Option(help="In pixels; may be repeated. [default: 512, with tiny 128]")
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Of the whole picture; 0 draws none.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="How often each part is timed.")] = 5,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. [default: the first there is]")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="[default: float16 on cuda, else float32]")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of each process, on a CPU. [default: its cores]")] = (
        os.cpu_count() or 1
    ),
    compiled: Annotated[bool, typer.Option("--compile", help="Compile UNet and decoder, of both libraries.")] = False,
    alone: Annotated[bool, typer.Option("--alone", help="Measure minisd only, without diffusers.")] = False,
) -> None:
    """Time minisd and diffusers in turns, on the same weights: import, load, text, step, decode, a picture; and memory.

    Nothing else should be running. At full size on two cores this takes about half an hour; --steps 2 a third of it.
    """
    from contextlib import nullcontext
    from importlib.util import find_spec

    from minisd import bench as benches
    from minisd.parts import best_device

    place = str(best_device()) if device is None else str(_usable_device(device))
    settings = benches.Settings(
        sizes=tuple(size or [128 if model == "tiny" else 512]),
        steps=steps,
        repeats=repeats,
        device=place,
        dtype=dtype or ("float16" if place.startswith("cuda") else "float32"),
        threads=threads,
        compiled=compiled,
        libraries=("minisd",) if alone or find_spec("diffusers") is None else ("minisd", "diffusers"),
    )
    if model == "tiny":
        from minisd.checkpoint import SHIPPED

        source: Any = nullcontext(SHIPPED)
    else:
        source = benches.random_weights() if model == "full" else nullcontext(Path(model))
    with source as folder:
        report = benches.run(folder, settings, say=_say)
    benches.write(report, output)
    _say(benches.table(report))
    print(output)


def _load(model: str | None, device: str | None, dtype: str | None, **choices: Any) -> StableDiffusion:
    import torch

    from minisd.pipeline import StableDiffusion

    place = None if device is None else _usable_device(device)
    precision = None if dtype is None else getattr(torch, dtype)
    return StableDiffusion.from_pretrained(model, device=place, dtype=precision, **choices)


def _load_adapters(sd: StableDiffusion, loras: Sequence[str], inversions: Sequence[Path]) -> None:
    """Load LoRAs, each given as FILE or FILE:WEIGHT, and textual inversions."""
    for given in loras:
        match = None if Path(given).exists() else re.fullmatch(r"(.+):(-?\d*\.?\d+)", given)
        file, weight = match.groups() if match else (given, "1")
        sd.load_lora(file, weight=float(weight))
    for path in inversions:
        sd.load_textual_inversion(path)


def _usable_device(name: str) -> torch.device:
    from minisd.parts import usable_device

    try:
        return usable_device(name)
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from error


def _choose_sampler(default: Sampler, name: str | None, spacing: str | None, karras: bool | None) -> Sampler:
    from minisd.samplers import Sampler

    changes = {key: value for key, value in (("spacing", spacing), ("karras", karras)) if value is not None}
    return replace(default if name is None else Sampler(name), **changes)  # type: ignore[arg-type]


def _unknown_words(sd: StableDiffusion, text: str) -> str:
    """A warning about words that the model never learned, with some that it did; "" where it knows all."""
    unknown = sd.unknown_words(text)
    if not unknown:
        return ""
    from minisd.training.captions import vocabulary
    from minisd.training.catalogue import CATALOGUE

    known = [word for word in vocabulary() if not sd.unknown_words(word)]
    close = [match for word in unknown for match in get_close_matches(word.lower(), known, n=1, cutoff=0.7)]
    nouns = [entry.noun for entry in CATALOGUE if entry.noun in known][::6]
    some = ", ".join(dict.fromkeys(close + nouns))
    quoted = ", ".join(f'"{word}"' for word in unknown)
    return f"warning: this model never learned {quoted}" + (f"; it knows, for example: {some}" if some else "")


def _explain(error: Exception) -> tuple[int, str]:
    """The exit code and the message for an error."""
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        text = error.format_message()
        if text.startswith("Usage:"):  # a command that needs another word: its help is the message
            return error.exit_code, text
        return error.exit_code, f"error: {text}" + (f" (see `{context.command_path} --help`)" if context else "")
    from minisd.weights import CheckpointError

    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'the file'}: {error.strerror}"
    if isinstance(error, (ValueError, TypeError)) and not isinstance(error, CheckpointError):
        return 2, f"error: {text}"
    from minisd.checks import is_out_of_memory

    if is_out_of_memory(error):
        reason = (str(error.__cause__ or error) or type(error).__name__).split("\n")[0]
        text = f"out of memory; try a smaller --batch, --width and --height, --dtype float16 or --offload ({reason})"
    elif not isinstance(error, (OSError, ValueError, FloatingPointError)):
        text = f"unexpected {type(error).__name__}: {text}; MINISD_DEBUG=1 shows where"
    return 1, f"error: {text}"


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say(f"warning: {message}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _ignore(text: str) -> None:
    """Say nothing."""
