"""Image to image, inpainting, outpainting and interpolation: what must come back exactly, and numbers by hand."""

import math

import numpy as np
import pytest
import torch
from models import gradient_picture, lively_model, rectangle_mask
from PIL import Image

from minisd import StableDiffusion
from minisd.editing import KeepUnmasked, extend_canvas, latent_mask, paste, slerp
from minisd.pipeline.checks import check_mask
from minisd.samplers import Sampler
from minisd.schedule import Schedule

SIDE = 64
QUICK = {"num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return lively_model()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return gradient_picture(SIDE)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    return rectangle_mask(SIDE)


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler_a", "heun", "dpmpp_2m"])
def test_kept_pixels_come_back_exactly(sd, picture, mask, sampler):
    result = sd.inpaint("a fox", picture, mask, seed=1, sampler=sampler, num_inference_steps=3)
    kept, before, after = np.asarray(mask) == 0, np.asarray(picture), np.asarray(result)
    assert np.array_equal(before[kept], after[kept])
    assert np.abs(before[~kept].astype(int) - after[~kept]).mean() > 10
    assert result.info["seed"] == 1


def test_unmasked_latents_follow_the_noise_levels():
    """Where the mask is 0, the state is √ᾱ x₀ + √(1−ᾱ) ε after every step, and x₀ at the end, exactly."""
    plan = Sampler("ddim").plan(Schedule(), 4)
    original, noise, mask = torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), -1.0), torch.zeros(1, 1, 2, 2)
    state, keep = plan.start(noise), KeepUnmasked(mask, original, noise)
    for _ in range(plan.num_calls):
        state, _ = plan.step(state, torch.zeros(1, 4, 2, 2))
        state = keep(plan, state)
        share = 1 / (plan.sigmas[state.index] ** 2 + 1)
        expected = math.sqrt(share) * 3 - math.sqrt(1 - share) if state.index < plan.num_calls else 3
        assert torch.allclose(plan.latents(state), torch.full((1, 4, 2, 2), float(expected)), atol=1e-6)


def test_soft_masks_mix():
    drawn, original = Image.new("RGB", (2, 1), (200, 100, 0)), Image.new("RGB", (2, 1), (100, 200, 50))
    result = paste(drawn, original, torch.tensor([[[[0.25, 0.0]]]]))
    assert result.getpixel((0, 0)) == (125, 175, 38)  # 0.25 · 200 + 0.75 · 100 …, rounded
    assert result.getpixel((1, 0)) == (100, 200, 50)


def test_masks_in_any_form():
    values = torch.zeros(16, 8)
    values[3, 5] = 1
    as_picture = Image.fromarray((values.numpy() * 255).astype(np.uint8))
    for given in (values, values[None], values[None, None], as_picture, as_picture.convert("RGB"), values.bool()):
        assert torch.equal(check_mask(given, (8, 16)), values[None, None])
    # one white pixel gives up the whole cell of 8 × 8 pixels that holds it
    assert latent_mask(values[None, None], 8).tolist() == [[[[1.0], [0.0]]]]


def test_outpainting_keeps_the_picture_where_it_was(sd, picture):
    result = sd.outpaint("a fox", picture, right=16, top=8, **QUICK)
    assert result.size == (SIDE + 16, SIDE + 8)
    assert np.array_equal(np.asarray(result)[8:, :SIDE], np.asarray(picture))
    canvas, mask = extend_canvas(picture, right=16, top=8)
    assert canvas.size == mask.size == result.size
    assert np.asarray(mask).sum() == 255 * ((SIDE + 16) * (SIDE + 8) - SIDE * SIDE)


def test_slerp_by_hand():
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.allclose(slerp(east, north, 1 / 3), torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    assert torch.allclose(slerp(east, 3 * east, 0.5), 2 * east)
    one, two = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.allclose(slerp(one, two, 0.0), one, atol=1e-6) and torch.allclose(slerp(one, two, 1.0), two, atol=1e-6)
    # halfway along the arc is as long as noise is; halfway along the line is not
    assert float(slerp(one, two, 0.5).std()) == pytest.approx(1, abs=0.06)
    assert float(((one + two) / 2).std()) == pytest.approx(math.sqrt(0.5), abs=0.06)


def test_interpolation_ends_at_the_pictures_it_goes_between(sd):
    settings = {"num_inference_steps": 2, "height": SIDE, "width": SIDE}
    pictures = sd.interpolate(("a fox", "a cat"), (4, 9), count=3, **settings)
    for end, prompt, seed in ((pictures[0], "a fox", 4), (pictures[-1], "a cat", 9)):
        alone = sd(prompt, seed=seed, **settings)
        assert np.abs(np.asarray(end, int) - np.asarray(alone, int)).max() <= 1
    assert np.abs(np.asarray(pictures[1], int) - np.asarray(pictures[0], int)).mean() > 2
