"""Options of `minisd train lora`, `dreambooth`, `inversion` and `full`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer


@dataclass(frozen=True)
class Tuning:
    """How pictures are prepared and their errors weighed.

    Raises ValueError for a value that makes no sense.
    """

    side: Annotated[
        int | None, typer.Option("--resolution", help="Side of the pictures in pixels. [default: the model's]")
    ] = None
    buckets: Annotated[
        bool, typer.Option("--buckets", help="Keep shapes: sizes of about the same area, not squares.")
    ] = False
    crop: Annotated[
        Literal["center", "random"],
        typer.Option(help="What to keep of a picture. Latents of random crops are not cached."),
    ] = "center"
    flip: Annotated[bool, typer.Option("--flip", help="Show half of the pictures mirrored.")] = False
    caption: Annotated[str | None, typer.Option(help="Caption of the pictures that have none.")] = None
    caption_dropout: Annotated[float, typer.Option(help="Share of captions replaced by the empty one.")] = 0.0
    min_snr: Annotated[
        float | None, typer.Option(help="γ of min-SNR weighting, usually 5: less weight to steps of little noise.")
    ] = None
    noise_offset: Annotated[
        float, typer.Option(help="Noise shared by a channel's pixels, such as 0.05: for very dark and bright pictures.")
    ] = 0.0
    class_pictures: Annotated[
        Path | None, typer.Option(help="Prior preservation: folder of pictures of the class, drawn where they lack.")
    ] = None
    class_prompt: Annotated[str | None, typer.Option(help="Their prompt, such as 'a dog'.")] = None
    class_count: Annotated[int, typer.Option(min=1, help="How many of them there are to be.")] = 100
    prior_weight: Annotated[float, typer.Option(help="Weight of their loss.")] = 1.0
    checkpointing: Annotated[
        bool | None, typer.Option(help="Compute activations twice to save most of their memory.")
    ] = None

    def __post_init__(self) -> None:
        from minisd.features.validate import check_float

        check_float("caption_dropout", self.caption_dropout, 0, 1)
        check_float("noise_offset", self.noise_offset, 0, 10)
        check_float("prior_weight", self.prior_weight, 0)
        if self.min_snr is not None and not check_float("min_snr", self.min_snr, 0) > 0:
            raise ValueError("min_snr=0; expected a positive number, usually 5")
        if (self.class_pictures is None) != (self.class_prompt is None):
            raise ValueError("prior preservation takes both class_pictures and class_prompt; give both or neither")


@dataclass(frozen=True)
class LoRAOptions:
    """More about a LoRA: what it updates, and its file.

    alpha: the updates are scaled by alpha / rank. text_factor: of the text encoder's learning rate.
    """

    alpha: Annotated[float | None, typer.Option(help="Scales the updates by alpha / rank. [default: the rank]")] = None
    text_encoder: Annotated[bool, typer.Option("--text-encoder", help="Update the text encoder as well.")] = False
    text_factor: Annotated[float, typer.Option(help="Of its learning rate, in that of the UNet.")] = 1.0
    layout: Annotated[
        Literal["diffusers", "kohya"], typer.Option(help="Of the file; kohya's is read by all web UIs.")
    ] = "diffusers"


@dataclass(frozen=True)
class Running:
    """How long, how fast and how precisely a model is tuned, and what is written when."""

    model: Annotated[str | None, typer.Option(help="Folder, file or hub id. [default: the tiny one]")] = None
    pictures: Annotated[
        Path | None, typer.Option(help="Folder of pictures and captions. [default: a unicorn's, shipped]")
    ] = None
    output: Annotated[Path | None, typer.Option(help="For checkpoints, curves, sheets. [default: runs/COMMAND]")] = None
    steps: Annotated[int | None, typer.Option(help="Length of the whole run, in steps.")] = None
    minutes: Annotated[float | None, typer.Option(help="Stop and save after so many minutes.")] = None
    batch: Annotated[int | None, typer.Option(help="Global batch, over all processes. [default: 8, 1 for SD]")] = None
    accumulate: Annotated[int, typer.Option(help="Pieces in which a batch is computed, to save memory.")] = 1
    lr: Annotated[float | None, typer.Option(help="Highest learning rate. [default: see docs/training.md]")] = None
    schedule: Annotated[
        Literal["plateau", "constant", "linear", "cosine"], typer.Option(help="Of the learning rate.")
    ] = "plateau"
    warmup: Annotated[int, typer.Option(min=0, help="Steps in which the learning rate rises.")] = 20
    optimizer: Annotated[
        Literal["adamw", "adamw8bit", "adafactor", "muon"] | None, typer.Option(help="[default: adamw]")
    ] = None
    weight_decay: Annotated[float, typer.Option(help="Of the optimizer.")] = 0.01
    precision: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="[default: bfloat16 on cuda, else float32]")
    ] = None
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu. [default: the first available]")] = None
    ema: Annotated[float | None, typer.Option(help="Decay of an average of the weights, which is exported.")] = None
    seed: Annotated[int, typer.Option(help="Of the data's order, the noise and the first weights.")] = 0
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --output.")] = False
    save_every: Annotated[int | None, typer.Option(help="Save every so many steps. [default: every 5 minutes]")] = None
    keep: Annotated[bool, typer.Option("--keep", help="Keep what every save exports.")] = False
    sheet_every: Annotated[
        int | None, typer.Option(help="Draw samples every so many steps; 0: never. [default: a tenth of the time]")
    ] = None
    prompt: Annotated[list[str] | None, typer.Option(help="Draw this for the sheet. May be repeated.")] = None
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the losses for TensorBoard too.")] = False
