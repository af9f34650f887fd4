"""Tiles: the blend against functions whose result is known, and against the autoencoder without tiles."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from minisd.features.tiling import ramp, starts, tiled
from minisd.images import from_pil
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.training.scenes import render, scene


def test_starts_and_ramp_by_hand():
    assert starts(40, 16, 4) == [0, 12, 24]
    assert starts(45, 16, 4) == [0, 12, 24, 29]
    assert starts(16, 16, 4) == starts(9, 16, 4) == [0]
    assert ramp(6, 2, True, False).tolist() == [0.25, 0.75, 1, 1, 1, 1]
    # where two tiles overlap their weights add up to 1
    assert (ramp(6, 4, False, True)[-4:] + ramp(6, 4, True, False)[:4]).tolist() == [1, 1, 1, 1]


def test_a_function_of_single_cells_needs_no_neighbours():
    x = torch.randn(2, 4, 21, 34, generator=torch.Generator().manual_seed(0))
    enlarged = tiled(lambda part: F.interpolate(part.square(), scale_factor=8), x, 9, 4, 8)
    assert torch.allclose(enlarged, F.interpolate(x.square(), scale_factor=8), atol=1e-5)
    pixels = torch.randn(1, 3, 96, 136, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(tiled(lambda part: F.avg_pool2d(part, 8), pixels, 48, 16, 1 / 8), F.avg_pool2d(pixels, 8))


def test_what_two_tiles_disagree_on_is_blended_in_a_straight_line():
    answers = iter((0.0, 1.0))
    blended = tiled(lambda part: torch.full_like(part, next(answers)), torch.zeros(1, 1, 1, 12), 8, 4, 1)
    assert blended.flatten().tolist() == [0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1]


def test_an_overlap_must_leave_a_way_to_go():
    for overlap in (0, 8, 9):
        with pytest.raises(ValueError, match="cannot overlap"):
            tiled(lambda part: part, torch.zeros(1, 1, 16, 16), 8, overlap, 1)


@pytest.mark.parametrize("index", [4, 5])
def test_tiled_autoencoder_is_near_the_whole_one(index):
    whole = StableDiffusion.from_pretrained(device="cpu")
    parts = StableDiffusion.from_pretrained(device="cpu", tile=True)
    images = from_pil(Image.fromarray(render(scene(1, index))).resize((384, 384), Image.Resampling.BICUBIC))
    latents = whole.encode_image(images)
    expected = whole.decode_to_tensor(latents).clamp(-1, 1)
    drawn = parts.decode_to_tensor(latents).clamp(-1, 1)
    psnr = 10 * math.log10(4 / float((drawn - expected).square().mean()))
    print(f"scene {index}: {psnr:.1f} dB")
    assert 35 <= psnr < 70  # near, and not the same computation
    assert float((parts.encode_image(images) - latents).square().mean().sqrt()) < 0.1 * float(latents.std())


def test_pictures_of_the_models_own_size_are_one_tile():
    whole = StableDiffusion.from_pretrained(device="cpu")
    parts = StableDiffusion.from_pretrained(device="cpu", tile=True)
    latents = torch.randn(2, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(whole.decode_to_tensor(latents), parts.decode_to_tensor(latents), atol=1e-4)
