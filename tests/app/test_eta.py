"""The setting `eta`, from every side: a new setting is a field of `Settings`, and nothing else needs to know it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minisd import Sampler, StableDiffusion
from minisd.app.web_drawing import Request, Result, draw
from minisd.pipeline.metadata import parse_parameters, read_parameters, read_texts, save_png
from minisd.pipeline.provenance import Provenance

Run = Callable[..., tuple[int, list[str], str]]
OPTIONS = ("--seed", "7", "--sampler", "ddim", "--eta", "0.5")


@pytest.fixture
def expected(small_model: Path) -> np.ndarray:
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    picture = np.asarray(sd("fox", seed=7, sampler=Sampler("ddim", eta=0.5)))
    assert np.array_equal(np.asarray(sd("fox", seed=7, sampler="ddim", eta=0.5)), picture)
    assert not np.array_equal(np.asarray(sd("fox", seed=7, sampler="ddim")), picture)
    return picture


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_eta_on_the_command_line_in_the_picture_and_in_like(run, expected):
    assert run("generate", "fox", *OPTIONS, "-o", "first.png")[0] == 0
    assert np.array_equal(pixels("first.png"), expected)
    text = read_parameters("first.png") or ""
    assert parse_parameters(text).settings["Eta"] == "0.5"
    info = PngInfo()
    info.add_text("parameters", text)
    Image.open("first.png").save("text.png", pnginfo=info)
    for source in ("first.png", "text.png"):
        assert run("generate", "--like", source, "-o", "again.png", "--overwrite")[0] == 0
        assert np.array_equal(pixels("again.png"), expected)
    assert run("generate", "--like", "first.png", "--sampler", "euler", "-o", "euler.png")[0] == 0
    info.add_text("parameters", text.replace("Sampler: DDIM", "Sampler: Euler a").replace("minisd", "v"))
    Image.open("first.png").save("other.png", pnginfo=info)  # other programs name an eta for other samplers too
    code, _, err = run("generate", "--like", "other.png", "-o", "other-again.png")
    assert code == 0 and "eta=0.5" in err and "ignoring eta" in err


def test_eta_in_a_prompts_file_and_its_manifest(run, expected):
    Path("prompts.jsonl").write_text('{"prompt": "fox", "seed": 7, "sampler": "ddim", "eta": 0.5}\n')
    assert run("generate", "--prompts", "prompts.jsonl", "-o", "out/")[0] == 0
    assert np.array_equal(pixels("out/0001-fox.png"), expected)
    assert json.loads(Path("out/manifest.jsonl").read_text())["eta"] == 0.5
    assert "0 drawn, 1 already existed" in run("generate", "--prompts", "prompts.jsonl", "-o", "out/")[2]


def test_eta_on_the_page(run, small_model):
    web = pytest.importorskip("minisd.app.web")
    assert web.SHOWN["eta"].label == "Eta"
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    request = Request("fox", seed="7", settings={"sampler": "ddim", "eta": 0.5})
    *_, result = draw(sd, Provenance.of(sd, str(small_model)), request)
    assert run("generate", "fox", *OPTIONS, "-o", "first.png")[0] == 0
    assert isinstance(result, Result) and result.file == Path("first.png").read_bytes()


def test_eta_that_cannot_be_used_is_rejected(run):
    for options in (("--sampler", "ddim", "--eta", "2"), ("--sampler", "euler", "--eta", "0.5")):
        code, files, err = run("generate", "fox", *options)
        assert (code, files) == (2, []) and "eta" in err


def test_eta_of_pictures_from_older_versions(run):
    """They recorded eta=0 for every sampler."""
    assert run("generate", "fox", "--seed", "7", "--sampler", "euler_a", "-o", "first.png")[0] == 0
    text, record, _ = read_texts("first.png")
    assert record is not None and record["eta"] is None
    save_png(Image.open("first.png"), Path("old.png"), text or "", record=record | {"eta": 0.0})
    assert run("generate", "--like", "old.png", "-o", "again.png")[0] == 0
    assert np.array_equal(pixels("again.png"), pixels("first.png"))
