"""Reading, validation and writing of `config.json` and other JSON files.

Keys that do not affect the network are ignored. Unsupported options and invalid sizes are rejected before any memory is
allocated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from minisd.config import AutoencoderConfig, ScheduleConfig, TextEncoderConfig, UNetConfig
from minisd.features.lcm_unet import LCMUNetConfig
from minisd.features.tiny_autoencoder import TinyAutoencoderConfig
from minisd.io.tensors import CheckpointError

Config = TextEncoderConfig | AutoencoderConfig | UNetConfig | ScheduleConfig
ConfigT = TypeVar("ConfigT", bound=Config)

MAX_JSON_BYTES = 2**26  # far more than the largest vocabulary or index of shards
MAX_DEPTH = 64  # of nested JSON; deeper values overflow Python's stack
MAX_SIZE = 2**20
MAX_LEVELS = 8
# Tighter limits for numbers of layers and table sizes.
MAX_SIZES = {"num_hidden_layers": 128, "layers_per_block": 16, "sample_size": 2**14, "num_train_timesteps": 100_000}

UNET: Mapping[str, tuple[Any, ...]] = {
    "act_fn": ("silu",), "flip_sin_to_cos": (True,), "freq_shift": (0,), "center_input_sample": (False,),
    "downsample_padding": (1,), "mid_block_type": ("UNetMidBlock2DCrossAttn", None), "mid_block_scale_factor": (1,),
    "only_cross_attention": (False,), "dual_cross_attention": (False,), "transformer_layers_per_block": (1,),
    "num_attention_heads": (None,), "resnet_time_scale_shift": ("default",), "time_embedding_type": ("positional",),
    "class_embed_type": (None,), "num_class_embeds": (None,), "addition_embed_type": (None,),
    "encoder_hid_dim": (None,), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
}  # fmt: skip
# The supported values of keys in published files; the first one is written when saving.
FIXED: Mapping[type, Mapping[str, tuple[Any, ...]]] = {
    TextEncoderConfig: {"model_type": ("clip_text_model",)},
    AutoencoderConfig: {
        "act_fn": ("silu",), "mid_block_add_attention": (True,), "use_quant_conv": (True,),
        "use_post_quant_conv": (True,), "shift_factor": (None,), "latents_mean": (None,),
    },
    TinyAutoencoderConfig: {
        "act_fn": ("relu",), "upsample_fn": ("nearest",), "upsampling_scaling_factor": (2,),
        "shift_factor": (0.0, None),
    },
    UNetConfig: {**UNET, "time_cond_proj_dim": (None,)},
    LCMUNetConfig: UNET,
    ScheduleConfig: {
        "trained_betas": (None,), "thresholding": (False,), "clip_sample": (False,),
    },
}  # fmt: skip
OPTIONAL = ("timestep_spacing", "set_alpha_to_one")
BLOCK_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
CHOICES = {
    "hidden_act": ("quick_gelu", "gelu"),
    "beta_schedule": ("scaled_linear", "linear"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "down_block_types": BLOCK_TYPES,
    "up_block_types": BLOCK_TYPES,
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError if the file is missing or not a valid JSON object."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, or not a regular file; download the entire folder")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; expected at most {MAX_JSON_BYTES:,}")
    try:
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON in UTF-8 ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} contains a {type(value).__name__}; expected a JSON object; download it again")
    return value


def parse_json(text: str) -> Any:
    """Parse JSON from outside. Raises ValueError if it is invalid, repeats a key or is nested more than 64 deep."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(values := dict(pairs)) < len(pairs):
            raise ValueError("duplicate key")
        return values

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [
            x
            for item in level
            for x in (item.values() if isinstance(item, dict) else item)
            if isinstance(x, (dict, list))
        ]
    if level:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return value


def write_json(path: Path, value: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write a JSON object, creating the parent folder; without `indent`, on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=None if indent else (",", ":"))
    path.write_text(text + ("\n" if indent else ""), encoding="utf-8", newline="\n")


