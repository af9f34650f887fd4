"""The command: what it draws, prints and refuses, and what its pictures carry."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from minisd import StableDiffusion, __version__
from minisd.app import cli
from minisd.config import ModelConfig
from minisd.pipeline.metadata import Parameters, parameters_text, parse_parameters, read_parameters, save_png
from minisd.unet import UNet


def chunks(path: Path) -> dict[bytes, list[bytes]]:
    """The chunks of a PNG file, by the specification: length, type, data, checksum."""
    data, at, found = path.read_bytes(), 8, {}
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body, (crc,) = data[at + 8 : at + 8 + length], struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert zlib.crc32(kind + body) == crc
        found.setdefault(kind, []).append(body)
        at += 12 + length
    return found


# Drawing


def test_generate_draws_what_python_draws(run, small_model):
    code, lines, err = run("generate", "red fox", "--seed", "7", "--steps", "2", "--guidance", "3", "--sampler", "ddim")
    assert (code, lines) == (0, ["red-fox-7.png"])
    expected = StableDiffusion.from_pretrained(small_model, device="cpu")(
        "red fox", seed=7, num_inference_steps=2, guidance_scale=3.0, sampler="ddim"
    )
    assert np.array_equal(np.asarray(Image.open("red-fox-7.png")), np.asarray(expected))
    for fact in (str(small_model), "cpu", "float32", "seed 7", "2 steps of DDIM"):
        assert fact in err


def test_a_terminal_without_the_characters_of_a_prompt(run, small_model, monkeypatch, tmp_path):
    """Their place is taken by escapes, as Python writes them; no picture is lost, and the exit code is 0."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        code, _, err = run("generate", "狐狸", "--seed", "1", "-n", "3", "--steps", "1")
    stream.flush()
    assert code == 0, err
    assert stream.buffer.getvalue().decode("cp1252").splitlines() == [rf"\u72d0\u72f8-{seed}.png" for seed in (1, 2, 3)]
    assert {path.name for path in tmp_path.glob("*.png")} == {f"狐狸-{seed}.png" for seed in (1, 2, 3)}


def test_interpolate_draws_its_ends(run, small_model):
    code, lines, _ = run("interpolate", "fox", "snow", "-n", "3", "--seeds", "4", "9", "-o", "way.png")
    assert (code, lines) == (0, ["way.png"])
    strip = np.asarray(Image.open("way.png")).astype(int)
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    for place, prompt, seed in ((0, "fox", 4), (64, "snow", 9)):
        assert np.abs(strip[:, place : place + 32] - np.asarray(sd(prompt, seed=seed)).astype(int)).max() <= 1
    assert "fox to snow" in (read_parameters("way.png") or "")
    assert run("interpolate", "fox", "snow", "-n", "1")[0] == 2


def test_mask_and_outpaint_keep_the_picture(run):
    start = Image.effect_noise((32, 32), 60).convert("RGB")
    start.save("start.png")
    Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 8)).save("mask.png")
    before = np.asarray(start)
    assert run("generate", "fox", "--image", "start.png", "--mask", "mask.png", "-o", "hole.png")[0] == 0
    after = np.asarray(Image.open("hole.png"))
    assert np.array_equal(after[:8], before[:8]) and (after[8:24, 8:24] != before[8:24, 8:24]).any()
    text = read_parameters("hole.png")
    assert text is not None and "Denoising strength: 1, Mask: mask.png" in text
    assert run("generate", "fox", "--image", "start.png", "--outpaint", "0", "16", "8", "0", "-o", "wide.png")[0] == 0
    wide = Image.open("wide.png")
    assert wide.size == (48, 40) and np.array_equal(np.asarray(wide)[8:, :32], before)
    assert "Outpaint: 0 16 8 0" in (read_parameters("wide.png") or "")


