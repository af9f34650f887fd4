"""Generation settings, defined in one place.

Python arguments, command-line options, prompts files, the manifest, PNG metadata, `--like` and the web page all iterate
over the fields of `Settings`. To add a setting, add a field here and use it in the pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args, get_origin

from minisd.features.presets import find_preset

if TYPE_CHECKING:  # the command line reads the settings before it imports torch
    from minisd.features.more_samplers import Sampler
    from minisd.io.diffusers_folder import Defaults
    from minisd.pipeline.arguments import PlanFunction

# Sampler names in AUTOMATIC1111's web UI.
SAMPLER_LABELS: Mapping[str, str] = MappingProxyType(
    {
        "ddpm": "DDPM",
        "ddim": "DDIM",
        "pndm": "PLMS",
        "euler": "Euler",
        "euler_a": "Euler a",
        "heun": "Heun",
        "dpmpp_2m": "DPM++ 2M",
        "lcm": "LCM",
        "dpmpp_2m_sde": "DPM++ 2M SDE",
        "dpmpp_sde": "DPM++ SDE",
        "unipc": "UniPC",
        "deis": "DEIS",
    }
)
JSON_KINDS = {str: "a string", bool: "true or false", int: "an integer", float: "a number"}


@dataclass(frozen=True)
class Setting:
    """The type and the names of one setting, with its conversions.

    Args:
        kind: The type: `int`, `float`, `bool`, `str`, or a pair such as `tuple[int, int]`.
        help: The help text for the command line.
        option: The command-line option, such as "--steps", or "" for none.
        png: The key in the `parameters` text of a PNG, such as "Steps", or "" for none.
        label: The label on the web page, or "" to hide it.
        choices: The valid values of an enumeration.
        metavar: The placeholder for the value in `--help`.
    """

    kind: Any
    help: str = ""
    option: str = ""
    png: str = ""
    label: str = ""
    choices: tuple[str, ...] = ()
    metavar: str | None = None

    def from_json(self, name: str, value: Any) -> Any:
        """Convert a JSON value. Raises ValueError if it has the wrong type."""
        pair = get_origin(self.kind) is tuple
        if pair and isinstance(value, list) and len(value) == 2 and all(type(x) in (int, float) for x in value):
            return tuple(value)
        numbers = (int, float) if self.kind is float else (self.kind,)
        if not pair and type(value) in numbers:  # not isinstance, which accepts bool as int
            return value
        expected = "a list of two numbers" if pair else JSON_KINDS[self.kind]
        raise ValueError(f"{name} is {json.dumps(value)}; expected {expected}")

    def from_text(self, text: str) -> Any:
        """Parse a value from a PNG's `parameters`. Raises ValueError if it is malformed."""
        if get_origin(self.kind) is tuple:
            first, second = text.split()
            kind = get_args(self.kind)[0]
            return kind(first), kind(second)
        return self.kind(text)

    def to_text(self, value: Any) -> str:
        """Format a value for a PNG's `parameters`, as short as possible without loss of precision."""
        if isinstance(value, tuple):
            return " ".join(map(self.to_text, value))
        return format_number(value) if isinstance(value, float) else str(value)


