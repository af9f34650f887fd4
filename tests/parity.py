"""Pairs of networks, ours and diffusers' or transformers', with the same random weights; how far apart they are.

Random weights make weak tests: most mistakes hide below rounding. The weights here are large enough, and the small
networks in double precision, so that every mistake of `test_mutations.py` shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from minisd.autoencoder import Autoencoder
from minisd.config import AutoencoderConfig, ModelConfig, TextEncoderConfig, UNetConfig
from minisd.io.configs import read_config
from minisd.io.diffusers_folder import Defaults
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet

TOLERANCE = 1e-10  # of the output's standard deviation, in float64
FULL_SIZE_TOLERANCE = 1e-5  # the same, in float32

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


class Pair(NamedTuple):
    """One network twice: ours, and the reference's."""

    ours: Any
    theirs: Any


def clip_config(values: Values) -> CLIPTextConfig:
    return CLIPTextConfig(**values, bos_token_id=49406, eos_token_id=49407, pad_token_id=1)


def meta_text_encoders(values: Values) -> Pair:
    with torch.device("meta"):
        return Pair(TextEncoder(read_config(TextEncoderConfig, values)), CLIPTextModel(clip_config(values)))


def meta_autoencoders(values: Values) -> Pair:
    with torch.device("meta"):
        return Pair(Autoencoder(read_config(AutoencoderConfig, values)), AutoencoderKL.from_config(dict(values)))


def meta_unets(values: Values) -> Pair:
    with torch.device("meta"):
        return Pair(UNet(read_config(UNetConfig, values)), UNet2DConditionModel.from_config(dict(values)))


def text_encoders(values: Values, dtype: torch.dtype = torch.float64) -> Pair:
    """Two text encoders that share their weights."""
    pair = meta_text_encoders(values)
    weights = random_weights(pair.theirs, dtype)
    pair.ours.load_state_dict({f"text_model.{key}": value for key, value in weights.items()}, assign=True)
    pair.theirs.load_state_dict(weights, assign=True)
    pair.theirs.embeddings.position_ids = torch.arange(77)[None]  # not in the state dict
    return frozen(pair)


def autoencoders(values: Values, dtype: torch.dtype = torch.float64) -> Pair:
    """Two autoencoders that share their weights."""
    return shared(meta_autoencoders(values), dtype)


def unets(values: Values, dtype: torch.dtype = torch.float64) -> Pair:
    """Two UNets that share their weights."""
    return shared(meta_unets(values), dtype)


def shared(pair: Pair, dtype: torch.dtype) -> Pair:
    weights = random_weights(pair.theirs, dtype)
    for network in pair:
        network.load_state_dict(weights, assign=True)
    return frozen(pair)


def frozen(pair: Pair) -> Pair:
    for network in pair:
        network.eval().requires_grad_(False)
    return pair


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


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two outputs, in standard deviations of the second."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float((ours - theirs).detach().abs().max() / theirs.detach().std())


def noise(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.inference_mode()
def text_difference(pair: Pair) -> float:
    """Over two rows of token ids, one a short prompt, one that fills the 77 tokens."""
    ids = torch.randint(0, 49406, (2, 77), generator=torch.Generator().manual_seed(2))
    ids[:, 0], ids[0, 6:], ids[1, 76] = 49406, 49407, 49407
    return difference(pair.ours(ids), pair.theirs(ids).last_hidden_state)


@torch.inference_mode()
def encode_difference(pair: Pair, height: int = 40, width: int = 24, n: int = 2) -> float:
    """Over the mean and the log-variance that the encoder gives for pictures in [-1, 1]."""
    images = noise(n, 3, height, width, dtype=dtype_of(pair)).clamp(-1, 1)
    ours, theirs = pair.ours.encode(images), pair.theirs.encode(images).latent_dist
    return max(difference(ours.mean, theirs.mean), difference(ours.logvar, theirs.logvar))


@torch.inference_mode()
def decode_difference(pair: Pair, height: int = 10, width: int = 6, n: int = 2) -> float:
    """Over the pictures decoded from latents."""
    latents = noise(n, 4, height, width, dtype=dtype_of(pair))
    return difference(pair.ours.decode(latents), pair.theirs.decode(latents).sample)


@torch.inference_mode()
def unet_difference(
    pair: Pair, height: int = 12, width: int = 8, timesteps: float | list[float] = 500, words: int = 77
) -> float:
    """Over the predictions for as many latents as there are timesteps."""
    n = len(timesteps) if isinstance(timesteps, list) else 1
    config, dtype = pair.theirs.config, dtype_of(pair)
    latents = noise(n, config.in_channels, height, width, dtype=dtype)
    context = noise(n, words, config.cross_attention_dim, dtype=dtype, seed=3)
    t = torch.tensor(timesteps)
    return difference(pair.ours(latents, t, context), pair.theirs(latents, t, context).sample)


def dtype_of(pair: Pair) -> torch.dtype:
    return next(pair.ours.parameters()).dtype


def norm_epsilons(network: nn.Module) -> dict[str, float]:
    """The epsilon of every norm, by the name of the layer (without CLIP's prefix)."""
    return {
        name.removeprefix("text_model."): module.eps
        for name, module in network.named_modules()
        if isinstance(module, nn.GroupNorm | nn.LayerNorm)
    }


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in network.state_dict().items()}


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def lively_model(config: ModelConfig, defaults: Defaults | None = None) -> StableDiffusion:
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


# FLOPs of Stable Diffusion 1's time embedding for one row: two layers, then one in each of 22 residual blocks, to 320
# channels (5 of them, 2 down and 3 up), 640 (5) and 1280 (12). diffusers computes it for both rows of a guided call.
SD1_TIME_FLOPS = 2 * (320 * 1280 + 1280 * 1280 + 1280 * (5 * 320 + 5 * 640 + 12 * 1280))

# What channels last costs: for that layout torch's GroupNorm on a CPU adds up the squares of a group in float32, one
# after the other, a million of them for a picture of 512×512; its result is off by up to 3e-4 there, and by 5e-7 in the
# other layout (`test_what_channels_last_costs`).
LAYOUT_TOLERANCE = 5e-4
# With norms in float64 in both networks only rounding is left, of kernels that add in another order: so measured,
# diffusers' decoder differs by 1.6e-5 from itself in the other layout.
KERNEL_TOLERANCE = 3e-5


@contextmanager
def norms_in_float64() -> Iterator[None]:
    """Within this block every GroupNorm, of either library, computes in float64."""

    def forward(self: nn.GroupNorm, x: Tensor) -> Tensor:
        return F.group_norm(x.double(), self.num_groups, self.weight.double(), self.bias.double(), self.eps).to(x.dtype)

    with mock.patch.object(nn.GroupNorm, "forward", forward):
        yield
