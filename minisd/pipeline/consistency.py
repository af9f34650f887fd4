"""Latent consistency models: whether a model is one, and what it does not support."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisd.features.lcm_unet import LCMUNet
from minisd.guidance import Guidance
from minisd.io.tensors import CheckpointError, read_metadata
from minisd.lora import LoRA

if TYPE_CHECKING:
    from minisd.pipeline.settings import Settings
    from minisd.pipeline.stable_diffusion import StableDiffusion

# What models and LoRAs for the lcm sampler call themselves: LCM, and the later distillations that run on it.
NAMES = re.compile(r"lcm|tcd|consistency|hyper-?_?sd", re.IGNORECASE)
STATED = ("ss_output_name", "ss_training_comment", "modelspec.title", "modelspec.description")  # in kohya's metadata


def check_consistency(sd: StableDiffusion, settings: Settings, negatives: list[str], loras: Mapping[str, Any]) -> None:
    """Check settings against what latent consistency models support.

    Warns if the sampler is lcm and nothing says that the model or a LoRA was distilled for it.

    Args:
        negatives: The negative prompts.
        loras: The LoRAs that the prompts name, as in `Request.loras`.

    Raises ValueError for settings of guidance by two calls if the UNet takes the guidance scale as an input.
    """
    if isinstance(sd.unet, LCMUNet):
        for name in ("guidance_rescale", "guidance_interval"):
            if getattr(settings, name):
                raise ValueError(f"{name} has no meaning for this model, whose UNet takes the guidance scale; omit it")
        if any(negatives):
            warnings.warn(
                "this model's UNet takes the guidance scale, so negative prompts have no effect", stacklevel=2
            )
    elif settings.sampler == "lcm" and not is_distilled(sd, loras):
        warnings.warn(
            "the sampler lcm (preset turbo) needs a model distilled for it, and neither the model's scheduler or name "
            "nor a LoRA says that it is: expect a blur. Pass an LCM-LoRA to --lora or load_lora, such as "
            "pytorch_lora_weights.safetensors from huggingface.co/latent-consistency/lcm-lora-sdv1-5, or load an LCM "
            "model, such as SimianLuo/LCM_Dreamshaper_v7",
            stacklevel=2,
        )


def check_own_guidance(sd: StableDiffusion, guidance: Guidance) -> None:
    """Raise ValueError for a `Guidance` of one's own if the UNet takes the guidance scale as an input."""
    if isinstance(sd.unet, LCMUNet) and type(guidance) is not Guidance:
        raise ValueError(f"{type(guidance).__name__} has no meaning for this model: its UNet takes the guidance scale")


def is_distilled(sd: StableDiffusion, loras: Mapping[str, Any]) -> bool:
    """Return whether the model's UNet, scheduler or name, or an active LoRA, points at distillation for lcm."""
    if isinstance(sd.unet, LCMUNet) or sd.defaults.sampler.name == "lcm" or NAMES.search(sd.name):
        return True
    return any(is_distillation(*each) for each in _active_loras(sd, loras))


def is_distillation(name: str, path: Path | None, lora: LoRA) -> bool:
    """Return whether the name, path, metadata or layers of a LoRA point at distillation.

    Published LCM-LoRAs are named pytorch_lora_weights, without metadata. But they change the layers for the timestep,
    and the UNet only; of other LoRAs, few do.
    """
    texts = [name]
    if path is not None:
        texts += path.parts[-4:]  # in the hub's cache: models--owner--name/snapshots/commit/file
        try:
            metadata = read_metadata(path)
        except (OSError, CheckpointError):  # the file is gone, and the LoRA is loaded already
            metadata = {}
        texts += [metadata.get(key, "") for key in STATED]
    changes_time = any(layer.endswith("time_emb_proj") for layer in lora.names)
    return changes_time and all(layer.startswith("unet.") for layer in lora.names) or any(map(NAMES.search, texts))


def _active_loras(sd: StableDiffusion, loras: Mapping[str, Any]) -> Iterator[tuple[str, Path | None, LoRA]]:
    """Yield the name, the path if known, and the layers of all LoRAs that act on a run."""
    for name in sd.adapters.active:
        yield name, sd.lora_path(name), sd.adapters.loras[name]
    for name, (parts, _) in loras.items():
        updates = {layer: update for part in parts.values() for layer, update in part.items() if part.weight}
        if updates:
            yield name, sd.lora_path(name), LoRA(updates)
