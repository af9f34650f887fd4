"""Many pictures from a file: the same whatever breaks the run, and every mistake named before anything is drawn."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Child, call, module, together
from PIL import Image

from minisd import Sampler, StableDiffusion
from minisd.app.jobs import batches
from minisd.app.manifest import read_manifest, write_manifest
from minisd.app.prompts_file import Prompt, plan_jobs, read_prompts
from minisd.io.diffusers_folder import Defaults
from minisd.pipeline.metadata import parse_parameters, read_parameters
from minisd.pipeline.provenance import Provenance

KILLS = int(os.environ.get("MINISD_KILLS", "3"))
PROVENANCE = Provenance("small", "float32", "cpu", "epsilon", "0123456789")
PROMPTS = [
    {"prompt": "red fox", "seed": 1},
    {"prompt": "snow", "seed": 2, "negative_prompt": "fox"},
    {"prompt": "fox, in the snow", "seed": 3, "name": "third"},
    {"prompt": "red snow", "seed": 4, "sampler": "euler", "num_inference_steps": 4},
    {"prompt": "fox", "seed": 5, "images": 3},
]
FILES = ["0001-red-fox", "0002-snow", "third", "0004-red-snow", "0005-fox-1", "0005-fox-2", "0005-fox-3"]
Run = Callable[..., tuple[int, list[str], str]]


def write(path: str | Path, objects: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(one) + "\n" for one in objects), encoding="utf-8")


def contents(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def manifest(folder: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def drawn() -> dict[str, bytes]:
    """The files of `whole`, once they are drawn."""
    return {}


@pytest.fixture
def whole(run: Run, drawn: dict[str, bytes]) -> dict[str, bytes]:
    """The files of an unbroken run of PROMPTS, in the folder "whole"; "prompts.jsonl" holds them."""
    write("prompts.jsonl", PROMPTS)
    if drawn:
        Path("whole").mkdir()
        for name, data in drawn.items():
            Path("whole", name).write_bytes(data)
    else:
        code, lines, err = run("generate", "--prompts", "prompts.jsonl", "--output", "whole", "--batch", "2")
        assert code == 0 and "7 drawn, 0 already existed" in err
        assert lines == [f"whole/{file}.png" for file in FILES]
        drawn.update(contents("whole"))
    return dict(drawn)


def again(run: Run, folder: str, *more: str) -> tuple[int, list[str], str]:
    return run("generate", "--prompts", "prompts.jsonl", "--output", folder, "--batch", "2", *more)


# What is drawn


def test_every_line_is_drawn_as_python_draws_it(run, small_model):
    lines: list[dict[str, Any]] = [
        {"prompt": "red fox", "seed": 7, "sampler": "ddim", "spacing": "trailing", "guidance_scale": 2.5},
        {"prompt": "snow", "negative_prompt": "fox", "seed": 8, "sampler": "heun", "karras": True, "width": 48},
        {"prompt": "fox", "seed": 9, "num_inference_steps": 5, "height": 24, "guidance_rescale": 0.5, "clip_skip": 1},
        {"prompt": "red snow", "seed": 3, "images": 2, "name": "two"},
    ]
    write("prompts.jsonl", lines)
    options = ("--batch", "1", "--steps", "2", "--sampler", "euler")
    assert run("generate", "--prompts", "prompts.jsonl", "-o", "out/", *options)[0] == 0
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    samplers = (Sampler("ddim", "trailing"), Sampler("heun", karras=True), Sampler("euler"), Sampler("euler"))
    names = ("0001-red-fox", "0002-snow", "0003-fox", "two-1")
    for line, sampler, name in zip(lines, samplers, names, strict=True):
        settings = {"num_inference_steps": 2} | {k: v for k, v in line.items() if k not in ("images", "name")}
        settings |= {"sampler": sampler}
        for key in ("spacing", "karras"):
            settings.pop(key, None)
        drawn = sd(settings.pop("prompt"), **settings)
        assert np.array_equal(np.asarray(Image.open(f"out/{name}.png")), np.asarray(drawn)), name
    second = sd("red snow", seed=4, num_inference_steps=2, sampler="euler")
    assert np.array_equal(np.asarray(Image.open("out/two-2.png")), np.asarray(second))
    assert sorted(contents("out")) == sorted([*(f"{name}.png" for name in (*names, "two-2")), "manifest.jsonl"])


def test_the_manifest_says_everything_in_order(whole):
    lines = manifest("whole")
    assert [line["file"] for line in lines] == [f"{file}.png" for file in FILES]
    assert [line["seed"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["prompt"] for line in lines[:4]] == [line["prompt"] for line in PROMPTS[:4]]
    assert [(line["batch_size"], line["batch_pos"]) for line in lines] == [
        *((2, 0), (2, 1), (1, 0), (1, 0), (2, 0), (2, 1), (1, 0))  # the fourth has other settings than its neighbours
    ]
    expected = {"negative_prompt": "fox", "sampler": "dpmpp_2m", "karras": True, "num_inference_steps": 3}
    expected |= {
        "guidance_scale": 4.0,
        "width": 32,
        "height": 32,
        "clip_skip": 1,
        "model": "small",
        "seed_drawn": False,
    }
    assert expected.items() <= lines[1].items()
    assert (lines[3]["sampler"], lines[3]["karras"], lines[3]["num_inference_steps"]) == ("euler", False, 4)
    for line in lines:
        said = parse_parameters(read_parameters(f"whole/{line['file']}") or "")
        assert (said.prompt, said.settings["Seed"]) == (line["prompt"], str(line["seed"]))


def test_a_text_file_is_a_prompt_a_line(run):
    Path("prompts.txt").write_bytes("\ufeffred fox\r\n\r\n  # no prompt\r\n狐 in the snow\r\n".encode())
    options = ("--seed", "5", "--negative", "snow", "--images", "2")
    code, lines, err = run("generate", "--prompts", "prompts.txt", "--output", "new/folder", *options)
    names = [f"{stem}-{at}.png" for stem in ("0001-red-fox", "0002-狐-in-the-snow") for at in (1, 2)]
    assert (code, lines) == (0, [f"new/folder/{name}" for name in names])
    said = [parse_parameters(read_parameters(name) or "") for name in lines]
    assert [(one.prompt, one.negative_prompt) for one in said] == [
        *(("red fox", "snow"), ("red fox", "snow"), ("狐 in the snow", "snow"), ("狐 in the snow", "snow"))
    ]
    assert [one.settings["Seed"] for one in said] == ["5", "6", "5", "6"]
    assert 'never learned "狐"' in err


def test_pictures_can_begin_with_one(run):
    Image.effect_noise((32, 32), 60).convert("RGB").save("start.png")
    Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 8)).save("mask.png")
    Path("prompts.txt").write_text("red fox\nsnow\n")
    start = ("--prompts", "prompts.txt", "--image", "start.png", "--mask", "mask.png", "--seed", "3")
    assert run("generate", *start, "-o", "out/")[0] == 0
    assert run("generate", "snow", *start[2:], "-o", "alone.png")[0] == 0
    assert Path("out/0002-snow.png").read_bytes() == Path("alone.png").read_bytes()
    assert "0 drawn, 2 already existed" in run("generate", *start, "-o", "out/")[2]
    Image.effect_noise((32, 32), 60).convert("RGB").save("start.png")
    assert "image_hash is" in run("generate", *start, "-o", "out/")[2]


# Resuming


def test_what_is_missing_broken_or_foreign_is_drawn_again(run, whole):
    shutil.copytree("whole", "broken")
    broken = Path("broken")
    (broken / "0001-red-fox.png").unlink()  # its batch is drawn again, and the other one of it left alone
    data = whole["third.png"]
    (broken / "third.png").write_bytes(data[: len(data) // 2])
    (broken / "0005-fox-2.png").write_bytes(whole["0005-fox-3.png"])
    (broken / "0005-fox-3.png").write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    (broken / "0004-red-snow.png").write_bytes(b"")
    (broken / ".0123456789abcdef0123456789abcdef.png").write_bytes(b"half")
    (broken / ".mine.png").write_bytes(b"not ours")
    before = {name: (broken / name).stat().st_mtime_ns for name in ("0002-snow.png", "0005-fox-1.png")}
    code, lines, err = again(run, "broken")
    redrawn = {"0001-red-fox", "third", "0004-red-snow", "0005-fox-2", "0005-fox-3"}
    assert (code, set(lines)) == (0, {f"broken/{name}.png" for name in redrawn})
    assert "5 drawn, 2 already existed" in err
    assert contents(broken) == whole | {".mine.png": b"not ours"}
    assert {name: (broken / name).stat().st_mtime_ns for name in before} == before
    code, lines, err = again(run, "broken")
    assert (code, lines) == (0, []) and "0 drawn, 7 already existed" in err


def test_drawn_seeds_are_kept(run):
    Path("prompts.txt").write_text("red fox\nsnow\nfox\n")
    command = ("generate", "--prompts", "prompts.txt", "--images", "2", "--output")
    assert run(*command, "whole")[0] == run(*command, "other")[0] == 0
    seeds = [line["seed"] for line in manifest("whole")]
    assert len(set(seeds)) == 6 and seeds != [line["seed"] for line in manifest("other")]
    assert [b - a for a, b in zip(seeds[::2], seeds[1::2], strict=True)] == [1, 1, 1]
    Path("broken").mkdir()
    shutil.copy("whole/manifest.jsonl", "broken")
    assert run(*command, "broken")[0] == 0
    assert contents("broken") == contents("whole")


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"prompt": "blue fox"}, [], ["line 1", "prompt is 'red fox'", "'blue fox'"]),
        ({"seed": 9}, [], ["line 1", "seed is 1", "expected 9"]),
        ({"guidance_scale": 4.5}, [], ["guidance_scale is 4.0", "4.5"]),
        ({"name": "fox"}, [], ["file is '0001-red-fox.png'"]),
        ({"images": 2}, [], ["7 pictures, not 8"]),
        ({}, ["--batch", "3"], ["batch_size is 2, expected 3"]),
        ({}, ["--steps", "2"], ["num_inference_steps is 3, expected 2"]),
        ({}, ["--dtype", "bfloat16"], ["precision is 'float32', expected 'bfloat16'"]),
        ({}, ["--negative", "snow"], ["negative_prompt is ''", "'snow'"]),
    ],
)
def test_another_plan_is_refused(run, whole, change, options, words):
    write("prompts.jsonl", [PROMPTS[0] | change, *PROMPTS[1:]])
    (Path("whole") / "third.png").unlink()
    code, lines, err = again(run, "whole", *options)
    assert (code, lines) == (2, [])
    assert all(word in err for word in [*words, "another folder", "--overwrite"]), err
    assert contents("whole") == {name: data for name, data in whole.items() if name != "third.png"}


def test_another_model_of_the_same_name_is_refused(run, whole, small_model):
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    with torch.no_grad():
        sd.unet.conv_out.bias += 1e-3
    sd.save_pretrained("other/small")
    code, _, err = run("generate", "--prompts", "prompts.jsonl", "-o", "whole", "--batch", "2", model="other/small")
    assert code == 2 and "weights is" in err


def test_overwrite_draws_anew(run, whole):
    write("prompts.jsonl", PROMPTS[:2])
    code, lines, err = again(run, "whole", "--overwrite")
    assert (code, len(lines), len(manifest("whole"))) == (0, 2, 2) and "2 drawn, 0 already existed" in err
    assert again(run, "whole")[1] == []
    Path("whole/manifest.jsonl").write_text('{"file": "x"}\n')
    code, lines, err = again(run, "whole")
    assert (code, lines) == (2, []) and "manifest.jsonl is corrupted" in err and "--overwrite" in err


def test_pictures_of_somebody_else_are_left_alone(run):
    write("prompts.jsonl", PROMPTS)
    Path("mine").mkdir()
    Path("mine/third.png").write_bytes(b"my holiday")
    code, lines, err = again(run, "mine")
    assert (code, lines, contents("mine")) == (2, [], {"third.png": b"my holiday"})
    assert "mine already contains third.png" in err and "another folder" in err


# Errors


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "fox"', ["not JSON", '{"prompt": "a fox"}']),
        ('["fox"]', ["not an object"]),
        ('{"negative_prompt": "fox"}', ['missing key "prompt"']),
        ('{"prompt": 5}', ["prompt is 5", "a string"]),
        ('{"prompt": null}', ["prompt is null", "a string"]),
        ('{"prompt": "fox", "prompt": "snow"}', ["duplicate key"]),
        ('{"prompt": "fox", "steps": 5}', ["'steps' is not a setting", "num_inference_steps"]),
        ('{"prompt": "fox", "seed": "5"}', ['seed is "5"', "an integer"]),
        ('{"prompt": "fox", "seed": 5.0}', ["seed is 5.0", "an integer"]),
        ('{"prompt": "fox", "seed": true}', ["seed is true", "an integer"]),
        ('{"prompt": "fox", "seed": -1}', ["seed=-1", "from 0"]),
        ('{"prompt": "fox", "seed": 9223372036854775807, "images": 2}', ["seed=9223372036854775808"]),
        ('{"prompt": "fox", "karras": 1}', ["karras is 1", "true or false"]),
        ('{"prompt": "fox", "guidance_scale": "7"}', ['guidance_scale is "7"', "a number"]),
        ('{"prompt": "fox", "guidance_scale": NaN}', ["guidance_scale=nan", "finite"]),
        (f'{{"prompt": "fox", "guidance_scale": 1{"0" * 400}}}', ["finite number"]),
        ('{"prompt": "fox", "num_inference_steps": 0}', ["num_inference_steps=0", "from 1 to 1000"]),
        ('{"prompt": "fox", "sampler": "magic"}', ["'magic'", "dpmpp_2m"]),
        ('{"prompt": "fox", "sampler": "ddim", "karras": true}', ["'ddim' does not support karras"]),
        ('{"prompt": "fox", "spacing": "odd"}', ["'odd'", "trailing"]),
        ('{"prompt": "fox", "width": 30}', ["width=30", "multiple of 8"]),
        ('{"prompt": "fox", "clip_skip": 2}', ["clip_skip=2"]),
        ('{"prompt": "fox", "guidance_rescale": 2}', ["guidance_rescale=2"]),
        ('{"prompt": "fox", "images": 0}', ["images=0", "from 1 to"]),
        ('{"prompt": "fox", "name": "same"}', ["same.png", "line 1", "another name"]),
        ('{"prompt": "fox", "name": "SAME.png"}', ["SAME.png", "line 1"]),
        ('{"prompt": "fox", "name": "../fox"}', ["name='../fox'", "no path"]),
        ('{"prompt": "fox", "name": "/fox"}', ["name='/fox'"]),
        ('{"prompt": "fox", "name": "a/b"}', ["name='a/b'"]),
        ('{"prompt": "fox", "name": "a\\\\b"}', ["name="]),
        ('{"prompt": "fox", "name": "C:fox"}', ["name='C:fox'"]),
        ('{"prompt": "fox", "name": ".hidden"}', ["name='.hidden'"]),
        ('{"prompt": "fox", "name": ""}', ["name=''"]),
        ('{"prompt": "fox", "name": "fox\\n"}', ["name="]),
        ('{"prompt": "fox", "name": "nul"}', ["name='nul'"]),
        (f'{{"prompt": "fox", "name": "{"狐" * 70}"}}', ["at most 200"]),
        ('{"prompt": "fox\\ud800"}', ["not text"]),
        ('{"prompt": "fox\\u0000"}', ["not text"]),
        ("[" * 100000, ["not JSON"]),
        (f'{{"prompt": "{"fox " * 10_000}"}}', ["10000 tokens", "at most 8"]),
        ('{"prompt": "fox", "negative_prompt": "(red:99)"}', ["weight 99"]),
    ],
)
def test_a_bad_line_is_named_before_anything_is_drawn(run, line, words):
    Path("prompts.jsonl").write_text('{"prompt": "fox", "name": "same"}\n\n' + line + "\n", encoding="utf-8")
    code, lines, err = again(run, "out/")
    error = err.splitlines()[-1]
    assert (code, lines, os.listdir()) == (2, [], ["prompts.jsonl"])
    assert error.startswith("error: prompts.jsonl, line 3")
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("prompts.csv", b"fox", ["prompts.csv must be a .txt file"]),
        ("prompts.txt", b"\n# fox\n", ["contains no prompts"]),
        ("prompts.txt", b"fox\nsn\xf6w\n", ["prompts.txt, line 2 is not UTF-8"]),
        ("prompts.txt", "fox\n".encode("utf-16"), ["line 1 is not UTF-8", "save the file as UTF-8"]),
    ],
)
def test_a_bad_file_is_refused(run, name, content, words):
    Path(name).write_bytes(content)
    code, lines, err = run("generate", "--prompts", name, "--output", "out/")
    assert (code, lines, os.listdir()) == (2, [], [name])
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompts", "prompts.txt"], ["requires a folder"]),
        (["--prompts", "prompts.txt", "-o", "out.png"], ["requires a folder"]),
        (["--prompts", "none.txt", "-o", "out/"], ["none.txt", "does not exist"]),
        (["fox", "--prompts", "prompts.txt", "-o", "out/"], ["cannot be combined with a prompt"]),
        (["--prompts", "prompts.txt", "-o", "out/", "--grid"], ["cannot be combined with --grid"]),
        (["--prompts", "prompts.txt", "-o", "out/", "--like", "prompts.txt"], ["cannot be combined with --like"]),
    ],
)
def test_options_that_do_not_go_together(run, options, words):
    Path("prompts.txt").write_text("fox\n")
    code, lines, err = run("generate", *options)
    assert (code, lines, os.listdir()) == (2, [], ["prompts.txt"])
    assert all(word in err for word in words), err


def test_one_prompt_is_not_shared_out(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run("generate", "fox")
    assert code == 2 and "several processes require --prompts" in err


def test_a_failed_write_keeps_what_is_finished(run, whole, monkeypatch):
    save, calls = Image.Image.save, []

    def fail(self: Image.Image, path: Path, **choices: Any) -> None:
        calls.append(path)
        if len(calls) == 4:
            Path(path).write_bytes(b"half")
            raise OSError(30, "Read-only file system", str(path))
        save(self, path, **choices)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail)
        code, lines, err = again(run, "broken")
    assert (code, len(lines)) == (1, 3) and "Read-only file system" in err
    assert contents("broken").items() <= whole.items() and len(contents("broken")) == 4
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        code, lines, err = again(run, "full")
    assert (code, lines, contents("full")) == (1, [], {}) and "No space left" in err
    assert again(run, "broken")[0] == 0
    assert contents("broken") == whole


# Large files


def test_a_hundred_thousand_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    write(path, [{"prompt": f"fox {i}\u2028{i}"} for i in range(100_000)])
    plan = plan_jobs(read_prompts(path), {}, 4, Defaults(), 32)
    assert len(plan) == 100_000 and plan[-1].file == "100000-fox-99999-99999.png"
    plan = plan[:10_000]
    write_manifest(plan, PROVENANCE, tmp_path / "out", overwrite=False)
    seeds = [one.seed for one in read_manifest(plan, PROVENANCE, tmp_path / "out")]
    assert seeds == [json.loads(line)["seed"] for line in (tmp_path / "out/manifest.jsonl").open(encoding="utf-8")]
    assert len(set(seeds)) > 9_990


def test_batches_are_neighbours_of_equal_settings():
    steps = [1, 1, 1, 2, 1, 1, 1, 1, 1]
    lines = [Prompt("", {"prompt": str(at), "num_inference_steps": n, "seed": at}) for at, n in enumerate(steps)]
    plan = plan_jobs(lines, {}, 3, Defaults(), 32)
    assert [[one.seed for one in some] for some in batches(plan)] == [[0, 1, 2], [3], [4, 5, 6], [7, 8]]


# Processes that are killed, and several of them


def command(folder: Path, output: str, model: Path) -> list[str]:
    words = ["minisd", "generate", "--prompts", str(folder / "prompts.jsonl"), "--batch", "2"]
    return [*words, "--model", str(model), "--output", str(folder / output), "--device", "cpu"]


def finish(*words: str) -> tuple[int, list[str], str]:
    code, out, err = call(module, *words)
    assert "Traceback" not in err, err
    return code, out.splitlines(), err


@pytest.fixture(scope="module")
def unbroken(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts.jsonl, and the pictures of one process, never stopped, in "whole"."""
    folder = tmp_path_factory.mktemp("many")
    settings = {"num_inference_steps": 12}
    write(folder / "prompts.jsonl", [one | settings for one in PROMPTS] + [{"prompt": "red", "seed": 40, "images": 9}])
    code, lines, _ = finish(*command(folder, "whole", small_model))
    assert (code, len(lines)) == (0, 16)
    return folder


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.timeout(60 + 60 * KILLS)
def test_killed_and_resumed_is_the_run_that_was_never_stopped(unbroken, small_model, record_property):
    """Killed at random moments, MINISD_KILLS of them, each in a folder of its own."""
    number, whole, halves = int(os.environ.get("MINISD_SEED", "0")), contents(unbroken / "whole"), []
    moments = random.Random(number)
    for kill in range(KILLS):
        words = command(unbroken, f"killed-{kill}", small_model)
        process = Child(module, *words)
        process.wait_for_lines(moments.randrange(15))
        time.sleep(moments.random() * 0.1)
        process.kill()
        folder = unbroken / f"killed-{kill}"
        left = contents(folder) if folder.exists() else {}
        halves.append(len(left))
        finished = {name: data for name, data in left.items() if not name.startswith(".")}
        code, lines, err = finish(*words)
        after = contents(folder)
        assert code == 0 and after == whole and finished.items() <= whole.items(), err
        assert f"{len(lines)} drawn, {16 - len(lines)} already existed" in err
        shutil.rmtree(folder)
    print("files after the kills:", halves)
    record_property("kills", KILLS)
    assert min(halves) < len(whole), "every kill came too late to show anything"


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_interrupting_keeps_what_is_finished(unbroken, small_model):
    process = Child(module, *command(unbroken, "interrupted", small_model))
    process.wait_for_lines(1)
    process.interrupt()
    code, _, err = process.finish(60)
    left = contents(unbroken / "interrupted")
    assert code == 130 and err.endswith("interrupted\n")
    assert left.items() <= contents(unbroken / "whole").items() and 2 <= len(left) < 17


