"""The UNet: predicts noise (or v) from noisy latents, conditioned on the timestep and the text embeddings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.attention import SpatialTransformer
from minisd.blocks import Downsample, ResBlock, Upsample
from minisd.config import UNetConfig


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Return sinusoidal embeddings (cosines, then sines) with geometrically spaced frequencies, (n, dim), float32.

    Source: Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Two-layer MLP applied to the sinusoidal embedding. (n, dim) -> (n, 4·dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, 4 * dim)
        self.linear_2 = nn.Linear(4 * dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class NoAttention(nn.Module):
    """Parameter-free placeholder for the transformer at levels without attention; returns its input."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x


def res_block(config: UNetConfig, in_channels: int, out_channels: int) -> ResBlock:
    time_dim = 4 * config.block_out_channels[0]
    return ResBlock(in_channels, out_channels, config.norm_num_groups, config.norm_eps, time_dim)


def transformer(config: UNetConfig, level: int, block_type: str = "CrossAttn") -> nn.Module:
    if not block_type.startswith("CrossAttn"):
        return NoAttention()
    return SpatialTransformer(
        config.block_out_channels[level],
        config.heads[level],
        config.cross_attention_dim,
        config.norm_num_groups,
        config.use_linear_projection,
        config.upcast_attention,
    )


class DownBlock(nn.Module):
    """One level of the downsampling path: residual blocks with attention, then 2× downsampling (except at the last).

    Returns the output and all intermediate feature maps, which the upsampling path uses as skip connections.
    """

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        widths, kind = config.block_out_channels, config.down_block_types[level]
        width, last = widths[level], level == len(widths) - 1
        inputs = [widths[max(level - 1, 0)]] + [width] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(res_block(config, channels, width) for channels in inputs)
        self.attentions = nn.ModuleList(transformer(config, level, kind) for _ in inputs)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(width, padding=1)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, time), context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.attentions = nn.ModuleList([transformer(config, -1)])
        self.resnets = nn.ModuleList(res_block(config, width, width) for _ in range(2))

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One level of the upsampling path: residual blocks that also take skips, then upsampling except at the top."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        widths, layers = config.block_out_channels, config.layers_per_block + 1
        width, kind = widths[level], config.up_block_types[len(widths) - 1 - level]
        inputs = [widths[min(level + 1, len(widths) - 1)]] + [width] * (layers - 1)
        skips = [width] * (layers - 1) + [widths[max(level - 1, 0)]]
        self.resnets = nn.ModuleList(res_block(config, a + b, width) for a, b in zip(inputs, skips, strict=True))
        self.attentions = nn.ModuleList(transformer(config, level, kind) for _ in inputs)
        self.upsamplers = nn.ModuleList([Upsample(width)] if level > 0 else [])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(torch.cat([x, skips.pop()], dim=1), time), context)
        for upsample in self.upsamplers:
            x = upsample(x, size=skips[-1].shape[-2:])
        return x


class UNet(nn.Module):
    """UNet of Stable Diffusion. Parameter names follow diffusers' `UNet2DConditionModel`.

    Source: Rombach et al. 2022, section 3.3; Ronneberger et al. 2015, "U-Net", figure 1.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        levels = range(len(widths))
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0])
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in levels)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Predict epsilon, v or x0, depending on what the model was trained to predict.

        Args:
            latents: Noisy latents, (n, in_channels, h, w).
            timesteps: Timesteps from 0 to 999, possibly fractional, (n,) or a scalar shared by the batch.
            context: Text embeddings, (n, tokens, d).
        """
        time = self.embed_time(timesteps, latents.dtype)
        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            x, new_skips = block(x, time, context)
            skips += new_skips
        x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            x = block(x, skips, time, context)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))

    def embed_time(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        embedding = timestep_embedding(timesteps.reshape(-1), self.config.block_out_channels[0])
        return self.time_embedding(embedding.to(dtype))
