"""UNets that change places: minisd's in diffusers' pipeline, and diffusers' in `StableDiffusion`."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from minisd import StableDiffusion
from minisd.io.configs import to_dict
from minisd.io.interop import ForDiffusers, FromDiffusers

TOLERANCE = 1e-10  # of the output's standard deviation, in float64
PROMPT = "a red fox in the snow"


def test_unet_inside_diffusers_pipeline(models):
    ours, pipe = models
    wrapped = StableDiffusionPipeline(
        **pipe.components | {"unet": ForDiffusers(ours.unet)}, requires_safety_checker=False
    )
    wrapped.set_progress_bar_config(disable=True)

    def draw(each):
        generator = torch.Generator().manual_seed(3)
        return each(PROMPT, num_inference_steps=4, generator=generator, output_type="latent").images

    expected = draw(pipe)
    assert (draw(wrapped) - expected).abs().max() <= TOLERANCE * expected.std()
    with pytest.raises(ValueError, match="does not support cross_attention_kwargs"):
        wrapped(PROMPT, num_inference_steps=1, cross_attention_kwargs={"scale": 0.5})


def test_diffusers_unet_inside(models):
    ours, pipe = models
    mixed = StableDiffusion(ours.config, ours.tokenizer, ours.text_encoder, FromDiffusers(pipe.unet), ours.autoencoder)
    assert mixed.unet.config == ours.unet.config and mixed.dtype == torch.float64
    options = {"seed": 3, "num_inference_steps": 4, "sampler": "dpmpp_2m", "output_type": "latent"}
    expected = ours(PROMPT, **options)
    assert (mixed(PROMPT, **options) - expected).abs().max() <= TOLERANCE * expected.std()
    with pytest.raises(ValueError, match="needs the blocks of minisd's UNet"):
        mixed(PROMPT, feature_reuse=(2, 1))
    with pytest.raises(ValueError, match="class_embed_type"):
        FromDiffusers(UNet2DConditionModel.from_config(to_dict(ours.unet.config) | {"class_embed_type": "timestep"}))
    with pytest.raises(TypeError, match="expected diffusers' UNet2DConditionModel, got Linear"):
        FromDiffusers(torch.nn.Linear(1, 1))
