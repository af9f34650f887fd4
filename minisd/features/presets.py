"""Presets: several settings under one name, which trade a little of a picture for time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Settings under one name.

    Args:
        description: What they do, for people.
        settings: By the names of `StableDiffusion.denoise`'s arguments.
    """

    name: str = ""
    description: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """The preset in one line."""
        return f"preset {self.name}: {self.description}"


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "fast": Preset(
            "fast",
            "12 steps of DPM++ 2M with trailing timesteps; every second call of the UNet runs its last 2 layers only",
            MappingProxyType(
                {"num_inference_steps": 12, "sampler": "dpmpp_2m", "spacing": "trailing", "feature_reuse": (2, 2)}
            ),
        )
    }
)


def find_preset(name: str | None) -> Preset:
    """The preset of a name; None has no settings. Raises ValueError, naming the presets, for an unknown one."""
    if name is None:
        return Preset()
    if not isinstance(name, str):
        raise TypeError(f"preset must be a name, one of {', '.join(PRESETS)}; got {type(name).__name__}")
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
