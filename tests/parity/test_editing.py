"""Image to image, inpainting and guidance rescale, against diffusers' pipelines, up to the last latents."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from models import gradient_picture, last, lively_model, rectangle_mask
from PIL import Image

from minisd import TINY, Sampler
from minisd.features.masked_area import blur_mask, find_area
from minisd.io.diffusers_folder import Defaults

SIDE = 64
DDIM = Defaults(Sampler("ddim", spacing="leading"), num_inference_steps=6, guidance_scale=3.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A plain and an inpainting model with large random weights, whose latents have no spread, and their folder."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for name, channels in (("plain", 4), ("inpainting", 9)):
        sd = lively_model(replace(TINY, unet=replace(TINY.unet, in_channels=channels)), DDIM)
        with torch.no_grad():
            # diffusers draws a sample of the latents, minisd takes the mean: without spread they are the same
            sd.autoencoder.quant_conv.weight[4:] = 0
            sd.autoencoder.quant_conv.bias[4:] = -30
        sd.save_pretrained(folder / name)
        found[name] = sd
    return found, folder


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return gradient_picture(SIDE)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    return rectangle_mask(SIDE)


def theirs(kind, folder, **settings) -> torch.Tensor:
    """The last latents of diffusers' pipeline `kind`."""
    pipe = getattr(diffusers, kind).from_pretrained(str(folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe("a fox", num_inference_steps=6, guidance_scale=3.0, **{"output_type": "latent"} | settings).images


def assert_close(ours, expected) -> None:
    difference = float((ours - expected).abs().max() / expected.abs().max())
    print(f"largest difference {difference:.1e} of the scale")
    assert difference < 1e-4


def noise(draws: int = 1) -> torch.Tensor:
    """The noise of the last of so many draws."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=generator) for _ in range(draws)][-1]


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image(models, picture, strength):
    sd, folder = models[0]["plain"], models[1] / "plain"
    ours = last(sd.denoise("a fox", picture, strength=strength, latents=noise(2)))
    generator = torch.Generator().manual_seed(3)  # whose first draw diffusers spends on the latents
    assert_close(
        ours, theirs("StableDiffusionImg2ImgPipeline", folder, image=picture, strength=strength, generator=generator)
    )


@pytest.mark.parametrize("model", ["plain", "inpainting"])
def test_inpainting(models, picture, mask, model):
    sd, folder = models[0][model], models[1] / model
    ours = last(sd.denoise("a fox", picture, mask, latents=noise()))
    settings = {"image": picture, "mask_image": mask, "height": SIDE, "width": SIDE}
    assert_close(ours, theirs("StableDiffusionInpaintPipeline", folder, strength=1.0, latents=noise(), **settings))
    # the mask matters
    other = last(sd.denoise("a fox", picture, Image.new("L", mask.size, 255), latents=noise()))
    assert float((other - ours).abs().max()) > 0.05


def test_inpainting_at_part_of_the_strength(models, picture, mask):
    sd, folder = models[0]["plain"], models[1] / "plain"
    ours = last(sd.denoise("a fox", picture, mask, strength=0.7, latents=noise(2)))
    settings = {"image": picture, "mask_image": mask, "height": SIDE, "width": SIDE, "strength": 0.7}
    generator = torch.Generator().manual_seed(3)
    assert_close(ours, theirs("StableDiffusionInpaintPipeline", folder, generator=generator, **settings))


def test_guidance_rescale(models):
    sd, folder = models[0]["plain"], models[1] / "plain"
    settings = {"latents": noise(), "height": SIDE, "width": SIDE}
    ours = last(sd.denoise("a fox", guidance_rescale=0.7, **settings))
    assert_close(ours, theirs("StableDiffusionPipeline", folder, guidance_rescale=0.7, **settings))
    assert float((last(sd.denoise("a fox", **settings)) - ours).abs().max()) > 1e-2


def white(size: tuple[int, int], *box: int) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def as_tensor(mask: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(mask, np.float32) / 255)[None, None]


@pytest.mark.parametrize(("box", "padding"), [((24, 24, 40, 40), 8), ((40, 8, 56, 24), 8), ((32, 32, 96, 96), 0)])
@pytest.mark.parametrize("model", ["plain", "inpainting"])
def test_the_masked_area_only(models, box, padding, model):
    """The area is cut out, scaled and drawn as in diffusers, and pasted back as there."""
    sd, folder = models[0][model], models[1] / model
    big = gradient_picture(130).resize((130, 110))
    mask = white(big.size, *box)
    ours = last(sd.denoise("a fox", big, mask, padding_mask_crop=padding, height=SIDE, width=SIDE, latents=noise()))
    settings = {"image": big, "mask_image": mask, "height": SIDE, "width": SIDE, "padding_mask_crop": padding}
    settings |= {"strength": 1.0, "latents": noise(), "output_type": "pil"}
    (expected,) = theirs("StableDiffusionInpaintPipeline", folder, **settings)
    area = find_area(as_tensor(mask), padding, SIDE, SIDE, 8)
    result = np.asarray(area.paste(sd.decode(ours)[0], big), int)
    assert np.abs(result - np.asarray(expected, int)).max() <= 1
    assert np.abs(result - np.asarray(big, int)).max() > 50


def test_areas_as_in_diffusers():
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = tuple(int(side) for side in rng.integers(60, 400, 2))
        corners = np.sort(rng.integers(0, min(size), (2, 2)), axis=0) + [[0, 0], [1, 1]]
        mask, padding = white(size, *(int(x) for x in corners.flatten())), int(rng.integers(0, 60))
        for width, height in ((512, 512), (512, 768), (640, 384)):
            expected = VaeImageProcessor.get_crop_region(mask, width, height, padding)
            area = find_area(as_tensor(mask), padding, width, height, 8)
            # diffusers divides in floating point, and may lose a pixel
            assert max(abs(a - b) for a, b in zip(area.box, expected, strict=True)) <= (width != height)
            assert area.size[0] <= width and area.size[1] <= height and not (area.size[0] % 8 or area.size[1] % 8)


@pytest.mark.parametrize("radius", [1, 4, 33])
def test_blurred_masks_as_in_diffusers(mask, radius):
    expected = np.asarray(VaeImageProcessor.blur(mask, radius), np.float32) / 255
    assert np.array_equal(blur_mask(as_tensor(mask), radius)[0, 0].numpy(), expected)
