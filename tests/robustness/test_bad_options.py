"""Bad options of every command, one at a time: one line, exit code 1 or 2, nothing printed and nothing written."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from models import write_adapters
from PIL import Image

from minisd.app import cli
from minisd.io import checkpoint

PLACES = ["text.txt", "text.txt/deep", "a\0b", "x" * 300]
TRAINING = {
    "--steps": ["0", "-1", "1.5", "x", "9" * 30],
    "--minutes": ["nan", "-1", "inf", "x"],
    "--batch": ["0", "-1", "x"],
    "--lr": ["nan", "inf", "-1", "x"],
    "--seed": ["-1", str(2**64), "x"],
    "--output": PLACES,
}
# For each command its words, and for each option (or place, where it has no name) what it refuses.
COMMANDS: dict[str, dict[str, list[str]]] = {
    "generate fox": {
        "--steps": ["0", "-1", "1000000", "1.5", "True", "", "nan", "9" * 30],
        "--seed": ["-1", str(2**63), str(2**64), "1.5", "x", ""],
        "--guidance": ["nan", "inf", "-inf", "1e30", "x", ""],
        "--width": ["0", "-8", "33", "1000000", "64.5", "wide"],
        "--height": ["0", "-8", "33", "1000000", "64.5", "high"],
        "--images": ["0", "-1", "1000000000", "two"],
        "--batch": ["0", "-1", "x"],
        "--rescale": ["-1", "2", "nan", "x"],
        "--clip-skip": ["0", "2", "x"],
        "--sampler": ["magic", ""],
        "--spacing": ["odd"],
        "--preset": ["quick"],
        "--dtype": ["int8", "float128"],
        "--device": ["toaster", "cuda:99", ""],
        "--negative": ["\udcff"],
        "--output": ["a.jpg", "a\0b.png", "text.txt/x.png", "x" * 300 + ".png", "x" * 300 + "/"],
        "--image": ["none.png", ".", "text.txt"],
        "--strength": ["0.5"],  # of no picture
        "--mask": ["mask.png"],
        "--outpaint": ["8 0 0 0"],
        "--lora": ["none", "text.txt", "style.safetensors:nan", "style.safetensors:1e400", ":", "", "word.safetensors"],
        "--textual-inversion": ["none", "text.txt", "", "style.safetensors"],
        "--like": ["none", "text.txt", "start.png"],
        "--prompts": ["none", "text.png", "start.png"],
        "--grid --images": ["2000"],
    },
    "generate fox --image start.png": {
        "--strength": ["0", "2", "nan", "x"],
        "--mask": ["none.png", "black.png", "text.txt"],
        "--outpaint": ["3 0 0 0", "0 0 0 0", "-8 0 0 0", "1000000 0 0 0", "a b c d", "8 8"],
    },
    "generate": {"": ["\udcff"]},
    "interpolate fox red": {
        "--images": ["0", "1", "-1", "x", "1000000000"],
        "--seeds": ["-1 0", "0 x", f"0 {2**63}"],
        "--steps": ["0", "-1", "1000000", "x"],
        "--guidance": ["nan", "inf", "x"],
        "--output": ["a.jpg", "text.txt/a.png", "x" * 300 + ".png"],
    },
    "merge model model --output new": {"--weight": ["nan", "inf", "x"], "--base": ["none", "text.txt"]},
    "merge model model": {"--output": [".", *PLACES]},
    "train scenes new": {
        "--count": ["0", "-1", "1000000000000", "x", "1.5"],
        "--seed": ["-1", "x"],
        "--mixture": ["0 0 0", "-1 1 1", "nan 1 1", "1 1"],
    },
    "train lora --steps 1 --model model": TRAINING
    | {
        "--rank": ["0", "-1", "1000000", "x"],
        "--layers": ["some"],
        "--pictures": ["none", "text.txt", "."],
        "--prompt": ["\udcff", "fox " * 10_000, "(fox:nan)"],
        "--model": ["none", "text.txt", "", "style.safetensors"],
    },
    "train inversion --steps 1 --model model --initial fox": TRAINING
    | {
        "--vectors": ["0", "-1", "1000", "x"],
        "--token": ["", "fox", "\udcff"],
        "--word": ["", " ", "zebra"],
        "--initial": ["", "zebra"],
        "--pictures": ["none", "text.txt", "."],
    },
    "train judge --steps 1": TRAINING,
    "train autoencoder --steps 1": {"--scenes": ["none", "text.txt", "."], "--from": ["none", "text.txt"]},
    "train clip --steps 1": {"--scenes": ["none", "text.txt", "."]},
    "train latents": {"--scenes": ["none", "text.txt"], "--model": ["none", "text.txt"]},
    "train unet --steps 1": {"--scenes": ["none", "text.txt"], "--clip": ["none"], "--from": ["none"]},
    "train export new": {"--unet": ["none"], "--clip": ["none"], "--autoencoder": ["none", "text.txt"]},
    "train sheet --model model": {"": ["x.qqq", "x", "text.txt/x.png", "a\0b.png"], "x.png --seeds": ["0", "x"]},
    "info": {
        "": ["none", "none.png", "text.txt", "start.png", "x" * 400, "a\0b", "", ".", "/dev/zero", "style.safetensors"],
        "--prediction-type": ["noise"],
    },
    "evaluate": {
        "--model": ["none", "text.txt"],
        "--count": ["0", "-1", "x", "10000000000"],
        "--steps": ["0", "100000", "x"],
        "--guidance": ["nan", "inf", "x"],
        "--output": PLACES,
    },
    "bench --model tiny --alone": {
        "--model": ["none", "text.txt"],
        "--size": ["0", "-64", "33", "1000000", "x"],
        "--steps": ["-1", "x"],
        "--repeats": ["0", "x"],
        "--threads": ["0", "x"],
        "--device": ["toaster", "cuda:99"],
        "--dtype": ["int8"],
        "--output": ["text.txt/x.json", "a\0b/x.json"],
    },
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory, small_model) -> Path:
    """A folder with pictures, a model, a LoRA, a word and a text."""
    folder = tmp_path_factory.mktemp("desk")
    Image.linear_gradient("L").resize((50, 40)).save(folder / "start.png")
    Image.new("L", (32, 32), 255).save(folder / "mask.png")
    Image.new("L", (32, 32)).save(folder / "black.png")
    (folder / "model").symlink_to(small_model)
    write_adapters(folder)
    (folder / "text.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_options(desk, command, small_model, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    monkeypatch.delenv("MINISD_DEBUG", raising=False)
    # the same models each time: their configurations and words are read once, their weights for every command
    monkeypatch.setattr(checkpoint, "open_checkpoint", cache(checkpoint.open_checkpoint))
    files = sorted(desk.rglob("*"))
    words = command.split()
    for name, values in COMMANDS[command].items():
        kept = words if name not in words else [*words[: words.index(name)], *words[words.index(name) + 2 :]]
        for value in values:
            several = name in ("--mixture", "--seeds", "--outpaint") and " " in value
            model = ["--model", str(small_model)] if words[0] in ("generate", "interpolate") else []
            code = cli.main([*kept, *name.split(), *(value.split() if several else [value]), *model])
            out, err = capsys.readouterr()
            assert code in (1, 2) and not out, (command, name, value, code, out)
            assert "error: " in err and "Traceback" not in err and "unexpected " not in err, (command, name, value, err)
            assert sorted(desk.rglob("*")) == files, (command, name, value)
