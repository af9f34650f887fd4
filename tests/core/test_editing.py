"""Image to image, inpainting, outpainting and interpolation: what must come back exactly, and numbers by hand."""

import math

import numpy as np
import pytest
import torch
from models import gradient_picture, lively_model, rectangle_mask
from PIL import Image, ImageFilter

from minisd import StableDiffusion
from minisd.editing import KeepUnmasked, extend_canvas, latent_mask, paste, slerp
from minisd.features.masked_area import blur_mask, find_area
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


# Batches, blurred masks, and the masked area only


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, int)


def close(one: Image.Image, other: Image.Image) -> bool:
    """The same up to the rounding of a batch."""
    return one.size == other.size and np.abs(pixels(one) - pixels(other)).max() <= 1


@pytest.fixture(scope="module")
def pictures(picture) -> list[Image.Image]:
    return [picture, picture.transpose(Image.Transpose.ROTATE_90), Image.new("RGB", picture.size, (90, 160, 30))]


@pytest.mark.parametrize("prompt", ["a fox", ["a fox", "a cat", "a dog"]])
def test_lists_of_images_are_drawn_as_each_alone(sd, pictures, mask, prompt):
    prompts = [prompt] * 3 if isinstance(prompt, str) else prompt
    masks = [mask, mask.transpose(Image.Transpose.ROTATE_180), mask]
    drawn = sd.image_to_image(prompt, pictures, 0.6, seed=4, num_inference_steps=3)
    painted = sd.inpaint(prompt, pictures, masks, seed=4, num_inference_steps=2)
    shared = sd.inpaint(prompt, pictures, mask, seed=[9, 2, 5], num_inference_steps=2)
    for i, (text, image) in enumerate(zip(prompts, pictures, strict=True)):
        assert close(drawn[i], sd.image_to_image(text, image, 0.6, seed=4 + i, num_inference_steps=3))
        assert close(painted[i], sd.inpaint(text, image, masks[i], seed=4 + i, num_inference_steps=2))
        assert close(shared[i], sd.inpaint(text, image, mask, seed=[9, 2, 5][i], num_inference_steps=2))
        kept = np.asarray(masks[i]) == 0
        assert np.array_equal(pixels(painted[i])[kept], pixels(image)[kept])
        assert (drawn[i].info["seed"], painted[i].info["seed"], shared[i].info["seed"]) == (4 + i, 4 + i, [9, 2, 5][i])
    assert not close(drawn[0], drawn[1])


def test_one_image_for_several_prompts_and_masks(sd, picture, mask):
    both = sd.image_to_image(["a fox", "a cat"], picture, seed=1, num_inference_steps=2)
    assert close(both[1], sd.image_to_image("a cat", picture, seed=2, num_inference_steps=2))
    masks = [mask, mask.transpose(Image.Transpose.ROTATE_180)]
    painted = sd.inpaint("a fox", picture, masks, seed=1, num_inference_steps=2)
    assert close(painted[1], sd.inpaint("a fox", picture, masks[1], seed=2, num_inference_steps=2))
    (single,) = sd.image_to_image("a fox", [picture], **QUICK)
    assert close(single, sd.image_to_image("a fox", picture, **QUICK))
    tensors = torch.rand(2, 3, SIDE, SIDE)
    assert len(sd.image_to_image("a fox", tensors, **QUICK)) == 2


def test_blur_is_a_gaussian():
    edge = torch.zeros(1, 1, 40, 80)
    edge[..., 40:] = 1
    for radius in (2, 5):
        blurred = blur_mask(edge, radius)[0, 0, 20]
        # a Gaussian over an edge is the normal distribution function
        expected = torch.special.ndtr((torch.arange(80) - 39.5) / radius)
        assert (blurred - expected).abs().max() < 0.02
    assert torch.equal(blur_mask(edge, 0), edge)


def test_a_blurred_mask_mixes_at_its_edges(sd, picture, mask):
    sharp = sd.inpaint("a fox", picture, mask, seed=3, num_inference_steps=2)
    soft = sd.inpaint("a fox", picture, mask, seed=3, num_inference_steps=2, mask_blur=4)
    far = np.asarray(mask.filter(ImageFilter.MaxFilter(41))) == 0
    assert np.array_equal(pixels(soft)[far], pixels(picture)[far])
    jump = np.abs(np.diff(pixels(sharp), axis=1)).max(-1)[20:44, 7].mean()  # across the left edge
    assert np.abs(np.diff(pixels(soft), axis=1)).max(-1)[20:44, 7].mean() < 0.5 * jump


