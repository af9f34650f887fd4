"""Trainings killed at random points, in the middle of a save too: what is resumed equals what was never killed.

Usually six parts are killed three times each. MINISD_KILLS=70 kills seventy times, ten times each of seven parts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from forked import Child
from killed_training import kill_again_and_again
from PIL import Image

from minisd.training.data import render_scenes

TUNED = ("lora", "inversion", "dreambooth", "full")
PARTS = ["autoencoder", "clip", "unet", "lora", "inversion", "dreambooth"]
PARTS += ["full"] if "MINISD_KILLS" in os.environ else []
SEED = int(os.environ.get("MINISD_SEED", "0"))
KILLS = max(3, int(os.environ.get("MINISD_KILLS", 0)) // len(PARTS))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    render_scenes(folder / "scenes", 8, seed=5)
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
    child = Child(kill_again_and_again, part, source, small_model, tmp_path, KILLS, SEED)
    done = child.finish(60 * (2 + KILLS))
    report = json.loads((done.out.splitlines() or ["{}"])[-1])
    assert done.code == 0, done.err[-3000:]
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
