"""TAESD: a small autoencoder for the latents of Stable Diffusion, without attention and norms.

It decodes with a small fraction of the multiplications of the KL autoencoder, and loses some detail.
Source: https://github.com/madebyollin/taesd; parameter names follow diffusers' `AutoencoderTiny`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from minisd.autoencoder import Autoencoder, Gaussian
from minisd.config import AutoencoderConfig


@dataclass(frozen=True)
class TinyAutoencoderConfig(AutoencoderConfig):
    """TAESD. Its latents are the scaled ones of Stable Diffusion, so its scaling factor is 1.

    All levels have the same width. `has_encoder` is False for a decoder on its own.
    """

    block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    norm_num_groups: int = 1
    scaling_factor: float = 1.0
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    has_encoder: bool = True


class Block(nn.Module):
    """Three convolutions with a residual connection. (n, c, h, w) -> (n, c, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """Encoder from images (n, 3, h, w) in [-1, 1] to scaled latents (n, 4, h/8, w/8)."""

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        width, layers = config.block_out_channels[0], list[nn.Module]()
        for level, blocks in enumerate(config.num_encoder_blocks):
            first = nn.Conv2d(config.in_channels, width, 3, padding=1)
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False) if level else first)
            layers += [Block(width) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, config.latent_channels, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((images + 1) / 2)  # type: ignore[no-any-return]


class TinyDecoder(nn.Module):
    """Decoder from scaled latents (n, 4, h/8, w/8) to images (n, 3, h, w), approximately in [-1, 1], not clipped."""

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        width = config.block_out_channels[0]
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for blocks, following in pairwise((*config.num_decoder_blocks, None)):
            layers += [Block(width) for _ in range(blocks or 0)]
            if following is not None:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(self, latents: Tensor) -> Tensor:
        # 3 tanh(z/3) limits outliers
        return 2 * self.layers(3 * torch.tanh(latents / 3)) - 1  # type: ignore[no-any-return]


class TinyAutoencoder(Autoencoder):
    """TAESD, with the interface of `Autoencoder`."""

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.encoder = TinyEncoder(config) if config.has_encoder else None  # type: ignore[assignment]
        self.decoder = TinyDecoder(config)  # type: ignore[assignment]

    def encode(self, images: Tensor) -> Gaussian:
        """Encode images (n, 3, h, w) in [-1, 1] to latents (n, 4, h/8, w/8), as a Gaussian of variance exp(-30).

        Raises ValueError if only the decoder was loaded.
        """
        if self.encoder is None:
            raise ValueError("this autoencoder has only a decoder; put taesd_encoder beside it to start from images")
        mean = self.encoder(images)
        return Gaussian(mean, torch.full_like(mean, -30))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (n, 4, h/8, w/8) to images (n, 3, h, w), approximately in [-1, 1], not clipped."""
        return self.decoder(latents)
