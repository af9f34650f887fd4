"""Training a finished model further, all of its weights: on captioned pictures, or on a few of one thing (DreamBooth).

Source of DreamBooth: Ruiz et al. 2023, "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven
Generation", section 3.3 (prior preservation).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.training.adapting import Adapting
from minisd.training.tuning_options import Tuning


class FullTask(Adapting):
    """Trains all weights of the UNet and, with `text_encoder`, of the text encoder; in float32.

    text_factor: of the text encoder's learning rate. With class pictures (see `Tuning`) it is DreamBooth.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        folder: Path,
        text_encoder: bool = False,
        seed: int = 0,
        prompts: Sequence[str] = (),
        tuning: Tuning | None = None,
        text_factor: float = 1.0,
    ) -> None:
        super().__init__(sd, folder, seed, prompts, tuning)
        if sd.dtype != torch.float32:
            raise ValueError(f"the model is in {sd.dtype}; load it in float32, small steps are lost in other formats")
        parts: dict[str, nn.Module] = {"unet": sd.unet}
        if text_encoder:
            parts["text_encoder"] = sd.text_encoder
        self._prepare_text_encoder(text_encoder)
        self.model: nn.Module = nn.ModuleDict(parts).requires_grad_()
        self.rate_factors = {
            parameter: text_factor for parameter in sd.text_encoder.parameters() if parameter.requires_grad
        }

    def before(self, choices: dict[str, Any]) -> list[Image.Image]:
        return []  # the model as it was is gone

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the whole model, as a folder that diffusers loads as well."""
        self.sd.save_pretrained(folder / "model")
