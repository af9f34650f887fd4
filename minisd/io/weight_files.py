"""Weight files of the parts of a folder, and of autoencoders on their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from minisd.config import AutoencoderConfig
from minisd.features.tiny_autoencoder import TinyAutoencoderConfig
from minisd.io.diffusers_folder import STEMS, pick_weights, read_autoencoder_config, read_index
from minisd.io.tensors import CheckpointError, TensorInfo, printable, read_header

# In TAESD's own files, the first convolution of the encoder is layer 0, and that of the decoder is layer 1.
TAESD_CONV = {"0.weight": "encoder", "1.weight": "decoder"}
TAESD_DECODER = re.compile(r"(taesd_)?decoder\.(layers\.)?\d+\.weight")
TAESD_FIRST = re.compile(r"vae\.(decoder\.layers\.0|(taesd_)?decoder\.1)\.weight")


class WeightFile(NamedTuple):
    """A weight file, the prefix to add to its keys (such as "unet." in a folder), and its header."""

    path: Path
    prefix: str
    header: Mapping[str, TensorInfo]


def weight_files(folder: Path, part: str, variant: str | None) -> list[WeightFile]:
    """Return the weight files of a part: a single file or its shards. Raises CheckpointError if there are none."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    chosen = pick_weights(names, STEMS[part], variant)
    if not chosen:
        advice = "download all of it" + (", or pass an autoencoder with vae= (--vae)" if part == "vae" else "")
        raise CheckpointError(
            f"{folder} has no {STEMS[part]}.safetensors or .bin, only {listed(sorted(names))}; {advice}"
        )
    first = folder / chosen[0]
    if first.suffix != ".json":
        return [WeightFile(first, f"{part}.", read_header(first))]
    index = read_index(first)
    files = [WeightFile(path, f"{part}.", read_header(path)) for path in sorted({folder / n for n in index.values()})]
    # each tensor must be in exactly one shard, the one listed in the index
    found = {(key, file.path.name) for file in files for key in file.header}
    if wrong := listed(sorted({key for key, _ in found ^ set(index.items())}), empty=""):
        raise CheckpointError(f"{first} and its shards disagree on {wrong}; download all of them again")
    return files


def open_autoencoder(
    path: Path, model: AutoencoderConfig, variant: str | None = None
) -> tuple[AutoencoderConfig, list[WeightFile]]:
    """Open an autoencoder that replaces the one of a model, without reading the weights.

    Args:
        path: A diffusers folder with an autoencoder or a whole model, or a single file with the keys of diffusers, of
            CompVis (also inside a whole checkpoint) or of TAESD. For taesd_encoder and taesd_decoder, the other one is
            read from the same folder; the decoder is required.
        model: The configuration of the model's own autoencoder, which also applies to a KL autoencoder in a single
            file.

    Raises:
        CheckpointError: If it is not an autoencoder, or has latents of another shape than the model.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "model_index.json").is_file() else path
        config, files = read_autoencoder_config(folder / "config.json"), weight_files(folder, "vae", variant)
    else:
        config, files = _open_file(path, model)
    if config.latent_channels != model.latent_channels or config.downscale != model.downscale:
        raise CheckpointError(
            f"{path} has {config.latent_channels} latent channels at 1/{config.downscale} of the image size, but the "
            f"model has {model.latent_channels} at 1/{model.downscale}; use an autoencoder for this kind of model"
        )
    return config, files


def listed(names: list[str], limit: int = 4, empty: str = "nothing") -> str:
    """Format names from a file for a message: the first few, and the number of others."""
    text = ", ".join(map(printable, names[:limit])) or empty
    return text + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _open_file(path: Path, model: AutoencoderConfig) -> tuple[AutoencoderConfig, list[WeightFile]]:
    header = read_header(path)
    if not TAESD_CONV.keys() & header.keys() and not any(map(TAESD_DECODER.fullmatch, header)):
        config = AutoencoderConfig() if isinstance(model, TinyAutoencoderConfig) else model
        return config, [WeightFile(path, "vae.", header)]
    files = [WeightFile(path, "vae.", header)]
    if part := next((part for key, part in TAESD_CONV.items() if key in header), ""):
        other = "decoder" if part == "encoder" else "encoder"
        beside = path.with_name(path.name.replace(part, other))
        files = [WeightFile(path, f"vae.{part}.", header)]
        if part in path.name and beside.is_file():
            files.append(WeightFile(beside, f"vae.{other}.", read_header(beside)))
        elif part == "encoder":
            raise CheckpointError(f"{path} is TAESD's encoder; put its decoder, taesd_decoder, into the same folder")
    shapes = {file.prefix + key: info.shape for file in files for key, info in file.header.items()}
    first = next((shape for key, shape in shapes.items() if TAESD_FIRST.fullmatch(key) and len(shape) == 4), (64, 4))
    has_encoder = any("encoder." in key for key in shapes)
    widths = (first[0],) * len(TinyAutoencoderConfig.block_out_channels)
    return TinyAutoencoderConfig(latent_channels=first[1], block_out_channels=widths, has_encoder=has_encoder), files
