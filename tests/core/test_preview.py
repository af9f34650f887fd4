"""Previews: the linear map by hand, its fit against a known answer, and what it is worth on the tiny model."""

import numpy as np
import torch

from minisd.images import to_images
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.preview import SD1, fit_preview, linear_preview
from minisd.training.scenes import render, scene


def test_linear_preview_by_hand():
    latents = torch.tensor([1.0, -2.0, 0.5, 0.0]).reshape(1, 4, 1, 1)
    factors = ((0.1, 0.2, 0.3), (0.0, 0.1, 0.0), (0.4, 0.0, 0.2), (9.0, 9.0, 9.0), (0.05, 0.0, -0.1))
    expected = torch.tensor([0.1 + 0.2 + 0.05, 0.2 - 0.2, 0.3 + 0.1 - 0.1])
    assert torch.allclose(linear_preview(latents, factors).flatten(), expected)


def test_the_fit_finds_the_map_that_made_the_images():
    latents = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(linear_preview(latents, SD1) + 0.25, scale_factor=8, mode="nearest")
    expected = np.array(SD1) + np.array([[0.0]] * 4 + [[0.25]])
    assert np.allclose(fit_preview(latents, images), expected, atol=1e-4)


def test_previews_of_the_tiny_model_resemble_the_pictures():
    sd = StableDiffusion.from_pretrained(device="cpu")
    pixels = np.stack([render(scene(77, i)) for i in range(24)])
    latents = torch.cat([sd.encode_image(to_images(one[None])) for one in pixels])
    small = pixels.reshape(24, 24, 8, 24, 8, 3).mean((2, 4))
    preview = np.stack([np.asarray(picture) for picture in sd.preview(latents)])
    assert preview.shape == small.shape
    error = np.abs(preview - small).mean()
    print(f"mean difference {error:.1f} of 255")
    # pictures that were never seen in the fit; the best constant colour is off by a multiple of this
    assert error < 0.35 * np.abs(small - small.mean((0, 1, 2))).mean()