def test_every_picture_has_its_own_seed_whatever_the_batch(run):
    _, lines, _ = run("generate", "fox", "--seed", "5", "-n", "3", "--batch", "2")
    assert lines == ["fox-5.png", "fox-6.png", "fox-7.png"]
    assert run("generate", "fox", "--seed", "7", "-o", "alone.png")[1] == ["alone.png"]
    drawn, alone = (np.asarray(Image.open(name)).astype(int) for name in ("fox-7.png", "alone.png"))
    assert np.abs(drawn - alone).max() <= 1
    assert (np.asarray(Image.open("fox-5.png")) != drawn).any()


def test_grid_is_one_file_with_the_pictures_row_by_row(run):
    run("generate", "fox", "--seed", "5", "-n", "3", "-o", "one.png")
    code, lines, _ = run("generate", "fox", "--seed", "5", "-n", "3", "--grid", "-o", "grid.png")
    sheet = np.asarray(Image.open("grid.png"))
    assert (code, lines, sheet.shape) == (0, ["grid.png"], (64, 64, 3))
    assert np.array_equal(sheet[:32, 32:], np.asarray(Image.open("one-6.png")))
    assert np.array_equal(sheet[32:, :32], np.asarray(Image.open("one-7.png")))


def test_size_and_a_folder_that_is_made(run):
    code, lines, _ = run("generate", "fox", "--seed", "1", "--width", "48", "--height", "24", "--output", "new/folder/")
    assert (code, lines) == (0, ["new/folder/fox-1.png"])
    assert Image.open(lines[0]).size == (48, 24)


def test_image_to_image_keeps_more_at_low_strength(run):
    Image.effect_noise((90, 60), 80).convert("RGB").save("start.png")
    start = ("generate", "fox", "--image", "start.png", "--seed", "3", "--steps", "10", "--strength")
    assert run(*start, "0.1", "-o", "near.png")[0] == run(*start, "1", "-o", "far.png")[0] == 0
    assert Image.open("near.png").size == (32, 32)  # scaled and cropped to the model's own size
    assert "Denoising strength: 0.1" in read_parameters("near.png")
    pictures = [np.asarray(Image.open(name)).astype(int) for name in ("near.png", "far.png")]
    assert np.abs(pictures[0] - pictures[1]).mean() > 1


def test_nothing_is_overwritten_unless_asked(run):
    names = [run("generate", "fox", "-o", "fox.png", "--seed", str(seed))[1][0] for seed in (1, 2, 3)]
    assert names == ["fox.png", "fox-2.png", "fox-3.png"]
    before = Path("fox.png").read_bytes()
    assert run("generate", "fox", "-o", "fox.png", "--seed", "2", "--overwrite")[1] == ["fox.png"]
    assert before != Path("fox.png").read_bytes() == Path("fox-2.png").read_bytes()


def test_quiet_prints_the_name_alone(run):
    assert run("generate", "fox", "--seed", "1", "--quiet") == (0, ["fox-1.png"], "")


def test_a_drawn_seed_is_said_and_draws_the_picture_again(run):
    name = run("generate", "fox")[1][0]
    seed = name.removeprefix("fox-").removesuffix(".png")
    run("generate", "fox", "--seed", seed, "-o", "again.png")
    assert Path(name).read_bytes() == Path("again.png").read_bytes()


def test_unknown_words_are_named_with_some_that_are_known(run):
    err = run("generate", "red foxx, dragon!", "--seed", "1")[2]
    warning = next(line for line in err.splitlines() if line.startswith("warning"))
    assert '"foxx", "dragon"; it knows, for example: fox' in warning and '"red"' not in warning
    assert "warning" not in run("generate", "red fox snow", "--seed", "1")[2]


def test_a_long_prompt_says_so_and_is_read_to_its_end(run):
    err = run("generate", "fox " * 75 + "snow", "--seed", "1", "-o", "snow.png")[2]
    assert "warning: the prompt has 76 tokens: it is read in 2 chunks of at most 75" in err
    run("generate", "fox " * 75 + "red", "--seed", "1", "-o", "red.png")
    assert (np.asarray(Image.open("snow.png")) != np.asarray(Image.open("red.png"))).any()


