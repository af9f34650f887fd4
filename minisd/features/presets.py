"""Presets: named groups of settings that trade a little image quality for speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A named group of settings.

    Args:
        description: A one-line description.
        settings: Keyword arguments for `StableDiffusion.denoise`.
    """

    name: str = ""
    description: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def settings_for(self, sampler: str | None) -> Mapping[str, Any]:
        """Return the settings for a model whose own sampler has this name: with the same one, its guidance stays."""
        same = sampler is not None and sampler == self.settings.get("sampler")
        return {name: value for name, value in self.settings.items() if name != "guidance_scale" or not same}

    def describe(self) -> str:
        """Return a one-line description."""
        return f"preset {self.name}: {self.description}"


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "fast": Preset(
            "fast",
            "12 steps of DPM++ 2M with trailing timesteps; every second call of the UNet runs its last 2 layers only",
            MappingProxyType(
                {"num_inference_steps": 12, "sampler": "dpmpp_2m", "spacing": "trailing", "feature_reuse": (2, 2)}
            ),
        ),
        "turbo": Preset(
            "turbo",
            "4 steps of LCM without guidance, for a model distilled for that, or with an LCM-LoRA",
            MappingProxyType({"num_inference_steps": 4, "sampler": "lcm", "guidance_scale": 1.0}),
        ),
    }
)


def find_preset(name: str | None) -> Preset:
    """Return a preset by name, or an empty one for None. Raises ValueError for an unknown name."""
    if name is None:
        return Preset()
    if not isinstance(name, str):
        raise TypeError(f"preset must be a name, one of {', '.join(PRESETS)}, got {type(name).__name__}")
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
