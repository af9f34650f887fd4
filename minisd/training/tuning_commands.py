"""`minisd train lora`, `dreambooth`, `inversion` and `full`: commands that tune a finished model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minisd.features.distributed import local_device, process_group, rank, show
from minisd.training.sitting import check_new, run, told
from minisd.training.tuning_options import LoRAOptions, Running, Tuning

if TYPE_CHECKING:
    import torch

    from minisd.pipeline.stable_diffusion import StableDiffusion
    from minisd.training.adapting import Adapting

LARGE = 400  # pixels along the native side of a model from which the learning rates of published models apply
# Learning rates for models trained here, and for published ones; the latter are those of diffusers' examples.
RATES = {"lora": (1e-3, 1e-4), "inversion": (5e-3, 5e-4), "dreambooth": (1e-4, 5e-6), "full": (1e-4, 1e-5)}
Rank = Annotated[int, typer.Option(min=1, help="Of the updates: more can hold more, in a larger file.")]
TextEncoder = Annotated[bool, typer.Option("--text-encoder", help="Train the text encoder as well.")]
TextFactor = Annotated[float, typer.Option(help="Of its learning rate, in that of the UNet.")]


def lora(
    running: Running,
    tuning: Tuning,
    options: LoRAOptions,
    rank: Rank = 8,
    layers: Annotated[Literal["attention", "all"], typer.Option(help="Which layers of the UNet are updated.")] = "all",
) -> None:
    """Teach a model a thing or a style from a few pictures: a LoRA, for `minisd generate --lora`."""

    def make(sd: StableDiffusion, pictures: Path, tuning: Tuning) -> Adapting:
        from minisd.training.adapting import LoRATask

        return LoRATask(sd, pictures, rank, layers, running.seed, running.prompt or (), options, tuning)

    tune("lora", make, running, tuning)


def inversion(
    running: Running,
    tuning: Tuning,
    token: Annotated[str, typer.Option(help="The new word.")] = "<unicorn>",
    word: Annotated[str, typer.Option(help="The word of the captions in whose place it stands.")] = "unicorn",
    initial: Annotated[str, typer.Option(help="The word, known to the model, from whose vector it begins.")] = "horse",
    vectors: Annotated[int, typer.Option(min=1, help="How many vectors the word has.")] = 4,
) -> None:
    """Teach a model a word from a few pictures: a textual inversion, for `minisd generate --textual-inversion`."""

    def make(sd: StableDiffusion, pictures: Path, tuning: Tuning) -> Adapting:
        from minisd.training.adapting import InversionTask

        names = (token, word, initial, vectors)
        return InversionTask(sd, pictures, *names, running.seed, running.prompt or (), tuning)

    tune("inversion", make, running, tuning)


def dreambooth(
    running: Running,
    tuning: Tuning,
    text_encoder: TextEncoder = False,
    text_factor: TextFactor = 1.0,
) -> None:
    """Train a whole model further on a few pictures of one thing, with --caption such as "a sks dog".

    --class-pictures and --class-prompt keep it from forgetting other dogs.
    """
    if tuning.caption is None:
        raise typer.BadParameter('dreambooth needs a --caption for the pictures, such as "a sks dog"')
    tune("dreambooth", _full(running, text_encoder, text_factor), running, tuning)


def full(
    running: Running,
    tuning: Tuning,
    text_encoder: TextEncoder = False,
    text_factor: TextFactor = 1.0,
) -> None:
    """Train a whole model further on captioned pictures."""
    tune("full", _full(running, text_encoder, text_factor), running, tuning)


def _full(running: Running, text_encoder: bool, text_factor: float) -> Callable[..., Any]:
    def make(sd: StableDiffusion, pictures: Path, tuning: Tuning) -> Adapting:
        from minisd.training.fine_tuning import FullTask

        return FullTask(sd, pictures, text_encoder, running.seed, running.prompt or (), tuning, text_factor)

    return make


def tune(kind: str, make: Callable[..., Any], running: Running, tuning: Tuning) -> None:
    """Load the model, build the task, train, and say where the result is."""
    import torch

    from minisd.features.validate import dtype_of
    from minisd.training.adapting import EXAMPLES

    output = running.output or Path("runs") / kind
    check_new(output, running.resume)
    with told(), _joined(running.device):
        sd = base(running.model, running.device)
        precision = running.precision or ("bfloat16" if sd.device.type == "cuda" else "float32")
        large = sd.unet.config.sample_size * sd.downscale >= LARGE
        choices = _choices(kind, running, large, precision)
        choices["optimizer"] = running.optimizer or default_optimizer(kind, sd.device)
        tuning = replace(tuning, checkpointing=large if tuning.checkpointing is None else tuning.checkpointing)
        task = make(sd, running.pictures or EXAMPLES, tuning)
        # on a CPU mixed precision computes with weights in float32
        task.rest(dtype_of(precision) if sd.device.type != "cpu" else torch.float32)
        if kind == "lora":
            task.facts = _facts(choices, precision)
        run(task, output, **choices)
    for path in sorted((output / "export").glob("*")) if rank() == 0 else ():
        show(path)


@contextmanager
def _joined(device: str | None) -> Iterator[None]:
    import torch

    place = local_device(device)
    if place is None and torch.cuda.is_available():
        place = "cuda"
    with process_group(None if place is None else torch.device(place)):
        yield


def base(model: str | None, device: str | None) -> StableDiffusion:
    """Load a model in float32; under torchrun on the process's own GPU."""
    import torch

    from minisd.pipeline.stable_diffusion import StableDiffusion

    return StableDiffusion.from_pretrained(model, device=local_device(device), dtype=torch.float32)


def _choices(kind: str, running: Running, large: bool, precision: str) -> dict[str, Any]:
    """Return the arguments of `loop.Options`."""
    names = ["steps", "minutes", "accumulate", "schedule", "warmup", "weight_decay", "seed", "resume"]
    names += ["save_every", "keep", "sheet_every", "tensorboard"]
    small_average = (0.99,) if kind in ("lora", "inversion") else ()
    return {name: getattr(running, name) for name in names} | {
        "batch": (1 if large else 8) if running.batch is None else running.batch,
        "lr": RATES[kind][large] if running.lr is None else running.lr,
        "decays": small_average if running.ema is None else (running.ema,),
        "bfloat16": precision == "bfloat16",
        "float16": precision == "float16",
    }


def default_optimizer(kind: str, device: torch.device) -> str:
    """Return "adamw", or "adafactor" where a GPU of less than 18 GB is to hold a whole model in training."""
    import torch

    if kind not in ("full", "dreambooth") or device.type != "cuda":
        return "adamw"
    return "adafactor" if torch.cuda.get_device_properties(device).total_memory < 18e9 else "adamw"


def _facts(choices: dict[str, Any], precision: str) -> dict[str, object]:
    """Return what kohya's trainer records about a run."""
    return {
        "ss_learning_rate": choices["lr"],
        "ss_lr_scheduler": choices["schedule"],
        "ss_lr_warmup_steps": choices["warmup"],
        "ss_optimizer": choices["optimizer"],
        "ss_max_train_steps": "None" if choices["steps"] is None else choices["steps"],
        "ss_total_batch_size": choices["batch"],
        "ss_gradient_accumulation_steps": choices["accumulate"],
        "ss_mixed_precision": {"bfloat16": "bf16", "float16": "fp16"}.get(precision, "no"),
    }
