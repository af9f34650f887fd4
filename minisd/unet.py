"""The UNet: given noisy latents, how noisy they are, and a text, it predicts the noise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.attention import SpatialTransformer
from minisd.blocks import Downsample, ResBlock, Upsample, silu
from minisd.config import UNetConfig


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Turn each timestep into a fan of cosines, then sines, at geometrically falling frequencies.

    timesteps (n,) -> (n, dim), float32. Source: Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B.
    """
    # ωᵢ = 10000^(−i / half);  embedding = [cos(t ω₀) … cos(t ω_half−1), sin(t ω₀) …]
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Two linear layers that let the network use the timestep. (n, dim) -> (n, 4·dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, 4 * dim)
        self.linear_2 = nn.Linear(4 * dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def _transformer(config: UNetConfig, level: int) -> SpatialTransformer:
    return SpatialTransformer(
        config.block_out_channels[level],
        config.heads[level],
        config.cross_attention_dim,
        config.norm_num_groups,
        config.use_linear_projection,
        config.upcast_attention,
    )


class DownBlock(nn.Module):
    """One level on the way down: residual blocks, each with attention where the level has it, then half the size.

    Returns the output and every feature map made on the way, which the way up will use. most: stop after so many maps.
    """

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        widths = config.block_out_channels
        inputs = [widths[max(level - 1, 0)]] + [widths[level]] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(
            ResBlock(width, widths[level], config.norm_num_groups, config.norm_eps, 4 * widths[0]) for width in inputs
        )
        if config.down_block_types[level].startswith("CrossAttn"):
            self.attentions = nn.ModuleList(_transformer(config, level) for _ in inputs)
        if level < len(widths) - 1:
            self.downsamplers = nn.ModuleList([Downsample(widths[level], padding=1)])

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor, most: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        skips: list[Tensor] = []
        for i, resnet in enumerate(self.resnets):
            if i == most:
                return x, skips
            x = resnet(x, time)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
            skips.append(x)
        if hasattr(self, "downsamplers") and most != len(self.resnets):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the bottom of the U."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.attentions = nn.ModuleList([_transformer(config, -1)])
        self.resnets = nn.ModuleList(
            ResBlock(width, width, config.norm_num_groups, config.norm_eps, 4 * config.block_out_channels[0])
            for _ in range(2)
        )

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), context)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One level on the way up: each residual block first takes back, as extra channels, a map saved on the way down.

    layers: run only these of its residual blocks, each with its attention; twice the size comes after the last one.
    """

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        widths, layers = config.block_out_channels, config.layers_per_block + 1
        below = widths[min(level + 1, len(widths) - 1)]
        inputs = [below] + [widths[level]] * (layers - 1)
        skips = [widths[level]] * (layers - 1) + [widths[max(level - 1, 0)]]
        self.resnets = nn.ModuleList(
            ResBlock(a + b, widths[level], config.norm_num_groups, config.norm_eps, 4 * widths[0])
            for a, b in zip(inputs, skips, strict=True)
        )
        if config.up_block_types[len(widths) - 1 - level].startswith("CrossAttn"):
            self.attentions = nn.ModuleList(_transformer(config, level) for _ in inputs)
        if level > 0:
            self.upsamplers = nn.ModuleList([Upsample(widths[level])])

    def forward(
        self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor, layers: range | None = None
    ) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            if layers is not None and i not in layers:
                continue
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
        if hasattr(self, "upsamplers") and (layers is None or layers.stop == len(self.resnets)):
            x = self.upsamplers[0](x, size=skips[-1].shape[-2:])
        return x


class UNet(nn.Module):
    """The denoiser of Stable Diffusion, with the parameter names of diffusers' `UNet2DConditionModel`.

    Source: Rombach et al. 2022, section 3.3; Ronneberger et al. 2015, "U-Net", figure 1.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0])
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(len(widths)))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(range(len(widths))))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    @property
    def layers(self) -> int:
        """How many residual blocks there are on the way up, all levels together."""
        return len(self.config.block_out_channels) * (self.config.layers_per_block + 1)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        layers: int | None = None,
        feature: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Latents (n, in_channels, h, w), timesteps (n,) or one, context (n, words, d) -> (n, out_channels, h, w).

        The timesteps lie between 0 and 999 and need not be whole. The output is the predicted noise, or v, as the
        checkpoint was trained.

        layers: return (output, feature), the feature being what the last so many layers of the way up begin with: it
        changes little from one step to the next. feature: begin there with that of an earlier call, and run only those
        layers, and what they need of the way down. Source: Ma et al. 2024, "DeepCache: Accelerating Diffusion Models
        for Free", section 3.2.
        """
        embedding = timestep_embedding(timesteps.reshape(-1), self.config.block_out_channels[0])
        time = self.time_embedding(embedding.to(latents.dtype))
        # channels last: convolutions are faster so, and tokens, (n, pixels, c), are then a view of the map
        x = self.conv_in(latents.contiguous(memory_format=torch.channels_last))
        if layers is not None:
            x, feature = self._reusing(x, time, context, layers, feature)
            return self.conv_out(silu(self.conv_norm_out(x))), feature
        skips = [x]
        for block in self.down_blocks:
            x, new = block(x, time, context)
            skips += new
        x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            x = block(x, skips, time, context)
        return self.conv_out(silu(self.conv_norm_out(x)))

    def _reusing(
        self, x: Tensor, time: Tensor, context: Tensor, layers: int, feature: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """From `conv_in` to the last layer, in two halves: what makes the feature, unless it is given, and the rest."""
        if not 1 <= layers <= self.layers:
            raise ValueError(f"layers={layers}; expected 1 to {self.layers}, all that there are on the way up")
        whole, skips = feature is None, [x]
        for block in self.down_blocks:
            x, new = block(x, time, context, None if whole else layers - len(skips))
            skips += new
        x = self.mid_block(x, time, context) if feature is None else feature
        below = self.layers - layers  # from here to the feature
        for block in self.up_blocks:
            count = self.config.layers_per_block + 1
            cut = min(max(below, 0), count)
            if whole and cut:
                x = block(x, skips, time, context, range(cut))
            feature = x if below == cut < count else feature
            if cut < count:
                x = block(x, skips, time, context, range(cut, count))
            below -= count
        assert feature is not None
        return x, feature