def setting(kind: Any, help: str, default: Any = ..., **more: Any) -> Any:
    """Define a field of `Settings`. Fields without a default are set by the model's defaults."""
    metadata = {"setting": Setting(kind, help, **more)}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """All generation settings other than prompts, seed and input image.

    Field names match the arguments of `StableDiffusion.denoise`, which also validates the values.
    """

    num_inference_steps: int = setting(int, "Number of sampling steps.", option="--steps", png="Steps", label="Steps")
    sampler: str | PlanFunction = setting(
        str, "Sampling method.", option="--sampler", png="Sampler", label="Sampler", choices=tuple(SAMPLER_LABELS)
    )
    guidance_scale: float | tuple[float, ...] = setting(
        float,
        "How strongly to follow the prompt; 1 turns guidance off.",
        option="--guidance",
        png="CFG scale",
        label="Guidance",
    )
    spacing: str | None = setting(
        str,
        "Spacing of the timesteps. [default: the model's]",
        None,
        option="--spacing",
        png="Timestep spacing",
        choices=("leading", "trailing", "linspace"),
    )
    karras: bool = setting(
        bool, "Use Karras noise levels (not for ddpm, ddim, pndm, euler_a, lcm).", False, option="--karras"
    )
    sigmas: str | None = setting(
        str,
        "Other noise levels instead, for the same samplers.",
        None,
        option="--sigmas",
        png="Sigmas",
        choices=("exponential", "beta"),
    )
    eta: float | None = setting(
        float, "Stochasticity of ddim, 0 to 1. [default: 0]", None, option="--eta", png="Eta", label="Eta"
    )
    guidance_rescale: float = setting(
        float,
        "Guidance rescale factor, 0 (off) to 1; reduces overexposure. [default: 0]",
        0.0,
        option="--rescale",
        png="Guidance rescale",
    )
    guidance_interval: tuple[float, float] | None = setting(
        tuple[float, float],
        "Interval of the run in which guidance is applied. [default: 0 1]",
        None,
        option="--guidance-interval",
        png="Guidance interval",
        metavar="BEGIN END",
    )
    feature_reuse: tuple[int, int] | None = setting(
        tuple[int, int],
        "DeepCache: run the full UNet every N-th call, and only its last L layers otherwise.",
        None,
        option="--reuse",
        png="Feature reuse",
        metavar="N L",
    )
    clip_skip: int = setting(
        int, "Text encoder layer to use, counted from the last. [default: 1]", 1, option="--clip-skip", png="Clip skip"
    )
    width: int | None = setting(int, "Width in pixels, a multiple of 8. [default: native]", None, option="--width")
    height: int | None = setting(int, "Height in pixels, a multiple of 8. [default: native]", None, option="--height")
    strength: float | None = setting(
        float,
        "Amount of change to --image, from above 0 to 1. [default: 0.8, or 1 with --mask]",
        None,
        option="--strength",
        png="Denoising strength",
    )
    mask_blur: float | None = setting(
        float, "Blur of the mask's edges, in pixels. [default: 0]", None, option="--mask-blur", png="Mask blur"
    )
    padding_mask_crop: int | None = setting(
        int,
        "Draw only the masked area of --image, with so many pixels around it, at full size.",
        None,
        option="--only-masked",
        png="Masked area padding",
        metavar="PADDING",
    )

    @classmethod
    def choose(cls, changes: Mapping[str, Any], defaults: Defaults | Settings) -> Settings:
        """Build settings from the defaults, then the preset `changes["preset"]`, then the other changes.

        Changing the sampler also resets its spacing, noise levels and eta. A preset with the sampler of the defaults
        leaves their guidance.

        Args:
            changes: Values by field name, and optionally `preset`. None leaves a setting unchanged. `sampler` is a
                name, a `Sampler`, or a function that returns a `Plan`.
            defaults: The defaults of the model, or the settings of another image.

        Raises:
            TypeError: If a name is not a setting, or a value has the wrong type.
            ValueError: If the preset is unknown, or the sampler does not support its options.
        """
        for name in changes:
            if name not in SETTINGS and name != "preset":
                raise TypeError(f"{name!r} is not a setting; expected one of {', '.join(SETTINGS)}, preset")
        own = {name: getattr(defaults, name, None) for name in SETTINGS}
        preset, values = changes.get("preset"), dict[str, Any]()
        sampler = getattr(own["sampler"], "name", own["sampler"])
        for layer in (own, {} if preset is None else find_preset(preset).settings_for(sampler), changes):
            values = _merge(values, {name: value for name, value in layer.items() if name != "preset"})
        settings = cls(**values)
        _ = settings.sampler_object  # raises for incompatible options
        return settings

    @property
    def sampler_object(self) -> Sampler:
        """The sampler with its options. Raises ValueError if it does not support them."""
        from minisd.features.more_samplers import Sampler, own_sampler

        if not isinstance(self.karras, bool):
            raise TypeError(f"karras={self.karras!r}; expected True or False")
        options = {name: getattr(self, name) for name in SAMPLER_PARTS}
        if isinstance(self.sampler, str):
            return Sampler(self.sampler, **options)
        return own_sampler(self.sampler, **options)

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments for `StableDiffusion.denoise`, without the settings that are None."""
        values = {name: value for name, value in vars(self).items() if value is not None and name not in SAMPLER_PARTS}
        return values | {"sampler": self.sampler_object}

    def record(self) -> dict[str, Any]:
        """Return all settings for JSON, with integers converted to float for float settings."""
        kinds = {name: known.kind for name, known in SETTINGS.items()}
        return {name: float(v) if kinds[name] is float and type(v) is int else v for name, v in vars(self).items()}

    def texts(self) -> dict[str, str]:
        """Return the non-default settings as formatted for a PNG's `parameters`, by their keys there."""
        values = self.changed() | {"sampler": sampler_label(self.sampler, self.karras)}
        return {SETTINGS[name].png: SETTINGS[name].to_text(v) for name, v in values.items() if SETTINGS[name].png}

    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from the field defaults, and those that have none."""
        return {item.name: value for item in fields(self) if (value := getattr(self, item.name)) != item.default}


SETTINGS: Mapping[str, Setting] = MappingProxyType({item.name: item.metadata["setting"] for item in fields(Settings)})
SAMPLER_PARTS = ("spacing", "karras", "sigmas", "eta")  # the options of a `Sampler`


def _merge(values: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Override values by those of a layer that are not None."""
    from minisd.samplers import Sampler

    changes = {name: value for name, value in layer.items() if value is not None}
    sampler = changes.get("sampler")
    if sampler is not None and not isinstance(sampler, (str, Sampler)) and not callable(sampler):
        raise TypeError(f"sampler must be a name, a Sampler or a function, got {type(sampler).__name__}")
    if isinstance(sampler, Sampler):
        parts = {name: getattr(sampler, name, None) for name in SAMPLER_PARTS}
        changes = parts | changes | {"sampler": sampler.name}
    below = {name: value for name, value in values.items() if sampler is None or name not in SAMPLER_PARTS}
    return below | {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}


def sampler_label(sampler: str | PlanFunction, karras: bool = False) -> str:
    """Return a sampler's name in the web UI, such as "DPM++ 2M Karras" for "dpmpp_2m" with `karras`."""
    name = SAMPLER_LABELS[sampler] if isinstance(sampler, str) else f"{sampler.__name__} (own)"
    return name + (" Karras" if karras else "")


def format_number(value: float) -> str:
    """Format a number as short as possible without loss of precision: 4, 7.5, 0.30000000000000004."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))
