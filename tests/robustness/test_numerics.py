"""NaN and infinity, planted in every part, are named wherever they come out; and the same call gives the same bits."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from minisd import StableDiffusion
from minisd.samplers import SAMPLERS

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
MASK = Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 8))
LATENTS = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
IMAGES = torch.zeros(1, 3, 32, 32)
CONTEXT = torch.randn(1, 77, 16, generator=torch.Generator().manual_seed(1))

FUNCTIONS: dict[str, Callable[[StableDiffusion], Any]] = {
    "call": lambda sd: sd("fox", seed=0),
    "denoise": lambda sd: next(sd.denoise("fox", seed=0)),
    "denoise an image": lambda sd: next(sd.denoise("fox", PICTURE, seed=0)),
    "image_to_image": lambda sd: sd.image_to_image("fox", PICTURE, seed=0),
    "inpaint": lambda sd: sd.inpaint("fox", PICTURE, MASK, seed=0),
    "outpaint": lambda sd: sd.outpaint("fox", PICTURE, right=8, seed=0),
    "interpolate": lambda sd: sd.interpolate(("fox", "snow"), (0, 1), count=2),
    "encode_text": lambda sd: sd.encode_text("fox"),
    "encode_image": lambda sd: sd.encode_image(PICTURE),
    "predict": lambda sd: sd.predict(LATENTS, 500.0, CONTEXT),
    "decode": lambda sd: sd.decode(LATENTS),
    "decode_to_tensor": lambda sd: sd.decode_to_tensor(LATENTS),
}
DRAWING = ("call", "denoise", "denoise an image", "image_to_image", "inpaint", "outpaint", "interpolate")
EDITING = ("denoise an image", "image_to_image", "inpaint", "outpaint")
# Where a bad number is planted, what the error must call it, and the functions that use that part.
PLACES = {
    "text_encoder": ("text_model.final_layer_norm.weight", "text encoder", (*DRAWING, "encode_text")),
    "unet": ("conv_out.bias", "UNet", (*DRAWING, "predict")),
    "encoder": ("encoder.conv_out.bias", "autoencoder's encoder", (*EDITING, "encode_image")),
    "decoder": ("decoder.conv_out.bias", "autoencoder's decoder",
                (*(name for name in DRAWING if "denoise" not in name), "decode", "decode_to_tensor")),
}  # fmt: skip


@pytest.fixture(scope="module")
def sd(small_model: Path) -> StableDiffusion:
    return StableDiffusion.from_pretrained(small_model, device="cpu")


@contextmanager
def planted(parameter: nn.Parameter, value: float) -> Iterator[None]:
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.view(-1)[0] = value
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", PLACES)
def test_bad_number_in_a_part_names_the_part(sd, place, value):
    key, name, users = PLACES[place]
    part = {"text_encoder": sd.text_encoder, "unet": sd.unet}.get(place, sd.autoencoder)
    with planted(part.get_parameter(key), value):
        for function, act in FUNCTIONS.items():
            if function in users:
                with pytest.raises(FloatingPointError, match=f"the {name} returned NaN or infinity in torch.float32"):
                    act(sd)
            elif function in ("encode_text", "encode_image", "predict", "decode"):
                act(sd)  # which shows that no other part is at fault


def test_bad_number_ends_the_work_at_once(sd, monkeypatch):
    calls: list[int] = []
    forward = sd.unet.forward
    monkeypatch.setattr(sd.unet, "forward", lambda *x: calls.append(1) or forward(*x))
    with planted(sd.unet.conv_out.bias, float("nan")), pytest.raises(FloatingPointError):  # type: ignore[arg-type]
        sd("fox", seed=0, num_inference_steps=50)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("part", "layer", "shapes"),
    [
        ("UNet", "unet.conv_in", [(2, 4, 3, 3), (8, 2, 1, 1)]),
        ("text encoder", "text_encoder.text_model.encoder.layers.0.mlp.fc1", [(2, 16), (32, 2)]),
    ],
)
def test_bad_number_in_a_lora_names_the_lora(small_model, tmp_path, part, layer, shapes):
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    factors = {"lora_A": torch.ones(shapes[0]), "lora_B": torch.full(shapes[1], float("nan"))}
    save_file({f"{layer}.{name}.weight": x for name, x in factors.items()}, tmp_path / "style.safetensors")
    sd.load_lora(tmp_path / "style.safetensors")
    with pytest.raises(FloatingPointError, match=f"(?i)the {part} with LoRA style returned NaN"):
        sd("fox", seed=0, num_inference_steps=1)
    sd.set_adapters({"style": 0.0})
    sd("fox", seed=0, num_inference_steps=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_number_in_an_argument_names_it(sd, value):
    def spoilt(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[-1] = value
        return x

    embeds = torch.zeros(1, 77, 16)
    for name, act in {
        "latents": lambda: sd.denoise("fox", latents=spoilt(LATENTS)),
        "latents ": lambda: sd.decode(spoilt(LATENTS)),
        "latents  ": lambda: sd.preview(spoilt(LATENTS)),
        "latents   ": lambda: sd.predict(spoilt(LATENTS), 500.0, CONTEXT),
        "context": lambda: sd.predict(LATENTS, 500.0, spoilt(CONTEXT)),
        "prompt_embeds": lambda: sd.denoise("fox", prompt_embeds=spoilt(embeds)),
        "image": lambda: sd.encode_image(spoilt(IMAGES)),
        "image ": lambda: sd.image_to_image("fox", spoilt(IMAGES)),
        "the image": lambda: sd.encode_image(Image.fromarray(spoilt(IMAGES)[0, 2].numpy())),
    }.items():
        with pytest.raises(FloatingPointError, match=f"{name.strip()} contains NaN or infinity"):
            act()


def everything(sd: StableDiffusion) -> list[Image.Image]:
    """A picture of every kind, and one with every sampler."""
    kinds = [act(sd) for name, act in FUNCTIONS.items() if name in ("call", "image_to_image", "inpaint", "outpaint")]
    samplers = [sd("red fox", seed=3, sampler=name, guidance_rescale=0.5) for name in SAMPLERS]
    return kinds + samplers + sd.interpolate(("fox", "snow"), (0, 1), count=3)


def digest(pictures: list[Image.Image]) -> str:
    return hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest()


def test_deterministic_algorithms(sd):
    """In this mode torch raises an error where an operation has no deterministic form, so passing means all have."""
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (digest(everything(sd)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first == second == digest(everything(sd))


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import torch
from test_numerics import digest, everything
from minisd import StableDiffusion
torch.set_num_threads(int(sys.argv[3]))
pictures = everything(StableDiffusion.from_pretrained(sys.argv[2], device="cpu"))
np.savez(sys.argv[4], *(np.asarray(picture) for picture in pictures))
print(digest(pictures))
"""


def test_other_processes_and_threads(sd, small_model, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        mine = everything(sd)
    finally:
        torch.set_num_threads(before)
    here = Path(__file__).parent
    for threads in (1, 2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(here), str(small_model), str(threads), str(tmp_path / "out.npz")],
            env=os.environ | {"PYTHONPATH": str(here.parents[1])},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        theirs = np.load(tmp_path / "out.npz").values()
        difference = max(np.abs(np.asarray(a, int) - b.astype(int)).max() for a, b in zip(mine, theirs, strict=True))
        print(f"{threads} threads in another process: largest difference of pixels {difference}")
        assert difference <= (0 if threads == 1 else 1)
        assert threads > 1 or done.stdout.strip() == digest(mine)
