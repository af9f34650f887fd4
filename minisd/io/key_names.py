"""Mapping from parameter names, which follow diffusers, to the keys of checkpoint files.

A diffusers folder has one file per module and, except for a few old spellings, the same names. A single file in CompVis
layout (`model.diffusion_model.…`) contains all modules under the names of https://github.com/CompVis/stable-diffusion;
the text encoder of Stable Diffusion 2 uses the names of OpenCLIP.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from minisd.config import AutoencoderConfig, ModelConfig, UNetConfig
from minisd.features.tiny_autoencoder import TinyAutoencoderConfig


class Source(NamedTuple):
    """The key of a tensor in a file and, if query, key and value are stacked, the index of the one to use."""

    key: str
    qkv_index: int | None = None


# Other kinds of files, identified by the first pattern that matches one of their keys.
OTHER_KINDS = (
    (r"conditioner\.embedders\..*|model\.diffusion_model\.label_emb\..*|add_embedding\..*", "Stable Diffusion XL"),
    (r"(model\.diffusion_model\.)?(joint_blocks|x_embedder)\..*|text_encoders\..*", "Stable Diffusion 3"),
    (r"(model\.diffusion_model\.)?(double_blocks|single_transformer_blocks)\..*", "Flux"),
    (r"(control_model|controlnet_cond_embedding|controlnet_.*_blocks)\..*", "a ControlNet"),
    (r".*[._]lora[._].*|.*\.(hada|lokr)_.*", "a LoRA"),
    (r"emb_params|string_to_param", "a textual inversion"),
    (r"model\.diffusion_model\..*", "a model in CompVis layout"),
    (r"time_embedding\.linear_1\..*", "a UNet only"),
    (r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up|mid)[._].*", "an autoencoder only"),
    (r"(text_model\.)?(encoder\.layers|embeddings\.token_embedding)\..*", "a text encoder only"),
)

# Keys that belong to no parameter but to every checkpoint. Those of `LEFTOVERS` are named; any other is an error.
SCHEDULE_KEYS = (
    r"betas|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?|sqrt_recip(m1)?_alphas_cumprod|lvlb_weights|logvar"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|scale_factor"  # the noise schedule, which is recomputed
)
IGNORED_IN_FOLDER = re.compile(
    r"text_encoder\.((text_model\.)?embeddings\.position_ids|text_projection\.weight|logit_scale)"
)
IGNORED_IN_SINGLE_FILE = re.compile(
    SCHEDULE_KEYS + r"|v_pred|ztsnr"
    r"|cond_stage_model\.(transformer\.|model\.)?(logit_scale|text_projection(\.weight)?|attn_mask)"  # unused
    r"|cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids"  # 0, 1, 2 … 76
    r"|cond_stage_model\.model\.transformer\.resblocks\.23\..*"  # Stable Diffusion 2 skips the last layer
)
IGNORED_IN_AUTOENCODER = re.compile(rf"vae\.((model|cond_stage_model|model_ema)\..*|{SCHEDULE_KEYS})")
# What training and merging leave behind: anything outside the three networks that is not part of another architecture,
# and some keys inside them.
LEFTOVERS = re.compile(
    r"(?!model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.|unet\.|vae\.|text_encoder\.).*"
    r"|(first_stage_model|vae(\.first_stage_model)?)\.(loss|model_ema)\..*"
    r"|(cond_stage_model\.transformer|text_encoder)\.(vision_model|visual_projection)\..*"
    r"|cond_stage_model\.model\.visual\..*|vae\.vae_(scale|shift)"
    r"|(unet|vae|text_encoder)\.(global_step|epoch|model_ema\..*|bundle_emb\..*)"
)
OTHER_ARCHITECTURES = re.compile(
    r"(control_model|controlnet|depth_model|embedder|noise_augmentor|conditioner|text_encoders|joint_blocks|x_embedder"
    r"|double_blocks|add_embedding|edm_(vpred|mean))[._].*|.*motion_modules?\..*|.*[._](lora|hada|lokr)[._].*"
)

UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_BLOCK = re.compile(
    r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(\w+)(.*)"
)

AUTOENCODER_RULES = (
    (r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)", r"\1.\2.block.\3"),
    (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)
OLD_AUTOENCODER_RULES = (
    (r"attentions\.0\.to_q", "attentions.0.query"),
    (r"attentions\.0\.to_k", "attentions.0.key"),
    (r"attentions\.0\.to_v", "attentions.0.value"),
    (r"attentions\.0\.to_out\.0", "attentions.0.proj_attn"),
)
OPENCLIP_RULES = (
    (r"text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm", "ln_final"),
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"self_attn\.[qkv]_proj\.", "attn.in_proj_"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
)


def folder_sources(part: str, name: str) -> tuple[Source, ...]:
    """Return the possible keys of a parameter in a diffusers folder, prefixed by the module; current spelling first."""
    names = [name]
    if part == "vae":
        names.append(_rewrite(name, OLD_AUTOENCODER_RULES))
    elif part == "text_encoder":
        names.append(name.removeprefix("text_model."))
    return tuple(Source(f"{part}.{each}") for each in names)


def single_file_sources(part: str, name: str, config: ModelConfig) -> tuple[Source, ...]:
    """Return the possible keys of a parameter in a single file in CompVis layout."""
    if part == "unet":
        return (Source(f"model.diffusion_model.{_unet_key(name, config.unet)}"),)
    if part == "vae":
        return (Source(f"first_stage_model.{_autoencoder_key(name, config.autoencoder)}"),)
    fused = re.search(r"self_attn\.([qkv])_proj", name)
    openclip = Source(
        f"cond_stage_model.model.{_rewrite(name, OPENCLIP_RULES)}", "qkv".index(fused[1]) if fused else None
    )
    plain = (Source(f"cond_stage_model.transformer.{each}") for each in (name, name.removeprefix("text_model.")))
    return (*plain, openclip)


def autoencoder_sources(part: str, name: str, config: AutoencoderConfig) -> tuple[Source, ...]:
    """Return the possible keys of a parameter in the files of an autoencoder on its own, prefixed by "vae."."""
    if isinstance(config, TinyAutoencoderConfig):
        shift = name.startswith("decoder.")  # the original decoder begins with a layer without parameters
        original = re.sub(r"\.layers\.(\d+)", lambda layer: f".{int(layer[1]) + shift}", name)
        return tuple(Source(f"{part}.{key}") for key in (name, original, f"taesd_{original}"))
    key = _autoencoder_key(name, config)
    return (*folder_sources(part, name), Source(f"{part}.{key}"), Source(f"{part}.first_stage_model.{key}"))


def is_leftover(key: str) -> bool:
    """Return whether an unused key harms nothing: what training, merging or bundling left behind."""
    return bool(LEFTOVERS.fullmatch(key)) and not OTHER_ARCHITECTURES.fullmatch(key)


def looks_like(keys: Collection[str]) -> str:
    """Return the kind of file that the keys belong to, or "" if unknown."""
    for pattern, kind in OTHER_KINDS:
        if any(re.fullmatch(pattern, key) for key in keys):
            return kind
    return ""


def _autoencoder_key(name: str, config: AutoencoderConfig) -> str:
    """Return the CompVis key of a parameter of the KL autoencoder."""
    last = len(config.block_out_channels) - 1
    # CompVis numbers the decoder's levels by resolution, diffusers in the order of computation
    renumbered = re.sub(r"up_blocks\.(\d+)", lambda level: f"up_blocks.{last - int(level[1])}", name)
    return _rewrite(renumbered, AUTOENCODER_RULES)


def _rewrite(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _unet_key(name: str, config: UNetConfig) -> str:
    """Return the CompVis key of a UNet parameter; blocks are numbered across levels, including the resampling."""
    block = UNET_BLOCK.fullmatch(name)
    if block is None:
        stem, _, tail = name.rpartition(".")
        return f"{UNET_ENDS[stem]}.{tail}"
    side, level, kind, slot, head, tail = block.groups()
    layers, sub = config.layers_per_block, 1 if kind == "attentions" else 0
    if kind == "resnets":
        head = UNET_RESNET[head]
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(slot)}.{head}{tail}"
    index = int(level) * (layers + 1) + (layers if kind.endswith("samplers") else int(slot))
    if side == "down":
        return f"input_blocks.{index + 1}.{sub}.{'op' if kind == 'downsamplers' else head}{tail}"
    if kind == "upsamplers":
        sub = 2 if config.up_block_types[int(level)].startswith("CrossAttn") else 1
    return f"output_blocks.{index}.{sub}.{head}{tail}"
