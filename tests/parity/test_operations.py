"""What is computed, and how often: counted operator by operator at full size, on shapes alone, beside diffusers.

Times depend on the machine; counts do not. Everything runs in torch's fake mode, as if on a CPU, without numbers.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from models import SD1_AUTOENCODER, SD1_UNET
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minisd import StableDiffusion
from minisd.attention import keep_projections
from minisd.autoencoder import Autoencoder
from minisd.blocks import Conv3x3, Upsample
from minisd.config import SD15
from minisd.unet import UNet

PRODUCTS = ("addmm", "mm", "bmm", "baddbmm", "convolution")  # what a linear layer or a convolution becomes
COPIES = ("clone", "_to_copy", "copy_")
MAYBE = ("to", "contiguous", "reshape")  # in inference mode torch does not say whether they copied


class Counting(TorchDispatchMode):
    """Counts the operators that are called within it, by their names in torch: "addmm", "clone" …"""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        copied = name in MAYBE and result.untyped_storage()._cdata != args[0].untyped_storage()._cdata
        self.calls["clone" if copied else name] += 1
        return result

    def among(self, names: Sequence[str]) -> int:
        return sum(self.calls[name] for name in names)


def counted(make: Callable[[], nn.Module], call: Callable[[Any, Callable[..., torch.Tensor]], object]) -> Counting:
    with FakeTensorMode(), torch.no_grad():
        module = make().eval()
        with Counting() as counting:
            call(module, torch.empty)
    return counting


@pytest.fixture(scope="module")
def steps() -> dict[str, Counting]:
    """A guided step of Stable Diffusion 1.5 at 512×512."""

    def ours(module: UNet, empty: Callable[..., torch.Tensor]) -> None:
        module(empty(2, 4, 64, 64), empty(()), empty(2, 77, 768))

    def theirs(module: Any, empty: Callable[..., torch.Tensor]) -> None:
        module(empty(2, 4, 64, 64), empty(()), empty(2, 77, 768), return_dict=False)

    return {
        "minisd": counted(lambda: UNet(SD15.unet), ours),
        "diffusers": counted(lambda: UNet2DConditionModel.from_config(dict(SD1_UNET)), theirs),
    }


@pytest.fixture(scope="module")
def decodes() -> dict[str, Counting]:
    """Decoding to 512×512."""
    return {
        "minisd": counted(lambda: Autoencoder(SD15.autoencoder), lambda m, empty: m.decode(empty(1, 4, 64, 64))),
        "diffusers": counted(
            lambda: AutoencoderKL.from_config(dict(SD1_AUTOENCODER)),
            lambda m, empty: m.decode(empty(1, 4, 64, 64), return_dict=False),
        ),
    }


def test_every_layer_is_computed_once(steps: dict[str, Counting], decodes: dict[str, Counting]) -> None:
    """As many as diffusers' networks have linear layers and convolutions, and as diffusers computes."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(SD1_UNET))
        vae = AutoencoderKL.from_config(dict(SD1_AUTOENCODER))
    layers = sum(isinstance(module, (nn.Linear, nn.Conv2d)) for module in unet.modules())
    # of the three upsamplings two are done by quarters: four convolutions, and four products for their weights
    assert steps["minisd"].among(PRODUCTS) - 2 * 7 == steps["diffusers"].among(PRODUCTS) == layers == 282
    decoder = [*vae.decoder.modules(), *vae.post_quant_conv.modules()]
    layers = sum(isinstance(module, (nn.Linear, nn.Conv2d)) for module in decoder)
    assert decodes["minisd"].among(PRODUCTS) - 3 * 7 == decodes["diffusers"].among(PRODUCTS) == layers


def test_attention_is_fused_and_nothing_else_is_computed_twice(steps: dict[str, Counting]) -> None:
    ours, theirs = steps["minisd"].calls, steps["diffusers"].calls
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    for name in (attention, "native_group_norm", "native_layer_norm", "gelu", "add", "cat"):
        assert 0 < ours[name] <= theirs[name], name
    assert 0 < ours["silu"] + ours["silu_"] <= theirs["silu"]


