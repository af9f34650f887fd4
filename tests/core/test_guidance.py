"""Classifier-free guidance: combined by hand, in its interval, with a scale for each image."""

import pytest
import torch
from models import last, lively_model

from minisd import StableDiffusion
from minisd.guidance import Guidance

SCALES = [0.0, 1.0, 3.0, 7.5, -1.0]
PROMPTS = ["a fox", "a dog", "a tree", "(snow)", "a house"]


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return lively_model()


@pytest.fixture
def rows(sd, monkeypatch):
    """The rows of each call of the UNet."""
    seen, forward = [], sd.unet.forward
    monkeypatch.setattr(sd.unet, "forward", lambda x, t, c: seen.append(len(x)) or forward(x, t, c))
    return seen


def drawn(sd, prompt="a fox", **settings) -> torch.Tensor:
    return last(sd.denoise(prompt, **{"num_inference_steps": 3, "sampler": "ddim", "seed": 3} | settings))


def apart(found, expected) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_combination_by_hand():
    negative, positive = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]], [[[2.0, 4.0]]]])
    assert Guidance(3.0).combine(negative, positive).flatten().tolist() == [3, 9, 6, 12]
    assert Guidance((2.0, 0.5)).combine(negative, positive).flatten().tolist() == [2, 6, 1, 2]


def test_rescale_by_hand():
    negative, positive = torch.tensor([[[[0.0, 0.0]]]]), torch.tensor([[[[1.0, 3.0]]]])
    # guided at 2: (2, 6); its spread is twice that of (1, 3), so full rescaling gives half of it back
    assert Guidance(2.0, 1.0).combine(negative, positive).tolist() == [[[[1.0, 3.0]]]]
    assert Guidance(2.0, 0.5).combine(negative, positive).tolist() == [[[[1.5, 4.5]]]]


def test_interval(sd, rows):
    drawn(sd, guidance_interval=(0.2, 0.5), num_inference_steps=10)
    assert rows == [1, 1, 2, 2, 2, 1, 1, 1, 1, 1]
    assert torch.allclose(drawn(sd, guidance_interval=(0.0, 0.0)), drawn(sd, guidance_scale=1.0))
    assert torch.equal(drawn(sd, guidance_interval=(0.0, 1.0)), drawn(sd))


@pytest.mark.parametrize(
    "settings", [{}, {"guidance_rescale": 0.7}, {"guidance_interval": (0.3, 0.9)}], ids=["plain", "rescale", "interval"]
)
@pytest.mark.parametrize("embeds", [False, True], ids=["prompts", "embeds"])
def test_scale_per_image_equals_one_by_one(sd, settings, embeds):
    def guided(prompts, **more) -> torch.Tensor:
        given = {"prompt_embeds": sd.encode_text(prompts)} if embeds else {}
        return drawn(sd, prompts, negative_prompt="a cat", **settings, **given, **more)

    together = guided(PROMPTS, seed=2, guidance_scale=SCALES)
    for i, (prompt, scale) in enumerate(zip(PROMPTS, SCALES, strict=True)):
        assert apart(together[i], guided([prompt], seed=2 + i, guidance_scale=scale)[0]) <= 1e-4
    assert apart(together, guided(PROMPTS, seed=2, guidance_scale=[3.0] * 5)) > 1e-2


def test_scales_of_zero_and_one_need_one_row_per_image(sd, rows):
    for scales, expected in (([0, 1], 2), ([1, 1], 2), ([0, 0], 2), ([0, 2], 4), (2, 4)):
        next(sd.denoise(["a fox", "a cat"], seed=0, guidance_scale=scales, num_inference_steps=2))
        assert rows.pop() == expected


def test_number_of_scales(sd):
    with pytest.raises(ValueError, match="3 guidance scales for 2 images"):
        sd(["a fox", "a cat"], guidance_scale=[1.0, 2.0, 3.0])
    pictures = sd("a fox", num_images_per_prompt=2, guidance_scale=[1.0, 5.0], seed=0, num_inference_steps=1)
    assert len(pictures) == 2
