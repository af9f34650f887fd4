"""Pairs of networks, ours and diffusers' or transformers', with the same random weights; how far apart they are.

Random weights make weak tests: most mistakes hide below rounding. The weights here are large enough, and the small
networks in double precision, so that every mistake of `test_mutations.py` shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from models import Values, difference, noise, random_weights
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from minisd.autoencoder import Autoencoder
from minisd.config import AutoencoderConfig, TextEncoderConfig, UNetConfig
from minisd.io.configs import read_config
from minisd.text_encoder import TextEncoder
from minisd.unet import UNet

FULL_SIZE_TOLERANCE = 1e-5  # of the output's standard deviation, in float32


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
