"""The types of the arguments that the methods of `StableDiffusion` share, for type checkers and editors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

from PIL import Image
from torch import Tensor

from minisd.guidance import Guidance
from minisd.samplers import Plan, Sampler

Prompt = str | Sequence[str]
ImageInput = Image.Image | Tensor
ImageList = ImageInput | Sequence[Image.Image]
MaskList = ImageInput | Sequence[ImageInput]
PlanFunction = Callable[..., Plan]  # (schedule, n, start=0, …) -> Plan, as in `samplers.py`
Callback = Callable[[int, float, Tensor], Tensor | None]  # (index of the call, t, latents) -> new latents or None
Arrays = Literal["np", "pt", "latent"]


class SettingsArguments(TypedDict, total=False):
    """The fields of `Settings` but `strength`, as keyword arguments; None leaves a setting at its default."""

    num_inference_steps: int | None
    sampler: str | Sampler | PlanFunction | None
    guidance_scale: float | Sequence[float] | None
    spacing: str | None
    karras: bool | None
    sigmas: str | None
    eta: float | None
    guidance_rescale: float | None
    guidance_interval: Sequence[float] | None
    feature_reuse: Sequence[int] | None
    clip_skip: int | None
    width: int | None
    height: int | None
    mask_blur: float | None
    padding_mask_crop: int | None


class Hooks(SettingsArguments, total=False):
    """Those of `denoise`: the settings, and objects of one's own.

    Attributes:
        preset: The name of a preset, see `features.presets`.
        guidance: A `Guidance` or an instance of a subclass, instead of the settings for guidance.
        callback: Called after each call of the UNet with its index, its timestep and the latents (n, 4, h/8, w/8). If
            it returns latents, they replace those of the run. It is not called inside inference mode.
    """

    preset: str | None
    guidance: Guidance | None
    callback: Callback | None


class Options(Hooks, total=False):
    """Those of every method that draws."""

    negative_prompt: Prompt
    seed: int | Sequence[int] | None
    progress: bool | None
