"""Memory of a training step of Stable Diffusion 1.5, counted on the fake GPU; the figures in docs/training.md."""

from __future__ import annotations

import json
from typing import Any

import pytest
import training_memory
from forked import call

UNET = 859_520_964  # parameters
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def count(*arguments: Any) -> dict[str, int]:
    done = call(training_memory.count, *arguments)
    assert done.code == 0, done.err[-3000:]
    found: dict[str, int] = json.loads(done.out)
    print(*arguments, f"{found['peak'] / 1e9:.2f} GB")
    return found


def test_a_lora_of_rank_8_at_512_pixels_fits_in_8_gb():
    found = count("lora", 512, 1, "bfloat16", True)
    assert found["updated"][0] == found["updated"][1] == 2 * 282  # two factors for each layer of the UNet
    assert 2 * UNET < found["weights"] < found["peak"] <= 8e9
    assert found["peak"] < count("lora", 512, 1, "bfloat16", False)["peak"]


def test_a_whole_unet_takes_sixteen_bytes_a_weight():
    """In float32: the weight, its gradient and AdamW's two moments; adafactor needs all but half as much."""
    found = count("full", 512, 1, "bfloat16", True)
    assert found["weights"] == 4 * UNET and found["after"] >= 16 * UNET
    assert 16 * UNET < found["peak"] <= 24e9
    assert count("full", 512, 1, "bfloat16", True, "adafactor")["peak"] <= 12e9
