"""DeepCache: reuse the UNet's deep features between full calls, and run only its last layers.

Deep features change little between adjacent steps, so most calls can use cached ones.
Source: Ma et al. 2024, "DeepCache: Accelerating Diffusion Models for Free", sections 3.2 and 3.3 (1:N uniform).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minisd.unet import DownBlock, UNet, UpBlock


def count_up_layers(unet: UNet) -> int:
    """Return the number of residual blocks in the upsampling path, which is the maximum depth."""
    return len(unet.config.block_out_channels) * (unet.config.layers_per_block + 1)


class DeepCache:
    """Wrapper with the call signature of a UNet, for the consecutive calls of one sampling run.

    Args:
        unet: The UNet to wrap.
        interval: The number of calls per full call, starting with the first. 1 makes every call full.
        depth: The number of final upsampling layers to run in the other calls.
        compile_options: Arguments for `torch.compile`, or None to run in eager mode.
    """

    def __init__(self, unet: UNet, interval: int, depth: int, compile_options: Mapping[str, Any] | None = None) -> None:
        if not 1 <= depth <= count_up_layers(unet):
            raise ValueError(f"depth={depth}; expected 1 to {count_up_layers(unet)}, the number of upsampling layers")
        self.unet, self.interval, self.depth = unet, interval, depth
        self.feature: Tensor | None = None
        self.age = 0
        self._full: Callable[..., Any] = run_full
        self._last: Callable[..., Any] = run_last
        if compile_options is not None:
            self._full, self._last = (torch.compile(run, **compile_options) for run in (run_full, run_last))

    def __call__(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Predict like `UNet.forward`, with a full call or from the cached feature.

        Without guidance the batch is half as large; the second half of the cached feature is that of the prompts.
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
    """Run the full UNet, and return its output and the input feature of the last `depth` layers."""
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
    """Run the first downsampling layers, then the last `depth` upsampling layers from a cached feature."""
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
    """Return the layers of the downsampling path, one per skip connection after the first."""
    layers: list[DownLayer] = []
    for block in unet.down_blocks:
        assert isinstance(block, DownBlock)
        layers += [DownLayer(*pair) for pair in zip(block.resnets, block.attentions, strict=True)]
        layers += [DownLayer(downsample) for downsample in block.downsamplers]
    return layers


def up_layers(unet: UNet) -> list[UpLayer]:
    """Return the layers of the upsampling path; the last layer of each level includes the upsampler."""
    layers: list[UpLayer] = []
    for block in unet.up_blocks:
        assert isinstance(block, UpBlock)
        level = [UpLayer(*pair) for pair in zip(block.resnets, block.attentions, strict=True)]
        for upsample in block.upsamplers:
            level[-1] = level[-1]._replace(upsample=upsample)
        layers += level
    return layers


class DownLayer(NamedTuple):
    """A residual block with its attention, or a downsampler."""

    module: nn.Module
    attention: nn.Module | None = None

    def __call__(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.module(x) if self.attention is None else self.attention(self.module(x, time), context)


class UpLayer(NamedTuple):
    """A residual block with its attention. Pops its skip connection from the end of `skips`."""

    resnet: nn.Module
    attention: nn.Module
    upsample: nn.Module | None = None

    def __call__(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        x = self.attention(self.resnet(torch.cat([x, skips.pop()], dim=1), time), context)
        return x if self.upsample is None else self.upsample(x, size=skips[-1].shape[-2:])
