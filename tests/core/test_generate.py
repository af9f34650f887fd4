"""`generate`, the core's own pipeline."""

import numpy as np
import pytest

from minisd import StableDiffusion
from minisd.generate import Model, generate


@pytest.fixture(scope="module")
def model() -> Model:
    return StableDiffusion.from_pretrained(device="cpu").model


def test_seeds_default_to_0_1_2(model):
    together = generate(model, ["a fox", "a house"], num_inference_steps=2)
    for i, prompt in enumerate(["a fox", "a house"]):
        (alone,) = generate(model, [prompt], num_inference_steps=2, seeds=[i])
        assert np.abs(np.asarray(together[i], int) - np.asarray(alone, int)).max() <= 1


@pytest.mark.parametrize("seeds", [(), (0,), (0, 1, 2)])
def test_number_of_seeds_must_match_prompts(model, seeds):
    with pytest.raises(ValueError, match=f"one seed per prompt, got {len(seeds)} seeds for 2 prompts"):
        generate(model, ["a fox", "a house"], num_inference_steps=2, seeds=seeds)


@pytest.mark.parametrize("prompts", ["a fox", [], ()])
def test_prompts_are_a_list(model, prompts):
    with pytest.raises(ValueError, match="expected a list of prompts, got "):
        generate(model, prompts, num_inference_steps=2)


@pytest.mark.parametrize(("scale", "rows"), [(1.0, [1, 1]), (0.0, [2, 2]), (4.0, [2, 2])])
def test_guidance_scale_of_one_calls_the_unet_once_per_image(model, monkeypatch, scale, rows):
    seen, forward = [], model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda x, t, c: seen.append(len(x)) or forward(x, t, c))
    generate(model, ["a fox"], num_inference_steps=2, guidance_scale=scale)
    assert seen == rows
