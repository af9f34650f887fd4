"""The `minisd` command: draw images, inspect models and images, train the tiny model.

Slow imports are deferred to the commands that need them, so that `--help` is fast. File names are printed to stdout,
everything else to stderr. Exit codes: 0 success, 1 failure, 2 invalid request, 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minisd import __version__
from minisd.app.export import export
from minisd.app.merge import merge
from minisd.app.options import (
    MAX_IMAGES,
    PICTURES,
    LoadOptions,
    Output,
    Overwrite,
    Prediction,
    Preset,
    RequestOptions,
    SettingsOptions,
    Vae,
    Variant,
    option_groups,
)
from minisd.app.serve import serve
from minisd.bench.command import bench
from minisd.evaluation.command import evaluate
from minisd.features import distributed
from minisd.features.distributed import rank, show, world_size
from minisd.features.presets import PRESETS, find_preset
from minisd.training.commands import app as training

if TYPE_CHECKING:
    from minisd.app.from_image import ImageSettings
    from minisd.app.prompts_file import Prompt
    from minisd.io.diffusers_folder import Defaults
    from minisd.pipeline.settings import Settings
    from minisd.pipeline.stable_diffusion import StableDiffusion

JOB_KEYS = ("prompt", "negative_prompt", "seed", "images", "outpaint")  # record keys other than settings

app = typer.Typer(
    name="minisd",
    help="Draw pictures from text with Stable Diffusion.",
    epilog='Start with: minisd generate "a fox in the snow"',
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(training, name="train")
app.command()(bench)
app.command()(evaluate)
app.command()(export)
app.command()(serve)
app.command()(merge)


class LogHandler(logging.Handler):
    """Prints what the library logs like the command's own lines."""

    def emit(self, record: logging.LogRecord) -> None:
        distributed.log(record.getMessage())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. Errors are printed as one line, or as a traceback if MINISD_DEBUG=1."""
    if isinstance(sys.stdout, TextIOWrapper):  # as on stderr: characters that its encoding lacks are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = LogHandler()
    logging.getLogger("minisd").addHandler(handler)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: distributed.log(f"warning: {message}")
        try:
            code = app(arguments, prog_name="minisd", standalone_mode=False) or 0
        except Exception as error:
            if os.environ.get("MINISD_DEBUG") == "1":
                raise
            code, message = _explain(error)
            distributed.log(message)
        finally:
            logging.getLogger("minisd").removeHandler(handler)
    if code == 130:
        distributed.log("interrupted")
    return code


@app.callback(invoke_without_command=True)
def minisd(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        show(f"minisd {__version__}")
    elif context.invoked_subcommand is None:
        show(context.get_help())


@app.command()
@option_groups
def generate(context: typer.Context, request: RequestOptions, changes: SettingsOptions, loading: LoadOptions) -> None:
    """Draw pictures from text. Options default to the model's own settings.

    (words) in parentheses get weight 1.1, [words] 1/1.1, and (words:1.3) 1.3. Write \\( for a literal parenthesis.

    \b
    Examples:
      minisd generate "a (fox:1.3) in the [snow]"
      minisd generate "a castle at night" --seed 7 --preset fast --output castle.png
      minisd generate "a red car" --images 9 --grid --steps 30 --sampler euler
      minisd generate "a snowman" --image photo.jpg --mask mask.png --strength 0.6
      minisd generate "a watercolor" --image photos/ --strength 0.5 --output out/
      minisd generate "a fox" --model stable-diffusion-v1-5/stable-diffusion-v1-5
      minisd generate --like castle.png --steps 50
      minisd generate --prompts prompts.txt --output out/

    --prompts reads a .txt file with one prompt per line, skipping lines that start with #, or a .jsonl file with one
    object per line: {"prompt": "a fox", "seed": 7, "name": "fox"}. Further keys are negative_prompt, images, preset,
    image, mask, outpaint, loras as in {"style": 0.8}, and settings by their Python names, such as num_inference_steps;
    they default to the options of the command. Pictures are looked for in the folder of the file. All lines are
    validated before the first picture is drawn. Rerun the command to draw missing pictures, and use
    `torchrun --nproc-per-node 2 -m minisd generate …` to distribute the work.
    """
    _check_modes(context, request)
    from minisd.app.prompts_file import read_prompts

    prompts = [] if request.prompts is None else read_prompts(request.prompts)
    values = request.values() | {name: value for name, value in vars(changes).items() if value is not None}
    like = None if request.like is None else _read_image(request.like, request, values, loading)
    if like is not None:
        values = {name: like.record[name] for name in JOB_KEYS if name in like.record} | values
    _draw(request, values, loading, like, prompts)


def _read_image(path: Path, request: RequestOptions, values: Mapping[str, Any], loading: LoadOptions) -> ImageSettings:
    """Read the settings of the --like image, except those overridden by options."""
    from minisd.app.from_image import settings_from_image

    known = {**find_preset(request.preset).settings, **values}
    known |= {name: path for name, path in (("image", request.image), ("mask", request.mask)) if path}
    known |= {"lora_folder": loading.lora_folder} if loading.lora_folder else {}
    like = settings_from_image(path, known)
    like.check_options(request.image, request.mask, loading)
    return like


def _draw(
    request: RequestOptions,
    values: Mapping[str, Any],
    loading: LoadOptions,
    like: ImageSettings | None,
    prompts: Sequence[Prompt],
) -> None:
    """Load the model, and draw one job or one per prompt of a file."""
    from minisd.app.jobs import Job, Source, Target, draw_folder, draw_images, folder_sources, model_side
    from minisd.app.manifest import draw_missing
    from minisd.app.prompts_file import plan_jobs
    from minisd.pipeline.provenance import Provenance
    from minisd.pipeline.settings import Settings

    images, batch = values.get("images") or 1, request.batch or 4
    same_images = like is not None and request.images is None and request.image is None
    grid = request.grid or (same_images and images > 1)
    # of a prompts file, a line without an image is checked on its own
    inputs = request.mask, values.get("outpaint"), None if prompts else values.get("strength")
    folder = request.image if request.image is not None and request.image.is_dir() else None
    sources = [Source.read(request.image, *inputs)] if folder is None else folder_sources(folder, *inputs)
    source = sources[0]
    output = f"{request.output}/" if prompts or folder else request.output
    target = Target.parse(output, values.get("prompt", ""), images > 1 and not grid, request.overwrite)
    log = _ignore if request.quiet or rank() else distributed.log
    started = time.perf_counter()
    precision, weights = (None, None) if like is None else (like.record.get("precision"), like.lora_weights)
    sd = loading.load(precision, weights, log)
    provenance = Provenance.of(sd, loading.model, loading.vae)
    seconds = time.perf_counter() - started
    log(f"{loading.model or 'tiny'} on {sd.device} in {provenance.precision}, loaded in {seconds:.1f} s")
    defaults: Defaults | Settings = sd.defaults
    if like is not None:
        like.check_model(provenance)
        defaults = Settings.choose(like.settings, sd.defaults)
    _log_notices(sd, [values, *(prompt.values for prompt in prompts)], log)
    common: dict[str, Any] = {"provenance": provenance, "quiet": request.quiet, "log": log}
    if prompts:
        jobs = plan_jobs(prompts, values, batch, defaults, model_side(sd), source)
        draw_missing(sd, jobs, target.folder, overwrite=request.overwrite, **common)
        return
    if folder:
        made = [Job.create(values, defaults, model_side(sd), each) for each in sources]
        draw_folder(sd, made, target.folder, overwrite=request.overwrite, **common)
        return
    job = Job.create(values, defaults, model_side(sd), source)
    if like is not None and same_images and request.batch is None:  # rounding depends on the batch size
        batch, job = like.batch[0], replace(job, batch=like.batch if images == 1 else (1, 0))
    draw_images(sd, job, target, images=images, batch=batch, grid=grid, **common)


def _log_notices(sd: StableDiffusion, values: Sequence[Mapping[str, Any]], log: Callable[[str], None]) -> None:
    """Warn about words unknown to the model, and log the presets."""
    from minisd.app.jobs import unknown_words_warning

    texts = [item.get(name) or "" for item in values for name in ("prompt", "negative_prompt")]
    if not rank() and (warning := unknown_words_warning(sd, texts)):
        distributed.log(warning)
    for name in dict.fromkeys(item.get("preset", "") for item in values):
        if name in PRESETS:
            log(PRESETS[name].describe())


@app.command()
@option_groups
def interpolate(
    start: Annotated[str, typer.Argument(help="Prompt for the first picture.")],
    end: Annotated[str, typer.Argument(help="Prompt for the last picture.")],
    changes: SettingsOptions,
    loading: LoadOptions,
    seeds: Annotated[tuple[int, int], typer.Option(help="Seeds of the first and last picture.")] = (0, 1),
    count: Annotated[int, typer.Option("--images", "-n", min=2, max=MAX_IMAGES, help="Number of pictures.")] = 8,
    negative: Annotated[str, typer.Option(help="Negative prompt: what to avoid.")] = "",
    preset: Preset = None,
    output: Output = None,
    overwrite: Overwrite = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the file name.")] = False,
) -> None:
    """Interpolate between two prompts and seeds, and save the pictures side by side in one file.

    \b
    Example:
      minisd interpolate "a red car on the beach" "a blue car in the snow" --seeds 3 3
    """
    from minisd.app.jobs import Job, Target, model_side
    from minisd.images import grid
    from minisd.pipeline.provenance import Provenance

    target = Target.parse(output, f"{start} to {end}", several=False, overwrite=overwrite)
    log = _ignore if quiet else distributed.log
    sd = loading.load(log=log)
    shared = {"negative_prompt": negative, "preset": preset}
    _log_notices(sd, [{"prompt": start} | shared, {"prompt": end}], log)
    values = {"prompt": f"{start} to {end}", "seed": seeds[0]} | shared | vars(changes)
    job = Job.create(values, sd.defaults, model_side(sd))
    options = job.arguments | {"negative_prompt": negative, "progress": False if quiet else None}
    pictures = sd.interpolate((start, end), seeds, count, **options)
    job = replace(job, images=count, interpolation=seeds)
    target.save(grid(pictures, columns=count), job, Provenance.of(sd, loading.model, loading.vae))


@app.command()
def info(
    source: Annotated[str, typer.Argument(metavar="MODEL|PICTURE", help="Hub id, folder or file.")] = "tiny",
    variant: Variant = None,
    vae: Vae = None,
    prediction: Prediction = None,
    raw: Annotated[bool, typer.Option("--raw", help="Print a picture's raw metadata text.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for other programs.")] = False,
) -> None:
    """Show information about a model, or the settings of a picture drawn by minisd, AUTOMATIC1111's web UI or similar.

    \b
    Examples:
      minisd info tiny
      minisd info v1-5-pruned-emaonly.safetensors
      minisd info fox.png
      minisd info fox.png --raw
      minisd info fox.png --json
    """
    if not source.lower().endswith(PICTURES):
        from minisd.io.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(source, variant=variant, vae=vae, prediction_type=prediction)
        show(json.dumps(checkpoint.summary(), ensure_ascii=False) if as_json else checkpoint.describe())
        return
    from minisd.pipeline.metadata import describe, no_metadata, parse_parameters, read_texts

    text, record, program = read_texts(source)
    if text is None:
        raise no_metadata(source, program)
    if as_json:
        parsed = parse_parameters(text)
        show(json.dumps(vars(parsed) | {"settings": {**parsed.settings}, "record": record}, ensure_ascii=False))
        return
    show(text if raw else describe(parse_parameters(text)))


def _check_modes(context: typer.Context, request: RequestOptions) -> None:
    """Raise BadParameter for incompatible options of `generate`."""
    prompts, output = request.prompts, request.output
    if request.prompt is None and prompts is None and request.like is None:
        raise typer.BadParameter("Missing argument 'PROMPT'; pass a prompt, --prompts or --like", context)
    if request.image is not None and request.image.is_dir():
        _check_folder_mode(context, request)
    elif request.mask is not None and request.mask.is_dir():
        raise typer.BadParameter("--mask is a folder, but --image is not; pass a folder of pictures too", context)
    if prompts is None and world_size() > 1:
        raise typer.BadParameter("several processes require --prompts; for one prompt use a single process", context)
    if prompts is None:
        return
    for name, value in (("a prompt", request.prompt is not None), ("--like", request.like), ("--grid", request.grid)):
        if value:
            raise typer.BadParameter(f"--prompts cannot be combined with {name}; omit one of them", context)
    if output is None or (output.lower().endswith(".png") and not Path(output).is_dir()):
        raise typer.BadParameter("--prompts requires a folder for its pictures, such as --output out/", context)


def _check_folder_mode(context: typer.Context, request: RequestOptions) -> None:
    """Raise BadParameter for options of `generate` that do not work with a folder of input pictures."""
    for name in ("prompts", "like", "grid", "images"):
        if getattr(request, name):
            raise typer.BadParameter(
                f"--image with a folder cannot be combined with --{name}; omit one of them", context
            )
    if request.output is None or (request.output.lower().endswith(".png") and not Path(request.output).is_dir()):
        raise typer.BadParameter(
            "--image with a folder requires a folder for its pictures, such as --output out/", context
        )


def _explain(error: Exception) -> tuple[int, str]:
    """Return the exit code and the message for an error."""
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        text = error.format_message()
        if text.startswith("Usage:"):  # a missing subcommand: print the help
            return error.exit_code, text
        return error.exit_code, f"error: {text}" + (f" (see `{context.command_path} --help`)" if context else "")
    from minisd.io.tensors import CheckpointError
    from minisd.pipeline.memory import is_out_of_memory

    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'the file'}: {error.strerror}"
    if isinstance(error, (ValueError, TypeError)) and not isinstance(error, CheckpointError):
        return 2, f"error: {text}"
    if is_out_of_memory(error):
        reason = (str(error.__cause__ or error) or type(error).__name__).split("\n")[0]
        text = f"out of memory; try a smaller --batch, --width and --height, --dtype float16 or --offload ({reason})"
    elif not isinstance(error, (OSError, ValueError, FloatingPointError)):
        text = f"unexpected {type(error).__name__}: {text}; set MINISD_DEBUG=1 for a traceback"
    return 1, f"error: {text}"


def _ignore(text: str) -> None:
    """Log nothing."""
