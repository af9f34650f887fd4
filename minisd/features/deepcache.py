"""DeepCache: between two full calls of the UNet, run only its last layers, on the feature that the deep ones left.

From one step to the next the deep feature changes little, so most calls can do without computing it again.
Source: Ma et al. 2024, "DeepCache: Accelerating Diffusion Models for Free", sections 3.2 and 3.3 (1:N uniform).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minisd.unet import UNet


def count_up_layers(unet: UNet) -> int:
    """Count the residual blocks on the way up, over all levels: the largest depth."""
    return sum(len(block.resnets) for block in unet.up_blocks)  # type: ignore[arg-type, misc]


class DeepCache:
    """A UNet that is called like the one it wraps, for the calls of one run in order.

    Args:
        unet: the UNet to call.
        interval: the first call and every `interval`-th after it are full; 1 makes every call full.
        depth: the other calls run this many of the last layers on the way up, and what they need of the way down.
        compile_options: of torch.compile, to compile both kinds of call; None does not compile.
    """

    def __init__(
        self, unet: UNet, interval: int, depth: int, compile_options: Mapping[str, Any] | None = None
    ) -> None:
        if not 1 <= depth <= count_up_layers(unet):
            raise ValueError(f"depth={depth}; expected 1 to {count_up_layers(unet)}, the layers on the way up")
        self.unet, self.interval, self.depth = unet, interval, depth
        self.feature: Tensor | None = None
        self.age = 0
        self._full, self._last = run_full, run_last
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
    for layer in down_layers(unet, time, context):
        x = layer(x)
        skips.append(x)
    x = unet.mid_block(x, time, context)
    layers = list(up_layers(unet, time, context))
    for layer in layers[:-depth]:
        x = layer(x, skips)
    feature = x
    for layer in layers[-depth:]:
        x = layer(x, skips)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x))), feature


def run_last(
    unet: UNet, latents: Tensor, timesteps: Tensor, context: Tensor, depth: int, feature: Tensor
) -> Tensor:
    """Run the first layers on the way down, then the last `depth` layers on the way up, from a cached feature."""
    time = unet.embed_time(timesteps, latents.dtype)
    x = unet.conv_in(latents)
    skips = [x]
    for layer in down_layers(unet, time, context):
        if len(skips) == depth:
            break
        x = layer(x)
        skips.append(x)
    x = feature
    for layer in list(up_layers(unet, time, context))[-depth:]:
        x = layer(x, skips)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def down_layers(unet: UNet, time: Tensor, context: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield the layers on the way down, one for each skip connection after the first."""
    for block in unet.down_blocks:
        for resnet, attention in zip(block.resnets, block.attentions, strict=True):  # type: ignore[arg-type]
            yield lambda x, resnet=resnet, attention=attention: attention(resnet(x, time), context)
        yield from block.downsamplers  # type: ignore[misc]


def up_layers(unet: UNet, time: Tensor, context: Tensor) -> Iterator[Callable[[Tensor, list[Tensor]], Tensor]]:
    """Yield the layers on the way up; each takes its skip connection from the end of the list."""
    for block in unet.up_blocks:
        resnets: nn.ModuleList = block.resnets  # type: ignore[assignment]
        for i, (resnet, attention) in enumerate(zip(resnets, block.attentions, strict=True)):  # type: ignore[arg-type]
            upsamplers = block.upsamplers if i == len(resnets) - 1 else ()

            def layer(
                x: Tensor, skips: list[Tensor], resnet=resnet, attention=attention, upsamplers=upsamplers
            ) -> Tensor:
                x = attention(resnet(torch.cat([x, skips.pop()], dim=1), time), context)
                for upsample in upsamplers:
                    x = upsample(x, size=skips[-1].shape[-2:])
                return x

            yield layer
