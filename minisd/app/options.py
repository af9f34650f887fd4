"""Groups of command-line options, as dataclasses that are expanded in a command's signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from minisd.app.provenance import split_lora
from minisd.features.distributed import local_device
from minisd.features.presets import PRESETS
from minisd.pipeline.settings import SETTINGS, Setting

if TYPE_CHECKING:
    from minisd.pipeline.stable_diffusion import StableDiffusion

MAX_IMAGES = 1_000_000

Model = Annotated[str | None, typer.Option(help="Hub id, folder, .safetensors or .ckpt. [default: tiny]")]
Variant = Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")]
Prediction = Annotated[
    Literal["epsilon", "v_prediction", "sample"] | None,
    typer.Option("--prediction-type", help="Prediction type, required for SD 2 single files."),
]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu. [default: the first available]")]
Precision = Annotated[
    Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="[default: float16 on cuda, else float32]")
]
Output = Annotated[
    str | None, typer.Option("--output", "-o", help="A .png file or a folder. [default: named after the prompt]")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files instead of numbering them.")]


def existing(help: str) -> Any:
    """Define an option for the path of an existing file."""
    return typer.Option(help=help, exists=True, dir_okay=False)


LoraFolder = Annotated[
    Path | None, typer.Option(help="Folder of the LoRAs that prompts name, as in <lora:name:0.8>.", metavar="FOLDER")
]


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
    image: Annotated[Path | None, existing("Picture to start from, scaled and cropped to fit.")] = None
    mask: Annotated[Path | None, existing("Inpainting mask for --image; white areas are repainted.")] = None
    outpaint: Annotated[
        tuple[int, int, int, int] | None,
        typer.Option(help="Extend --image by pixels on the left, right, top and bottom.", metavar="L R T B"),
    ] = None
    preset: Annotated[
        Literal[tuple(PRESETS)] | None,  # type: ignore[valid-type]
        typer.Option(help="Named group of settings that trades a little quality for speed."),
    ] = None
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


@dataclass(frozen=True)
class LoadOptions:
    """Options for loading a model."""

    model: Model = None
    variant: Variant = None
    prediction_type: Prediction = None
    device: Device = None
    dtype: Precision = None
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep modules in CPU memory while they are not running.")
    ] = False
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA to load, with an optional weight. May be repeated.", metavar="FILE[:WEIGHT]"),
    ] = None
    inversion: Annotated[
        list[Path] | None, typer.Option("--textual-inversion", help="File to load. May be repeated.", metavar="FILE")
    ] = None

    lora_folder: LoraFolder = None

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
        more: dict[str, Any] = {
            "variant": self.variant,
            "prediction_type": self.prediction_type,
            "lora_folder": self.lora_folder,
        }
        precision = None if dtype is None else dtype_of(dtype)
        return StableDiffusion.from_pretrained(self.model, device=device, dtype=precision, offload=self.offload, **more)

    def load(self, dtype: str | None = None, lora_weights: Mapping[str, float] | None = None) -> StableDiffusion:
        """Load the model with LoRAs and textual inversions. The arguments are defaults for missing options."""
        sd = self.load_model(dtype)
        for argument in self.lora or []:
            file, weight = split_lora(argument)
            usual = (lora_weights or {}).get(Path(file).stem, 1.0)
            sd.load_lora(file, weight=usual if weight is None else weight)
        for path in self.inversion or []:
            sd.load_textual_inversion(path)
        return sd


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


def option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command to replace its dataclass parameters by their fields, as options for typer."""
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if not is_dataclass(parameter.annotation):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = parameter.annotation
        hints = get_type_hints(parameter.annotation, include_extras=True)
        for item in fields(parameter.annotation):
            parameters.append(
                inspect.Parameter(
                    item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=hints[item.name]
                )
            )

    @wraps(command)
    def flat(**values: Any) -> None:
        made = {
            name: group(**{item.name: values.pop(item.name) for item in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **made)

    flat.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del flat.__wrapped__  # type: ignore[attr-defined]  # typer would read its signature
    return flat
