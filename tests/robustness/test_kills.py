"""Trainings killed at random points, in the middle of a save too: what is resumed equals what was never killed.

Usually four parts are killed three times each. MINISD_KILLS=70 kills seventy times, ten times
each of seven parts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from minisd.training.data import render_scenes

SCRIPT = Path(__file__).parents[1] / "killed_training.py"
TUNED = ("lora", "inversion", "dreambooth", "full")
PARTS = ["autoencoder", "lora", "inversion", "dreambooth"]
PARTS += ["full", "clip", "unet"] if "MINISD_KILLS" in os.environ else []
SEED = os.environ.get("MINISD_SEED", "0")
KILLS = max(3, int(os.environ.get("MINISD_KILLS", 0)) // len(PARTS))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    render_scenes(folder / "scenes", 24, seed=5)
    (folder / "pictures").mkdir()
    lines = []
    for index, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (32, 32), color).save(folder / f"pictures/{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"a thing on snow {index}"}))
    (folder / "pictures/metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks and kills processes")
@pytest.mark.timeout(120 + 60 * KILLS)
@pytest.mark.parametrize("part", PARTS)
def test_a_killed_training_loses_nothing(part, data, small_model, tmp_path, record_property):
    source = data / ("pictures" if part in TUNED else "scenes")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), part, str(source), str(small_model), str(tmp_path), str(KILLS), SEED],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
    )
    report = json.loads((done.stdout.splitlines() or ["{}"])[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"\n{part}: {report}")
    assert sum(report["kills"].values()) == KILLS and report["ends"] >= 1
    record_property("kills", KILLS)


def test_what_options_refuse(tmp_path):
    from minisd.training.loop import Options

    for choices, words in (
        ({"steps": 0}, "steps=0"), ({"steps": 1.5}, "steps=1.5"), ({"steps": 5, "batch": 0}, "batch=0"),
        ({"minutes": float("nan")}, "minutes=nan"), ({"minutes": -1.0}, "minutes=-1"),
        ({"steps": 5, "lr": float("inf")}, "lr=inf"), ({"steps": 5, "lr": -0.1}, "lr=-0.1"),
        ({"steps": 5, "seed": -1}, "seed=-1"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=words):
            Options(tmp_path, **choices)  # type: ignore[arg-type]
