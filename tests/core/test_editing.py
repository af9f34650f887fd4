"""Inpainting, image to image, outpainting, interpolation and the forms of guidance: against diffusers and by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import lively_model
from PIL import Image

from minisd.config import TINY
from minisd.editing import extend, latent_mask, paste, read_mask, slerp
from minisd.guidance import Guidance
from minisd.io.diffusers_folder import Defaults
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.samplers import Sampler

SIDE = 64
DDIM = Defaults(Sampler("ddim", spacing="leading"), num_inference_steps=6, guidance_scale=3.0)


def random_model(channels: int = 4) -> StableDiffusion:
    """A model of the tiny size with large random weights, whose latents have no spread."""
    sd = lively_model(replace(TINY, unet=replace(TINY.unet, in_channels=channels)), DDIM)
    with torch.no_grad():
        # diffusers draws a sample of the latents, minisd takes the mean: without spread they are the same
        quant = sd.autoencoder.quant_conv
        assert quant.bias is not None
        quant.weight[4:] = 0
        quant.bias[4:] = -30
    return sd


@pytest.fixture(scope="module")
def plain() -> StableDiffusion:
    return random_model()


@pytest.fixture(scope="module")
def inpainting() -> StableDiffusion:
    return random_model(channels=9)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    return Image.fromarray(np.stack([4 * x, 4 * y, 255 - 2 * (x + y)], -1).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    values = np.zeros((SIDE, SIDE), np.uint8)
    values[16:48, 8:40] = 255
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def folders(plain: StableDiffusion, inpainting: StableDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    plain.save_pretrained(folder / "plain")
    inpainting.save_pretrained(folder / "inpainting")
    return folder


def theirs(kind: str, folder: Path, **choices: Any) -> torch.Tensor:
    """The last latents of diffusers' pipeline `kind`, at the model's scale."""
    import diffusers

    pipe = getattr(diffusers, kind).from_pretrained(str(folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe(num_inference_steps=6, guidance_scale=3.0, output_type="latent", **choices).images


def last(steps: Iterator[Any]) -> torch.Tensor:
    *_, step = steps
    return step.latents


def assert_close(mine: torch.Tensor, expected: torch.Tensor) -> None:
    difference = float((mine - expected).abs().max() / expected.abs().max())
    print(f"largest difference {difference:.1e} of the scale")
    assert difference < 1e-4


def noise(seed: int = 3) -> torch.Tensor:
    return torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image_against_diffusers(
    plain: StableDiffusion, folders: Path, picture: Image.Image, strength: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=generator)  # diffusers spends a first draw on the latents
    second = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=generator)
    mine = last(plain.denoise("a fox", picture, strength=strength, latents=second))
    expected = theirs(
        "StableDiffusionImg2ImgPipeline",
        folders / "plain",
        prompt="a fox",
        image=picture,
        strength=strength,
        generator=torch.Generator().manual_seed(3),
    )
    assert_close(mine, expected)


@pytest.mark.parametrize("model", ["plain", "inpainting"])
def test_inpainting_against_diffusers(
    request: pytest.FixtureRequest, folders: Path, picture: Image.Image, mask: Image.Image, model: str
) -> None:
    sd: StableDiffusion = request.getfixturevalue(model)
    mine = last(sd.denoise("a fox", picture, mask, latents=noise()))
    choices = {"prompt": "a fox", "image": picture, "mask_image": mask, "height": SIDE, "width": SIDE}
    expected = theirs("StableDiffusionInpaintPipeline", folders / model, strength=1.0, latents=noise(), **choices)
    assert_close(mine, expected)
    # the mask matters: with another one the result is another one
    other = last(sd.denoise("a fox", picture, Image.new("L", mask.size, 255), latents=noise()))
    assert float((other - mine).abs().max()) > 0.05


def test_inpainting_at_part_of_the_strength_against_diffusers(
    plain: StableDiffusion, folders: Path, picture: Image.Image, mask: Image.Image
) -> None:
    generator = torch.Generator().manual_seed(3)
    torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=generator)
    second = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=generator)
    mine = last(plain.denoise("a fox", picture, mask, strength=0.7, latents=second))
    choices = {"prompt": "a fox", "image": picture, "mask_image": mask, "height": SIDE, "width": SIDE}
    generator = torch.Generator().manual_seed(3)
    expected = theirs("StableDiffusionInpaintPipeline", folders / "plain", strength=0.7, generator=generator, **choices)
    assert_close(mine, expected)


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler_a", "heun", "dpmpp_2m"])
def test_kept_pixels_come_back_exactly(
    plain: StableDiffusion, picture: Image.Image, mask: Image.Image, sampler: str
) -> None:
    result = plain.inpaint("a fox", picture, mask, seed=1, sampler=sampler, num_inference_steps=3)
    kept = np.asarray(mask) == 0
    before, after = np.asarray(picture), np.asarray(result)
    assert np.array_equal(before[kept], after[kept])
    assert np.abs(before[~kept].astype(int) - after[~kept]).mean() > 10
    assert result.info["seed"] == 1


def test_a_mask_in_steps_mixes_in_steps() -> None:
    drawn, original = Image.new("RGB", (2, 1), (200, 100, 0)), Image.new("RGB", (2, 1), (100, 200, 50))
    result = paste(drawn, original, torch.tensor([[[[0.25, 0.0]]]]))
    assert result.getpixel((0, 0)) == (125, 175, 38)  # 0.25 · 200 + 0.75 · 100 …, rounded
    assert result.getpixel((1, 0)) == (100, 200, 50)


def test_masks_are_read_in_any_form() -> None:
    values = torch.zeros(16, 8)
    values[3, 5] = 1
    as_picture = Image.fromarray((values.numpy() * 255).astype(np.uint8))
    for given in (values, values[None], values[None, None], as_picture, as_picture.convert("RGB"), values.bool()):
        assert torch.equal(read_mask(given, (8, 16)), values[None, None])
    # one white pixel gives away the whole cell of 8 × 8 pixels that holds it
    assert latent_mask(values[None, None], 8).tolist() == [[[[1.0], [0.0]]]]


def test_bad_masks_are_refused(plain: StableDiffusion, inpainting: StableDiffusion, picture: Image.Image) -> None:
    with pytest.raises(ValueError, match="black everywhere"):
        plain.inpaint("a fox", picture, Image.new("L", picture.size, 0))
    with pytest.raises(ValueError, match=r"shape \(32, 64\)"):
        plain.inpaint("a fox", picture, Image.new("L", (64, 32), 255))
    with pytest.raises(ValueError, match="outside"):
        plain.inpaint("a fox", picture, torch.full((SIDE, SIDE), 2.0))
    with pytest.raises(ValueError, match="pass the picture too"):
        plain.denoise("a fox", mask_image=Image.new("L", picture.size, 255))
    with pytest.raises(ValueError, match="needs image and mask_image"):
        inpainting("a fox")
    with pytest.raises(ValueError, match="multiple of 8"):
        plain.inpaint("a fox", picture.crop((0, 0, 60, 64)), Image.new("L", (60, 64), 255))


def test_outpainting_keeps_the_picture_where_it_was(plain: StableDiffusion, picture: Image.Image) -> None:
    result = plain.outpaint("a fox", picture, right=16, top=8, num_inference_steps=2, seed=0)
    assert result.size == (SIDE + 16, SIDE + 8)
    assert np.array_equal(np.asarray(result)[8:, :SIDE], np.asarray(picture))
    canvas, mask = extend(picture, right=16, top=8)
    assert canvas.size == mask.size == result.size
    assert np.asarray(mask).sum() == 255 * ((SIDE + 16) * (SIDE + 8) - SIDE * SIDE)
    with pytest.raises(ValueError, match="left=3"):
        plain.outpaint("a fox", picture, left=3)
    with pytest.raises(ValueError, match="no side"):
        plain.outpaint("a fox", picture)


def test_slerp_by_hand() -> None:
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.allclose(slerp(east, north, 1 / 3), torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    assert torch.allclose(slerp(east, 3 * east, 0.5), 2 * east)
    one, two = noise(1), noise(2)
    assert torch.allclose(slerp(one, two, 0.0), one, atol=1e-6) and torch.allclose(slerp(one, two, 1.0), two, atol=1e-6)
    # halfway along the arc is as long as noise is; halfway along the line is not
    assert float(slerp(one, two, 0.5).std()) == pytest.approx(1, abs=0.06)
    assert float(((one + two) / 2).std()) == pytest.approx(math.sqrt(0.5), abs=0.06)


def test_interpolation_ends_at_the_pictures_it_goes_between(plain: StableDiffusion) -> None:
    choices: dict[str, Any] = {"num_inference_steps": 2, "height": SIDE, "width": SIDE}
    way = plain.interpolate(("a fox", "a cat"), (4, 9), count=3, **choices)
    for end, prompt, seed in ((way[0], "a fox", 4), (way[-1], "a cat", 9)):
        alone = plain(prompt, seed=seed, **choices)
        assert np.abs(np.asarray(end, int) - np.asarray(alone, int)).max() <= 1
    assert np.abs(np.asarray(way[1], int) - np.asarray(way[0], int)).mean() > 2
    with pytest.raises(ValueError, match="count=1"):
        plain.interpolate(("a fox", "a cat"), (4, 9), count=1)


def test_guidance_rescale_against_diffusers(plain: StableDiffusion, folders: Path) -> None:
    mine = last(plain.denoise("a fox", guidance_rescale=0.7, latents=noise(), height=SIDE, width=SIDE))
    choices = {"prompt": "a fox", "latents": noise(), "height": SIDE, "width": SIDE}
    expected = theirs("StableDiffusionPipeline", folders / "plain", guidance_rescale=0.7, **choices)
    assert_close(mine, expected)
    without = last(plain.denoise("a fox", latents=noise(), height=SIDE, width=SIDE))
    assert float((without - mine).abs().max()) > 1e-2


def test_guidance_acts_in_its_interval_only(plain: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = plain.unet.forward
    monkeypatch.setattr(plain.unet, "forward", lambda x, t, c: seen.append(len(x)) or forward(x, t, c))
    choices: dict[str, Any] = {"latents": noise(), "height": SIDE, "width": SIDE, "num_inference_steps": 10}
    list(plain.denoise("a fox", guidance_interval=(0.2, 0.5), **choices))
    assert seen == [1, 1, 2, 2, 2, 1, 1, 1, 1, 1]
    never = last(plain.denoise("a fox", guidance_interval=(0.0, 0.0), **choices))
    assert torch.allclose(never, last(plain.denoise("a fox", guidance_scale=1.0, **choices)))
    always = last(plain.denoise("a fox", guidance_interval=(0.0, 1.0), **choices))
    assert torch.equal(always, last(plain.denoise("a fox", **choices)))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval"),
        ({"guidance_interval": (0.0, 2.0)}, "guidance_interval"),
        ({"latents": torch.zeros(1, 4, 3, 3)}, "latents have shape|latents has shape"),
        ({"prompt_embeds": torch.zeros(1, 77, 5)}, "prompt_embeds has shape"),
    ],
)
def test_bad_values_are_refused(plain: StableDiffusion, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain.denoise("a fox", **choices)


def test_rescale_by_hand() -> None:
    negative, positive = torch.tensor([[[[0.0, 0.0]]]]), torch.tensor([[[[1.0, 3.0]]]])
    # guided at 2: (2, 6); its spread is twice that of (1, 3), so full rescaling gives half of it back
    assert Guidance(2.0, 1.0).combine(negative, positive).tolist() == [[[[1.0, 3.0]]]]
    assert Guidance(2.0, 0.5).combine(negative, positive).tolist() == [[[[1.5, 4.5]]]]


def test_leaving_the_loop_stops_the_work(plain: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = plain.unet.forward
    monkeypatch.setattr(plain.unet, "forward", lambda x, t, c: calls.append(1) or forward(x, t, c))
    for step in plain.denoise("a fox", seed=0, num_inference_steps=9):
        if step.index == 2:
            break
    assert len(calls) == 3
    assert plain.decode(step.x0)[0].size == (128, 128)
