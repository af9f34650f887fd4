"""Convolutional blocks shared by the autoencoder and the UNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResBlock(nn.Module):
    """Residual block: GroupNorm, SiLU and 3×3 convolution, twice; the UNet adds the time embedding in between.

    x (n, in_channels, h, w), time (n, time_dim) or None -> (n, out_channels, h, w).
    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks"; Ho et al. 2020, appendix B.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, eps: float, time_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.nonlinearity = nn.SiLU()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.nonlinearity(self.norm2(h))
        h = self.conv2(h)
        return h + self.conv_shortcut(x)


class Downsample(nn.Module):
    """2× downsampling by a convolution of stride 2. (n, c, h, w) -> (n, c, h/2, w/2).

    The UNet pads all sides (`padding=1`, h/2 rounded up), the autoencoder right and bottom (`padding=0`, rounded down).
    """

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbor upsampling, 2× or to `size`, and a convolution. (n, c, h, w) -> (n, c, *size)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
