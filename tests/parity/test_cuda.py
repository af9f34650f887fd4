"""On a GPU: the tiny model draws the pictures of the CPU, and full size in float16 is as near to float32 as diffusers.

Nothing here runs without one. `python -m pytest tests/test_cuda.py -s` prints what was found.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minisd import Sampler, StableDiffusion, record_attention
from minisd.features.attention_maps import watch_attention

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"), pytest.mark.timeout(600)]

PROMPT = "a red car on the beach at sunset"
DDIM = Sampler("ddim", "leading")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """float32 is float32 here: by default torch lets convolutions on a GPU round to 10 bits (TF32)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def cpu() -> StableDiffusion:
    return StableDiffusion.from_pretrained(device="cpu")


def pixels(picture: Image.Image | list[Image.Image]) -> np.ndarray:
    return np.asarray(picture, dtype=int) if isinstance(picture, Image.Image) else np.stack(list(map(pixels, picture)))


def difference(one: Image.Image | list[Image.Image], other: Image.Image | list[Image.Image]) -> int:
    found = int(np.abs(pixels(one) - pixels(other)).max())
    print(f"largest difference {found}/255")
    return found


def test_the_first_device_is_the_gpu_and_its_usual_dtype_float16():
    sd = StableDiffusion.from_pretrained()
    assert sd.device.type == "cuda" and sd.unet.conv_in.weight.dtype == torch.float16
    assert sd.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "heun", "ddim"])
def test_float32_draws_the_picture_of_the_cpu(cpu, sampler):
    gpu = StableDiffusion.from_pretrained(device="cuda", dtype=torch.float32)
    choices = {"seed": [3, 4], "sampler": Sampler(sampler), "num_inference_steps": 8}
    assert difference(gpu([PROMPT] * 2, **choices), cpu([PROMPT] * 2, **choices)) <= 2


def test_float16_stays_near_float32(cpu):
    gpu = StableDiffusion.from_pretrained(device="cuda", dtype=torch.float16)
    apart = np.abs(pixels(gpu(PROMPT, seed=3)) - pixels(cpu(PROMPT, seed=3)))
    print(f"mean {apart.mean():.3f}/255, largest {apart.max()}/255")
    assert apart.mean() < 2


def test_editing_draws_the_picture_of_the_cpu(cpu):
    gpu = StableDiffusion.from_pretrained(device="cuda", dtype=torch.float32)
    start = cpu(PROMPT, seed=3)
    mask = Image.new("L", start.size)
    mask.paste(255, (48, 48, 144, 144))
    drawn = [
        (sd.image_to_image("a blue car", start, 0.6, seed=5), sd.inpaint("a fox", start, mask, seed=5))
        for sd in (gpu, cpu)
    ]
    for one, other in zip(*drawn, strict=True):
        assert difference(one, other) <= 2


def test_maps_of_attention_are_those_of_the_cpu(cpu):
    gpu = StableDiffusion.from_pretrained(device="cuda", dtype=torch.float32)
    maps = []
    for sd in (gpu, cpu):
        with record_attention(sd.unet) as records:
            list(sd.denoise(PROMPT, seed=3, num_inference_steps=2))
        maps.append({record.name: record.weights.cpu() for record in records})
    for name, weights in maps[0].items():
        torch.testing.assert_close(weights, maps[1][name], rtol=0, atol=1e-3)
    layer = dict(gpu.unet.named_modules())["down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
    seen: list[torch.Tensor] = []
    plain = gpu(PROMPT, seed=3, num_inference_steps=2)
    with watch_attention({layer: seen.append}):
        assert difference(gpu(PROMPT, seed=3, num_inference_steps=2), plain) == 0
    assert len(seen) == 2 and all(weights.is_cuda for weights in seen)


@pytest.mark.parametrize(
    "options", [{"sampler": "ddim"}, {"sampler": "lcm"}, {"sampler": "dpmpp_sde"}, {"guidance_scale": [3, 7.5]}]
)
def test_no_step_waits_for_the_gpu(options):
    """torch raises for whatever waits, from the first call of the UNet to the last."""
    gpu, calls = StableDiffusion.from_pretrained(device="cuda"), list[int]()
    choices = {"seed": 3, "num_inference_steps": 6, **options}
    plain = gpu([PROMPT] * 2, **choices)
    total = next(gpu.denoise([PROMPT] * 2, **choices)).num_calls

    def watch(module: torch.nn.Module, inputs: object) -> None:
        calls.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(calls) < total else "default")

    handle = gpu.unet.register_forward_pre_hook(watch)
    try:
        assert difference(gpu([PROMPT] * 2, **choices), plain) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
        handle.remove()
    assert len(calls) == total


