"""The faster layers for the CPU compute what the plain ones do, with fewer operators."""

from collections import Counter
from copy import deepcopy

import pytest
import torch
from counting import Counting
from models import SMALL, noise, random_weights
from torch import nn
from torch.nn import functional as F

from minisd import Autoencoder, StableDiffusion, UNet
from minisd.blocks import Upsample
from minisd.features.fast import MatmulConv, QuarterUpsample, linear, onednn_is_faster, speed_up


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (2, 0)])
def test_convolution_as_a_product(stride, padding):
    torch.manual_seed(0)
    layer = MatmulConv(48, 40, 3, stride, padding).double()
    for sides in ((3, 3), (5, 4), (8, 8)):
        x = noise(2, 48, *sides)
        with Counting() as counting:
            y = layer(x)
        is_heavy = 16 * x.numel() <= 9 * 48 * 40
        assert (counting.calls["convolution"] == 0) == is_heavy
        expected = nn.functional.conv2d(x, layer.weight, layer.bias, stride, padding)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("sides", [(30, 20), (17, 33)])
@torch.no_grad()
def test_upsampling_by_quarters(sides, monkeypatch):
    torch.manual_seed(0)
    layer, x = Upsample(12).double(), noise(2, 12, *sides)
    expected = layer.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    speed_up(layer)
    assert type(layer) is QuarterUpsample
    monkeypatch.setattr("minisd.features.fast.LARGE", 0)
    with Counting() as counting:
        found = layer(x)
    assert counting.calls["convolution"] == 4 and counting.calls["upsample_nearest2d"] == 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    # hooks on the convolution, such as a LoRA's, are called
    handle = layer.conv.register_forward_hook(lambda module, inputs, output: output + 1)
    torch.testing.assert_close(layer(x), expected + 1, rtol=0, atol=1e-13)
    handle.remove()
    odd = (2 * sides[0] - 1, 2 * sides[1])
    expected = layer.conv(nn.functional.interpolate(x, size=odd, mode="nearest"))
    torch.testing.assert_close(layer(x, odd), expected, rtol=0, atol=1e-13)


@torch.no_grad()
def test_whole_networks(monkeypatch):
    monkeypatch.setattr("minisd.features.fast.LARGE", 0)
    unet, autoencoder = UNet(SMALL.unet).double(), Autoencoder(SMALL.autoencoder).double()
    inputs = noise(2, 4, 8, 8), torch.tensor(300.0), noise(2, 77, 16)
    for network, call in (
        (unet, lambda: unet(*inputs)),
        (autoencoder, lambda: autoencoder.decode(noise(1, 4, 8, 8))),
        (autoencoder, lambda: autoencoder.encode(noise(1, 3, 64, 64)).mean),
    ):
        network.load_state_dict(random_weights(network, torch.float64))
        expected, keys = call(), list(network.state_dict())
        speed_up(network)
        torch.testing.assert_close(call(), expected, rtol=0, atol=1e-12)
        assert list(network.state_dict()) == keys


def test_operators_of_a_step_beside_the_unet():
    """Arithmetic of latents with Python's numbers, and two looks for NaN, at the prediction and at the latents."""
    sd, counts = StableDiffusion.from_pretrained(), []
    for steps in (3, 4):
        run = sd.denoise("a fox", num_inference_steps=steps, seed=0)
        with Counting() as counting:
            for _ in run:
                pass
        counts.append(counting)
    with torch.inference_mode():
        x, words = torch.zeros(2, 4, 24, 24), torch.zeros(2, 77, sd.config.text_encoder.hidden_size)
        with Counting() as unet:
            sd.unet(x, torch.tensor(1.0), words)
    step = Counter(counts[1].calls)
    step.subtract(counts[0].calls)
    step.subtract(unet.calls)
    assert step["is_nonzero"] + step["_local_scalar_dense"] == 2  # where a GPU is waited for
    assert step["clone"] <= 1 and step["_to_copy"] <= 0 and step["lift_fresh"] <= 0
    assert min(step.values()) >= -1 and 0 < sum(step.values()) < 50


@pytest.fixture
def amd(monkeypatch):
    """A machine whose float32 products go through oneDNN, above a small size."""
    onednn_is_faster.cache_clear()
    monkeypatch.setattr("minisd.features.fast.capabilities", lambda: {"cpu_name": "AMD EPYC 9555", "avx512_f": True})
    monkeypatch.setattr("minisd.features.fast.MANY", 0)
    yield
    onednn_is_faster.cache_clear()


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN")
@torch.no_grad()
def test_products_by_onednn(amd):
    assert onednn_is_faster()
    torch.manual_seed(0)
    unet = UNet(SMALL.unet)
    unet.load_state_dict(random_weights(unet, torch.float32))
    exact, inputs = deepcopy(unet).double(), (noise(2, 4, 8, 8), torch.tensor(300.0), noise(2, 77, 16))
    expected = exact(*inputs)
    with Counting() as before:
        error = (unet(*(x.float() for x in inputs)) - expected).abs().max()
    speed_up(unet)
    with Counting() as counting:
        found = unet(*(x.float() for x in inputs))
    assert before.calls["_linear_pointwise"] == 0 < counting.calls["_linear_pointwise"]
    assert (found - expected).abs().max() < 4 * error + 1e-6
    with torch.enable_grad():  # which that operator does not have
        x, weight = noise(3, 5).float(), noise(2, 5).float()
        assert torch.equal(linear(x, weight, None), F.linear(x, weight))


def test_products_stay_where_onednn_rounds(amd, monkeypatch):
    def rounded(x, weight, bias):
        return F.linear(x.bfloat16(), weight.bfloat16()).float()

    monkeypatch.setattr("minisd.features.fast.onednn_linear", rounded)
    assert not onednn_is_faster()
