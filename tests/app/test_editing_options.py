"""Input pictures on the command line: folders of them, blurred masks, the masked area only, and drawn again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minisd import StableDiffusion

Run = Callable[..., tuple[int, list[str], str]]
SIDE = 32  # of the small model


@pytest.fixture
def photos(run: Run) -> None:
    """Two photos of odd sizes, and masks of the same names."""
    for folder in ("photos", "masks"):
        Path(folder).mkdir()
    for name, size in (("b", (70, 50)), ("a", (41, 90))):
        Image.effect_noise(size, 60).convert("RGB").save(f"photos/{name}.png")
        mask = Image.new("L", size)
        mask.paste(255, (10, 12, 26, 30))
        mask.save(f"masks/{name}.png")
    Path("photos/notes.txt").write_text("not a picture")


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_only_masked_draws_what_python_draws(run, photos, small_model):
    options = ["--image", "photos/b.png", "--mask", "masks/b.png", "--only-masked", "5", "--mask-blur", "1.5"]
    code, files, err = run("generate", "red fox", "--seed", "7", "--steps", "2", *options, "-o", "ours.png")
    assert code == 0, err
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    expected = sd.inpaint(
        "red fox", Image.open("photos/b.png"), Image.open("masks/b.png"), seed=7, num_inference_steps=2,
        padding_mask_crop=5, mask_blur=1.5,
    )  # fmt: skip
    assert files == ["ours.png"] and np.array_equal(pixels("ours.png"), np.asarray(expected))
    text = Image.open("ours.png").info["parameters"]
    assert "Mask blur: 1.5, Masked area padding: 5" in text and f"Size: {SIDE}x{SIDE}" in text
    # drawn again from the record, and from the text alone
    bare = ["--image", "photos/b.png", "--mask", "masks/b.png"]
    info = PngInfo()
    info.add_text("parameters", text)
    Image.open("ours.png").save("text.png", pnginfo=info)
    for like in ("ours.png", "text.png"):
        code, files, err = run("generate", "--like", like, *bare, "-o", "again.png", "--overwrite")
        assert code == 0 and np.array_equal(pixels("again.png"), pixels("ours.png")), err


def test_a_folder_of_pictures(run, photos, small_model):
    code, files, err = run("generate", "red fox", "--image", "photos", "--steps", "2", "--seed", "3", "-o", "out/")
    assert (code, files) == (0, ["out/a.png", "out/b.png"]), err
    code, alone, _ = run("generate", "red fox", "--image", "photos/b.png", "--steps", "2", "--seed", "4", "-o", "b.png")
    assert np.array_equal(pixels("out/b.png"), pixels("b.png"))
    masked = ["--mask", "masks", "--only-masked", "4"]
    code, files, err = run("generate", "red fox", "--image", "photos", *masked, "--steps", "2", "-o", "painted/")
    assert code == 0, err
    for name in "ab":
        kept = np.asarray(Image.open(f"masks/{name}.png")) == 0
        assert np.array_equal(pixels(f"painted/{name}.png")[kept], pixels(f"photos/{name}.png")[kept])
        assert not np.array_equal(pixels(f"painted/{name}.png"), pixels(f"photos/{name}.png"))
    code, files, _ = run("generate", "red fox", "--image", "photos", "--steps", "2", "--seed", "3", "-o", "out/")
    assert files == ["out/a-2.png", "out/b-2.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "photos"], "requires a folder for its pictures, such as --output out/"),
        (["--image", "photos", "-o", "x.png"], "requires a folder"),
        (["--image", "photos", "-o", "out/", "-n", "2"], "cannot be combined with --images"),
        (["--image", "photos", "-o", "out/", "--grid"], "cannot be combined with --grid"),
        (["--image", "masks/..", "-o", "out/"], "is a folder without pictures"),
        (["--image", "photos/a.png", "--mask", "masks"], "--mask is a folder, but --image is not"),
        (["--image", "photos", "--mask", "few", "-o", "out/"], "has no mask for b.png; expected b.png"),
        (["--image", "photos/a.png", "--mask-blur", "4"], "mask_blur=4.0 is only valid for inpainting"),
        (["--only-masked", "4"], "padding_mask_crop=4 is only valid for inpainting"),
        (["--image", "photos/a.png", "--mask", "masks/a.png", "--only-masked", "-4"], "padding_mask_crop=-4"),
        (["--image", "photos/a.png", "--mask", "masks/a.png", "--width", "100"], "such as 96"),
    ],
)
def test_bad_combinations_are_named(run, photos, options, message):
    Path("few").mkdir()
    Image.new("L", (8, 8), 255).save("few/a.png")
    code, files, err = run("generate", "red fox", "--steps", "1", *options)
    assert code == 2 and files == [] and message in err
    assert not Path("out").exists() or not list(Path("out").iterdir())


def test_a_masked_picture_of_the_web_ui(run, photos):
    text = (
        "red fox\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 5, Size: 32x32, Denoising strength: 0.9, "
        "Mask blur: 4, Inpaint area: Only masked, Masked area padding: 8, Masked content: fill, Version: v1.10.1"
    )
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (70, 50)).save("theirs.png", pnginfo=info)
    model = ["generate", "--like", "theirs.png"]
    code, _, err = run(*model)
    assert code == 2 and "pass it with --image" in err
    assert "unsupported settings, which are ignored: Masked content: fill\n" in err
    code, _, err = run(*model, "--image", "photos/b.png")
    assert code == 2 and "pass it with --mask" in err
    code, files, err = run(*model, "--image", "photos/b.png", "--mask", "masks/b.png", "-o", "ours.png")
    assert code == 0, err
    drawn = Image.open("ours.png")
    assert drawn.size == (70, 50) and "Mask blur: 4, Masked area padding: 8" in drawn.info["parameters"]
