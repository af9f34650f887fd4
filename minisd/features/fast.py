"""Drop-in faster layers, mostly for the CPU: `speed_up(model)` swaps layer classes in place.

Parameters and state dicts do not change. Notebook 14 and `minisd bench` measure the speedup of each class.
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

HEAVY = 16  # weights per input element above which a single matmul beats torch's convolution on a CPU
LARGE = 2**18  # input elements above which QuarterUpsample is faster


class ChannelsLastConv(nn.Conv2d):
    """First convolution of a UNet, which converts its input to channels_last; subsequent layers keep that format.

    Convolutions are faster in channels_last, and the tokens (n, pixels, c) are a view of the feature map.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class ChannelsLastOnCPUConv(nn.Conv2d):
    """First convolution of the encoder and decoder, which converts its input to channels_last except on CUDA.

    On CUDA, torch's GroupNorm copies channels_last tensors twice, which takes a fifth of the decoder's time.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.is_cuda else x.contiguous(memory_format=torch.channels_last))


class MatmulConv(nn.Conv2d):
    """3×3 convolution that uses a single matmul on a CPU if it has far more weights than input elements.

    Deep in the UNet, 64 pixels meet 15 million weights, and torch's convolution spends most of its time reordering
    the weights on every call. Unfolding the input into patches and multiplying gives the same sums without that.
    """

    def is_heavy(self, numbers: int) -> bool:
        """Return whether the layer has far more weights than an input of `numbers` elements."""
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
    """Nearest-neighbor upsampling and 3×3 convolution fused into four 2×2 convolutions: 16 multiplications, not 36.

    After 2× upsampling, a 3×3 neighborhood has only 2×2 distinct pixels. Each quarter of the output (every second row
    and column) is therefore a 2×2 convolution whose kernel sums the weights of equal pixels.
    """

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        doubled = (2 * x.shape[-2], 2 * x.shape[-1])
        plain = x.device.type != "cpu" or torch.is_grad_enabled() or x.numel() < LARGE
        plain |= bool(self.conv._forward_hooks or self.conv._forward_pre_hooks)  # such as a LoRA's
        if plain or (size or doubled) != doubled or self.conv.is_heavy(4 * x.numel()):  # type: ignore[operator]
            return super().forward(x, size)
        n, c, h, w = x.shape
        out = x.new_empty(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)
        x, weight = F.pad(x, [1] * 4), self.conv.weight.flatten(2)
        # upsampled rows 2i−1, 2i, 2i+1 are input rows i−1, i, i; upsampled rows 2i, 2i+1, 2i+2 are i, i, i+1
        sums = x.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        for i, j in product(range(2), range(2)):
            quarter = (weight @ torch.kron(sums[i], sums[j]).T).unflatten(2, (2, 2))
            out[:, :, i::2, j::2] = F.conv2d(x[:, :, i : i + h + 1, j : j + w + 1], quarter, self.conv.bias)
        return out


class InPlaceSiLU(nn.SiLU):
    """SiLU that runs in place when gradients are disabled, which is safe because its input is always a norm's output.

    Saves 268 MB in the decoder for a 512×512 image.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())


def speed_up(model: nn.Module) -> None:
    """Swap the layers of a UNet or an autoencoder for faster ones, in place.

    Outputs differ by rounding only, and are deterministic.
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
