"""The UNet against diffusers' `UNet2DConditionModel` with the same weights."""

from __future__ import annotations

import math
import time

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from models import SD1_INPAINT_UNET, SD1_UNET, SD2_UNET, SMALL_UNET, SMALL_UNET_2, TOLERANCE, difference, noise
from pairs import (
    KERNEL_TOLERANCE,
    LAYOUT_TOLERANCE,
    Pair,
    meta_unets,
    norm_epsilons,
    norms_in_float64,
    parameters,
    shapes,
    unet_difference,
    unets,
)

from minisd.config import SD15, SD15_INPAINT, SD21, SD21_BASE, UNetConfig
from minisd.io.configs import check_config, read_config
from minisd.unet import timestep_embedding

SMALL = {"SD 1": SMALL_UNET, "SD 2": SMALL_UNET_2}


def test_published_configurations():
    assert SD15.unet == read_config(UNetConfig, SD1_UNET)
    assert SD15_INPAINT.unet == read_config(UNetConfig, SD1_INPAINT_UNET)
    assert SD21_BASE.unet == read_config(UNetConfig, SD2_UNET)
    assert SD21.unet == read_config(UNetConfig, {**SD2_UNET, "sample_size": 96, "upcast_attention": True})
    assert SD15.unet.heads == (8, 8, 8, 8)


@pytest.mark.parametrize(
    ("values", "count"),
    [(SD1_UNET, 859_520_964), (SD1_INPAINT_UNET, 859_535_364), (SD2_UNET, 865_910_724)],
    ids=["SD 1.5", "SD 1.5 inpainting", "SD 2"],
)
def test_every_key_shape_and_epsilon(values, count):
    ours, theirs = meta_unets(values)
    assert parameters(ours) == count
    assert len(shapes(ours)) == 686
    assert shapes(ours) == shapes(theirs)
    assert norm_epsilons(ours) == norm_epsilons(theirs)


@pytest.mark.parametrize("values", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"height": 8, "width": 24},
        {"height": 7, "width": 13},
        {"height": 1, "width": 3},
        {"timesteps": 0},
        {"timesteps": 999},
        {"timesteps": 372.61},
        {"timesteps": [1, 640.25, 999]},
        {"words": 154},
    ],
    ids=str,
)
def test_small(values, case):
    assert unet_difference(unets(values), **case) <= TOLERANCE


def test_inpainting_takes_nine_channels():
    assert unet_difference(unets({**SMALL_UNET, "in_channels": 9})) <= TOLERANCE


def test_one_timestep_serves_the_batch():
    ours, theirs = unets(SMALL_UNET)
    latents, context = noise(3, 4, 8, 8), noise(3, 77, 24, seed=3)
    expected = theirs(latents, torch.tensor([437, 437, 437]), context).sample
    for timesteps in (torch.tensor(437), torch.tensor([437]), torch.tensor([437, 437, 437])):
        assert difference(ours(latents, timesteps, context), expected) <= TOLERANCE


@pytest.fixture(scope="module")
def full_size() -> Pair:
    return unets(SD1_UNET, torch.float32)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 28)])
def test_full_size(full_size, height, width):
    start = time.perf_counter()
    with norms_in_float64():
        found = unet_difference(full_size, height, width)
    took = time.perf_counter() - start
    print(f"UNet, latents {width}×{height}: {found:.2e} of the output's standard deviation, {took:.0f} s")
    assert found <= KERNEL_TOLERANCE


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_full_size_as_it_is(full_size):
    assert unet_difference(full_size, 40, 28) <= LAYOUT_TOLERANCE


@pytest.mark.parametrize("dim", [32, 320])
def test_timestep_embedding_by_hand(dim):
    for t in (0.0, 1.0, 500.5, 999.0):
        angles = [t * 10000 ** (-i / (dim // 2)) for i in range(dim // 2)]
        expected = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
        torch.testing.assert_close(timestep_embedding(torch.tensor([t]), dim)[0], expected, rtol=0, atol=2e-4)
    assert timestep_embedding(torch.tensor([7]), dim)[0, :2].tolist() == pytest.approx(
        [math.cos(7), math.cos(7 * 10000 ** (-2 / dim))], abs=1e-5
    )


def test_timestep_embedding_against_diffusers():
    timesteps = torch.tensor([0, 1, 17, 372.61, 999])
    expected = get_timestep_embedding(timesteps, 320, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_embedding(timesteps, 320), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_out_channels": (320, 640)}, "down_block_types has length 4; expected 2, one per level"),
        ({"attention_head_dim": (8, 8)}, "heads has length 2; expected 4, one per level"),
        ({"attention_head_dim": 7}, r"is not divisible by attention_head_dim \(the number of heads\)=7"),
        ({"norm_num_groups": 48}, "block_out_channels=320 is not divisible by norm_num_groups=48"),
        (
            {"up_block_types": ("AttnUpBlock2D",) * 4},
            "up_block_types='AttnUpBlock2D'; expected 'CrossAttnDownBlock2D' or",
        ),
    ],
)
def test_bad_configurations(wrong, message):
    with pytest.raises(ValueError, match=message):
        check_config(UNetConfig(**wrong))


@pytest.mark.parametrize(
    "key", ["flip_sin_to_cos", "addition_embed_type", "time_embedding_type", "transformer_layers_per_block"]
)
def test_a_network_of_another_kind_is_refused(key):
    with pytest.raises(ValueError, match=f"unsupported {key}='other'; minisd supports only {key}="):
        read_config(UNetConfig, {**SD1_UNET, key: "other"})
