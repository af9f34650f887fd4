"""Whole pictures of the shipped model, drawn by diffusers' pipeline from the same folder."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import minisd
from minisd import Sampler, StableDiffusion

FOLDER = Path(minisd.__file__).parent / "assets/tiny"
PROMPTS = ["a fox in the snow", "a red car on the beach", "two penguins", "a castle at night"]


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return StableDiffusion.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def loaded():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(FOLDER), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded):
    own = loaded.scheduler
    yield loaded
    loaded.scheduler = own


def largest_difference(sd, pipe, prompt, seed, steps, **settings) -> int:
    ours = sd(prompt, seed=seed, num_inference_steps=steps, **settings)
    generator = torch.Generator().manual_seed(seed)
    scale = sd.defaults.guidance_scale
    theirs = pipe(prompt, num_inference_steps=steps, guidance_scale=scale, generator=generator).images[0]
    assert np.asarray(ours).std() > 20
    return int(np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max())


@pytest.mark.parametrize("seed", range(4))
def test_shipped_folder_in_diffusers(sd, pipe, seed):
    assert largest_difference(sd, pipe, PROMPTS[seed], seed, sd.defaults.num_inference_steps) <= 1


@pytest.mark.parametrize(
    ("name", "scheduler", "extra"),
    [
        ("ddim", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
        ("euler", "EulerDiscreteScheduler", {}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    ],
)
def test_deterministic_samplers(sd, pipe, name, scheduler, extra):
    """All but PNDM: fed v, diffusers' extrapolates v and ours epsilon, as the paper does (see test_samplers.py)."""
    pipe.scheduler = getattr(diffusers, scheduler)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=sd.config.schedule.prediction_type,
        timestep_spacing="leading",
        steps_offset=1,
        **extra,
    )
    assert largest_difference(sd, pipe, PROMPTS[0], 5, 9, sampler=Sampler(name, spacing="leading")) <= 1
