"""Memory of a training step of Stable Diffusion 1.5, counted on the fake GPU; the figures in docs/training.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "training_memory.py"
UNET = 859_520_964  # parameters
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def count(*arguments: str) -> dict[str, int]:
    path = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout)
    print(*arguments, f"{found['peak'] / 1e9:.2f} GB")
    return found


def test_a_lora_of_rank_8_at_512_pixels_fits_in_8_gb():
    found = count("lora", "512", "1", "bfloat16", "checkpointing")
    assert found["updated"][0] == found["updated"][1] == 2 * 282  # two factors for each layer of the UNet
    assert 2 * UNET < found["weights"] < found["peak"] <= 8e9
    assert found["peak"] < count("lora", "512", "1", "bfloat16", "plain")["peak"]


def test_a_whole_unet_takes_sixteen_bytes_a_weight():
    """In float32: the weight, its gradient and AdamW's two moments; adafactor needs all but half as much."""
    found = count("full", "512", "1", "bfloat16", "checkpointing")
    assert found["weights"] == 4 * UNET and found["after"] >= 16 * UNET
    assert 16 * UNET < found["peak"] <= 24e9
    assert count("full", "512", "1", "bfloat16", "checkpointing", "adafactor")["peak"] <= 12e9
