"""Drop-in faster layers, mostly for the CPU: `speed_up(model)` swaps layer classes in place.

Parameters and state dicts do not change. Notebook 14 and `minisd bench` measure the speedup of each class.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from minisd.autoencoder import Decoder, Encoder
from minisd.blocks import Upsample
from minisd.unet import UNet

HEAVY = 16  # weights per input element above which a single matmul beats torch's convolution on a CPU
LARGE = 2**18  # input elements above which QuarterUpsample is faster
MANY = 2**27  # multiplications above which oneDNN's preparations no longer matter
TOLERANCE = 1e-5  # of the root mean square; float32 has 3e-7, float32 rounded to bfloat16 2e-3


def capabilities() -> Mapping[str, Any]:
    """Return what torch knows about this CPU, such as "cpu_name" and "avx512_f"; empty for old versions of torch."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    return {} if ask is None else ask()


def has_bfloat16(cpu: Mapping[str, Any]) -> bool:
    """Return whether a CPU multiplies in bfloat16, with AMX or AVX-512."""
    return bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))


@cache
def onednn_is_faster() -> bool:
    """Return whether large float32 products go through oneDNN: on CPUs by AMD with AVX-512, if it is as exact there.

    torch multiplies float32 matrices with MKL. On two cores of a Zen 5 MKL reached 220 GFLOP/s and oneDNN, which torch
    has too, 456. On an Intel Xeon and on a Zen 3, which has no AVX-512, both are equally fast within a few percent.

    The choice depends on the CPU alone and not on a timing, so that equal settings give equal images. Exactness is
    checked against float64: a setting of torch, or another CPU, may make oneDNN round float32 to bfloat16.
    """
    cpu = capabilities()
    amd = str(cpu.get("cpu_name", "")).startswith("AMD") and cpu.get("avx512_f")
    return bool(amd and torch.backends.mkldnn.is_available() and onednn_is_exact())


def onednn_is_exact() -> bool:
    """Return whether oneDNN's float32 product is as near to that in float64 as float32 allows."""
    random = torch.Generator().manual_seed(0)
    with unset_fake_temporarily():  # with numbers, where the caller counts without
        x, weight = (torch.randn(64, 512, generator=random) for _ in range(2))
        exact = x.double() @ weight.double().T
        error = (onednn_linear(x, weight, None) - exact).square().mean().sqrt()
        return bool(error < TOLERANCE * exact.square().mean().sqrt())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `F.linear`: x (…, in), weight (out, in), bias (out,) -> (…, out), with the faster library on a CPU.

    Without numbers, in torch's fake mode, it is torch's own product, so that operators are counted alike on every CPU.
    """
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled() or isinstance(x, FakeTensor)
    if plain or x.numel() * len(weight) < MANY or torch.compiler.is_compiling() or not onednn_is_faster():
        return F.linear(x, weight, bias)
    return onednn_linear(x, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `F.linear` on a CPU with oneDNN, which has no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class FastLinear(nn.Linear):
    """Linear layer that multiplies with the faster library, see `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


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
        out = linear(rows, self.weight.flatten(1), self.bias)
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
        elif type(module) is nn.Linear and onednn_is_faster():
            module.__class__ = FastLinear
        elif isinstance(module, UNet):
            module.conv_in.__class__ = ChannelsLastConv
        elif isinstance(module, (Encoder, Decoder)):
            module.conv_in.__class__ = ChannelsLastOnCPUConv
        for name, child in module.named_children():
            if type(child) is nn.Conv2d and name in ("conv", "conv1", "conv2"):
                child.__class__ = MatmulConv