def test_nothing_is_copied_but_the_patches_of_heavy_convolutions(
    steps: dict[str, Counting], decodes: dict[str, Counting]
) -> None:
    # One copy puts the channels of the latents last. To 1280 channels at 16×16 or 8×8 a convolution is heavy: two in
    # each residual block, of which there are 2 and 2 on the way down, 2 in the middle, 3 and 3 on the way up; and those
    # from 16×16 to 8×8 and back. Upsampling by quarters copies four little tables, of 4 by 9 numbers.
    heavy = 2 * (2 + 2 + 2 + 3 + 3) + 2
    assert steps["minisd"].among(COPIES) == 1 + heavy + 2 * 4
    assert decodes["minisd"].among(COPIES) == 1 + 3 * 4


def test_the_words_are_projected_once() -> None:
    """A second step with the same context has two products less for each of the 16 layers that attend to words."""
    with FakeTensorMode(), torch.no_grad():
        unet = UNet(SD15.unet).eval()
        words, products, kept = torch.empty(2, 77, 768), [], {}
        for context in (words, words, words.clone()):
            with Counting() as step, keep_projections(kept):
                unet(torch.empty(2, 4, 64, 64), torch.empty(()), context)
            products.append(step.among(PRODUCTS))
    assert len(kept) == 16 and products == [282 + 2 * 7, 282 - 32 + 2 * 7, 282 + 2 * 7]


def test_a_step_of_the_sampler_adds_next_to_nothing() -> None:
    """Beside the UNet: arithmetic of latents with Python's numbers, and two looks for NaN, of UNet and of latents."""
    sd = StableDiffusion.from_pretrained()
    counts = []
    for steps in (3, 4):
        run = sd.denoise("a fox", num_inference_steps=steps, seed=0)
        with Counting() as counting:
            for _ in run:
                pass
        counts.append(counting)
    with torch.inference_mode():
        x, t = torch.zeros(2, 4, 16, 16), torch.tensor(1.0)
        words, kept = torch.zeros(2, 77, sd.config.text_encoder.hidden_size), {}
        for _ in range(2):
            with Counting() as unet, keep_projections(kept):
                sd.unet(x, t, words)
    step = Counter(counts[1].calls)
    step.subtract(counts[0].calls)
    step.subtract(unet.calls)
    assert step["is_nonzero"] + step["_local_scalar_dense"] == 2  # where a GPU is waited for
    assert step["clone"] == 1 and step["_to_copy"] == step["lift_fresh"] == 0  # the copy of the prediction
    assert min(step.values()) == 0 and 0 < sum(step.values()) < 50


def test_the_convolution_as_a_product_is_the_convolution() -> None:
    """Both ways of computing it, in float64; odd sides, both strides, and the padding that the autoencoder does."""
    torch.manual_seed(0)
    for stride, padding in ((1, 1), (2, 1), (2, 0)):
        layer = Conv3x3(48, 40, stride=stride, padding=padding).double()
        for sides in ((3, 3), (5, 4), (8, 8)):
            x = torch.randn(2, 48, *sides, dtype=torch.float64)
            with Counting() as counting:
                y = layer(x)
            heavy = 16 * x.numel() <= 9 * 48 * 40
            assert (counting.calls["convolution"] == 0) == heavy
            expected = nn.functional.conv2d(x, layer.weight, layer.bias, stride, padding)
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("sides", [(30, 20), (17, 33)])
def test_upsampling_by_quarters_is_upsampling(sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, beside torch's own repetition and convolution."""
    torch.manual_seed(0)
    layer, x = Upsample(12).double(), torch.randn(2, 12, *sides, dtype=torch.float64)
    expected = layer.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    monkeypatch.setattr("minisd.blocks.LARGE", 0)
    with Counting() as counting, torch.no_grad():
        found = layer(x)
    assert counting.calls["convolution"] == 4 and counting.calls["upsample_nearest2d"] == 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    # who listens to the convolution, or adds to what it returns as a LoRA does, is heard
    handle = layer.conv.register_forward_hook(lambda module, inputs, output: output + 1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected + 1, rtol=0, atol=1e-13)
    handle.remove()
    odd = (2 * sides[0] - 1, 2 * sides[1])
    expected = layer.conv(nn.functional.interpolate(x, size=odd, mode="nearest"))
    with torch.no_grad():
        torch.testing.assert_close(layer(x, odd), expected, rtol=0, atol=1e-13)