def test_float16_and_bfloat16_draw(run):
    for dtype in ("float16", "bfloat16"):
        code, _, err = run("generate", "fox", "--seed", "1", "--dtype", dtype)
        assert code == 0 and dtype in err


# What a picture carries


def weights_by_hand(model: Path) -> str:
    """The fingerprint of a model, from its files."""
    config, usual = asdict(StableDiffusion.from_pretrained(model, device="cpu").config), asdict(ModelConfig())
    lines = [f"{part}.{name}={value}" for part in config for name, value in config[part].items()]
    lines = sorted(set(lines) - {f"{part}.{name}={value}" for part in usual for name, value in usual[part].items()})
    found = hashlib.sha256("\n".join(lines).encode())
    for part, folder in (("autoencoder", "vae"), ("text_encoder", "text_encoder"), ("unet", "unet")):
        tensors = load_file(next((model / folder).glob("*.safetensors")))
        for name in sorted(tensors):
            values, shape = tensors[name].numpy().ravel(), tuple(tensors[name].shape)
            found.update(f"{part}.{name} {shape}".encode() + values[:8].tobytes() + values[-8:].tobytes())
    return found.hexdigest()[:10]


def test_the_png_carries_the_communitys_parameters(run, small_model):
    run("generate", "red fox", "--seed", "7", "--steps", "2", "--negative", "snow", "-o", "fox.png")
    text = (
        "red fox\nNegative prompt: snow\n"
        f"Steps: 2, Sampler: DPM++ 2M Karras, CFG scale: 4, Seed: 7, Size: 32x32, Model: {small_model.name}, "
        f"Weights: {weights_by_hand(small_model)}, Prediction type: v_prediction, Version: minisd {__version__}"
    )
    written, record = chunks(Path("fox.png"))[b"tEXt"]
    assert written == b"parameters\0" + text.encode("latin-1")
    assert record.startswith(b"minisd\0")
    expected = {"format": 1, "prompt": "red fox", "negative_prompt": "snow", "seed": 7, "num_inference_steps": 2}
    expected |= {"sampler": "dpmpp_2m", "karras": True, "guidance_scale": 4.0, "width": 32, "height": 32}
    expected |= {"weights": weights_by_hand(small_model), "device": "cpu", "precision": "float32"}
    assert expected.items() <= json.loads(record.removeprefix(b"minisd\0")).items()
    assert run("info", "fox.png", "--raw") == (0, text.splitlines(), "")
    assert run("info", "fox.png")[1][:4] == [
        "Prompt           red fox",
        "Negative prompt  snow",
        "Steps            2",
        "Sampler          DPM++ 2M Karras  (--sampler dpmpp_2m --karras)",
    ]


def test_a_prompt_beyond_latin_is_stored_as_utf8(run):
    _, lines, _ = run("generate", "狐 in the snow", "--seed", "1")
    assert lines == ["狐-in-the-snow-1.png"]
    assert chunks(Path(lines[0]))[b"iTXt"][0].startswith(b"parameters\0\0\0\0\0" + "狐 in".encode())
    assert run("info", lines[0])[1][0].split(maxsplit=1) == ["Prompt", "狐 in the snow"]


def test_parameters_of_another_program_are_understood():
    text = (
        "a castle, (detailed:1.2)\nby a lake\nNegative prompt: blurry, low quality\nugly\n"
        'Steps: 28, Sampler: Euler a, CFG scale: 7.5, Seed: 1234, Size: 512x768, Model hash: 6ce0161689, Model: "v1, 5"'
    )
    assert parse_parameters(text) == Parameters(
        "a castle, (detailed:1.2)\nby a lake",
        "blurry, low quality\nugly",
        {
            "Steps": "28",
            "Sampler": "Euler a",
            "CFG scale": "7.5",
            "Seed": "1234",
            "Size": "512x768",
            "Model hash": "6ce0161689",
            "Model": "v1, 5",
        },
    )
    assert parse_parameters("only words: no settings") == Parameters("only words: no settings")


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]))


