"""What code that builds on the library relies on: files, tensors that can be trained with, names of LoRAs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minisd import StableDiffusion


@pytest.fixture
def sd(small_model: Path) -> StableDiffusion:
    return StableDiffusion.from_pretrained(small_model, device="cpu")


def write_lora(sd: StableDiffusion, path: Path, seed: int = 0) -> Path:
    generator, layer = torch.Generator().manual_seed(seed), sd.unet.conv_in.weight
    a, b = (torch.randn(shape, generator=generator) for shape in ((2, *layer.shape[1:]), (len(layer), 2, 1, 1)))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"unet.conv_in.lora_A.weight": a, "unet.conv_in.lora_B.weight": b}, path)
    return path


def test_save_pretrained_wants_a_folder(sd, tmp_path):
    with pytest.raises(ValueError, match=r"model.safetensors names a file; .*save_single_file"):
        sd.save_pretrained(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_encodes_and_decodes_can_be_trained_with(sd):
    """Inference tensors cannot be saved for a backward pass."""
    context = sd.encode_text("a fox")
    latents = sd.encode_image(torch.zeros(1, 3, 32, 32))
    weight = torch.ones((), requires_grad=True)
    (sd.unet(weight * latents, torch.tensor([500.0]), context * weight).mean()).backward()
    assert weight.grad is not None and bool(torch.isfinite(weight.grad))
    pixels = sd.decode_to_tensor(latents)
    (pixels * weight).square().mean().backward()
    assert not any(each.is_inference() for each in (context, latents, pixels))


def test_loras_of_one_file_name(sd, tmp_path):
    paths = [write_lora(sd, tmp_path / f"{name}/export/lora.safetensors", seed) for seed, name in enumerate("abc")]
    assert [sd.load_lora(path) for path in paths] == ["lora", "export/lora", "c/export/lora"]
    with pytest.raises(ValueError, match="already loaded"):
        sd.load_lora(paths[0])
    sd.unload_lora()
    sd.lora_folder = tmp_path
    with pytest.raises(ValueError, match="several: a/export/lora, b/export/lora, c/export/lora; name one of these"):
        sd.denoise("a fox <lora:lora:1>")
    drawn = sd("a fox <lora:b/export/lora:0.5>", seed=3)
    sd.load_lora(paths[1], weight=0.5)
    assert abs(sum(drawn.tobytes()) - sum(sd("a fox", seed=3).tobytes())) <= len(drawn.tobytes())
    with pytest.raises(ValueError, match="'c', which is not in"):
        sd.denoise("a fox <lora:c:1>")
