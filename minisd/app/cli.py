"""The `minisd` command: draw pictures, look into models and pictures, train the tiny model.

Whatever takes long to import is imported by the command that needs it, so that `--help` answers at once.
File names go to standard output, everything else to standard error. Exit codes: 0 done, 1 failed, 2 asked for
something that cannot be, 130 interrupted.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minisd import __version__
from minisd.app.drawing import (
    Drawing,
    Means,
    Target,
    draw_all,
    file_hash,
    model_side,
    split_lora,
    unknown_words_warning,
)
from minisd.app.serve import serve
from minisd.bench.command import bench
from minisd.features.distributed import local_device, log, rank, world_size
from minisd.training.commands import app as training

if TYPE_CHECKING:
    import torch

    from minisd.pipeline.stable_diffusion import StableDiffusion

SamplerName = Literal["ddpm", "ddim", "pndm", "euler", "euler_a", "heun", "dpmpp_2m", "lcm"]
Spacing = Literal["leading", "trailing", "linspace"]
Precision = Literal["float32", "float16", "bfloat16"]
PresetName = Literal["fast"]
Prediction = Literal["epsilon", "v_prediction", "sample"]
HASHES = {"image_hash": "image", "mask_hash": "mask"}
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
            log(message)
    if code == 130:
        log("interrupted")
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
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What to draw, in words.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Draw a picture for each line of this .txt or .jsonl file.", exists=True, dir_okay=False),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Draw this picture again, but for what other options say.", exists=True, dir_okay=False),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="A .png file or a folder. [default: named after the prompt]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files, instead of numbering.")] = False,
    images: Annotated[
        int | None, typer.Option("--images", "-n", min=1, max=MOST, help="How many; each the next seed. [default: 1]")
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Lay the pictures out in one file.")] = False,
    seed: Annotated[int | None, typer.Option(help="Draws the same picture again. [default: random]")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strongly to follow the prompt; 1 is plain.")] = None,
    preset: Annotated[
        PresetName | None, typer.Option(help="Settings that trade a little of the picture for time; says which.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What to keep away from, in words.")] = None,
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
    rescale: Annotated[float | None, typer.Option(help="Tame strong guidance, 0 (off) to 1. [default: 0]")] = None,
    interval: Annotated[
        tuple[float, float] | None,
        typer.Option("--guidance-interval", help="The part of the run with guidance. [default: 0 1]", metavar="B E"),
    ] = None,
    reuse: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Calls of the UNet: every N-th whole, the others L of its last layers.", metavar="N L"),
    ] = None,
    clip_skip: Annotated[
        int | None, typer.Option(help="Which layer of the text encoder, counted from its end. [default: 1]")
    ] = None,
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
    batch: Annotated[
        int | None, typer.Option(min=1, help="How many pictures are drawn at a time. [default: 4]")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the file names only.")] = False,
) -> None:
    """Draw pictures from words. What is left out comes from the model's own defaults.

    (words) in brackets count 1.1 times as much, [words] less by that, and (words:1.3) 1.3 times. \\( is a bracket.

    \b
    Examples:
      minisd generate "a fox in the snow"
      minisd generate "a (fox:1.3) in the [snow]"
      minisd generate "a castle at night" --seed 7 --output castle.png
      minisd generate "a red car" --images 9 --grid --steps 30 --sampler euler
      minisd generate "a snowman" --image photo.jpg --strength 0.6
      minisd generate "a snowman" --image photo.jpg --mask mask.png
      minisd generate "a castle at night" --preset fast
      minisd generate "a fox" --model stable-diffusion-v1-5/stable-diffusion-v1-5
      minisd generate --like castle.png --steps 50
      minisd generate --prompts prompts.txt --output out/

    With --prompts, a .txt file has a prompt on each line; lines that begin with # are skipped. Each line of a .jsonl
    file is an object: {"prompt": "a fox", "seed": 7, "name": "fox"}, with negative_prompt, num_inference_steps,
    guidance_scale, sampler, spacing, karras, width, height, clip_skip, guidance_rescale, guidance_interval,
    feature_reuse, preset and images as further keys; the options here are their defaults. All lines are checked before
    the first picture is drawn. The same command again draws what is missing, and
    `torchrun --nproc-per-node 2 -m minisd generate …` shares the work out.
    """
    _check_modes(context, prompt, prompts, like, output, grid)
    options: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "sampler": sampler,
        "spacing": spacing,
        "karras": karras,
        "width": width,
        "height": height,
        "image": image,
        "mask": mask,
        "strength": strength,
        "outpaint": outpaint,
        "guidance_rescale": rescale,
        "guidance_interval": interval,
        "feature_reuse": reuse,
        "preset": preset,
        "clip_skip": clip_skip,
        "seed": seed,
        "images": images,
        "batch": batch,
        "grid": grid or None,
        "dtype": dtype,
    }
    recalled = None
    if like is not None:
        from minisd.app.like import recall
        from minisd.features.presets import fill

        recalled = recall(like, fill(options), model, lora or [])
        options = recalled.options
    options |= {name: file_hash(options[of]) for name, of in HASHES.items() if options[of]}
    count, batch = options["images"] or 1, options["batch"] or 4
    lines = None
    if prompts is not None:
        from minisd.app.batch import read_prompts

        lines = read_prompts(prompts)
        target = Target.parse(f"{output}/", "", several=True, overwrite=overwrite)
    else:
        target = Target.parse(output, options["prompt"], several=count > 1 and not options["grid"], overwrite=overwrite)
    tell: Callable[[str], None] = _ignore if quiet or rank() else log
    started = time.perf_counter()
    kind = {"variant": variant, "prediction_type": prediction, "offload": offload}
    sd = _load(model, local_device(device), options["dtype"], **kind)
    tell(
        f"{model or 'tiny'} on {sd.device} in {str(sd.dtype).removeprefix('torch.')}, "
        f"loaded in {time.perf_counter() - started:.1f} s"
    )
    _load_adapters(sd, lora or [], inversion or [], recalled.lora_weights if recalled else {})
    means = Means.of(sd, model)
    if recalled is not None:
        recalled.check(means)
    said: list[Mapping[str, Any]] = [options] if lines is None else [options, *(line.settings for line in lines)]
    words = [one.get(name) or "" for one in said for name in ("prompt", "negative_prompt")]
    if not rank() and (unknown := unknown_words_warning(sd, words)):
        log(unknown)
    from minisd.features.presets import PRESETS

    for name in dict.fromkeys(one["preset"] for one in said if one.get("preset") in PRESETS):
        tell(PRESETS[name].describe())
    if lines is not None:
        from minisd.app.batch import draw_many, make_plan

        plan = make_plan(lines, options, batch, sd.defaults, model_side(sd))
        draw_many(sd, plan, means, target.folder, overwrite=overwrite, quiet=quiet, say=tell)
        return
    drawing = Drawing.choose(options, sd.defaults)
    choices: dict[str, Any] = {"seed": options["seed"], "images": count, "batch": batch, "grid": bool(options["grid"])}
    place = recalled.place if recalled else None
    draw_all(sd, drawing, target, **choices, means=means, quiet=quiet, say=tell, place=place)


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
    if unknown := unknown_words_warning(sd, [start, end]):
        log(unknown)
    drawing = Drawing(
        prompt=f"{start} to {end}",
        negative_prompt="",
        num_inference_steps=sd.defaults.num_inference_steps if steps is None else steps,
        guidance_scale=sd.defaults.guidance_scale if guidance is None else guidance,
        sampler=sd.defaults.sampler,
    )
    pictures = sd.interpolate(
        (start, end),
        seeds,
        count,
        num_inference_steps=drawing.num_inference_steps,
        guidance_scale=drawing.guidance_scale,
    )
    way = {"Interpolation": f"{seeds[0]} to {seeds[1]}"}
    text = drawing.parameters(seeds[0], pictures[0].size, Means.of(sd, model), count, more=way)
    target.save(grid(pictures, columns=count), seeds[0], text)


@app.command()
def info(
    source: Annotated[str, typer.Argument(metavar="MODEL|PICTURE", help="A hub id, folder or file.")] = "tiny",
    variant: Annotated[str | None, typer.Option(help="Of the model's files, such as fp16.")] = None,
    prediction: Annotated[
        Prediction | None, typer.Option("--prediction-type", help="What a single file of SD 2 predicts.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Print a picture's text as it is.")] = False,
) -> None:
    """Say what a model consists of, or how a picture was drawn, by minisd or by AUTOMATIC1111's web UI and its like.

    \b
    Examples:
      minisd info tiny
      minisd info v1-5-pruned-emaonly.safetensors
      minisd info fox.png
      minisd info fox.png --raw
    """
    if not source.lower().endswith(PICTURES):
        from minisd.io.checkpoint import open_checkpoint

        print(open_checkpoint(source, variant=variant, prediction_type=prediction).describe())
        return
    from minisd.app.metadata import describe, parse_parameters, read_parameters

    text = read_parameters(source)
    if text is None:
        raise OSError(f"{source} does not say how it was drawn; expected a `parameters` text, as in a PNG of minisd")
    print(text if raw else describe(parse_parameters(text)))


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
    from minisd.pipeline.checks import writable

    writable(output)
    result = evaluate_model(model, output, Settings(count=count, steps=steps, guidance=guidance))
    for name, shares in result["attributes"].items():
        drawn, real = ("{share} [{low}, {high}] of {of}".format(**shares[kind]) for kind in ("drawn", "real"))
        log(f"{name:<12} drawn {drawn:<32} real scenes {real}" + ("" if shares["quoted"] else "  (judge below 97%)"))
    print(output / "evaluation.json")


app.command()(bench)
app.command()(serve)


def _load(model: str | None, device: str | None, dtype: str | None, **choices: Any) -> StableDiffusion:
    import torch

    from minisd.pipeline.stable_diffusion import StableDiffusion

    place = None if device is None else _usable_device(device)
    precision = None if dtype is None else getattr(torch, dtype)
    return StableDiffusion.from_pretrained(model, device=place, dtype=precision, **choices)


def _load_adapters(
    sd: StableDiffusion, loras: Sequence[str], inversions: Sequence[Path], usual: Mapping[str, float]
) -> None:
    """Load LoRAs, each given as FILE or FILE:WEIGHT, and textual inversions. usual: weights by name, in place of 1."""
    for given in loras:
        file, weight = split_lora(given)
        sd.load_lora(file, weight=usual.get(Path(file).stem, 1.0) if weight is None else weight)
    for path in inversions:
        sd.load_textual_inversion(path)


def _usable_device(name: str) -> torch.device:
    from minisd.pipeline.parts import usable_device

    try:
        return usable_device(name)
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from error


def _check_modes(
    context: typer.Context, prompt: str | None, prompts: Path | None, like: Path | None, output: str | None, grid: bool
) -> None:
    """Raise BadParameter for what `generate` cannot do at once."""
    if prompt is None and prompts is None and like is None:
        raise typer.BadParameter("Missing argument 'PROMPT'; give one, or --prompts, or --like", context)
    if prompts is None and world_size() > 1:
        raise typer.BadParameter("several processes share the lines of --prompts; for one prompt start one", context)
    if prompts is None:
        return
    for name, given in (("a prompt", prompt is not None), ("--like", like), ("--grid", grid)):
        if given:
            raise typer.BadParameter(f"--prompts does not go with {name}; leave one of them out", context)
    if output is None or (output.lower().endswith(".png") and not Path(output).is_dir()):
        raise typer.BadParameter("--prompts draws many pictures; name a folder for them: --output out/", context)


def _explain(error: Exception) -> tuple[int, str]:
    """The exit code and the message for an error."""
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        text = error.format_message()
        if text.startswith("Usage:"):  # a command that needs another word: its help is the message
            return error.exit_code, text
        return error.exit_code, f"error: {text}" + (f" (see `{context.command_path} --help`)" if context else "")
    from minisd.io.tensors import CheckpointError

    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'the file'}: {error.strerror}"
    if isinstance(error, (ValueError, TypeError)) and not isinstance(error, CheckpointError):
        return 2, f"error: {text}"
    from minisd.pipeline.checks import is_out_of_memory

    if is_out_of_memory(error):
        reason = (str(error.__cause__ or error) or type(error).__name__).split("\n")[0]
        text = f"out of memory; try a smaller --batch, --width and --height, --dtype float16 or --offload ({reason})"
    elif not isinstance(error, (OSError, ValueError, FloatingPointError)):
        text = f"unexpected {type(error).__name__}: {text}; MINISD_DEBUG=1 shows where"
    return 1, f"error: {text}"


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    log(f"warning: {message}")


def _ignore(text: str) -> None:
    """Say nothing."""