@given(prompt=TEXT, negative=TEXT, model=TEXT)
def test_parameters_survive_the_round_trip(prompt, negative, model):
    text = parameters_text(prompt, negative, {"Steps": 20, "Model": model, "Seed": 7})
    expected = Parameters(prompt.strip(), negative.strip(), {"Steps": "20", "Model": model.strip(), "Seed": "7"})
    parsed = parse_parameters(text)
    assert (parsed.prompt, parsed.negative_prompt) == (expected.prompt, expected.negative_prompt)
    assert {key: value.strip() for key, value in parsed.settings.items()} == expected.settings


# What is refused


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate"], 2, ["Missing argument", "minisd generate --help"]),
        (["draw"], 2, ["No such command 'draw'"]),
        (["generate", "fox", "--stepz", "3"], 2, ["--stepz", "--steps"]),
        (["generate", "fox", "--steps", "0"], 2, ["num_inference_steps=0", "from 1 to 1000"]),
        (["generate", "fox", "--width", "30"], 2, ["width=30", "multiple of 8"]),
        (["generate", "fox", "--sampler", "magic"], 2, ["'magic'", "dpmpp_2m"]),
        (["generate", "fox", "--sampler", "ddim", "--karras"], 2, ["'ddim' does not support karras", "euler"]),
        (["generate", "fox", "--output", "fox.jpg"], 2, ["fox.jpg", ".png"]),
        (["generate", "fox", "--output", "text.txt/fox.png"], 1, ["text.txt is not a folder"]),
        (["generate", "fox", "--image", "text.txt"], 1, ["text.txt is not a valid image", "PNG"]),
        (["generate", "fox", "--mask", "plain.png"], 2, ["--mask requires an input picture", "--image"]),
        (["generate", "fox", "--image", "plain.png", "--mask", "plain.png"], 2, ["black everywhere"]),
        (["generate", "fox", "--image", "plain.png", "--outpaint", *"0300"], 2, ["right=3", "multiple of 8"]),
        (["info", "none.png"], 1, ["none.png: No such file"]),
        (["info", "plain.png"], 1, ["plain.png has no generation metadata"]),
        (["info", "nowhere"], 1, ["nowhere", "expected a diffusers folder"]),
        (["info", "owner/name"], 1, ["owner/name is not in the cache"]),
    ],
)
def test_errors_are_one_line_with_a_code_and_leave_nothing(run, arguments, code, words):
    Path("text.txt").write_text("not a picture")
    Path("broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    Image.new("RGB", (8, 8)).save("plain.png")
    before = sorted(os.listdir())
    got, lines, err = run(*arguments)
    error = err.splitlines()[-1]
    assert (got, lines) == (code, [])
    assert error.startswith("error: ") and err.count("error: ") == 1
    assert all(word in error for word in words), error
    assert sorted(os.listdir()) == before


def test_a_model_with_a_missing_part_is_a_failure_that_names_it(run, small_model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_bytes((small_model / "model_index.json").read_bytes())
    code, lines, err = run("generate", "fox", model=str(broken))
    assert (code, lines) == (1, []) and "error: " in err and "config.json is missing" in err


def test_a_nan_in_a_part_is_a_failure_that_names_the_part(run, monkeypatch):
    monkeypatch.setattr(UNet, "forward", lambda self, latents, *_: latents * float("nan"))
    code, lines, err = run("generate", "fox", "--seed", "1")
    assert (code, lines, os.listdir()) == (1, [], [])
    assert "the UNet returned NaN" in err


def test_out_of_memory_says_what_to_do(run, monkeypatch):
    def full(*_: object) -> None:
        raise RuntimeError("can't allocate memory: you tried to allocate 9 TB")

    monkeypatch.setattr(UNet, "forward", full)
    code, _, err = run("generate", "fox", "--seed", "1")
    assert code == 1 and "error: out of memory; try a smaller --batch" in err


def test_debug_shows_the_traceback(small_model, monkeypatch):
    monkeypatch.setenv("MINISD_DEBUG", "1")
    with pytest.raises(ValueError, match="seed=-1"):
        cli.main(["generate", "fox", "--seed", "-1", "--model", str(small_model)])


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "minisd", *arguments]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}  # for a checkout that is not installed


