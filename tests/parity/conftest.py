"""A small random model in both libraries, for the comparisons of adapters and prompts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from checkpoints import SMALL, make_parts, make_pipeline, write_folder
from diffusers import StableDiffusionPipeline

from minisd import StableDiffusion


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[StableDiffusion, StableDiffusionPipeline]:
    """One small random model twice, in float64: ours and diffusers'."""
    parts = make_parts(SMALL, scale=1.2)
    folder = write_folder(tmp_path_factory.mktemp("models") / "model", parts)
    ours = StableDiffusion.from_pretrained(folder, device="cpu", dtype=torch.float64)
    pipe = make_pipeline(parts).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return ours, pipe


@pytest.fixture
def ours(models: Any) -> StableDiffusion:
    """A copy of ours, which a test may change."""
    sd = models[0]
    return StableDiffusion(
        sd.config, sd.tokenizer, copy.deepcopy(sd.text_encoder), copy.deepcopy(sd.unet), sd.autoencoder
    )
