"""DeepCache: between two full calls of the UNet, run only its last layers, on the feature that the deep ones left.

From one step to the next the deep feature changes little, so most calls can do without computing it again.
Source: Ma et al. 2024, "DeepCache: Accelerating Diffusion Models for Free", sections 3.2 and 3.3 (1:N uniform).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minisd.unet import DownBlock, UNet, UpBlock


def count_up_layers(unet: UNet) -> int:
    """Count the residual blocks on the way up, over all levels: the largest depth."""
    return len(unet.config.block_out_channels) * (unet.config.layers_per_block + 1)


class DeepCache:
    """A UNet that is called like the one it wraps, for the calls of one run in order.

    Args:
        unet: the UNet to call.
        interval: the first call and every `interval`-th after it are full; 1 makes every call full.
        depth: the other calls run this many of the last layers on the way up, and what they need of the way down.
        compile_options: of torch.compile, to compile both kinds of call; None does not compile.
    """

    def __init__(self, unet: UNet, interval: int, depth: int, compile_options: Mapping[str, Any] | None = None) -> None:
        if not 1 <= depth <= count_up_layers(unet):
            raise ValueError(f"depth={depth}; expected 1 to {count_up_layers(unet)}, the layers on the way up")
        self.unet, self.interval, self.depth = unet, interval, depth
        self.feature: Tensor | None = None
        self.age = 0
        self._full: Callable[..., Any] = run_full
        self._last: Callable[..., Any] = run_last
        if compile_options is not None:
            self._full, self._last = (torch.compile(run, **compile_options) for run in (run_full, run_last))

    def __call__(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Predict as `UNet.forward` does, full or from the cached feature.

        Without guidance the batch is half as large: the cached feature's second half belongs to the prompts.
        """
        rows = len(latents)
        if self.feature is None or self.age >= self.interval or len(self.feature) < rows:
            x, self.feature = self._full(self.unet, latents, timesteps, context, self.depth)
            self.age = 0
        else:
            x = self._last(self.unet, latents, timesteps, context, self.depth, self.feature[-rows:])
        self.age += 1
        return x


def run_full(unet: UNet, latents: Tensor, timesteps: Tensor, context: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Run the whole UNet; return its output and the feature that the last `depth` layers begin with."""
    time = unet.embed_time(timesteps, latents.dtype)
    x = unet.conv_in(latents)
    skips = [x]
    for run_down in down_layers(unet):
        x = run_down(x, time, context)
        skips.append(x)
    x = unet.mid_block(x, time, context)
    layers = up_layers(unet)
    for run_up in layers[:-depth]:
        x = run_up(x, skips, time, context)
    feature = x
    for run_up in layers[-depth:]:
        x = run_up(x, skips, time, context)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x))), feature


def run_last(unet: UNet, latents: Tensor, timesteps: Tensor, context: Tensor, depth: int, feature: Tensor) -> Tensor:
    """Run the first layers on the way down, then the last `depth` layers on the way up, from a cached feature."""
    time = unet.embed_time(timesteps, latents.dtype)
    x = unet.conv_in(latents)
    skips = [x]
    for run_down in down_layers(unet)[: depth - 1]:
        x = run_down(x, time, context)
        skips.append(x)
    x = feature
    for run_up in up_layers(unet)[-depth:]:
        x = run_up(x, skips, time, context)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def down_layers(unet: UNet) -> list[DownLayer]:
    """The layers on the way down, one for each skip connection after the first."""
    layers: list[DownLayer] = []
    for block in unet.down_blocks:
        assert isinstance(block, DownBlock)
        layers += [DownLayer(*pair) for pair in zip(block.resnets, block.attentions, strict=True)]
        layers += [DownLayer(downsample) for downsample in block.downsamplers]
    return layers


def up_layers(unet: UNet) -> list[UpLayer]:
    """The layers on the way up; the last one of a level upsamples."""
    layers: list[UpLayer] = []
    for block in unet.up_blocks:
        assert isinstance(block, UpBlock)
        level = [UpLayer(*pair) for pair in zip(block.resnets, block.attentions, strict=True)]
        for upsample in block.upsamplers:
            level[-1] = level[-1]._replace(upsample=upsample)
        layers += level
    return layers


class DownLayer(NamedTuple):
    """A residual block with its attention, or a downsampling."""

    module: nn.Module
    attention: nn.Module | None = None

    def __call__(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.module(x) if self.attention is None else self.attention(self.module(x, time), context)


class UpLayer(NamedTuple):
    """A residual block with its attention, which takes its skip connection from the end of a list."""

    resnet: nn.Module
    attention: nn.Module
    upsample: nn.Module | None = None

    def __call__(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        x = self.attention(self.resnet(torch.cat([x, skips.pop()], dim=1), time), context)
        return x if self.upsample is None else self.upsample(x, size=skips[-1].shape[-2:])
