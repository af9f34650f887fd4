"""Models with random weights, and how far apart two results are. Pairs with other libraries' networks: `pairs.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from minisd import TINY, Autoencoder, StableDiffusion, TextEncoder, Tokenizer, UNet
from minisd.config import ModelConfig

TOLERANCE = 1e-10  # of the output's standard deviation, in float64

Values = dict[str, Any]

# What the published config.json files of Stable Diffusion 1.5 and 2.1 say, typed here once more.
SD1_TEXT: Values = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SD2_TEXT: Values = SD1_TEXT | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
SD1_AUTOENCODER: Values = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD1_UNET: Values = {
    "act_fn": "silu",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD1_INPAINT_UNET: Values = SD1_UNET | {"in_channels": 9}
SD2_UNET: Values = SD1_UNET | {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}

# Small networks of the same kinds. What they leave out (eps, activations …) takes the default on either side.
SMALL_TEXT: Values = {
    "vocab_size": 49408,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
SMALL_TEXT_2: Values = SMALL_TEXT | {"hidden_act": "gelu"}
SMALL_AUTOENCODER: Values = {
    "block_out_channels": [16, 32, 48],
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
SMALL_UNET: Values = {
    "block_out_channels": [32, 48, 64],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
SMALL_UNET_2: Values = SMALL_UNET | {
    "attention_head_dim": [2, 3, 4],
    "use_linear_projection": True,
    "upcast_attention": True,
}

WORDS = ("fox", "cat", "dog", "tree", "house", "snow", "castle", "moon", "river", "stone", "cloud", "bird", "hill")

# A model with everything that the tiny one has, in a thousandth of the work.
SMALL = replace(
    TINY,
    text_encoder=replace(
        TINY.text_encoder, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ),
    autoencoder=replace(TINY.autoencoder, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, sample_size=64),
    unet=replace(
        TINY.unet,
        sample_size=8,
        cross_attention_dim=16,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        attention_head_dim=2,
    ),
)

# FLOPs of Stable Diffusion 1's time embedding for one row: two layers, then one in each of 22 residual blocks, to 320
# channels (5 of them, 2 down and 3 up), 640 (5) and 1280 (12). diffusers computes it for both rows of a guided call.
SD1_TIME_FLOPS = 2 * (320 * 1280 + 1280 * 1280 + 1280 * (5 * 320 + 5 * 640 + 12 * 1280))


def noise(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two outputs, in standard deviations of the second."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float((ours - theirs).detach().abs().max() / theirs.detach().std())


def long_prompt(tokens: int, first: int = 0) -> str:
    """So many words that are one token each."""
    return " ".join(WORDS[(first + i * i) % len(WORDS)] for i in range(tokens))


def last(steps: Iterable[Any]) -> Tensor:
    """The latents that a run ends with."""
    *_, step = steps
    return step.latents


def random_weights(network: nn.Module, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Weights for every key of a network on the meta device, cut from one block of noise (cheaper than drawing).

    Matrices keep the size of what passes, gains of norms lie about 1 and biases about 0, both spread widely.
    """
    length = 1_000_003
    block = torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=dtype).repeat(2)
    weights, start = {}, 0
    for key, parameter in network.state_dict().items():
        start = (start + 7919) % length
        size, cut = parameter.numel(), block[start : start + length]
        values = (cut.repeat(-(-size // length)) if size > length else cut)[:size].view(parameter.shape)
        if parameter.ndim == 1:
            weights[key] = values * 0.3 + ("norm" in key and key.endswith("weight"))
        elif key.endswith("_embedding.weight"):
            weights[key] = values.clone()
        else:
            weights[key] = values * 1.2 / math.sqrt(parameter[0].numel())
    return weights


def write_adapters(folder: Path) -> None:
    """A LoRA of one layer, and a word of two vectors, for models as wide as SMALL."""
    factors = {"lora_A": noise(2, 4, 3, 3, dtype=torch.float32), "lora_B": noise(8, 2, 1, 1, dtype=torch.float32)}
    save_file({f"unet.conv_in.{name}.weight": x for name, x in factors.items()}, folder / "style.safetensors")
    save_file({"<word>": noise(2, 16, dtype=torch.float32)}, folder / "word.safetensors")


def lively_model(config: ModelConfig = SMALL, defaults: Any = None) -> StableDiffusion:
    """A model with random weights, large enough that prompt, picture and mask matter."""
    torch.manual_seed(0)
    parts = TextEncoder(config.text_encoder), UNet(config.unet), Autoencoder(config.autoencoder)
    with torch.no_grad():
        for part in parts:
            for name, parameter in part.named_parameters():
                if parameter.dim() > 1 and "embedding" not in name:
                    parameter.mul_(2)
    text_encoder, unet, autoencoder = (part.eval().requires_grad_(False) for part in parts)
    return StableDiffusion(config, Tokenizer.from_pretrained(), text_encoder, unet, autoencoder, defaults)


def gradient_picture(side: int) -> Image.Image:
    """A picture whose colours change from corner to corner."""
    y, x = np.mgrid[0:side, 0:side]
    return Image.fromarray(np.stack([4 * x, 4 * y, 255 - 2 * (x + y)], -1).clip(0, 255).astype(np.uint8))


def rectangle_mask(side: int) -> Image.Image:
    """A mask that is white in a rectangle off its middle."""
    values = np.zeros((side, side), np.uint8)
    values[16:48, 8:40] = 255
    return Image.fromarray(values)
