"""Prompts files whose lines have pictures and LoRAs; options of interpolate and serve; JSON of info; merge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from minisd import StableDiffusion
from minisd.app import serve as serving
from minisd.app.cli import main
from minisd.app.jobs import Job
from minisd.pipeline.metadata import read_texts


@pytest.fixture
def sd(small_model: Path) -> StableDiffusion:
    return StableDiffusion.from_pretrained(small_model, device="cpu")


@pytest.fixture
def photo(tmp_path: Path) -> Image.Image:
    (tmp_path / "in").mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    picture.save(tmp_path / "in/photo.png")
    mask = Image.new("L", (60, 40), 0)
    mask.paste(255, (0, 0, 30, 40))
    mask.save(tmp_path / "in/mask.png")
    return ImageOps.fit(picture, (32, 32), Image.Resampling.LANCZOS)


def write_lines(*lines: dict[str, object]) -> None:
    Path("in/prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))


def near(file: str, expected: Image.Image) -> bool:
    with Image.open(file) as picture:
        return int(np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max()) <= 1


def test_lines_with_pictures_and_loras(run, sd, photo):
    a, b = torch.randn(2, 4, 3, 3), torch.randn(len(sd.unet.conv_in.weight), 2, 1, 1)
    save_file({"unet.conv_in.lora_A.weight": a, "unet.conv_in.lora_B.weight": b}, "in/style.safetensors")
    line = {"prompt": "a fox", "seed": 3, "image": "photo.png"}
    write_lines(
        line | {"strength": 0.4, "name": "a"},
        line | {"mask": "mask.png", "mask_blur": 2.0, "name": "b"},
        line | {"outpaint": [0, 16, 0, 0], "name": "c"},
        {"prompt": "a fox", "seed": 3, "loras": {"style": 0.5}, "name": "d"},
    )
    options = ("--lora-folder", "in", "-o", "out/")
    assert run("generate", "--prompts", "in/prompts.jsonl", *options)[0] == 0
    with Image.open("in/mask.png") as opened:
        mask = ImageOps.fit(opened.convert("RGB"), (32, 32), Image.Resampling.LANCZOS)
    assert near("out/a.png", sd.image_to_image("a fox", photo, strength=0.4, seed=3))
    assert near("out/b.png", sd.inpaint("a fox", photo, mask, mask_blur=2.0, seed=3))
    assert near("out/c.png", sd.outpaint("a fox", photo, right=16, seed=3))
    sd.load_lora("in/style.safetensors", weight=0.5)
    assert near("out/d.png", sd("a fox", seed=3))
    assert run("generate", "--prompts", "in/prompts.jsonl", *options)[1] == []  # all are there
    assert read_texts("out/a.png").record["image"] == "photo.png"


@pytest.mark.parametrize(
    "line, words",
    [
        ({"image": "none.png"}, "line 1: image in/none.png is not a file; paths start from the folder"),
        ({"mask": "mask.png"}, "line 1: --mask requires an input picture"),
        ({"image": "photo.png", "outpaint": [8, 8]}, "line 1: outpaint is [8, 8]; expected pixels on the left"),
        ({"image": "photo.png", "mask": "mask.png", "outpaint": [8, 0, 0, 0]}, "--outpaint cannot be combined"),
        ({"strength": 0.5}, "line 1: strength=0.5 is only valid for image-to-image"),
        ({"loras": ["style"]}, 'line 1: loras is ["style"]; expected weights by name'),
        ({"loras": {"a:b": 1}}, "expected weights by name"),
        ({"loras": {"style": 1}}, "line 1: the prompt names the LoRA 'style'; load it, or pass its folder"),
    ],
)
def test_lines_that_are_refused(run, photo, line, words):
    write_lines({"prompt": "a fox"} | line)
    code, _, err = run("generate", "--prompts", "in/prompts.jsonl", "-o", "out/")
    assert code == 2 and words in err and not Path("out").exists()


def test_interpolate_takes_a_negative_prompt_and_a_preset(run, sd):
    code, out, err = run(
        "interpolate", "fox", "red snow", "-n", "2", "--negative", "snow", "--preset", "fast", "-q", "-o", "a.png"
    )
    assert (code, out, err) == (0, ["a.png"], "")
    expected = sd.interpolate(("fox", "red snow"), (0, 1), 2, negative_prompt="snow", preset="fast")
    with Image.open("a.png") as picture:
        assert near("a.png", Image.fromarray(np.concatenate([np.asarray(each) for each in expected], axis=1)))
        assert "Negative prompt: snow" in picture.info["parameters"]


def test_serve_takes_the_options_of_loading(small_model, monkeypatch, tmp_path, sd):
    loaded = []

    class Stop(Exception): ...

    def stop(self, *arguments, **options):
        loaded.append(self)
        raise Stop

    monkeypatch.setattr(serving.PageOptions, "load", stop)
    monkeypatch.setenv("MINISD_DEBUG", "1")
    more = ["--vae", "other", "--lora", "style:0.5", "--offload", "--variant", "fp16", "--lora-folder", str(tmp_path)]
    with pytest.raises(Stop):
        main(["serve", str(small_model), "--port", "7999", *more])
    (options,) = loaded
    assert (options.model, options.vae, options.lora, options.offload) == (
        str(small_model),
        "other",
        ["style:0.5"],
        True,
    )
    assert (options.variant, options.lora_folder) == ("fp16", tmp_path)


def test_info_as_json(run, small_model, sd):
    code, (line,), _ = run("info", str(small_model), "--json", model=None)
    facts = json.loads(line)
    counts = {"text_encoder": sd.text_encoder, "vae": sd.autoencoder, "unet": sd.unet}
    assert {name: part["parameters"] for name, part in facts["parts"].items()} == {
        name: sum(p.numel() for p in part.parameters()) for name, part in counts.items()
    }
    assert facts["pixels"] == 32 and facts["bytes"] == sum(
        file.stat().st_size for file in small_model.rglob("*.safetensors")
    )
    assert run("generate", "a fox, red", "--seed", "3", "--negative", "snow", "-o", "a.png")[0] == 0
    code, (line,), _ = run("info", "a.png", "--json", model=None)
    facts = json.loads(line)
    assert (facts["prompt"], facts["negative_prompt"], facts["settings"]["Seed"]) == ("a fox, red", "snow", "3")
    assert facts["record"]["seed"] == 3 and code == 0
    assert Job.create(facts["record"], sd.defaults, 32).settings.num_inference_steps == 3


def test_merge_command(run, small_model, sd, tmp_path):
    sd.unet.conv_in.weight.data += 1.0
    sd.save_pretrained("other")
    places = (str(small_model), "other", "--weight", "0.25")
    assert run("merge", *places, "-o", "mixed/", model=None)[:2] == (0, ["mixed"])
    name = "unet/diffusion_pytorch_model.safetensors"
    first, second, mixed = (
        load_file(folder / name)["conv_in.weight"] for folder in (small_model, Path("other"), Path("mixed"))
    )
    torch.testing.assert_close(mixed, 0.75 * first + 0.25 * second)
    assert run("merge", *places, "-o", "mixed/", model=None)[0] == 2
    assert run("merge", *places, "-o", "one.safetensors", "--float16", model=None)[0] == 0
    assert load_file("one.safetensors")["model.diffusion_model.input_blocks.0.0.weight"].dtype == torch.float16
