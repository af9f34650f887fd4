"""The pipeline on a made-up GPU in float16: no tensor is left on the CPU; and in float16 on the CPU.

Networks are of full size, except where only the sampling loop is tested.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import difference, noise, random_weights

from minisd.autoencoder import Autoencoder
from minisd.config import TINY
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.samplers import SAMPLERS
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet

SCRIPT = Path(__file__).parents[1] / "fake_gpu.py"
PLANTS = ["position embedding", "UNet weight", "UNet norm", "decoder norm", "frequencies", "context"]


@pytest.fixture(scope="module")
def outcomes() -> Any:
    run = subprocess.run(
        [sys.executable, str(SCRIPT)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
        timeout=900,
        check=True,
    )
    return json.loads(run.stdout)


def result(outcomes: Any, name: str) -> Any:
    assert outcomes[name]["outcome"] == "ran through", outcomes[name]["error"]
    return outcomes[name]["result"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["SD 1.5", "SD 2.1", *SAMPLERS])
def test_words_to_pixels(outcomes, name):
    assert result(outcomes, name) == [[2, 3, 512, 448], "float16", "fakegpu"]


def test_image_to_image(outcomes):
    assert result(outcomes, "redraw") == [[1, 3, 512, 512], "float16", "fakegpu"]


def test_steps_stay_on_the_device_in_float32(outcomes):
    assert result(outcomes, "steps") == 6 * [[[2, 4, 24, 24], "float32", "fakegpu"]]


def test_attention_is_recorded_on_the_device(outcomes):
    assert result(outcomes, "record") == (12 + 2 * 16) * ["fakegpu"]


def test_no_step_waits_for_the_device(outcomes):
    found = result(outcomes, "waits")
    assert len(found.pop("planted")) == 3  # the callback's, after each call but the last
    assert found == dict.fromkeys(found, []) and len(found) > 15


def test_offloaded_parts_are_on_the_device_one_at_a_time(outcomes):
    found = result(outcomes, "offload")
    assert found["placed"] == {name: [name] for name in ("text encoder", "UNet", "autoencoder")}
    assert found["after"] == []
    # two bytes for each parameter
    assert found["weights"] == {"text encoder": 246_120_960, "UNet": 1_719_041_928, "autoencoder": 167_307_726}
    print({name: f"{peak / 1e9:.2f} GB" for name, peak in found["peaks"].items()})
    assert max(found["peaks"].values()) < 4e9
    # the meter sees what is computed: each part makes tensors of at least these sizes, in float16
    made = {"text encoder": 77 * 3072, "UNet": 2 * 4096 * 2560, "autoencoder": 256 * 512 * 512}
    for name, numbers in made.items():
        assert found["peaks"][name] > found["weights"][name] + 2 * numbers


def test_lora_on_offloaded_parts(outcomes):
    layers, calls = result(outcomes, "offload with LoRA")
    assert calls == layers > 200  # one step, guidance in one batch


@pytest.mark.parametrize("name", PLANTS)
def test_tensor_left_on_the_cpu(outcomes, name):
    assert outcomes[f"plant: {name}"]["outcome"] == "FakeTensorDeviceMismatchError"


def tiny(dtype: torch.dtype) -> StableDiffusion:
    with torch.device("meta"):
        parts: list[Any] = [TextEncoder(TINY.text_encoder), UNet(TINY.unet), Autoencoder(TINY.autoencoder)]
    for part in parts:
        weights = random_weights(part, torch.float32)
        part.load_state_dict({key: value.to(dtype) for key, value in weights.items()}, assign=True)
        part.eval().requires_grad_(False)
    return StableDiffusion(TINY, Tokenizer.from_pretrained(), *parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_mixes_with_no_other(dtype):
    """On the CPU, where a float16 tensor beside a float32 one is an error."""
    sd = tiny(dtype)
    for sampler in SAMPLERS:
        for step in sd.denoise("a fox", num_inference_steps=2, seed=0, sampler=sampler, height=32, width=32):
            assert {step.latents.dtype, step.x0.dtype, step.noise.dtype} == {torch.float32}
        assert sd.decode_to_tensor(step.latents).dtype == dtype
    image = torch.zeros(1, 3, 32, 32)
    for step in sd.denoise("a fox", image, num_inference_steps=4, strength=0.5, seed=0, sampler="ddpm"):
        assert step.latents.dtype == torch.float32


def test_half_precision_predicts_nearly_the_same():
    context, latents = noise(2, 77, 128, dtype=torch.float32), noise(1, 4, 8, 8, dtype=torch.float32)
    half = tiny(torch.float16).predict(latents, 500.0, context.half(), 7.5)
    full = tiny(torch.float32).predict(latents, 500.0, context, 7.5)
    assert half.dtype == torch.float32
    assert 0 < difference(half, full) < 0.1
