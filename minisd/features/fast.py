"""Faster layers for the CPU that compute the same: `speed_up(model)` swaps layer classes in place.

Parameters, and so state dicts, stay as they are. What each class saves is measured by `minisd bench` and told in
notebook 14.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minisd.autoencoder import Decoder, Encoder
from minisd.blocks import Upsample
from minisd.unet import UNet

HEAVY = 16  # weights for each number of the map, from which on a convolution on a CPU is better one matrix product
LARGE = 2**18  # numbers in a map, from which on upsampling in quarters pays


class ChannelsLastConv(nn.Conv2d):
    """The first convolution of a UNet: it puts the map into channels-last order, which the layers behind it keep.

    Convolutions are faster so, and tokens, (n, pixels, c), are then a view of the map.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class ChannelsLastOnCPUConv(nn.Conv2d):
    """The first convolution of encoder and decoder: channels last, but not on CUDA.

    There, torch's GroupNorm copies channels-last maps twice, which costs a fifth of the decoder's time.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.is_cuda else x.contiguous(memory_format=torch.channels_last))


class MatmulConv(nn.Conv2d):
    """A 3×3 convolution that is one matrix product on a CPU where the weights far outnumber the map.

    Deep in the UNet 64 pixels meet 15 million weights, and torch's convolution spends most of its time on reordering
    them at each call. The rows of all neighbourhoods, times the weights as they are, give the same sums.
    """

    def is_heavy(self, numbers: int) -> bool:
        """Tell whether the weights far outnumber a map of so many numbers."""
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


class QuarterUpsample(Upsample):
    """Doubling and convolving at once, as four 2×2 convolutions: 16 products for 36.

    Where every pixel is repeated in a square, a 3×3 neighbourhood holds only 2×2 different pixels. Each quarter of the
    output (every second row and column) is a 2×2 convolution with the weights of equal pixels added up.
    """

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        doubled = (2 * x.shape[-2], 2 * x.shape[-1])
        plain = x.device.type != "cpu" or torch.is_grad_enabled() or x.numel() < LARGE
        plain |= bool(self.conv._forward_hooks or self.conv._forward_pre_hooks)  # such as a LoRA's: it must be called
        if plain or (size or doubled) != doubled or self.conv.is_heavy(4 * x.numel()):  # type: ignore[operator]
            return super().forward(x, size)
        n, c, h, w = x.shape
        out = x.new_empty(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)
        x, weight = F.pad(x, [1] * 4), self.conv.weight.flatten(2)
        # rows 2i−1, 2i, 2i+1 of the doubled map are rows i−1, i, i of the map; rows 2i, 2i+1, 2i+2 are i, i, i+1
        sums = x.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        for i, j in product(range(2), range(2)):
            quarter = (weight @ torch.kron(sums[i], sums[j]).T).unflatten(2, (2, 2))
            out[:, :, i::2, j::2] = F.conv2d(x[:, :, i : i + h + 1, j : j + w + 1], quarter, self.conv.bias)
        return out


class InPlaceSiLU(nn.SiLU):
    """SiLU that overwrites its input where no gradient is wanted: the input is always a norm's own output.

    In the decoder that saves 268 MB for a picture of 512×512.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())


def speed_up(model: nn.Module) -> None:
    """Swap the layers of a UNet or an autoencoder for the faster ones, in place.

    The results are the same up to the order of sums, and to the last bit from one call to the next.
    """
    for module in model.modules():
        if type(module) is Upsample:
            module.__class__ = QuarterUpsample
        elif type(module) is nn.SiLU:
            module.__class__ = InPlaceSiLU
        elif isinstance(module, UNet):
            module.conv_in.__class__ = ChannelsLastConv
        elif isinstance(module, (Encoder, Decoder)):
            module.conv_in.__class__ = ChannelsLastOnCPUConv
        for name, child in module.named_children():
            if type(child) is nn.Conv2d and name in ("conv", "conv1", "conv2"):
                child.__class__ = MatmulConv
