"""A random Stable Diffusion 1.5 of full size, written by diffusers, draws in minisd diffusers' picture.

The pictures have 128×128 pixels, for time's sake. test_unet.py compares the UNet at the 64×64 latents of 512×512, and
test_autoencoder.py the autoencoder at 256×256; `minisd bench`, and the tests with published weights (`real`), compare
whole pictures of 512×512.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minisd import Sampler, StableDiffusion

pytestmark = pytest.mark.timeout(900)  # minutes of work on two cores

SIDE = 128
PROMPTS = ["a fox in the snow", "an astronaut riding a horse on the moon"]


def load(source: Path) -> StableDiffusion:
    return StableDiffusion.from_pretrained(source, device="cpu", dtype=torch.float32)


def draw(sd: StableDiffusion, prompt: str, side: int) -> np.ndarray:
    settings = {"num_inference_steps": 2, "guidance_scale": 7.5, "sampler": Sampler("ddim", "leading")}
    picture = sd(prompt, seed=7, width=side, height=side, **settings)
    assert picture.size == (side, side)
    return np.asarray(picture, dtype=int)


@pytest.mark.full
def test_folder_draws_the_picture_of_diffusers(full_checkpoints):
    from diffusers import StableDiffusionPipeline

    sd = load(full_checkpoints[0])
    mine = draw(sd, PROMPTS[0], SIDE)
    moved = np.abs(draw(sd, PROMPTS[0], 64) - draw(sd, PROMPTS[1], 64)).max()
    del sd
    pipe = StableDiffusionPipeline.from_pretrained(str(full_checkpoints[0]), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(7)
    settings = {"num_inference_steps": 2, "guidance_scale": 7.5, "width": SIDE, "height": SIDE}
    theirs = pipe(PROMPTS[0], generator=seed, **settings).images[0]
    difference = np.abs(mine - np.asarray(theirs, dtype=int)).max()
    print(f"difference {difference}/255, standard deviation {mine.std():.1f}/255, another prompt moves {moved}/255")
    assert difference <= 1
    assert mine.std() >= 20
    assert moved >= 100


@pytest.mark.full
def test_single_file_has_the_weights_of_the_folder(full_checkpoints):
    """The file has other names and shapes, and no schedule; both hold the same float32 numbers."""
    folder, file = (load(path) for path in full_checkpoints)
    for part in ("text_encoder", "unet", "autoencoder"):
        ours, other = (getattr(sd, part).state_dict() for sd in (folder, file))
        assert list(ours) == list(other)
        assert all(torch.equal(weight, other[name]) for name, weight in ours.items()), part
    assert replace(folder.config, schedule=file.config.schedule) == file.config
    assert np.abs(draw(folder, PROMPTS[0], 64) - draw(file, PROMPTS[0], 64)).max() <= 1


@pytest.mark.real
def test_published_weights_draw_the_picture_of_diffusers(real_model):
    """On named weights, in float32 on the CPU; with a GPU the next test does the same in float16."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(real_model, safety_checker=None)
    compare_with(pipe, real_model, torch.float32, "cpu", tolerance=1)


@pytest.mark.real
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_published_weights_in_float16_on_cuda(real_model):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(real_model, safety_checker=None, dtype=torch.float16).to("cuda")
    compare_with(pipe, real_model, torch.float16, "cuda", tolerance=24)


def compare_with(pipe: object, source: str, dtype: torch.dtype, device: str, tolerance: int) -> None:
    """Same latents in, pictures compared: the largest difference in float32, the mean one in float16."""
    import diffusers

    pipe.scheduler = diffusers.DDIMScheduler.from_config(  # type: ignore[attr-defined]
        pipe.scheduler.config,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="leading",  # type: ignore[attr-defined]
    )
    sd = StableDiffusion.from_pretrained(source, device=device, dtype=dtype)
    side = sd.unet.config.sample_size
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(7))
    theirs = pipe(  # type: ignore[operator]
        PROMPTS[0], num_inference_steps=4, guidance_scale=7.5, latents=noise.to(device, dtype)
    ).images[0]
    mine = sd(PROMPTS[0], seed=7, num_inference_steps=4, guidance_scale=7.5, sampler=Sampler("ddim", "leading"))
    assert isinstance(mine, Image.Image)
    difference = np.abs(np.asarray(mine, dtype=int) - np.asarray(theirs, dtype=int))
    print(f"largest difference {difference.max()}/255, mean {difference.mean():.3f}/255")
    assert (difference.max() if dtype == torch.float32 else difference.mean()) <= tolerance
