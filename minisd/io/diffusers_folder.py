"""The diffusers folder format: file names, JSON configurations, and saving."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minisd.autoencoder import Autoencoder
from minisd.config import AutoencoderConfig, ModelConfig, TextEncoderConfig, UNetConfig
from minisd.features.lcm_unet import LCMUNetConfig
from minisd.features.more_samplers import Sampler
from minisd.features.tiny_autoencoder import TinyAutoencoderConfig
from minisd.features.validate import check_path
from minisd.generate import Model
from minisd.io.atomic import replaced_folder, save_atomically
from minisd.io.configs import ConfigT, read_config, read_json, to_dict, write_json
from minisd.io.schedulers import SCHEDULERS, read_scheduler, scheduler_values
from minisd.io.tensors import CheckpointError, printable
from minisd.io.tokenizer_files import write_tokenizer
from minisd.preview import SD1, Factors
from minisd.text_encoder import TextEncoder
from minisd.unet import UNet

STEMS = {"text_encoder": "model", "vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model"}
CLASSES = {"text_encoder": "CLIPTextModel", "vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}
FAST = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc", "deis")  # samplers for about 25 steps
AUTOENCODERS: Mapping[str, type[AutoencoderConfig]] = {
    "AutoencoderKL": AutoencoderConfig,
    "AutoencoderTiny": TinyAutoencoderConfig,
}
LCM_PIPELINE = "LatentConsistencyModelPipeline"
PIPELINES = (*(f"StableDiffusion{task}Pipeline" for task in ("", "Img2Img", "Inpaint")), LCM_PIPELINE)


@dataclass(frozen=True)
class Defaults:
    """A model's default sampling settings.

    They are read from `minisd.json`. Folders without that file use the sampler of the scheduler configuration with 25
    steps (DPM++, UniPC, DEIS) or 50, and guidance 7.5; LCM uses 4 steps and no guidance, or 8.5 if the UNet takes the
    scale as an input. Single files use the values below.

    Attributes:
        preview: The linear map from latents to RGB, for previews.
    """

    sampler: Sampler = Sampler("dpmpp_2m", karras=True)
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    preview: Factors = SD1


@dataclass(frozen=True, eq=False)
class Loaded(Model):
    """A loaded model with its default sampling settings; modules are in eval mode, with gradients disabled."""

    defaults: Defaults = Defaults()


def pick_weights(names: Collection[str], stem: str, variant: str | None = None) -> list[str]:
    """Choose a module's weight files: a single file, or an index with its shards.

    Args:
        names: The names of all files in the module's folder.
        stem: The base name, "model" for the text encoder and "diffusion_pytorch_model" for the others.
        variant: The preferred variant, before files without a variant, then fp16. Safetensors come before pickles.

    Returns:
        The names of the weight files, or an empty list.
    """
    for wanted in (f".{variant}" if variant else "", "", ".fp16"):
        for first, suffix in ((stem, ".safetensors"), ("pytorch_model" if stem == "model" else stem, ".bin")):
            if (name := f"{first}{wanted}{suffix}") in names:
                return [name]
            index = f"{first}{suffix}.index{wanted}.json"
            if index in names:
                shard = re.compile(rf"{first}({re.escape(wanted)})?-\d+-of-\d+({re.escape(wanted)})?{suffix}")
                return [index, *sorted(filter(shard.fullmatch, names))]
    return []


def read_index(index: Path) -> dict[str, str]:
    """Read a shard index as a map from tensor to file names. Raises CheckpointError unless all files are next to it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no valid weight_map; download it again")
    for name in sorted(set(weight_map.values())):
        if re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name) is None:
            raise CheckpointError(
                f"{index} refers to {name!r}; shards must be in the folder of the index. Do not trust this file"
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} refers to {name}, which is missing; download it")
    return weight_map