def test_bad_number_on_the_gpu_names_the_part():
    gpu = StableDiffusion.from_pretrained(device="cuda")
    gpu.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="the UNet returned NaN or infinity in torch.float16"):
        gpu(PROMPT, seed=3, num_inference_steps=50)
    with pytest.raises(FloatingPointError, match="the UNet returned NaN"):
        gpu(PROMPT, seed=3, num_inference_steps=1, output_type="latent")


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}])
def test_compiled_draws_the_same_picture(options):
    plain, sd = (StableDiffusion.from_pretrained(device="cuda", dtype=torch.float32) for _ in range(2))
    sd.compile(**options)
    for seed in (3, 4):
        assert difference(sd(PROMPT, seed=seed), plain(PROMPT, seed=seed)) <= 3


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion 1.5 as diffusers writes it, in float32."""
    from checkpoints import make_parts, write_folder

    from minisd import SD15

    return write_folder(tmp_path_factory.mktemp("full") / "model", make_parts(SD15))


def test_full_size_in_float16_is_as_near_to_float32_as_diffusers(full):
    """The judge is diffusers in float32; on whole pictures, 20 guided steps at 512×512."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(7)).cuda()

    def theirs(dtype: torch.dtype) -> np.ndarray:
        pipe = StableDiffusionPipeline.from_pretrained(str(full), dtype=dtype, local_files_only=True).to("cuda")
        pipe.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
        )
        pipe.set_progress_bar_config(disable=True)
        return pixels(pipe(PROMPT, latents=noise.to(dtype), num_inference_steps=20, guidance_scale=7.5).images[0])

    def ours(dtype: torch.dtype) -> np.ndarray:
        sd = StableDiffusion.from_pretrained(full, device="cuda", dtype=dtype)
        *_, last = sd.denoise(PROMPT, latents=noise, num_inference_steps=20, guidance_scale=7.5, sampler=DDIM)
        return pixels(sd.decode(last.latents)[0])

    judge = theirs(torch.float32)
    float32, mine, other = (
        np.abs(x - judge) for x in (ours(torch.float32), ours(torch.float16), theirs(torch.float16))
    )
    print(
        f"from diffusers in float32, mean (largest) of 255: minisd float32 {float32.mean():.4f} ({float32.max()}), "
        f"float16 {mine.mean():.3f} ({mine.max()}), diffusers float16 {other.mean():.3f} ({other.max()}); "
        f"the picture's own spread {judge.std():.1f}"
    )
    assert judge.std() > 20
    assert float32.max() <= 1
    assert mine.mean() <= 1.1 * other.mean() + 0.05


def test_offloaded_parts_take_less_of_the_gpu_and_draw_the_same(full):
    drawn, peaks = [], []
    for offload in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sd = StableDiffusion.from_pretrained(full, device="cuda", dtype=torch.float16, offload=offload, tile=offload)
        drawn.append(sd(PROMPT, seed=1, num_inference_steps=2))
        peaks.append((torch.cuda.max_memory_allocated() - before) / 1e9)
        del sd
    print(f"peak {peaks[0]:.2f} GB, offloaded {peaks[1]:.2f} GB")
    assert difference(*drawn) <= 2
    assert peaks[1] < peaks[0] - 0.3
