"""Short training runs without matplotlib, resumed with other options, and on data that lacks something."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest
from PIL import Image

from minisd.app.cli import main
from minisd.training import own_pictures, unet
from minisd.training.adapting import read_examples


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "0.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a red fox"}')
    return folder


def lora_command(small_model: Path, pictures: Path, output: Path, *more: str) -> list[str]:
    places = ["--pictures", str(pictures), "--model", str(small_model), "--output", str(output)]
    return ["train", "lora", *places, "--steps", "1", "--batch", "1", *more]


def test_lora_without_matplotlib(small_model, pictures, tmp_path, monkeypatch, capsys):
    """Curves are left out, which one line says; everything else is saved."""
    find = util.find_spec
    monkeypatch.setattr("minisd.training.loop.find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert main(lora_command(small_model, pictures, tmp_path / "lora")) == 0
    names = {path.name for path in (tmp_path / "lora").iterdir()}
    assert "curves.png" not in names and {"checkpoint.pt", "losses.jsonl", "sheet-000001.png", "export"} <= names
    assert (tmp_path / "lora/export/pytorch_lora_weights.safetensors").is_file()
    assert capsys.readouterr().err.count("matplotlib is not installed") == 1


def test_resume_with_another_rank_is_one_line(small_model, pictures, tmp_path, capsys):
    assert main(lora_command(small_model, pictures, tmp_path / "lora", "--rank", "2")) == 0
    capsys.readouterr()
    assert main(lora_command(small_model, pictures, tmp_path / "lora", "--rank", "4", "--resume")) != 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "size mismatch" in line and "with these options" in line and len(line) < 600


def test_caption_null(pictures):
    (pictures / "metadata.jsonl").write_text('{"file_name": "0.png", "text": null}')
    with pytest.raises(ValueError, match="line 1: expected a picture and its text .*text is None; expected a string"):
        read_examples(pictures, 32)


def test_unet_of_scenes_without_layouts(small_model, tmp_path, monkeypatch):
    """Scenes that say nothing of where their objects are train the denoising loss alone."""
    given = {}

    class Scenes:
        captions, descriptions = ["a fox"], [{"caption": "a fox"}]

        def __init__(self, folder: Path) -> None: ...

    class Stop(Exception): ...

    class Task(unet.UNetTask):
        def __init__(self, *arguments: object, **options: object) -> None:
            given.update(options)
            raise Stop

    monkeypatch.setattr(own_pictures, "Scenes", Scenes)
    monkeypatch.setattr(unet, "UNetTask", Task)
    monkeypatch.setenv("MINISD_DEBUG", "1")
    places = ["--scenes", str(tmp_path), "--autoencoder", str(small_model), "--clip", str(small_model)]
    with pytest.raises(Stop):
        main(["train", "unet", *places, "--steps", "1"])
    assert given["layout"] is None
