"""The pipeline as a whole, against torch's own noise, its parts called by hand, and itself where nothing may change."""

import threading

import numpy as np
import pytest
import torch
from models import SMALL, last, lively_model
from PIL import Image

from minisd import Autoencoder, Sampler, StableDiffusion, TextEncoder, Tokenizer, UNet

PROMPTS = ["a fox in the snow", "a red car on the beach", "two penguins", "a castle at night"]


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return lively_model()


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(sd, prompt="a fox", **settings) -> torch.Tensor:
    return last(sd.denoise(prompt, **{"num_inference_steps": 4} | settings))


def close(ours, expected) -> bool:
    return float((ours - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


def test_first_noise_is_that_of_torchs_generator(sd):
    step = next(iter(sd.denoise("a fox", seed=7, sampler="ddim", num_inference_steps=4)))
    sigma = Sampler("ddim").plan(sd.schedule, 4).sigmas[0]
    # x = (x0 + σ ε) / √(σ²+1), so a step tells with what noise it began
    begun = (step.x0 + sigma * step.noise) / np.sqrt(sigma**2 + 1)
    assert torch.allclose(begun, noise(7, 1, 4, 8, 8), atol=1e-5)


def test_seed_determines_the_picture(sd):
    first, second, other = (np.asarray(sd("a fox", seed=seed, num_inference_steps=3), int) for seed in (3, 3, 4))
    assert np.array_equal(first, second)
    assert np.abs(first - other).max() > 20


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a"])
def test_batch_equals_one_by_one(sd, sampler):
    together = drawn(sd, PROMPTS, seed=10, sampler=sampler)
    for i, prompt in enumerate(PROMPTS):
        assert close(together[i], drawn(sd, prompt, seed=10 + i, sampler=sampler)[0])


def test_threads_of_torch(sd):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(drawn(sd, seed=1))
    finally:
        torch.set_num_threads(before)
    assert close(results[0], results[1])


def test_runs_interleave_and_threads_share_a_model(sd):
    alone = [drawn(sd, seed=seed, sampler="pndm") for seed in (1, 2)]
    runs = (sd.denoise("a fox", seed=seed, sampler="pndm", num_inference_steps=4) for seed in (1, 2))
    *_, (a, b) = zip(*runs, strict=True)
    assert torch.equal(a.latents, alone[0]) and torch.equal(b.latents, alone[1])
    found = {}

    def draw(seed: int) -> None:
        found[seed] = drawn(sd, seed=seed, sampler="pndm")

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert close(found[1], alone[0]) and close(found[2], alone[1])


def test_guidance_scale_one_is_the_prompt_and_zero_the_negative_prompt(sd):
    latents, t, context = noise(0, 1, 4, 8, 8), 500.0, sd.encode_text(["blurry", "a fox"])
    with torch.inference_mode():
        negative, positive = (sd.unet(latents, torch.tensor(t), c[None]) for c in context)
        for scale in (0.0, 1.0, 7.5):
            expected = negative + scale * (positive - negative)
            assert torch.allclose(sd.predict(latents, t, context, scale), expected, atol=1e-4)
    plain = drawn(sd, guidance_scale=1.0, seed=2)
    for scale, prompt, negative in ((1.0, "a fox", "anything"), (0.0, "anything", "a fox")):
        assert torch.equal(drawn(sd, prompt, negative_prompt=negative, guidance_scale=scale, seed=2), plain)


def test_steps_of_a_run(sd):
    steps = list(sd.denoise("a fox", seed=0, sampler="pndm", num_inference_steps=5))
    assert [step.index for step in steps] == list(range(6))
    assert {step.num_calls for step in steps} == {6}
    # a sampler that ends at σ = 0 ends on its last prediction of the picture
    *_, end = sd.denoise("a fox", seed=0, sampler="euler", num_inference_steps=5)
    assert torch.allclose(end.latents, end.x0, atol=1e-5)


def test_leaving_the_loop_stops_the_work(sd, monkeypatch):
    calls, forward = [], sd.unet.forward
    monkeypatch.setattr(sd.unet, "forward", lambda *inputs: calls.append(1) or forward(*inputs))
    for step in sd.denoise("a fox", seed=0, num_inference_steps=9):
        if step.index == 2:
            break
    assert len(calls) == 3
    assert sd.decode(step.x0)[0].size == (64, 64)


def test_spacing_that_other_noise_levels_replace_is_named(sd):
    for name, options in (("dpmpp_2m", {"karras": True}), ("unipc", {"sigmas": "beta"})):
        with pytest.warns(UserWarning, match=f"spacing='trailing' has no effect on {name}"):
            sd.denoise("a fox", seed=0, sampler=name, spacing="trailing", **options)


def test_image_to_image_runs_a_share_of_the_steps(sd):
    picture = Image.new("RGB", (64, 48), "orange")
    steps = list(sd.denoise("a fox", picture, strength=0.55, num_inference_steps=10, sampler="ddim", seed=0))
    assert len(steps) == 5
    assert steps[0].latents.shape == (1, 4, 6, 8)
    assert sd.image_to_image("a fox", picture, 0.5, num_inference_steps=4, seed=1).size == (64, 48)


def test_decode_keeps_the_latents(sd):
    latents = noise(0, 1, 4, 8, 8)
    before = latents.clone()
    first, second = sd.decode(latents)[0], sd.decode(latents)[0]
    assert np.array_equal(np.asarray(first), np.asarray(second))
    assert torch.equal(latents, before)


def test_scaling_factor_each_way(sd):
    image = noise(0, 1, 3, 64, 64).clamp(-1, 1)
    with torch.inference_mode():
        mean = sd.autoencoder.encode(image).mean
        assert torch.allclose(sd.encode_image(image), 0.18215 * mean)
        assert torch.allclose(sd.decode_to_tensor(0.18215 * mean), sd.autoencoder.decode(mean), atol=1e-4)


def test_decoder_that_overflows_in_float16_decodes_in_float32():
    torch.manual_seed(0)
    parts = TextEncoder(SMALL.text_encoder), UNet(SMALL.unet), Autoencoder(SMALL.autoencoder)
    with torch.no_grad():  # the norm behind it brings the numbers back, so only their size in between is at fault
        parts[2].decoder.up_blocks[-1].resnets[-1].conv2.weight.mul_(2e5)
    full = StableDiffusion(SMALL, Tokenizer.from_pretrained(), *(part.eval() for part in parts))
    latents = noise(0, 1, 4, 4, 4)
    expected = full.decode_to_tensor(latents)
    half = StableDiffusion(SMALL, full.tokenizer, *(part.half() for part in parts))
    with pytest.warns(UserWarning, match="overflows in float16"):
        found = half.decode_to_tensor(latents)
    assert torch.allclose(found, expected, atol=0.02 * float(expected.abs().max()))
    assert half.autoencoder.decoder.conv_in.weight.dtype == torch.float16


def test_lists_of_prompts_and_numbers_of_images(sd):
    assert isinstance(sd("a fox", num_inference_steps=1, seed=0), Image.Image)
    pictures = sd(["a fox", "a cat"], num_images_per_prompt=2, num_inference_steps=1, seed=5)
    assert [picture.info["seed"] for picture in pictures] == [5, 6, 7, 8]
    pictures = sd(["a fox", "a cat"], num_inference_steps=1, seed=[4, 2])
    assert [picture.info["seed"] for picture in pictures] == [4, 2]
    fresh = sd("a fox", num_inference_steps=1)
    again = sd("a fox", num_inference_steps=1, seed=fresh.info["seed"])
    assert np.array_equal(np.asarray(fresh), np.asarray(again))


def test_unknown_words_have_embeddings_of_zeros(sd):
    ids = sd.tokenizer.encode("zebra")
    table = sd.text_encoder.token_embedding.weight
    before = table[ids].clone()
    table[ids] = 0
    try:
        assert sd.unknown_words("a zebra, in the snow!") == ["zebra"]
    finally:
        table[ids] = before
    assert sd.unknown_words("a zebra in the snow") == []


def test_float16_is_near_float32(sd, tmp_path):
    sd.save_pretrained(tmp_path / "model", torch.float16)
    half = StableDiffusion.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float16)
    assert half.dtype == torch.float16
    ours, exact = (drawn(model, seed=0, num_inference_steps=3, sampler="euler") for model in (half, sd))
    assert ours.dtype == torch.float32
    assert float((ours - exact).abs().max()) < 0.2 * float(exact.abs().max())
    assert half.decode(ours)[0].size == (64, 64)
