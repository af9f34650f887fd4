"""What is computed, and how often: counted operator by operator at full size, on shapes alone, beside diffusers.

Times depend on the machine; counts do not. Everything runs in torch's fake mode, as if on a CPU, without numbers.
"""

import pytest
import torch
from counting import COPIES, PRODUCTS, Counting
from diffusers import AutoencoderKL, UNet2DConditionModel
from models import SD1_AUTOENCODER, SD1_UNET
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minisd import SD15, Autoencoder, UNet
from minisd.features.fast import speed_up


def counted(make, call) -> Counting:
    with FakeTensorMode(), torch.no_grad():
        module = make().eval()
        if isinstance(module, UNet | Autoencoder):
            speed_up(module)
        with Counting() as counting:
            call(module)
    return counting


@pytest.fixture(scope="module")
def steps() -> dict[str, Counting]:
    """A guided step of Stable Diffusion 1.5 at 512×512."""

    def step(unet, **options):
        unet(torch.empty(2, 4, 64, 64), torch.empty(()), torch.empty(2, 77, 768), **options)

    return {
        "minisd": counted(lambda: UNet(SD15.unet), step),
        "diffusers": counted(
            lambda: UNet2DConditionModel.from_config(dict(SD1_UNET)), lambda unet: step(unet, return_dict=False)
        ),
    }


@pytest.fixture(scope="module")
def decodes() -> dict[str, Counting]:
    """Decoding to 512×512."""
    return {
        "minisd": counted(lambda: Autoencoder(SD15.autoencoder), lambda m: m.decode(torch.empty(1, 4, 64, 64))),
        "diffusers": counted(
            lambda: AutoencoderKL.from_config(dict(SD1_AUTOENCODER)),
            lambda m: m.decode(torch.empty(1, 4, 64, 64), return_dict=False),
        ),
    }


def test_every_layer_is_computed_once(steps, decodes):
    """As many as diffusers' networks have linear layers and convolutions, and as diffusers computes."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(SD1_UNET))
        vae = AutoencoderKL.from_config(dict(SD1_AUTOENCODER))
    layers = sum(isinstance(module, nn.Linear | nn.Conv2d) for module in unet.modules())
    # of the three upsamplings two are done by quarters: four convolutions, and four products for their weights
    assert steps["minisd"].among(PRODUCTS) - 2 * 7 == steps["diffusers"].among(PRODUCTS) == layers == 282
    decoder = [*vae.decoder.modules(), *vae.post_quant_conv.modules()]
    layers = sum(isinstance(module, nn.Linear | nn.Conv2d) for module in decoder)
    assert decodes["minisd"].among(PRODUCTS) - 3 * 7 == decodes["diffusers"].among(PRODUCTS) == layers


def test_attention_is_fused_and_nothing_else_is_computed_twice(steps):
    ours, theirs = steps["minisd"].calls, steps["diffusers"].calls
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    for name in (attention, "native_group_norm", "native_layer_norm", "gelu", "add", "cat"):
        assert 0 < ours[name] <= theirs[name], name
    assert 0 < ours["silu"] + ours["silu_"] <= theirs["silu"]


def test_only_patches_of_heavy_convolutions_are_copied(steps, decodes):
    # One copy puts the channels of the latents last. To 1280 channels at 16×16 or 8×8 a convolution is heavy: two in
    # each residual block, of which there are 2 and 2 on the way down, 2 in the middle, 3 and 3 on the way up; and those
    # from 16×16 to 8×8 and back. Upsampling by quarters copies four little tables, of 4 by 9 numbers.
    heavy = 2 * (2 + 2 + 2 + 3 + 3) + 2
    assert steps["minisd"].among(COPIES) == 1 + heavy + 2 * 4
    assert decodes["minisd"].among(COPIES) == 1 + 3 * 4