def read_configs(folder: Path) -> tuple[ModelConfig, Defaults]:
    """Read the JSON files of a folder. Raises CheckpointError if one is missing, corrupted or unsupported."""
    path, scheduler = folder / "model_index.json", folder / "scheduler/scheduler_config.json"
    if not path.exists():
        raise CheckpointError(f"{path} is missing; {_suggestion(folder)}")
    index = read_json(path)
    if (kind := index.get("_class_name")) not in PIPELINES:
        raise CheckpointError(f"{folder} is a {printable(str(kind))}; expected a {' or '.join(PIPELINES)}")
    for part, name in CLASSES.items():
        entry = index.get(part)
        names = [*AUTOENCODERS] if part == "vae" else [name]
        if not isinstance(entry, list) or not entry or entry[-1] not in names:
            raise CheckpointError(f"{path} has {part}={printable(repr(entry))}; expected a {' or '.join(names)}")
    entry = index.get("scheduler")
    kind = entry[-1] if isinstance(entry, list) and entry else read_json(scheduler).get("_class_name")
    schedule, sampler = read_scheduler(scheduler, str(kind))
    config = ModelConfig(
        read_part_config(TextEncoderConfig, folder / "text_encoder/config.json"),
        read_autoencoder_config(folder / "vae/config.json"),
        read_unet_config(folder / "unet/config.json"),
        schedule,
    )
    usual = _usual_defaults(sampler, isinstance(config.unet, LCMUNetConfig))
    path = folder / "minisd.json"
    return config, _read_defaults(path) if path.is_file() else usual


def read_part_config(kind: type[ConfigT], path: Path, **changes: Any) -> ConfigT:
    """Read the configuration of one module from its file, with some values overridden."""
    values = read_json(path)
    try:
        return read_config(kind, values | changes)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} describes an unsupported model: {error}") from error


def read_autoencoder_config(path: Path) -> AutoencoderConfig:
    """Read the config.json of an AutoencoderKL or AutoencoderTiny. Raises CheckpointError for another class."""
    name = read_json(path).get("_class_name", "AutoencoderKL")
    if not isinstance(name, str) or name not in AUTOENCODERS:
        raise CheckpointError(f"{path} is a {printable(str(name))}; expected an {' or '.join(AUTOENCODERS)}")
    return read_part_config(AUTOENCODERS[name], path)


def read_unet_config(path: Path) -> UNetConfig:
    """Read the config.json of a UNet, with or without the guidance scale as an input."""
    has_scale = read_json(path).get("time_cond_proj_dim") is not None
    return read_part_config(LCMUNetConfig if has_scale else UNetConfig, path)


def _suggestion(folder: Path) -> str:
    """Return advice for a folder that is not a complete model."""
    if (folder / "config.json").is_file():
        values = read_json(folder / "config.json")
        kind = str(values.get("_class_name") or values.get("architectures") or values.get("model_type"))[:80]
        return f"the folder contains only one module, {kind}; pass the parent folder"
    for path in folder.glob("*.safetensors"):
        return f"to load the single file {path.name}, pass its path"
    return "download the entire folder"


def _read_defaults(path: Path) -> Defaults:
    values = read_json(path)
    try:
        preview = tuple((float(r), float(g), float(b)) for r, g, b in values.get("preview", SD1))
        options = {name: value for name, value in values["sampler"].items() if value}  # eta=0 is for ddim only
        defaults = Defaults(**values | {"sampler": Sampler(**options), "preview": preview})
        steps, guidance = defaults.num_inference_steps, defaults.guidance_scale
        if type(steps) is not int or not 1 <= steps <= 1000 or not math.isfinite(guidance):
            raise ValueError(f"num_inference_steps={steps!r}, guidance_scale={guidance!r}")
        if not all(math.isfinite(number) for row in preview for number in row):
            raise ValueError("preview has values that are not finite")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} has no valid generation defaults ({error!r}); download it again") from error
    return defaults


def _usual_defaults(sampler: Sampler, has_scale: bool = False) -> Defaults:
    if sampler.name == "lcm":
        return Defaults(sampler, num_inference_steps=4, guidance_scale=8.5 if has_scale else 1.0)
    return Defaults(sampler, 25 if sampler.name in FAST else 50)


