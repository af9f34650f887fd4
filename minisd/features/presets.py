"""Presets: several settings under one name, which trade a little of a picture for its time. What is asked for wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from minisd.samplers import Sampler


@dataclass(frozen=True)
class Preset:
    """Settings by the names of `StableDiffusion.denoise`'s arguments; None leaves one to the model's defaults."""

    name: str = ""
    num_inference_steps: int | None = None
    sampler: Sampler | None = None
    guidance_interval: tuple[float, float] | None = None
    feature_reuse: tuple[int, int] | None = None

    def settings(self) -> dict[str, Any]:
        """What the preset sets, by the names of a prompts file's keys: a sampler is a name, a spacing and Karras."""
        found: dict[str, Any] = {name: value for name, value in vars(self).items() if value is not None}
        del found["name"]
        if self.sampler is not None:
            found |= {"sampler": self.sampler.name, "spacing": self.sampler.spacing, "karras": self.sampler.karras}
        return found

    def describe(self) -> str:
        """What the preset changes, in one line."""
        said = []
        if self.num_inference_steps is not None:
            said.append(f"{self.num_inference_steps} steps")
        if self.sampler is not None:
            levels = "Karras levels" if self.sampler.karras else f"{self.sampler.spacing or 'its own'} timesteps"
            said.append(f"sampler {self.sampler.name} with {levels}")
        if self.guidance_interval is not None:
            begin, end = (f"{share:.0%}" for share in self.guidance_interval)
            said.append(f"guidance from {begin} to {end} of the run")
        if self.feature_reuse is not None:
            every, layers = self.feature_reuse
            last = "last layer" if layers == 1 else f"last {layers} layers"
            said.append(f"1 call of the UNet in {every} whole, the others its {last} only")
        return f"preset {self.name}: {', '.join(said)}"


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "fast": Preset(
            "fast",
            num_inference_steps=12,
            sampler=Sampler("dpmpp_2m", spacing="trailing"),
            feature_reuse=(2, 2),
        ),
    }
)


def find(name: str | None) -> Preset:
    """The preset of a name; None has no settings. Raises ValueError, naming the presets, for an unknown one."""
    if name is None:
        return Preset()
    if not isinstance(name, str):
        raise TypeError(f"preset must be a name, one of {', '.join(PRESETS)}; got {type(name).__name__}")
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not known; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def fill(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the keys of a prompts file, with the settings of their preset where they are missing or None.

    A sampler that is named comes without the preset's spacing and noise levels.
    """
    settings = find(options.get("preset")).settings()
    if options.get("sampler") is not None:
        settings = {name: value for name, value in settings.items() if name not in ("sampler", "spacing", "karras")}
    return {**options, **{name: value for name, value in settings.items() if options.get(name) is None}}


def pick(*values: Any) -> Any:
    """The first of the values that is not None."""
    return next((value for value in values if value is not None), None)
