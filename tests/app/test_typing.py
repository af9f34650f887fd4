"""Code of users under `mypy --strict`: what is right passes, and what is wrong is found, with the error it deserves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START = """
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from minisd import Sampler, StableDiffusion, UNet
from minisd.guidance import Guidance
from minisd.samplers import Plan, euler
from minisd.schedule import Schedule
sd = StableDiffusion.from_pretrained()
photo = Image.new("RGB", (64, 64))
"""
RIGHT = {
    "draws": """
image: Image.Image = sd("a fox", seed=7, num_inference_steps=20, guidance_scale=7.5)
images: list[Image.Image] = sd(["a fox", "a cat"], seed=[1, 2], sampler=Sampler("ddim"), karras=False)
several: list[Image.Image] = sd("a fox", num_images_per_prompt=3)
""",
    "outputs": """
array: NDArray[np.float32] = sd("a fox", output_type="np")
latents: Tensor = sd("a fox", output_type="latent", preset="fast")
path = sd.save(sd("a fox"), "fox.png").name.upper()
""",
    "edits": """
edited: Image.Image = sd.image_to_image("a fox", photo, 0.5, resize=True, seed=3)
painted: Image.Image = sd.inpaint("a fox", photo, photo, mask_blur=4, padding_mask_crop=32)
both: list[Image.Image] = sd.image_to_image("a fox", [photo, photo], negative_prompt="blurry")
""",
    "hooks": """
def callback(index: int, t: float, latents: Tensor) -> Tensor | None:
    return latents * 0.99 if index > 3 else None

class Own(Guidance):
    def combine(self, uncond: Tensor, cond: Tensor) -> Tensor:
        return cond

def mine(schedule: Schedule, n: int, start: int = 0) -> Plan:
    return euler(schedule, n, start)

sd("a fox", callback=callback, guidance=Own(4.0), sampler=mine)
for step in sd.denoise("a fox", callback=callback):
    print(step.t + 1, step.latents.shape)
""",
    "parts": """
class Mine(UNet):
    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        return latents

other = StableDiffusion(sd.config, sd.tokenizer, sd.text_encoder, Mine(sd.unet.config), sd.autoencoder)
other.to("cpu", torch.float32).merge(sd, weight=0.3)
context: Tensor = sd.encode_text(["a fox"])
sd.save_single_file("model.safetensors", torch.float16)
""",
}
WRONG = {  # the error follows the line
    "misspelt": """
sd("a fox", guidence_scale=7.5)  # call-overload
sd.image_to_image("a fox", photo, strenght=1)  # call-overload
sd.outpaint("a fox", photo, rigth=8)  # call-arg
""",
    "kinds": 'sd("a fox", num_inference_steps="20")  # call-overload\nsd.denoise("a fox", width="64")  # arg-type',
    "results": 'image: Image.Image = sd(["a fox"])  # assignment\nsd("a fox").append(1)  # attr-defined',
    "callbacks": """
def callback(index: str, t: float, latents: Tensor) -> Tensor | None: ...
sd.denoise("a fox", callback=callback)  # arg-type
sd.denoise("a fox", guidance=7.5)  # arg-type
""",
    "files": 'sd.save("fox.png", photo)  # arg-type\nsd.to(device=3)  # arg-type\nsd.merge("other")  # arg-type',
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_code_of_users_under_mypy(tmp_path):
    for name, code in {**RIGHT, **WRONG}.items():
        (tmp_path / f"{name}.py").write_text(START + code, encoding="utf-8")
    (tmp_path / "mypy.ini").write_text("[mypy]\n")
    options = ["--follow-imports=silent", "--config-file=mypy.ini", f"--cache-dir={os.devnull}"]
    command = [sys.executable, "-m", "mypy", "--strict", *options, "."]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = re.findall(r"^(\w+)\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    expected = [
        (name, str(number), line.partition("  # ")[2])
        for name, code in WRONG.items()
        for number, line in enumerate((START + code).splitlines(), 1)
        if "  # " in line
    ]
    assert set(found) == set(expected), done.stdout + done.stderr
    assert len(RIGHT) + len(WRONG) == 10