def test_the_masked_area_is_drawn_at_full_size(sd):
    """A picture of odd sides keeps every pixel outside its mask, and the UNet sees 64×64 pixels."""
    picture = gradient_picture(93).resize((93, 75))
    mask = Image.new("L", picture.size)
    mask.paste(255, (10, 20, 30, 36))
    shapes = []
    hook = sd.unet.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape[-2:])))
    result = sd.inpaint("a fox", picture, mask, padding_mask_crop=6, **QUICK)
    hook.remove()
    assert set(shapes) == {(8, 8)} and result.size == picture.size and result.info["seed"] == 1
    kept = np.asarray(mask) == 0
    assert np.array_equal(pixels(result)[kept], pixels(picture)[kept])
    assert np.abs(pixels(result) - pixels(picture))[~kept].mean() > 10
    # by hand: 20 + 2·6 wide, 16 + 2·6 = 28 high, which grows to 32, two pixels on either side
    area = find_area(torch.from_numpy(np.asarray(mask) / 255)[None, None], 6, 64, 64, 8)
    assert (area.box, area.size) == ((4, 12, 36, 44), (64, 64))
    larger = sd.inpaint("a fox", picture, mask, padding_mask_crop=6, width=96, height=64, mask_blur=2, **QUICK)
    assert larger.size == picture.size


def test_an_area_that_the_image_is_too_small_for_is_not_distorted():
    mask = torch.zeros(1, 1, 200, 64)
    mask[..., 10:110, 30:40] = 1
    area = find_area(mask, 0, 512, 512, 8)
    assert (area.box, area.size) == ((0, 10, 64, 110), (328, 512))  # 512 · 64 / 100 = 327.7


def test_areas_of_several_images(sd, picture, mask):
    wide = gradient_picture(90)
    far = Image.new("L", wide.size)
    far.paste(255, (60, 60, 80, 70))
    both = sd.inpaint(
        ["a fox", "a cat"], [picture, wide], [mask, far], padding_mask_crop=4, negative_prompt="x", **QUICK
    )
    assert [each.size for each in both] == [picture.size, wide.size]
    alone = sd.inpaint("a cat", wide, far, padding_mask_crop=4, negative_prompt="x", seed=2, num_inference_steps=2)
    assert np.array_equal(pixels(both[1]), pixels(alone)) and both[1].info["seed"] == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sd, p, m: sd.image_to_image("a", p.resize((61, 75))), r"image is 61×75; .* for example to 64×72"),
        (lambda sd, p, m: sd.image_to_image("a", p.resize((3, 100))), r"for example to 8×96"),
        (lambda sd, p, m: sd("a", width=100), "width=100; expected a positive multiple of 8, such as 96"),
        (lambda sd, p, m: sd.image_to_image("a", [p, p.resize((48, 64))]), r"sizes \[\(48, 64\), \(64, 64\)\]"),
        (lambda sd, p, m: sd.image_to_image(["a", "b"], [p, p, p]), "3 images for 2 prompts"),
        (lambda sd, p, m: sd.image_to_image("a", []), "image is an empty list"),
        (lambda sd, p, m: sd.inpaint(["a", "b", "c"], p, [m, m]), "2 masks for 3 prompts"),
        (lambda sd, p, m: sd.inpaint("a", [p, p], [m, m, m]), "2 images for 3 prompts"),
        (lambda sd, p, m: sd.inpaint("a", [p, p], [m, m, m], padding_mask_crop=1), "2 values of image for 3 images"),
        (lambda sd, p, m: sd.image_to_image("a", p, mask_blur=4), "mask_blur=4 is only valid for inpainting"),
        (lambda sd, p, m: sd("a", padding_mask_crop=4), "padding_mask_crop=4 is only valid for inpainting"),
        (lambda sd, p, m: sd.inpaint("a", p, m, mask_blur=-1), "mask_blur=-1"),
        (lambda sd, p, m: sd.inpaint("a", p, m, padding_mask_crop=-1), "padding_mask_crop=-1"),
        (lambda sd, p, m: sd.denoise("a", torch.zeros(1, 3, 64, 64), m, padding_mask_crop=4), "requires one PIL image"),
        (lambda sd, p, m: sd.inpaint("a", p, m.resize((9, 9)), padding_mask_crop=4), "the mask has shape"),
        (lambda sd, p, m: sd.inpaint("a", p, m, padding_mask_crop=4, width=65), "width=65"),
    ],
)  # fmt: skip
def test_batches_and_areas_that_cannot_be_drawn(sd, picture, mask, call, message):
    with pytest.raises(TypeError, match="the mask must be a PIL image"):
        sd.inpaint("a", picture, None)
    with pytest.raises(ValueError, match=message):
        call(sd, picture, mask)
