"""The autoencoder: encodes images into latents with 48× fewer values, and decodes them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from minisd.attention import Attention
from minisd.blocks import Downsample, ResBlock, Upsample
from minisd.config import AutoencoderConfig

EPS = 1e-6  # GroupNorm epsilon of the autoencoder; the UNet's residual blocks use 1e-5


@dataclass(frozen=True)
class Gaussian:
    """Diagonal Gaussian over latents, the approximate posterior: mean and log-variance, both (n, 4, h/8, w/8).

    Source: Kingma and Welling 2014, "Auto-Encoding Variational Bayes", section 3 and appendix B.
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return a sample, mean + std · noise, given unit Gaussian noise of the same shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """Return the KL divergence from the unit Gaussian in nats, summed over the latents of each image, (n,)."""
        # KL = ½ Σ (μ² + σ² − 1 − log σ²)
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class PixelAttention(Attention):
    """Single-head self-attention over pixels, with a residual connection. (n, c, h, w) -> (n, c, h, w)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        tokens = rearrange(self.group_norm(x), "n c h w -> n (h w) c")
        return x + rearrange(super().forward(tokens), "n (h w) c -> n c h w", h=x.shape[-2])


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution. (n, c, h, w) -> (n, c, h, w)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)])  # a list to match checkpoint keys
        self.resnets = nn.ModuleList([ResBlock(channels, channels, groups, EPS) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """Residual blocks, followed by 2× downsampling, 2× upsampling or (at the last level) no resampling."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, down: bool = False, up: bool = False
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(ResBlock(a, b, groups, EPS) for a, b in pairwise(widths))
        self.downsamplers = nn.ModuleList([Downsample(out_channels, padding=0)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = block(x)
        return x


class Encoder(nn.Module):
    """Encoder from images (n, 3, h, w) to the concatenated mean and log-variance of latents, (n, 8, h/8, w/8)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(a, b, config.layers_per_block, groups, down=level < len(widths) - 1)
            for level, (a, b) in enumerate(pairwise((widths[0], *widths)))
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Decoder from latents (n, 4, h/8, w/8) to images (n, 3, h, w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(a, b, config.layers_per_block + 1, groups, up=level < len(widths) - 1)
            for level, (a, b) in enumerate(pairwise((widths[0], *widths)))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """KL-regularized autoencoder of Stable Diffusion. Parameter names follow diffusers' `AutoencoderKL`.

    Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> Gaussian:
        """Encode images (n, 3, h, w) in [-1, 1] to a Gaussian over unscaled latents (n, 4, h/8, w/8)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Gaussian(mean, logvar.clamp(-30, 20))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents (n, 4, h/8, w/8) to images (n, 3, h, w), approximately in [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Gaussian]:
        """Return (reconstruction, posterior), decoding the mean, or a sample if unit Gaussian noise is given."""
        posterior = self.encode(images)
        return self.decode(posterior.mean if noise is None else posterior.sample(noise)), posterior
