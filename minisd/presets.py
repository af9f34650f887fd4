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


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        one.name: one
        for one in (
            Preset(
                "fast",
                num_inference_steps=12,
                sampler=Sampler("dpmpp_2m", karras=True),
                guidance_interval=(0.0, 0.8),
                feature_reuse=(2, 1),
            ),
        )
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


def pick(*values: Any) -> Any:
    """The first of the values that is not None."""
    return next((value for value in values if value is not None), None)
