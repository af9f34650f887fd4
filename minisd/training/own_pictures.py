"""Training from scratch on pictures of one's own: a captioned folder in the place of rendered scenes, and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisd.autoencoder import Autoencoder
from minisd.config import TINY, ModelConfig
from minisd.features.distributed import local_device
from minisd.images import to_images, to_pixels
from minisd.io.configs import check_config, read_json
from minisd.pipeline.memory import best_device, usable_device
from minisd.training.clip import ImageEncoderConfig
from minisd.training.data import Scenes
from minisd.training.folder_data import Pictures, list_examples
from minisd.training.shards import list_shards, read_shard
from minisd.training.unet import PROMPTS, cache_latents

PARTS = ("text_encoder", "autoencoder", "unet", "schedule")


class OwnPictures(Scenes):
    """The pictures of a folder (see `folder_data` and `shards`) as squares, with the interface of `Scenes`.

    All are in memory, 12 KB each at 64 pixels. side: in pixels, a multiple of 8. A picture with repeats has as many
    places in the data.
    """

    def __init__(self, folder: Path, side: int, caption: str | None = None) -> None:
        self.descriptions: list[dict[str, Any]] = []
        if shards := list_shards(folder):
            samples = [sample for shard in shards for sample in read_shard(shard, side, caption)]
            if not samples:
                raise ValueError(f"{shards[0]} has no pictures; expected files such as 000.jpg and 000.txt")
            self.unique, self.captions = np.stack([picture for picture, _ in samples]), [text for _, text in samples]
            self.rows = list(range(len(samples)))
            return
        pictures = Pictures(list_examples(folder, caption), side, 8)
        images = [to_pixels(pictures.image(index))[0] for index in range(len(pictures.sizes))]
        self.unique = np.stack(images)
        self.rows = [row for row, example in enumerate(pictures.examples) for _ in range(example.repeats)]
        self.captions = [pictures.texts[row] for row in self.rows]

    def images(self, indices: list[int]) -> Tensor:
        """Pictures (n, 3, side, side) in [-1, 1]."""
        return to_images(self.unique[[self.rows[index] for index in indices]])

    def held_out(self) -> np.ndarray:
        """Up to eight of the pictures, for the sheet; none is held out."""
        return self.unique[:8]


def read_sizes(path: Path | None, side: int) -> tuple[ModelConfig, ImageEncoderConfig]:
    """Read the sizes of a model from a JSON file: the tiny model's, changed by what the file has.

    The file has objects under text_encoder, autoencoder, unet, schedule (with the names of `minisd.config`) and
    image_encoder (with those of `ImageEncoderConfig`). Raises ValueError for names and values that make no sense.
    """
    values = {} if path is None else read_json(path)
    known = {part: getattr(TINY, part) for part in PARTS} | {"image_encoder": ImageEncoderConfig()}
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{path} has {unknown[0]!r}; expected {', '.join(known)}")
    found: dict[str, Any] = {}
    for part, config in known.items():
        given = values.get(part, {})
        names = [item.name for item in fields(config)]
        if not isinstance(given, dict) or (unknown := [name for name in given if name not in names]):
            raise ValueError(f"{path}: {part} has {given!r:.80}; expected an object with some of {', '.join(names)}")
        found[part] = replace(config, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
        if part in PARTS:
            check_config(found[part])
    image = found.pop("image_encoder")
    config = ModelConfig(**found)
    if config.unet.cross_attention_dim != config.text_encoder.hidden_size:
        raise ValueError(
            f"unet.cross_attention_dim={config.unet.cross_attention_dim} and text_encoder.hidden_size="
            f"{config.text_encoder.hidden_size}; expected the same"
        )
    if side % config.autoencoder.downscale:
        raise ValueError(f"side={side}; expected a multiple of {config.autoencoder.downscale}")
    latent = side // config.autoencoder.downscale
    sized = replace(config, autoencoder=replace(config.autoencoder, sample_size=side))
    return replace(sized, unet=replace(config.unet, sample_size=latent)), image


def read_data(
    scenes: Path, data: Path | None, side: int, sizes: Path | None, device: str | None
) -> tuple[Scenes, ModelConfig, ImageEncoderConfig, torch.device]:
    """Return what a command trains on: the data, the sizes of the model and of CLIP's image tower, and the device.

    Scenes are trained on with the sizes of the tiny model, on the CPU. Raises ValueError for options of the other kind.
    """
    if data is not None:
        chosen = local_device(device)
        place = best_device() if chosen is None else usable_device(chosen)
        return OwnPictures(data, side), *read_sizes(sizes, side), place
    if sizes is not None or device is not None:
        raise ValueError("--config and --device go with --data; scenes have the sizes of the tiny model, on the CPU")
    return Scenes(scenes), TINY, ImageEncoderConfig(), torch.device("cpu")


def own_latents(output: Path, autoencoder: Autoencoder, data: Scenes) -> Path:
    """Encode the pictures; return the file of their latents. Under torchrun, call it within a `process_group`."""
    path = output / "latents.safetensors"
    cache_latents(autoencoder, data, path)
    return path


def sheet_prompts(data: Scenes) -> Sequence[str]:
    """Return the prompts of the sheet: sixteen captions of own pictures, or the fixed ones for scenes."""
    if not isinstance(data, OwnPictures):
        return PROMPTS
    different = list(dict.fromkeys(data.captions))
    return different[:: max(len(different) // 16, 1)][:16]
