"""The UNet of latent consistency models that takes the guidance scale as an input, in place of guidance by two calls.

Source: Luo et al. 2023, "Latent Consistency Models", sections 4.2 and 4.4; parameter names follow diffusers'
`UNet2DConditionModel` with `time_cond_proj_dim`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisd.config import UNetConfig
from minisd.unet import TimeEmbedding, UNet, timestep_embedding


@dataclass(frozen=True)
class LCMUNetConfig(UNetConfig):
    """A UNet with the guidance scale as an input; `time_cond_proj_dim` is the width of its sinusoidal embedding."""

    time_cond_proj_dim: int = 256


class LCMTimeEmbedding(TimeEmbedding):
    """`TimeEmbedding` with a projection of the scale's embedding, which is added to that of the timestep."""

    def __init__(self, dim: int, scale_dim: int) -> None:
        super().__init__(dim)
        self.cond_proj = nn.Linear(scale_dim, dim, bias=False)


class LCMUNet(UNet):
    """UNet whose timesteps have a second column with the guidance scales, (n, 2); `with_scales` adds it."""

    time_embedding: LCMTimeEmbedding

    def __init__(self, config: LCMUNetConfig) -> None:
        super().__init__(config)
        self.scale_dim = config.time_cond_proj_dim
        self.time_embedding = LCMTimeEmbedding(config.block_out_channels[0], config.time_cond_proj_dim)

    def embed_time(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed timesteps and guidance scales, (n, 2) -> (n, 4·c)."""
        if timesteps.dim() != 2:
            raise ValueError("this UNet takes the guidance scale as an input; call it through with_scales(unet, …)")
        t, scales = timesteps.unbind(1)
        embedding = timestep_embedding(t, self.config.block_out_channels[0]).to(dtype)
        return self.time_embedding(
            embedding + self.time_embedding.cond_proj(scale_embedding(scales, self.scale_dim).to(dtype))
        )  # type: ignore[no-any-return]


def scale_embedding(scales: Tensor, dim: int) -> Tensor:
    """Return sinusoidal embeddings (sines, then cosines) of guidance scales, (n,) -> (n, dim), float32."""
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=scales.device) / (half - 1)
    )
    # the paper's w is the scale − 1, and is embedded like a timestep of 1000 w
    angles = 1000 * (scales.float() - 1)[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def with_scales(unet: Callable[..., Tensor], scales: Tensor) -> Callable[..., Tensor]:
    """Return a callable with the signature of a UNet that passes guidance scales, (n,) or (1,), to an `LCMUNet`."""

    def call(latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        rows = torch.stack([timestep.expand(len(latents)), scales.expand(len(latents))], dim=1)
        return unet(latents, rows, context)

    return call
