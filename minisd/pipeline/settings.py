"""How a picture is drawn: the one list of settings.

Python arguments, command-line options, prompts files, the manifest, PNG texts, `--like` and the web page all iterate
over the fields of `Settings`. To add a setting, add a field here and use it where the picture is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args, get_origin

from minisd.features.presets import find_preset

if TYPE_CHECKING:  # imported when needed: the command line reads this list before it imports torch
    from minisd.io.diffusers_folder import Defaults
    from minisd.samplers import Sampler

# The samplers by the names that AUTOMATIC1111's web UI gives them.
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
    }
)
JSON_KINDS = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Setting:
    """What is known of one setting: how it is called, read and written.

    Args:
        kind: `int`, `float`, `bool`, `str`, or a pair such as `tuple[int, int]`.
        help: One line for `--help`.
        option: On the command line, such as "--steps". "" if it is no option.
        png: In the `parameters` text of a PNG, such as "Steps". "" if it is not there under a name of its own.
        label: On the web page. "" if it is not shown there.
        in_file: Whether a line of a prompts file may have it.
        choices: All valid values, where there are few.
        metavar: What `--help` calls the value.
    """

    kind: Any
    help: str = ""
    option: str = ""
    png: str = ""
    label: str = ""
    in_file: bool = True
    choices: tuple[str, ...] = ()
    metavar: str | None = None

    def from_json(self, name: str, value: Any) -> Any:
        """A value of a JSON file, checked for its type. Raises ValueError, naming what was expected."""
        pair = get_origin(self.kind) is tuple
        if pair and isinstance(value, list) and len(value) == 2 and all(type(x) in (int, float) for x in value):
            return tuple(value)
        numbers = (int, float) if self.kind is float else (self.kind,)
        if not pair and type(value) in numbers:  # not isinstance: True is no number here
            return value
        expected = "a list of two numbers" if pair else JSON_KINDS[self.kind]
        raise ValueError(f"{name} is {json.dumps(value)}; expected {expected}")

    def from_text(self, text: str) -> Any:
        """A value of a PNG's `parameters`. Raises ValueError if it cannot be read."""
        if get_origin(self.kind) is tuple:
            first, second = text.split()
            kind = get_args(self.kind)[0]
            return kind(first), kind(second)
        return self.kind(text)

    def to_text(self, value: Any) -> str:
        """A value as a PNG's `parameters` have it, as short as possible without changing it."""
        if isinstance(value, tuple):
            return " ".join(map(self.to_text, value))
        return format_number(value) if isinstance(value, float) else str(value)


