"""Putting the trained parts together: a model folder in float16 that minisd and diffusers load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from minisd.config import TINY
from minisd.io.atomic import save_atomically
from minisd.io.diffusers_folder import Defaults, load_autoencoder, load_text_encoder, load_unet
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.preview import fit_preview
from minisd.tokenizer import Tokenizer
from minisd.training.data import pixels_of
from minisd.training.scenes import scene
from minisd.training.unet import SAMPLING


@dataclass(frozen=True)
class Sitting:
    """One line of the training log: what was run, for how long, and where it arrived."""

    part: str
    command: str
    minutes: float
    steps: int
    samples: int
    loss: float


def assemble(vae: Path, text: Path, unet: Path, target: Path, defaults: Defaults = SAMPLING) -> None:
    """Read vae/, text_encoder/ and clip/, and unet/ from the given folders; write them, float16, as one model.

    Raises FileExistsError when the target holds something else than a model.
    """
    autoencoder, text_encoder = load_autoencoder(vae / "vae"), load_text_encoder(text / "text_encoder")
    denoiser = load_unet(unet / "unet")
    config = replace(TINY, text_encoder=text_encoder.config, autoencoder=autoencoder.config, unet=denoiser.config)
    images = pixels_of(scene(0, index) for index in range(64))
    with torch.inference_mode():
        latents = autoencoder.encode(images).mean * autoencoder.config.scaling_factor
    defaults = replace(defaults, preview=fit_preview(latents, images))
    sd = StableDiffusion(config, Tokenizer.from_pretrained(), text_encoder, denoiser, autoencoder, defaults)
    sd.save_pretrained(target, torch.float16)
    tower = {key: value.half() for key, value in load_file(text / "clip/model.safetensors").items()}
    save_atomically(lambda path: save_file(tower, path), target / "clip/model.safetensors")
    settings = (text / "clip/config.json").read_text(encoding="utf-8")
    save_atomically(lambda path: path.write_text(settings, encoding="utf-8"), target / "clip/config.json")


def log_sitting(path: Path, sitting: Sitting) -> None:
    """Append one line to the training log."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    save_atomically(
        lambda target: target.write_text(before + json.dumps(asdict(sitting)) + "\n", encoding="utf-8"), path
    )


def write_curves(target: Path, logs: Mapping[str, Path], points: int = 200) -> None:
    """Thin the `losses.jsonl` of some runs to about `points` means each, of four digits, in one small JSON file.

    The notebook on training draws it. After another training:
    `write_curves(Path("minisd/assets/tiny/curves.json"), {"unet": Path("runs/unet/losses.jsonl"), …})`.
    """
    curves: dict[str, dict[str, list[float]]] = {}
    for part, path in logs.items():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        pieces = np.array_split(np.arange(len(lines)), min(points, len(lines)))
        curves[part] = {"step": [int(piece[-1]) + 1 for piece in pieces]}
        for name in lines[0]:
            means = (np.mean([lines[place][name] for place in piece]) for piece in pieces)
            curves[part][name] = [float(f"{mean:.4g}") for mean in means]
    save_atomically(lambda path: path.write_text(json.dumps(curves) + "\n", encoding="utf-8"), target)
