"""The pipeline as a whole: against diffusers, and against itself where nothing may change."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from minisd.noise import seeds
from parity import lively_model
from PIL import Image

from minisd.autoencoder import Autoencoder
from minisd.config import TINY
from minisd.images import from_pil, grid, to_images, to_pixels
from minisd.io.diffusers_folder import Defaults
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.samplers import Sampler
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet

PROMPTS = ["a fox in the snow", "a red car on the beach", "two penguins", "a castle at night"]


@pytest.fixture(scope="module")
def shipped() -> StableDiffusion:
    return StableDiffusion.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def random_model() -> StableDiffusion:
    return lively_model(TINY)


def last(sd: StableDiffusion, *arguments: object, **choices: object) -> torch.Tensor:
    *_, step = sd.denoise(*arguments, **choices)  # type: ignore[arg-type]
    return step.latents


def diffusers_pipeline(folder: Path | str) -> object:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shipped_folder() -> Path:
    import minisd

    return Path(minisd.__file__).parent / "assets/tiny"


def test_shipped_folder_draws_the_same_in_diffusers(shipped: StableDiffusion) -> None:
    pipe = diffusers_pipeline(shipped_folder())
    for prompt, seed in zip(PROMPTS, (0, 1, 2, 3), strict=True):
        mine = shipped(prompt, seed=seed)
        theirs = pipe(  # type: ignore[operator]
            prompt,
            num_inference_steps=shipped.defaults.num_inference_steps,
            guidance_scale=shipped.defaults.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        difference = np.abs(np.asarray(mine, dtype=int) - np.asarray(theirs, dtype=int)).max()
        print(prompt, "largest difference of pixels:", difference)
        assert difference <= 1
        assert np.asarray(mine).std() > 20


@pytest.mark.parametrize(
    ("name", "scheduler", "extra"),
    [
        ("ddim", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
        ("euler", "EulerDiscreteScheduler", {}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    ],
)
def test_deterministic_samplers_draw_as_diffusers_does(
    shipped: StableDiffusion, name: str, scheduler: str, extra: dict[str, object]
) -> None:
    """All but PNDM: fed v, diffusers' extrapolates v and ours epsilon, as the paper does (see test_samplers.py)."""
    import diffusers

    pipe = diffusers_pipeline(shipped_folder())
    pipe.scheduler = getattr(diffusers, scheduler)(  # type: ignore[attr-defined]
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=shipped.config.schedule.prediction_type,
        timestep_spacing="leading",
        steps_offset=1,
        **extra,
    )
    mine = shipped("a fox in the snow", seed=5, sampler=Sampler(name, spacing="leading"), num_inference_steps=9)
    theirs = pipe(  # type: ignore[operator]
        "a fox in the snow",
        num_inference_steps=9,
        guidance_scale=shipped.defaults.guidance_scale,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert np.abs(np.asarray(mine, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1


def test_first_noise_is_that_of_torch_and_diffusers(random_model: StableDiffusion) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    step = next(iter(random_model.denoise("a fox", seed=7, sampler="ddim", num_inference_steps=4)))
    theirs = randn_tensor((1, 4, 16, 16), generator=torch.Generator().manual_seed(7))
    run = Sampler("ddim").plan(random_model.schedule, 4)
    sigma = run.sigmas[0]
    # x = (x0 + σ ε) / √(σ²+1), so the noise that the step began with can be had back from what it says
    begun = (step.x0 + sigma * step.noise) / np.sqrt(sigma**2 + 1)
    assert torch.allclose(begun, theirs, atol=1e-5)


def test_same_seed_same_picture(random_model: StableDiffusion) -> None:
    first, second = (random_model("a fox", seed=3, num_inference_steps=3) for _ in range(2))
    assert np.array_equal(np.asarray(first), np.asarray(second))
    other = random_model("a fox", seed=4, num_inference_steps=3)
    assert np.abs(np.asarray(first, dtype=int) - np.asarray(other, dtype=int)).max() > 20


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a"])
def test_batch_is_the_same_as_one_by_one(random_model: StableDiffusion, sampler: str) -> None:
    together = last(random_model, PROMPTS, seed=10, sampler=sampler, num_inference_steps=6)
    for i, prompt in enumerate(PROMPTS):
        alone = last(random_model, prompt, seed=10 + i, sampler=sampler, num_inference_steps=6)
        assert float((together[i] - alone[0]).abs().max()) <= 1e-4 * max(1.0, float(alone.abs().max()))


def test_threads_of_torch_do_not_matter(random_model: StableDiffusion) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(last(random_model, "a fox", seed=1, num_inference_steps=4))
    finally:
        torch.set_num_threads(before)
    assert float((results[0] - results[1]).abs().max()) <= 1e-4 * max(1.0, float(results[0].abs().max()))


def test_two_runs_interleave_and_threads_share(random_model: StableDiffusion) -> None:
    alone = [last(random_model, "a fox", seed=s, sampler="pndm", num_inference_steps=4) for s in (1, 2)]
    pairs = zip(
        *(random_model.denoise("a fox", seed=s, sampler="pndm", num_inference_steps=4) for s in (1, 2)), strict=True
    )
    *_, (a, b) = pairs
    assert torch.equal(a.latents, alone[0]) and torch.equal(b.latents, alone[1])
    drawn: dict[int, torch.Tensor] = {}

    def draw(seed: int) -> None:
        drawn[seed] = last(random_model, "a fox", seed=seed, sampler="pndm", num_inference_steps=4)

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.allclose(drawn[1], alone[0], atol=1e-5) and torch.allclose(drawn[2], alone[1], atol=1e-5)


def test_guidance_one_is_conditional_and_zero_unconditional(random_model: StableDiffusion) -> None:
    latents, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 500.0
    context = random_model.encode_text(["blurry", "a fox"])
    with torch.inference_mode():
        negative, positive = (random_model.unet(latents, torch.tensor(t), c[None]) for c in context)
        for guidance in (0.0, 1.0, 7.5):
            expected = negative + guidance * (positive - negative)
            assert torch.allclose(random_model.predict(latents, t, context, guidance), expected, atol=1e-4)
    for guidance, prompt, negative_prompt in ((1.0, "a fox", "anything"), (0.0, "anything", "a fox")):
        one = last(
            random_model,
            prompt,
            negative_prompt=negative_prompt,
            guidance_scale=guidance,
            seed=2,
            num_inference_steps=2,
        )
        plain = last(random_model, "a fox", guidance_scale=1.0, seed=2, num_inference_steps=2)
        assert torch.equal(one, plain)


def test_steps_tell_what_happened(random_model: StableDiffusion) -> None:
    steps = list(random_model.denoise("a fox", seed=0, sampler="pndm", num_inference_steps=5))
    assert [step.index for step in steps] == list(range(6))
    assert {step.calls for step in steps} == {6}
    # a sampler that ends at σ = 0 ends on its last prediction of the picture
    end = list(random_model.denoise("a fox", seed=0, sampler="euler", num_inference_steps=5))[-1]
    assert torch.allclose(end.latents, end.x0, atol=1e-5)


def test_image_to_image_counts_its_steps(random_model: StableDiffusion) -> None:
    picture = Image.new("RGB", (64, 48), "orange")
    steps = list(random_model.denoise("a fox", picture, strength=0.55, num_inference_steps=10, sampler="ddim", seed=0))
    assert len(steps) == 5
    assert steps[0].latents.shape == (1, 4, 6, 8)
    assert random_model.image_to_image("a fox", picture, 0.5, num_inference_steps=4, seed=1).size == (64, 48)
    with pytest.raises(ValueError, match="run none"):
        random_model.denoise("a fox", picture, strength=0.05, num_inference_steps=10)
    with pytest.raises(ValueError, match="strength"):
        random_model.denoise("a fox", picture, strength=1.5)


def test_decode_twice_gives_one_picture_and_keeps_the_latents(random_model: StableDiffusion) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = latents.clone()
    first, second = random_model.decode(latents)[0], random_model.decode(latents)[0]
    assert np.array_equal(np.asarray(first), np.asarray(second))
    assert torch.equal(latents, before)


def test_scaling_factor_is_applied_once_each_way(random_model: StableDiffusion) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        plain = random_model.autoencoder.encode(image).mean
        assert torch.allclose(random_model.encode_image(image), 0.18215 * plain)
        assert torch.allclose(
            random_model.decode_to_tensor(0.18215 * plain), random_model.autoencoder.decode(plain), atol=1e-4
        )


def test_a_decoder_that_overflows_in_float16_decodes_in_float32() -> None:
    torch.manual_seed(0)
    parts = TextEncoder(TINY.text_encoder), UNet(TINY.unet), Autoencoder(TINY.autoencoder)
    with torch.no_grad():  # the norm behind it brings the numbers back, so only their size in between is at fault
        parts[2].decoder.up_blocks[-1].resnets[-1].conv2.weight.mul_(2e5)
    full = StableDiffusion(TINY, Tokenizer.from_pretrained(), *(part.eval() for part in parts))
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = full.decode_to_tensor(latents)
    half = StableDiffusion(TINY, full.tokenizer, *(part.half() for part in parts))
    with pytest.warns(UserWarning, match="overflows in float16"):
        drawn = half.decode_to_tensor(latents)
    assert torch.allclose(drawn, expected, atol=0.02 * float(expected.abs().max()))
    assert half.autoencoder.decoder.conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize("part", ["text_encoder", "unet", "autoencoder"])
def test_nan_names_the_part(part: str) -> None:
    torch.manual_seed(0)
    parts = {
        "text_encoder": TextEncoder(TINY.text_encoder),
        "unet": UNet(TINY.unet),
        "autoencoder": Autoencoder(TINY.autoencoder),
    }
    weight = {
        "text_encoder": "text_model.final_layer_norm.weight",
        "unet": "conv_out.bias",
        "autoencoder": "decoder.conv_out.bias",
    }
    with torch.no_grad():
        parts[part].get_parameter(weight[part]).fill_(float("nan"))
    sd = StableDiffusion(TINY, Tokenizer.from_pretrained(), **parts)  # type: ignore[arg-type]
    name = {"text_encoder": "text encoder", "unet": "UNet", "autoencoder": "autoencoder's decoder"}[part]
    with pytest.raises(FloatingPointError, match=name):
        sd("a fox", num_inference_steps=1, seed=0)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": 10**6}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"height": 100}, "height=100"),
        ({"width": 0}, "width=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed"),
        ({"seed": [1, 2]}, "2 seeds for 1"),
        ({"sampler": "dpm"}, "dpmpp_2m"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1"),
        ({"clip_skip": 9}, "clip_skip=9"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
    ],
)
def test_bad_values_are_refused(random_model: StableDiffusion, choices: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_model("a fox", **choices)  # type: ignore[arg-type]


def test_bad_prompts_are_refused(random_model: StableDiffusion) -> None:
    for prompt in ([], 7, [None]):
        with pytest.raises(TypeError, match="prompt must be"):
            random_model(prompt)  # type: ignore[arg-type]


def test_lists_and_numbers_of_images(random_model: StableDiffusion) -> None:
    assert isinstance(random_model("a fox", num_inference_steps=1, seed=0), Image.Image)
    pictures = random_model(["a fox", "a cat"], num_images_per_prompt=2, num_inference_steps=1, seed=5)
    assert [picture.info["seed"] for picture in pictures] == [5, 6, 7, 8]
    fresh = random_model("a fox", num_inference_steps=1)
    again = random_model("a fox", num_inference_steps=1, seed=fresh.info["seed"])
    assert np.array_equal(np.asarray(fresh), np.asarray(again))


def test_seeds() -> None:
    assert seeds(7, 3) == [7, 8, 9]
    assert seeds([4, 2], 2) == [4, 2]
    assert len(set(seeds(None, 4))) == 4


def test_unknown_words_have_rows_of_zeros(random_model: StableDiffusion) -> None:
    ids = random_model.tokenizer.encode("zebra")
    table = random_model.text_encoder.token_embedding.weight
    before = table[ids].clone()
    table[ids] = 0
    try:
        assert random_model.unknown_words("a zebra, in the snow!") == ["zebra"]
    finally:
        table[ids] = before
    assert random_model.unknown_words("a zebra in the snow") == []


def test_float16_runs_without_mixing_dtypes(random_model: StableDiffusion, tmp_path: Path) -> None:
    random_model.save_pretrained(tmp_path / "model", torch.float16)
    half = StableDiffusion.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float16)
    assert half.dtype == torch.float16
    mine = last(half, "a fox", seed=0, num_inference_steps=3, sampler="euler")
    assert mine.dtype == torch.float32
    exact = last(random_model, "a fox", seed=0, num_inference_steps=3, sampler="euler")
    assert float((mine - exact).abs().max()) < 0.2 * float(exact.abs().max())
    assert half.decode(mine)[0].size == (128, 128)


def test_save_pretrained_keeps_every_weight_and_the_defaults(random_model: StableDiffusion, tmp_path: Path) -> None:
    sampler = Sampler("euler", karras=True)
    parts = random_model.text_encoder, random_model.unet, random_model.autoencoder
    sd = StableDiffusion(TINY, random_model.tokenizer, *parts, Defaults(sampler, 12, 3.0))
    sd.save_pretrained(tmp_path / "model")
    again = StableDiffusion.from_pretrained(tmp_path / "model", device="cpu")
    assert again.defaults == Defaults(sampler, 12, 3.0)
    assert again.config == TINY
    for part in ("text_encoder", "unet", "autoencoder"):
        mine, theirs = getattr(sd, part).state_dict(), getattr(again, part).state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_pictures_of_every_mode_become_images() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    expected = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert torch.equal(from_pil(red), expected)
    assert torch.equal(from_pil(red.convert("RGBA")), expected)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert torch.equal(from_pil(clear), torch.ones(1, 3, 8, 8))
    assert torch.equal(from_pil(Image.new("L", (8, 8), 255)), torch.ones(1, 3, 8, 8))
    sixteen = Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16))
    assert torch.equal(from_pil(sixteen), torch.ones(1, 3, 8, 8))


def test_pixels_survive_the_way_to_images_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    assert np.array_equal(to_pixels(to_images(pixels)), pixels)


def test_grid_places_pictures_in_reading_order() -> None:
    colors = ["red", "lime", "blue"]
    sheet = grid([Image.new("RGB", (4, 4), color) for color in colors])
    assert sheet.size == (8, 8)
    assert [sheet.getpixel(place) for place in ((0, 0), (4, 0), (0, 4))] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    captioned = grid([Image.new("RGB", (64, 64), "red")] * 2, columns=2, captions=["a fox", "a very long caption " * 3])
    assert captioned.width == 128 and captioned.height > 64
    assert {captioned.getpixel((x, y)) for x in range(128) for y in range(64)} == {(255, 0, 0)}
    assert any(captioned.getpixel((x, y)) != (255, 255, 255) for x in range(64) for y in range(64, captioned.height))
    with pytest.raises(ValueError, match="1 captions for 2"):
        grid([Image.new("RGB", (4, 4))] * 2, captions=["one"])
    with pytest.raises(ValueError, match="one size"):
        grid([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))])