def setting(kind: Any, help: str, default: Any = ..., **more: Any) -> Any:
    """A field of `Settings`; without a default the model decides."""
    metadata = {"setting": Setting(kind, help, **more)}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """How a picture is drawn, but for its prompts, its seed, and the picture it starts from.

    The names are those of `StableDiffusion.denoise`'s arguments. Values are checked where they are used.
    """

    num_inference_steps: int = setting(int, "Number of sampling steps.", option="--steps", png="Steps", label="Steps")
    sampler: str = setting(
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
    karras: bool = setting(bool, "Noise levels of Karras et al. (euler, heun, dpmpp_2m).", False, option="--karras")
    eta: float = setting(
        float, "Share of fresh noise, 0 to 1 (ddim). [default: 0]", 0.0, option="--eta", png="Eta", label="Eta"
    )
    guidance_rescale: float = setting(
        float,
        "Reduce the contrast of strong guidance, 0 (off) to 1. [default: 0]",
        0.0,
        option="--rescale",
        png="Guidance rescale",
    )
    guidance_interval: tuple[float, float] | None = setting(
        tuple[float, float],
        "Part of the run in which guidance acts. [default: 0 1]",
        None,
        option="--guidance-interval",
        png="Guidance interval",
        metavar="BEGIN END",
    )
    feature_reuse: tuple[int, int] | None = setting(
        tuple[int, int],
        "DeepCache: run the whole UNet at every N-th call, and only its last L layers at the others.",
        None,
        option="--reuse",
        png="Feature reuse",
        metavar="N L",
    )
    clip_skip: int = setting(
        int,
        "Layer of the text encoder to use, counted from the last. [default: 1]",
        1,
        option="--clip-skip",
        png="Clip skip",
    )
    width: int | None = setting(int, "In pixels, a multiple of 8. [default: the model's]", None, option="--width")
    height: int | None = setting(int, "In pixels, a multiple of 8. [default: the model's]", None, option="--height")
    strength: float | None = setting(
        float,
        "How much of --image to redraw, above 0 to 1. [default: 0.8, with --mask 1]",
        None,
        option="--strength",
        png="Denoising strength",
        in_file=False,
    )

    @classmethod
    def choose(cls, changes: Mapping[str, Any], defaults: Defaults | Settings) -> Settings:
        """Settings from the defaults, then from the preset that `changes["preset"]` names, then from the other changes.

        A named sampler comes with its own spacing and noise levels, not with those of the default or preset sampler.

        Args:
            changes: Values by the names of the fields, and `preset`; None changes nothing. `sampler` is a name or a
                `Sampler`.
            defaults: The model's, or the settings of another picture.

        Raises:
            TypeError: If a name is not a setting, or a value has the wrong type.
            ValueError: If the preset is unknown, or sampler, spacing and noise levels do not go together.
        """
        for name in changes:
            if name not in SETTINGS and name != "preset":
                raise TypeError(f"{name!r} is not a setting; expected one of {', '.join(SETTINGS)}, preset")
        own = {name: getattr(defaults, name, None) for name in SETTINGS}
        preset, values = changes.get("preset"), dict[str, Any]()
        for layer in (own, {} if preset is None else find_preset(preset).settings, changes):
            values = _merge(values, {name: value for name, value in layer.items() if name != "preset"})
        settings = cls(**values)
        _ = settings.sampler_object  # raises for what does not go together
        return settings

    @property
    def sampler_object(self) -> Sampler:
        """The sampler with its spacing and noise levels. Raises ValueError for a combination that does not exist."""
        from minisd.samplers import Sampler

        if not isinstance(self.karras, bool):
            raise TypeError(f"karras={self.karras!r}; expected True or False")
        return Sampler(self.sampler, **{name: getattr(self, name) for name in SAMPLER_PARTS})

    def arguments(self) -> dict[str, Any]:
        """The settings as arguments of `StableDiffusion.denoise`; what the model decides is left out."""
        values = {name: value for name, value in vars(self).items() if value is not None and name not in SAMPLER_PARTS}
        return values | {"sampler": self.sampler_object}

    def record(self) -> dict[str, Any]:
        """All settings as JSON has them: 4 and 4.0 are the same guidance scale."""
        kinds = {name: known.kind for name, known in SETTINGS.items()}
        return {name: float(v) if kinds[name] is float and type(v) is int else v for name, v in vars(self).items()}

    def texts(self) -> dict[str, str]:
        """The changed settings as a PNG's `parameters` have them, by their names there."""
        values = self.changed() | {"sampler": sampler_label(self.sampler, self.karras)}
        return {SETTINGS[name].png: SETTINGS[name].to_text(v) for name, v in values.items() if SETTINGS[name].png}

    def changed(self) -> dict[str, Any]:
        """The values that differ from the fields' own defaults; those without a default are always there."""
        return {item.name: value for item in fields(self) if (value := getattr(self, item.name)) != item.default}


SETTINGS: Mapping[str, Setting] = MappingProxyType({item.name: item.metadata["setting"] for item in fields(Settings)})
SAMPLER_PARTS = ("spacing", "karras", "eta")  # of a `Sampler`, beside its name


def _merge(values: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Put the values of a layer that are not None over those below it."""
    from minisd.samplers import Sampler

    changes = {name: value for name, value in layer.items() if value is not None}
    sampler = changes.get("sampler")
    if sampler is not None and not isinstance(sampler, (str, Sampler)):
        raise TypeError(f"sampler must be a name or a Sampler; got {type(sampler).__name__}")
    if isinstance(sampler, Sampler):
        parts = {name: getattr(sampler, name) for name in SAMPLER_PARTS}
        changes = parts | changes | {"sampler": sampler.name}
    below = {name: value for name, value in values.items() if sampler is None or name not in SAMPLER_PARTS}
    return below | {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}


def sampler_label(name: str, karras: bool = False) -> str:
    """The web UI's name of a sampler: "dpmpp_2m" with the noise levels of Karras et al. is "DPM++ 2M Karras"."""
    return SAMPLER_LABELS[name] + (" Karras" if karras else "")


def format_number(value: float) -> str:
    """A number as short as it can be written without changing it: 4, 7.5, 0.30000000000000004."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))