def read_config(kind: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Build a configuration from the content of a published `config.json`.

    Args:
        kind: The configuration class: TextEncoderConfig, AutoencoderConfig, UNetConfig or ScheduleConfig.
        values: The parsed JSON. Missing and null keys default to the values of Stable Diffusion 1.

    Raises:
        ValueError: If a key has an unsupported value.
    """
    for key, supported in FIXED[kind].items():
        if key in values and values[key] not in supported:
            expected = " or ".join(repr(value) for value in supported)
            raise ValueError(f"unsupported {key}={_shorten(values[key])}; minisd supports only {key}={expected}")
    names = {item.name for item in fields(kind)}
    given: dict[str, Any] = {key: value for key, value in values.items() if key in names and value is not None}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    config = kind(**given)
    check_config(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Return the content of a `config.json` for diffusers or transformers."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    content = {key: supported[0] for key, supported in FIXED[type(config)].items()} | values
    if isinstance(config, TinyAutoencoderConfig):
        widths = {f"{part}_block_out_channels": content["block_out_channels"] for part in ("encoder", "decoder")}
        unused = ("block_out_channels", "layers_per_block", "norm_num_groups", "sample_size", "has_encoder")
        return {key: value for key, value in content.items() if key not in unused} | widths
    if isinstance(config, AutoencoderConfig):
        levels = len(config.block_out_channels)
        content["down_block_types"] = ["DownEncoderBlock2D"] * levels
        content["up_block_types"] = ["UpDecoderBlock2D"] * levels
    return content


def check_config(config: Config) -> None:
    """Raise ValueError for values of the wrong type or out of range, and for incompatible sizes."""
    for item in fields(config):
        if getattr(config, item.name) is not None or item.name not in OPTIONAL:
            _check_value(item.name, getattr(config, item.name), item.default)
    if isinstance(config, TextEncoderConfig):
        _check_divisible("hidden_size", config.hidden_size, "num_attention_heads", config.num_attention_heads)
    elif isinstance(config, ScheduleConfig):
        _check_schedule(config)
    else:
        for channels in config.block_out_channels:
            _check_divisible("block_out_channels", channels, "norm_num_groups", config.norm_num_groups)
    if isinstance(config, UNetConfig):
        levels = len(config.block_out_channels)
        for name in ("down_block_types", "up_block_types", "heads"):
            if len(getattr(config, name)) != levels:
                raise ValueError(f"{name} has length {len(getattr(config, name))}; expected {levels}, one per level")
        for channels, heads in zip(config.block_out_channels, config.heads, strict=True):
            _check_divisible("block_out_channels", channels, "attention_head_dim (the number of heads)", heads)


def _check_schedule(config: ScheduleConfig) -> None:
    if not config.beta_start <= config.beta_end < 1:
        raise ValueError(
            f"beta_start={config.beta_start}, beta_end={config.beta_end}; expected 0 < beta_start ≤ beta_end < 1"
        )
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise ValueError("rescale_betas_zero_snr=True with prediction_type='epsilon'; expected 'v_prediction'")


def _check_value(name: str, value: Any, default: Any) -> None:
    """Check the type of a value against the field's default, and its range."""
    expected = None
    if isinstance(value, tuple) and (isinstance(default, tuple) or name == "attention_head_dim"):
        if not 1 <= len(value) <= MAX_LEVELS:
            raise ValueError(f"{name} has length {len(value)}; expected 1 to {MAX_LEVELS}")
        for entry in value:
            _check_value(name, entry, default[0] if isinstance(default, tuple) else default)
    elif isinstance(default, bool):
        expected = None if isinstance(value, bool) else "true or false"
    elif isinstance(default, int):
        low, high = 0 if name == "steps_offset" else 1, MAX_SIZES.get(name, MAX_SIZE)
        expected = None if type(value) is int and low <= value <= high else f"an integer from {low} to {high}"
    elif isinstance(default, float):  # the comparison also rejects NaN and infinity
        valid = type(value) in (int, float) and 0 < value < MAX_SIZE
        expected = None if valid else "a positive number"
    elif isinstance(default, tuple):
        expected = "a list"
    elif not isinstance(value, str) or value not in CHOICES[name]:
        expected = " or ".join(map(repr, CHOICES[name]))
    if expected is not None:
        raise ValueError(f"{name}={_shorten(value)}; expected {expected}")


def _check_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name}={value} is not divisible by {divisor_name}={divisor}; choose a multiple")


def _shorten(value: Any) -> str:
    """Format a value for an error message; long values and containers by their type only."""
    short = isinstance(value, (int, float, str)) and len(str(value)) < 50
    return repr(value) if short else f"a {type(value).__name__}"
