"""Single parts read from the folders that the trainings export, in float32 and ready to train or to use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from minisd.autoencoder import Autoencoder
from minisd.config import AutoencoderConfig, TextEncoderConfig, UNetConfig
from minisd.io.diffusers_folder import read_part_config
from minisd.text_encoder import TextEncoder
from minisd.unet import UNet


def load_autoencoder(folder: Path) -> Autoencoder:
    """Read `vae/`. Raises CheckpointError when config.json is missing, RuntimeError when weights do not fit."""
    return _load(Autoencoder(read_part_config(AutoencoderConfig, folder / "config.json")), folder)


def load_text_encoder(folder: Path) -> TextEncoder:
    """Read `text_encoder/`; errors as for `load_autoencoder`."""
    return _load(TextEncoder(read_part_config(TextEncoderConfig, folder / "config.json")), folder, "model")


def load_unet(folder: Path) -> UNet:
    """Read `unet/`; errors as for `load_autoencoder`."""
    return _load(UNet(read_part_config(UNetConfig, folder / "config.json")), folder)


def _load(module: nn.Module, folder: Path, stem: str = "diffusion_pytorch_model") -> Any:
    weights = load_file(folder / f"{stem}.safetensors")
    module.load_state_dict({key: value.float() for key, value in weights.items()})
    return module.eval().requires_grad_(False)
