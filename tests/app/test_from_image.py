"""`minisd generate --like`: pictures of this program, of its first version, and of others, drawn again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from minisd import StableDiffusion
from minisd.app.from_image import settings_from_image
from minisd.pipeline.metadata import RECORD_KEY, read_parameters, save_png

Run = Callable[..., tuple[int, list[str], str]]
CASES: dict[str, list[str]] = {
    "plain": ["--seed", "5"],
    "settings": ["--seed", "5", "--steps", "4", "--sampler", "ddim", "--spacing", "trailing", "--guidance", "2.5",
                 "--rescale", "0.3", "--guidance-interval", "0.2", "0.9", "--reuse", "2", "1", "--width", "48",
                 "--negative", "snow\nSteps: 5", "--clip-skip", "1"],
    "preset": ["--seed", "5", "--preset", "fast"],
    "heun": ["--seed", "5", "--sampler", "heun", "--karras", "--height", "24"],
    "bfloat16": ["--seed", "5", "--dtype", "bfloat16"],
    "of a batch": ["--seed", "3", "-n", "3"],
    "grid": ["--seed", "3", "-n", "3", "--grid", "--batch", "2"],
    "image": ["--seed", "5", "--image", "start.png", "--strength", "0.7"],
    "mask": ["--seed", "5", "--image", "start.png", "--mask", "mask.png"],
    "outpaint": ["--seed", "5", "--image", "start.png", "--outpaint", "8", "0", "0", "16"],
}  # fmt: skip


def pixels(path: str | Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path).convert("RGB"))


def resave(source: str, target: str, text: str | None, **record: Any) -> None:
    """The picture with this `parameters` text, and with these changes of its record or without a record."""
    info = PngInfo()
    if text is not None:
        info.add_text("parameters", text)
    with Image.open(source) as picture:
        if record:
            info.add_text(RECORD_KEY, json.dumps(json.loads(picture.info[RECORD_KEY]) | record))
        picture.save(target, pnginfo=info)


@pytest.fixture
def sources(run: Run) -> None:
    Image.effect_noise((32, 32), 60).convert("RGB").save("start.png")
    Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 8)).save("mask.png")


@pytest.mark.parametrize("case", CASES)
def test_a_picture_is_drawn_again_from_its_record_and_from_its_text_alone(run, sources, case):
    code, files, err = run("generate", "red (fox:1.2)", *CASES[case], "-o", "first.png")
    assert code == 0, err
    first = files[-1]
    text = read_parameters(first)
    resave(first, "text.png", text)  # as version 6bd0a67 wrote it
    more = [word for name in ("--image", "--mask") if name in CASES[case] for word in (name, f"{name[2:]}.png")]
    more = [word.replace("image.png", "start.png") for word in more]
    for source in (first, "text.png"):
        code, files, err = run("generate", "--like", source, *more, "-o", "again.png", "--overwrite")
        assert (code, files) == (0, ["again.png"]) and "was drawn" not in err, err
        assert np.array_equal(pixels("again.png"), pixels(first))
        assert read_parameters("again.png") == text


def test_a_record_is_exact_where_the_text_is_not_asked(run):
    run("generate", "fox", "--seed", "5", "--guidance", "3.3333333333333335", "-o", "first.png")
    resave("first.png", "edited.png", "other words\nSteps: 9, Seed: 1", version="0.1.0")
    assert run("generate", "--like", "edited.png", "-o", "again.png")[0] == 0
    assert np.array_equal(pixels("again.png"), pixels("first.png"))


@pytest.mark.parametrize("change", [{"format": 2}, {"seed": "5"}, {"sampler": None}, {"outpaint": [1]}, {"prompt": 3}])
def test_a_damaged_record_gives_way_to_the_text(run, change):
    run("generate", "fox", "--seed", "5", "-o", "first.png")
    resave("first.png", "damaged.png", read_parameters("first.png"), **change)
    assert run("generate", "--like", "damaged.png", "-o", "again.png")[0] == 0
    assert np.array_equal(pixels("again.png"), pixels("first.png"))


def test_options_replace_what_the_picture_says(run, small_model):
    run("generate", "fox", "--seed", "5", "--sampler", "heun", "--karras", "--clip-skip", "1", "-o", "first.png")
    options = ["snow", "--steps", "2", "--sampler", "ddim", "--seed", "9"]
    assert run("generate", *options[:1], "--like", "first.png", *options[1:], "-o", "again.png")[0] == 0
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    expected = sd("snow", num_inference_steps=2, sampler="ddim", seed=9)
    assert np.array_equal(pixels("again.png"), np.asarray(expected))


OTHER = (
    "red fox, <lora:ink wash:0.6>\nNegative prompt: snow\nSteps: 2, Sampler: DPM++ 2M, Schedule type: Karras, "
    "CFG scale: 4, Seed: 7, Size: 32x32, Model hash: 0a1b2c3d4e, Clip skip: 1, ENSD: 31337, Version: v1.10.1"
)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture_of_the_web_ui(run, small_model, suffix):
    text = OTHER.replace(", <lora:ink wash:0.6>", "")
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode("utf-16-be")
    Image.new("RGB", (32, 32)).save(f"other{suffix}", exif=exif.tobytes())
    code, files, err = run("generate", "--like", f"other{suffix}")
    assert (code, files) == (0, ["red-fox-7.png"])
    assert "drawn by another program (v1.10.1)" in err and "ENSD: 31337" in err
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    expected = sd("red fox", negative_prompt="snow", seed=7, num_inference_steps=2, guidance_scale=4)
    assert np.array_equal(pixels(files[0]), np.asarray(expected))


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (OTHER, [], ["LoRA 'ink wash' at 0.6", "--lora ink wash.safetensors"]),
        (OTHER.replace(":0.6", ":0.5:0.8"), [], ["LoRA 'ink wash' at 0.5:0.8", "--lora ink wash.safetensors"]),
        (OTHER.replace(":0.6", ":0.6:lbw=1,0"), [], ["<lora:ink wash:0.6:lbw=1,0>", "not supported", "another prompt"]),
        (OTHER.replace(":0.6", ":strong"), [], ["<lora:ink wash:strong>", "other.png"]),
        (OTHER.replace("DPM++ 2M", "LMS"), ["fox"], ["unsupported sampler LMS, Karras", "--sampler"]),
        (OTHER.replace("CFG scale: 4, ", ""), ["fox"], ["has no CFG scale", "--guidance"]),
        (OTHER.replace("Seed: 7", "Seed: x"), ["fox"], ["Seed: 'x'", "--seed"]),
        (OTHER.replace("Size: 32x32", "Size: big"), ["fox"], ["Size: 'big'", "--width"]),
        (OTHER.replace("ENSD: 31337", "Denoising strength: 0.5"), ["fox"], ["--image"]),
        (OTHER + ", TI hashes: \"unicorn: ab\"", ["fox"], ["textual inversion 'unicorn'", "--textual-inversion"]),
        ("a\nSteps: 2, Interpolation: 1 to 2", [], ["minisd interpolate"]),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_its_option(run, text, options, words):
    save_png(Image.new("RGB", (32, 32)), Path("other.png"), text)
    code, files, err = run("generate", *options, "--like", "other.png")
    assert (code, files) == (2, [])
    assert all(word in err.splitlines()[-1] for word in words), err


@pytest.mark.parametrize(
    ("label", "nearest"),
    [
        ("LMS", "euler"), ("LMS Karras", "euler"), ("DPM2", "heun"), ("DPM2 a Karras", "euler_a"), ("TCD", "lcm"),
        ("DPM++ 2S a Karras", "dpmpp_sde"), ("DPM++ 3M SDE Exponential", "dpmpp_2m_sde"), ("Restart", "heun"),
        ("DPM++ 2M SDE Heun", "dpmpp_2m_sde"), ("DPM fast", "dpmpp_2m"), ("DPM adaptive", "dpmpp_2m"),
        ("DDIM CFG++", "ddim"), ("SA-Solver", "dpmpp_2m_sde"), ("IPNDM", "pndm"), ("Euler SMEA Dy", ""),
    ],
)  # fmt: skip
def test_samplers_of_the_web_ui_are_named_with_the_nearest(tmp_path, label, nearest):
    text = f"fox\nSteps: 2, Sampler: {label}, CFG scale: 4, Seed: 7, Size: 32x32, Model: x, Version: v1.10.1"
    save_png(Image.new("RGB", (32, 32)), path := tmp_path / "other.png", text)
    with pytest.warns(UserWarning, match="another program"), pytest.raises(typer.BadParameter) as caught:
        settings_from_image(path, {})
    assert f"unsupported sampler {label};" in str(caught.value)
    assert (f"the nearest is {nearest} of ddpm" if nearest else "--sampler: ddpm") in str(caught.value)


def test_an_option_makes_up_for_what_cannot_be_read(run):
    text = OTHER.replace("DPM++ 2M", "UniPC").replace("CFG scale: 4, ", "").replace("Size: 32x32", "Size: big")
    save_png(Image.new("RGB", (32, 32)), Path("other.png"), text)
    options = ["--sampler", "ddim", "--guidance", "2", "--width", "32", "--height", "32"]
    assert run("generate", "fox", "--like", "other.png", *options)[0] == 0


def test_warnings_about_other_files_weights_and_models(run, sources, small_model):
    assert run("generate", "fox", "--seed", "5", "--image", "start.png", "-o", "first.png")[0] == 0
    Image.effect_noise((32, 32), 60).convert("RGB").save("start.png")
    err = run("generate", "--like", "first.png", "--image", "start.png", "-o", "again.png")[2]
    assert "start.png is not the file that first.png was drawn from" in err
    code, _, err = run("generate", "--like", "first.png", "-o", "again.png")
    assert code == 2 and "was drawn with the image start.png; pass it with --image" in err
    code, _, err = run("generate", "--like", "first.png", "--image", "start.png", model=None)
    assert code == 2 and f"was drawn with the model {small_model.name}; specify one with --model" in err
    resave("first.png", "other.png", read_parameters("first.png"), weights="0123456789", device="cuda")
    err = run("generate", "--like", "other.png", "--image", "start.png", "-o", "again.png")[2]
    assert "was drawn with weights that differ" in err and "was drawn on cuda" in err
