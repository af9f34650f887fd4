"""Presets on the command line and in prompts files, and what `minisd bench --preset` says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from models import SD1_TIME_FLOPS, SD1_UNET
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from minisd import SD15, TINY, Sampler, StableDiffusion
from minisd.app.cli import main
from minisd.bench import compare as bench
from minisd.bench.preset import Call, Settings, flops, work
from minisd.training.unet import PROMPTS


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_picture_of_a_preset_is_drawn_again_from_its_parameters(run, small_model):
    code, files, err = run("generate", "a fox", "--seed", "5", "--preset", "fast", "-o", "fast.png")
    assert (code, files) == (0, ["fast.png"]) and "preset fast: 12 steps" in err
    assert run("generate", "--like", "fast.png", "-o", "again.png")[0] == 0
    assert np.array_equal(pixels("again.png"), pixels("fast.png"))
    model = StableDiffusion.from_pretrained(small_model, device="cpu")
    assert np.array_equal(np.asarray(model("a fox", seed=5, preset="fast")), pixels("fast.png"))
    assert run("generate", "a fox", "--seed", "5", "-o", "plain.png")[0] == 0
    assert not np.array_equal(pixels("plain.png"), pixels("fast.png"))
    # a picture drawn without it, again with it; and one drawn with it, again without reuse and in another interval
    assert run("generate", "--like", "plain.png", "--preset", "fast", "-o", "faster.png")[0] == 0
    assert np.array_equal(pixels("faster.png"), pixels("fast.png"))
    other = ["--reuse", "1", "1", "--guidance-interval", "0.25", "0.75", "--steps", "5"]
    assert run("generate", "--like", "fast.png", *other, "-o", "other.png")[0] == 0
    own = {"num_inference_steps": 5, "guidance_interval": (0.25, 0.75), "sampler": Sampler("dpmpp_2m", "trailing")}
    assert np.array_equal(np.asarray(model("a fox", seed=5, **own)), pixels("other.png"))


def test_turbo_takes_four_calls_without_guidance(run, small_model):
    code, _, err = run("generate", "a fox", "--seed", "5", "--preset", "turbo", "-o", "turbo.png")
    assert code == 0 and "preset turbo: 4 steps" in err
    assert err.count("needs a model distilled for it") == 1  # this one is not
    assert run("generate", "--like", "turbo.png", "-o", "again.png")[0] == 0
    model = StableDiffusion.from_pretrained(small_model, device="cpu")
    own = model("a fox", seed=5, num_inference_steps=4, sampler="lcm", guidance_scale=1.0)
    assert isinstance(own, Image.Image)
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "a fox", "seed": 5, "preset": "turbo"}))
    (line,) = run("generate", "--prompts", "prompts.jsonl", "-o", "out")[1]
    for file in ("turbo.png", "again.png", line):
        assert np.array_equal(np.asarray(own), pixels(file)), file
    steps = [(step.num_calls, step.t) for step in model.denoise("a fox", preset="turbo")]
    assert steps == [(4, t) for t in (999.0, 759.0, 499.0, 259.0)]  # as diffusers' LCMScheduler


def test_lines_of_a_prompts_file_have_presets_of_their_own(run, small_model):
    lines: list[dict[str, Any]] = [
        {"prompt": "a fox", "seed": 1, "preset": "fast"},
        {"prompt": "a fox", "seed": 1, "preset": "fast", "sampler": "ddim", "num_inference_steps": 4},
        {"prompt": "a fox", "seed": 1, "feature_reuse": [2, 1], "guidance_interval": [0.0, 0.5]},
        {"prompt": "a fox", "seed": 1},
    ]
    Path("prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, files, _ = run("generate", "--prompts", "prompts.jsonl", "-o", "out")
    assert code == 0 and len(files) == 4
    model = StableDiffusion.from_pretrained(small_model, device="cpu")
    for line, file in zip(lines, files, strict=True):
        assert np.array_equal(np.asarray(model(**line)), pixels(file)), line
        assert run("generate", "--like", file, "-o", "again.png", "--overwrite")[0] == 0
        assert np.array_equal(pixels("again.png"), pixels(file)), line
    code, files, _ = run("generate", "--prompts", "prompts.jsonl", "-o", "out")
    assert (code, files) == (0, [])


def test_flops_of_a_cached_call_by_hand():
    """At full size, one layer deep: conv_in, the time embedding, one residual block, one transformer, conv_out."""
    cells, c, d, words, text, time = 64 * 64, 320, 1280, 77, 768, 1280
    convolutions = cells * (4 * c * 9 + 2 * c * c * 9 + c * c * 9 + 2 * c * c + c * 4 * 9)
    embedding = 320 * time + time * time + time * c
    outer = cells * 2 * c * c
    itself = cells * 4 * c * c + 2 * cells * cells * c
    cross = cells * 2 * c * c + 2 * words * text * c + 2 * cells * words * c
    feed_forward = cells * (c * 2 * d + d * c)
    by_hand = 2 * (convolutions + embedding + outer + itself + cross + feed_forward)
    assert flops(SD15, [Call(1, full=False)], 1) == by_hand
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(dict(SD1_UNET))
        latents, context = torch.empty(2, 4, 64, 64), torch.empty(2, 77, 768)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        theirs(latents, torch.tensor(481.0, device="meta"), context)
    step = counter.get_total_flops() - SD1_TIME_FLOPS
    assert flops(SD15, [Call(2, full=True)], 1) == step
    decode = bench.flops(SD15, 512)["decode"]
    found = work(SD15, [Call(2, True)] * 4, [Call(2, True), Call(2, False), Call(1, True), Call(1, False)], 1)
    after = 1.5 * step + 3 * by_hand
    assert found["unet_ratio"] == pytest.approx(after / (4 * step), abs=1e-4)
    assert found["picture_ratio"] == pytest.approx((after + decode) / (4 * step + decode), abs=1e-4)


def test_work_of_the_preset_at_full_size():
    fast = [Call(2, full=True), Call(2, full=False)] * 6
    assert work(SD15, [Call(2, full=True)] * 20, fast, 2)["picture_ratio"] <= 0.45


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="at least 1"):
        Settings(pictures=0)


def test_bench_measures_the_preset(tmp_path, monkeypatch):
    monkeypatch.setattr("minisd.training.unet.PROMPTS", PROMPTS[:2])
    path = tmp_path / "preset.json"
    words = f"bench --preset fast --model tiny --pictures 2 --steps 4 --threads 1 --device cpu -o {path}"
    assert main(words.split()) == 0
    report = json.loads(path.read_text())
    assert report["calls"] == [4, 12]
    assert report["judge"]["attributes"]["everything"][1]["of"] == 2
    assert report["work"]["Stable Diffusion 1.5"]["unet_gflop"][0] == pytest.approx(4 * 1607, rel=0.01)
    assert 10 < report["psnr"]["mean"] < 60 and report["seconds"]["a_picture"][0] > 0
    assert Image.open(path.with_suffix(".png")).size == (2 * 192, 2 * 192)


def test_bench_only_times_a_model_that_the_judge_does_not_know(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr("minisd.bench.preset.SD15", TINY)  # it is counted in the test above
    path = tmp_path / "preset.json"
    words = f"bench --preset fast --model {small_model} --pictures 2 --steps 2 --threads 1 --device cpu -o {path}"
    assert main(words.split()) == 0
    report = json.loads(path.read_text())
    assert report["calls"] == [2, 12] and "judge" not in report
    assert report["work"]["this model"]["size"] == 32 and report["seconds"]["ratio"] > 0
    assert Image.open(path.with_suffix(".png")).size == (32, 64)
    assert main(words.replace("fast", "turbo").split()) == 0
    report = json.loads(path.read_text())
    assert report["calls"] == [2, 4]
    # 4 calls of one row for 2 calls of two
    assert report["work"]["this model"]["unet_ratio"] == pytest.approx(1, abs=0.02)
