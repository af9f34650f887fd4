"""Groups of command-line options, as dataclasses that are expanded in a command's signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minisd.features import distributed
from minisd.features.distributed import local_device
from minisd.features.option_groups import option_groups as option_groups
from minisd.features.presets import PRESETS
from minisd.pipeline.provenance import split_lora
from minisd.pipeline.settings import SETTINGS, Setting

if TYPE_CHECKING:
    from minisd.features.adapters import Weight
    from minisd.pipeline.stable_diffusion import StableDiffusion

MAX_IMAGES = 1_000_000
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")

Model = Annotated[str | None, typer.Option(help="Hub id, folder, .safetensors or .ckpt. [default: tiny]")]
Variant = Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")]
Prediction = Annotated[
    Literal["epsilon", "v_prediction", "sample"] | None,
    typer.Option("--prediction-type", help="Prediction type, required for SD 2 single files."),
]
Vae = Annotated[str | None, typer.Option(help="Autoencoder to use instead of the model's: hub id, folder or file.")]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu. [default: the first available]")]
Precision = Annotated[
    Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="[default: float16 on cuda, else float32]")
]
Output = Annotated[
    str | None, typer.Option("--output", "-o", help="A .png file or a folder. [default: named after the prompt]")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files instead of numbering them.")]


Preset: Any = Annotated[
    Literal[tuple(PRESETS)] | None, typer.Option(help="Named group of settings that trades a little quality for speed.")
]


def existing(help: str, folder: bool = False) -> Any:
    """Define an option for the path of an existing file or, if `folder`, a folder."""
    return typer.Option(help=help, exists=True, dir_okay=folder)


@dataclass(frozen=True)
class RequestOptions:
    """Input and output options of `minisd generate`."""

    prompt: Annotated[str | None, typer.Argument(help="Description of the picture.")] = None
    negative: Annotated[str | None, typer.Option(help="Negative prompt: what to avoid.")] = None
    seed: Annotated[int | None, typer.Option(help="Random seed, for reproducible results. [default: random]")] = None
    images: Annotated[
        int | None,
        typer.Option("--images", "-n", min=1, max=MAX_IMAGES, help="Number of pictures to draw. [default: 1]"),
    ] = None
    prompts: Annotated[Path | None, existing("Draw one picture per line of a .txt or .jsonl file.")] = None
    like: Annotated[Path | None, existing("Redraw this picture from its metadata; other options override it.")] = None
    image: Annotated[Path | None, existing("Picture to start from, scaled and cropped to fit, or a folder.", True)] = (
        None
    )
    mask: Annotated[
        Path | None, existing("Inpainting mask for --image, or a folder of them; white areas are repainted.", True)
    ] = None
    outpaint: Annotated[
        tuple[int, int, int, int] | None,
        typer.Option(help="Extend --image by pixels on the left, right, top and bottom.", metavar="L R T B"),
    ] = None
    preset: Preset = None
    output: Output = None
    overwrite: Overwrite = False
    grid: Annotated[bool, typer.Option("--grid", help="Arrange the pictures in a grid in one file.")] = False
    batch: Annotated[int | None, typer.Option(min=1, help="Number of pictures to draw at a time. [default: 4]")] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the file names.")] = False

    def values(self) -> dict[str, Any]:
        """Return the options that were given, by argument name as in prompts files."""
        names = {"negative_prompt": "negative"} | {
            name: name for name in ("prompt", "seed", "images", "preset", "outpaint")
        }
        values = {name: getattr(self, field) for name, field in names.items()}
        return {name: value for name, value in values.items() if value is not None}


FULL_SIZE = 100_000_000  # weights of a UNet from which on precision matters for speed


@dataclass(frozen=True)
class LoadOptions:
    """Options for loading a model."""

    model: Model = None
    variant: Variant = None
    vae: Vae = None
    prediction_type: Prediction = None
    device: Device = None
    dtype: Precision = None
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep modules in CPU memory while they are not running.")
    ] = False
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA, LoHa, LoKr or DoRA to load, with an optional weight, or with one for the text encoder and one "
            "for the UNet. May be repeated.",
            metavar="FILE[:WEIGHT|:TEXT:UNET]",
        ),
    ] = None
    inversion: Annotated[
        list[str] | None,
        typer.Option(
            "--textual-inversion",
            help="Textual inversion to load, with an optional word to use for it. May be repeated.",
            metavar="FILE[:WORD]",
        ),
    ] = None
    lora_folder: Annotated[
        Path | None,
        typer.Option(help="Folder of the LoRAs that prompts name, as in <lora:name:0.8>.", metavar="FOLDER"),
    ] = None

    def find_device(self) -> Any:
        """Return the selected device or None. Raises BadParameter if it is not available."""
        from minisd.pipeline.memory import usable_device

        name = local_device(self.device)
        try:
            return None if name is None else usable_device(name)
        except ValueError as error:
            raise typer.BadParameter(f"--{error}") from error

    def load_model(self, dtype: str | None = None) -> StableDiffusion:
        """Load the model. `dtype` is the default for the --dtype option."""
        from minisd.features.validate import dtype_of
        from minisd.pipeline.stable_diffusion import StableDiffusion

        device, dtype = self.find_device(), self.dtype or dtype
        names = ("variant", "vae", "prediction_type", "lora_folder")
        more: dict[str, Any] = {name: getattr(self, name) for name in names}
        precision = None if dtype is None else dtype_of(dtype)
        return StableDiffusion.from_pretrained(self.model, device=device, dtype=precision, offload=self.offload, **more)

    def load(
        self,
        dtype: str | None = None,
        lora_weights: Mapping[str, Weight] | None = None,
        log: Callable[[str], None] = distributed.log,
    ) -> StableDiffusion:
        """Load the model with LoRAs and textual inversions, and log the new words, and whether bfloat16 is faster.

        The first two arguments are defaults for missing options.
        """
        from minisd.features.adapters import default_name

        sd = self.load_model(dtype)
        if self.dtype is None and dtype is None and (advice := bfloat16_advice(sd)):
            log(advice)
        for argument in self.lora or []:
            file, weight = split_lora(argument)
            name, before = default_name(Path(file), sd.adapters.loras), set(sd.tokenizer.added)
            sd.load_lora(file, weight=(lora_weights or {}).get(name, 1.0) if weight is None else weight)
            if words := [word for word in sd.tokenizer.added if word not in before]:
                log(f"{file}: the words for it are {', '.join(words)}")
        for argument in self.inversion or []:
            head, _, word = ("", "", "") if Path(argument).exists() else argument.rpartition(":")
            taken = sd.load_textual_inversion(head or argument, word or None)
            log(f"{head or argument}: the word for it is {taken}")
        return sd


def bfloat16_advice(sd: StableDiffusion) -> str:
    """Return a line that recommends bfloat16 if a full-size model is in float32 on a CPU that multiplies in it."""
    import torch

    from minisd.features.fast import capabilities, has_bfloat16

    size = sum(weight.numel() for weight in sd.unet.parameters())
    if sd.device.type != "cpu" or sd.dtype != torch.float32 or size < FULL_SIZE or not has_bfloat16(capabilities()):
        return ""
    return "this CPU computes in bfloat16: --dtype bfloat16 takes about half the memory and half the time"


def _option(setting: Setting) -> Any:
    """Return the annotation of a setting's option."""
    kind = Literal[setting.choices] if setting.choices else setting.kind  # type: ignore[valid-type]
    flags = f"{setting.option}/--no-{setting.option[2:]}" if kind is bool else setting.option
    return Annotated[kind | None, typer.Option(flags, help=setting.help, metavar=setting.metavar)]


# One option per setting.
SettingsOptions: Any = make_dataclass(
    "SettingsOptions",
    [(name, _option(setting), None) for name, setting in SETTINGS.items() if setting.option],
    frozen=True,
)