def under_torchrun(*words: str) -> tuple[int, list[str], str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, *words], env=environment, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout.splitlines(), done.stderr


def two(*words: str) -> tuple[list[int], list[str], str]:
    """As torchrun starts two processes, but sooner."""
    done = together(2, module, *words)
    err = "".join(one.err for one in done)
    assert "Traceback" not in err, err
    return [one.code for one in done], [line for one in done for line in one.out.splitlines()], err


def test_two_processes_write_the_files_of_one(unbroken, small_model):
    words = command(unbroken, "two", small_model)
    code, lines, err = under_torchrun(*words)
    assert code == 0 and sorted(lines) == sorted(
        str(unbroken / "two" / name) for name in contents(unbroken / "two") if name.endswith(".png")
    ), err
    assert contents(unbroken / "two") == contents(unbroken / "whole")
    assert len(re.findall("16 drawn, 0 already existed", err)) == 1
    for name in ("third.png", "0005-fox-1.png", "0005-fox-2.png", "0005-fox-3.png"):
        (unbroken / "two" / name).unlink()
    codes, lines, err = two(*words)
    assert (codes, len(lines)) == ([0, 0], 4) and "4 drawn, 12 already existed" in err
    assert contents(unbroken / "two") == contents(unbroken / "whole")
    # an error of the plan is said once, and nobody waits for ever
    codes, lines, err = two(*words, "--steps", "5", "--guidance", "3")
    assert all(codes) and lines == [] and err.count("error: ") == 1 and "belongs to other prompts" in err
    assert contents(unbroken / "two") == contents(unbroken / "whole")