def test_a_full_disk_is_a_failure_that_leaves_nothing(small_model, tmp_path):
    resource = pytest.importorskip("resource", reason="limits the size of files, which Windows cannot")
    done = subprocess.run(
        command("generate", "fox", "--seed", "1", "--model", str(small_model)),
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert (done.returncode, done.stdout, os.listdir(tmp_path)) == (1, "", [])
    assert "File too large" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_interrupting_leaves_whole_pictures_only_and_exits_130(small_model, tmp_path):
    process = subprocess.Popen(
        command("generate", "fox", "--seed", "1", "-n", "100000", "--batch", "1", "--model", str(small_model)),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts jobs in the background lets them ignore Ctrl-C, and they hand that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "fox-1.png\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith("interrupted\n") and "Traceback" not in err
    for path in tmp_path.iterdir():
        assert path.name.startswith("fox-")
        Image.open(path).load()


# The writer of pictures


def test_save_png_leaves_nothing_when_writing_fails(tmp_path, monkeypatch):
    def fail(self: Image.Image, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "fox.png").write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", fail)
    for overwrite in (False, True):
        with pytest.raises(OSError, match="No space left"):
            save_png(Image.new("RGB", (8, 8)), tmp_path / "fox.png", "text", overwrite)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"fox.png": b"old"}


# Help, version, start


def test_help_shows_examples_and_every_option(run):
    code, lines, _ = run("generate", "--help", model=None)
    text = "\n".join(lines)
    assert code == 0 and 'minisd generate "a castle at night"' in text
    for option in (
        "--seed",
        "--images",
        "--grid",
        "--steps",
        "--guidance",
        "--sampler",
        "--width",
        "--negative",
        "--model",
        "--device",
        "--dtype",
    ):
        assert option in text


def test_without_a_command_the_help_is_shown(run):
    code, lines, _ = run("--help")
    assert code == 0 and lines[0].startswith("Usage: minisd")
    assert {"generate", "info", "train"} <= {line.split()[0] for line in lines if line.strip()}
    assert run("--version")[1] == [f"minisd {__version__}"]
    assert cli.main([]) == 0
    assert cli.main(["train"]) == 2


def test_info_describes_a_model(run, small_model):
    import torch

    counts = [sum(map(torch.Tensor.numel, load_file(path).values())) for path in small_model.rglob("*.safetensors")]
    code, lines, _ = run("info", str(small_model))
    assert code == 0 and f"{sum(counts):,} parameters" in lines[-1]


def test_the_command_starts_without_torch():
    code = "import sys, minisd.app.cli; minisd.app.cli.main(['generate', '--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=ENVIRONMENT)


def test_generate_recommends_bfloat16(run, small_model, monkeypatch):
    draw = ("generate", "red fox", "--steps", "1", "--device", "cpu", "--overwrite")
    advice = "--dtype bfloat16"
    monkeypatch.setattr("minisd.features.fast.capabilities", lambda: {"amx_bf16": True})
    assert advice not in run(*draw)[2]  # a small model
    monkeypatch.setattr("minisd.app.options.FULL_SIZE", 1)
    assert run(*draw)[2].count(advice) == 1
    assert advice not in run(*draw, "--dtype", "float32")[2]
    monkeypatch.setattr("minisd.features.fast.capabilities", lambda: {"avx512_f": True})
    assert advice not in run(*draw)[2]
