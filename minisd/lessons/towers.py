"""The shipped CLIP, for notebook 04."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch

from minisd.io.diffusers_folder import load_text_encoder
from minisd.training.clip import CLIP


def shipped_clip() -> CLIP:
    """Both towers of the tiny model's CLIP, in float32 on the CPU.

    A folder in diffusers' layout holds a text encoder and no image tower, so a notebook that runs on another model
    needs this CLIP whole.
    """
    tiny = Path(str(resources.files("minisd"))) / "assets/tiny"
    with torch.random.fork_rng(devices=[]):  # a new text encoder draws weights, which the file's then replace
        text_encoder = load_text_encoder(tiny / "text_encoder")
    return CLIP.load(tiny / "clip", text_encoder)