def save(model: Loaded, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Save a model to a folder that minisd, diffusers and transformers can load.

    An existing folder is replaced atomically (see `replaced_folder`); other files in it are kept.

    Args:
        model: The model to save.
        folder: The target: a new or empty folder, or a model with the same weight files.
        dtype: The dtype of the saved weights. Defaults to that of the model.

    Raises:
        FileExistsError: If the folder contains anything else.
    """
    if not getattr(model.config.autoencoder, "has_encoder", True):
        raise ValueError("the autoencoder has only a decoder, and a model needs both; load taesd_encoder with it")
    target = check_path("folder", folder).resolve()
    existing = _files_in(target) if target.is_dir() else set()
    if target.exists() and (not target.is_dir() or (existing and Path("model_index.json") not in existing)):
        raise FileExistsError(f"{target} exists and is not a model; choose a new or an empty folder")
    parts: dict[str, nn.Module] = {"text_encoder": model.text_encoder, "vae": model.autoencoder, "unet": model.unet}
    with replaced_folder(target) as new:
        write_settings(model, new)
        for part, module in parts.items():
            weights = {name: value.to("cpu", dtype).contiguous() for name, value in module.state_dict().items()}
            write = partial(save_file, weights, metadata={"format": "pt"})
            save_atomically(write, new / part / f"{STEMS[part]}.safetensors")
        left = {path for path in existing - _files_in(new) if str(path.parent) in STEMS and path.name != "config.json"}
        if left:
            names = ", ".join(sorted(map(str, left)))
            raise FileExistsError(
                f"{target} contains the weights of another model ({names}); choose a new or an empty folder"
            )


def write_settings(model: Loaded, folder: Path) -> None:
    """Write all of a model's files but its weights."""
    for part, content in _contents(model).items():
        write_json(folder / part, content)
    write_tokenizer(folder / "tokenizer", model.tokenizer)


def _files_in(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def _contents(model: Loaded) -> dict[str, dict[str, Any]]:
    """Return the content of a model's JSON files, by path."""
    config, sampler = model.config, model.defaults.sampler
    text_encoder = replace(config.text_encoder, vocab_size=len(model.tokenizer.vocabulary))
    vae = next(name for name, kind in AUTOENCODERS.items() if type(config.autoencoder) is kind)
    # without "dtype", diffusers would load float16 files as float16 for this module but as float32 for others
    clip = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "dtype": "float32"}
    ends = {"bos_token_id": model.tokenizer.bos_token_id, "eos_token_id": model.tokenizer.eos_token_id}
    kind = f"StableDiffusion{'Inpaint' if config.unet.in_channels == 9 else ''}Pipeline"
    return {
        "text_encoder/config.json": to_dict(text_encoder) | clip | ends,
        "vae/config.json": {"_class_name": vae} | to_dict(config.autoencoder),
        "unet/config.json": {"_class_name": CLASSES["unet"]} | to_dict(config.unet),
        "scheduler/scheduler_config.json": scheduler_values(config.schedule, sampler),
        "minisd.json": asdict(model.defaults),
        "model_index.json": {
            "_class_name": LCM_PIPELINE if isinstance(config.unet, LCMUNetConfig) else kind,
            "_diffusers_version": "0.38.0",  # required by diffusers' inpainting pipeline
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", SCHEDULERS[sampler.name][0]],
            "text_encoder": ["transformers", CLASSES["text_encoder"]],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", CLASSES["unet"]],
            "vae": ["diffusers", vae],
        },
    }


def load_autoencoder(folder: Path) -> Autoencoder:
    """Load only a `vae/` folder, in float32. Raises CheckpointError if its config.json is invalid."""
    return _load_weights(Autoencoder(read_part_config(AutoencoderConfig, folder / "config.json")), folder)


def load_text_encoder(folder: Path) -> TextEncoder:
    """Load only a `text_encoder/` folder, in float32. Raises CheckpointError if its config.json is invalid."""
    return _load_weights(TextEncoder(read_part_config(TextEncoderConfig, folder / "config.json")), folder, "model")


def load_unet(folder: Path) -> UNet:
    """Load only a `unet/` folder, in float32. Raises CheckpointError if its config.json is invalid."""
    return _load_weights(UNet(read_part_config(UNetConfig, folder / "config.json")), folder)


def _load_weights(part: nn.Module, folder: Path, stem: str = "diffusion_pytorch_model") -> Any:
    weights = load_file(folder / f"{stem}.safetensors")
    part.load_state_dict({key: value.float() for key, value in weights.items()})
    return part.eval().requires_grad_(False)
