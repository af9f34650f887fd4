"""The convolutional pieces that the autoencoder and the UNet share: residual block, downsampling, upsampling."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

LARGE = 2**18  # numbers in a map
HEAVY = 16  # weights for each number of the map, from which on a convolution on a CPU is better one matrix product


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x), element by element. Where no gradient is wanted it takes the place of x in memory.

    So x must be the caller's own, such as what a norm returned: in the decoder that is 268 MB for one picture.
    """
    return F.silu(x, inplace=not torch.is_grad_enabled())


def in_order(x: Tensor) -> Tensor:
    """Pictures or latents in the order in memory in which the autoencoder is fastest: on a CPU with channels last.

    On CUDA torch's GroupNorm, which knows the other order only, would copy every map twice: a fifth of the time.
    """
    return x if x.is_cuda else x.contiguous(memory_format=torch.channels_last)


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution. On a CPU, where the weights far outnumber the map, it is done as one matrix product.

    Deep in the UNet 64 pixels meet 15 million weights, and torch's convolution, which puts the weights into an order of
    its own at each call, spends most of its time on that. Every pixel's neighbourhood in a row, times the weights as
    they are, gives the same sums. (n, in_channels, h, w) -> (n, out_channels, h/stride, w/stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, padding: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding)

    def is_heavy(self, numbers: int) -> bool:
        """Whether the weights far outnumber a map of so many numbers."""
        return self.weight.numel() >= HEAVY * numbers

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.is_heavy(x.numel()):
            return super().forward(x)
        padding, stride = self.padding[0], self.stride[0]
        x = F.pad(x, [padding] * 4)  # type: ignore[list-item]
        patches = x.unfold(2, 3, stride).unfold(3, 3, stride)
        n, _, h, w = patches.shape[:4]
        rows = rearrange(patches, "n c h w i j -> (n h w) (c i j)")
        out = F.linear(rows, self.weight.flatten(1), self.bias)
        return rearrange(out, "(n h w) o -> n o h w", n=n, h=h, w=w)


class ResBlock(nn.Module):
    """Norm, SiLU, 3×3 convolution, twice, added to the input; in the UNet the time embedding is added in between.

    x (n, in_channels, h, w), time (n, time_dim) or None -> (n, out_channels, h, w).
    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", figure 1(b); Ho et al. 2020, appendix B.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, eps: float, time_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        if time_dim is not None:
            self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = Conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = silu(self.norm2(h))  # a name for each map would keep them all in memory
        h = self.conv2(h)
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Downsample(nn.Module):
    """Halve height and width by a convolution of stride 2. (n, c, h, w) -> (n, c, h/2, w/2).

    The UNet pads one pixel on every side. The autoencoder's encoder pads only right and below (`padding=0`): with the
    wrong one every shape is kept, and every picture shifts.
    """

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Repeat pixels to the given height and width, by default twice the input's, then convolve.

    (n, c, h, w) -> (n, c, *size).

    Where every pixel is repeated in a square, a 3×3 neighbourhood holds only 2×2 different ones. So for large maps on a
    CPU four convolutions of 2×2, with the weights of equal pixels added up, write every second row and column each: the
    same sums in 16 products for 36.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        twice = (2 * x.shape[-2], 2 * x.shape[-1])
        plain = x.device.type != "cpu" or torch.is_grad_enabled() or x.numel() < LARGE
        plain |= bool(self.conv._forward_hooks or self.conv._forward_pre_hooks)  # such as a LoRA's: it must be called
        if plain or (size or twice) != twice or self.conv.is_heavy(4 * x.numel()):
            return self.conv(F.interpolate(x, size=size or twice, mode="nearest"))
        return self._by_quarters(x)

    def _by_quarters(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        out = x.new_empty(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)
        x, weight = F.pad(x, [1] * 4), self.conv.weight.flatten(2)
        # what pixels 2i−1, 2i, 2i+1 show is, of the input, i−1, i, i; what 2i, 2i+1, 2i+2 show is i, i, i+1
        sums = x.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        for i, j in product(range(2), range(2)):
            quarter = (weight @ torch.kron(sums[i], sums[j]).T).unflatten(2, (2, 2))
            seen = x[:, :, i : i + h + 1, j : j + w + 1]
            out[:, :, i::2, j::2] = F.conv2d(seen, quarter, self.conv.bias)
        return out
