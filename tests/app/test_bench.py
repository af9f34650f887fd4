"""`minisd bench` on the tiny model. Its times are of no interest here: that it measures the same thing twice is."""

import json
import os
import re
import statistics
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from models import SD1_AUTOENCODER, SD1_TIME_FLOPS, SD1_UNET
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from minisd.app.cli import main
from minisd.bench import compare as bench
from minisd.bench import operators, training
from minisd.config import SD15, TINY
from minisd.io.checkpoint import SHIPPED
from minisd.io.configs import to_dict


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    for measured in (bench, training):
        monkeypatch.setattr(measured, "CEILING_SIDE", 512)


@pytest.fixture(scope="module")
def process() -> Iterator[bench.Process]:
    """A process of minisd, which imports torch for some seconds."""
    shared = bench.Process("minisd", bench.Settings(threads=1))
    yield shared
    shared.close()


def measured(size: int) -> set[str]:
    whats = {"peak memory, step and decode", "one guided UNet step", "decode"}
    return {"matrix product 512³", "text encoder, two prompts", *(f"{what} at {size}" for what in whats)}


def test_the_command_measures_both_libraries(tmp_path, capsys):
    path = tmp_path / "bench.json"
    command = f"bench --model tiny --size 64 --steps 2 --repeats 1 --threads 1 --device cpu --no-loading -o {path}"
    assert main(command.split()) == 0
    report = json.loads(path.read_text())
    assert report["picture_difference"] <= 1  # both drew the same picture
    found = {(row["what"], row["library"]): row for row in report["rows"]}
    assert {what for what, _ in found} == {*measured(64), "picture 64×64, 2 steps"}
    for what in ("text encoder, two prompts", "one guided UNet step at 64", "decode at 64", "picture 64×64, 2 steps"):
        assert found[what, "minisd"]["seconds"] > 0 and found[what, "diffusers"]["seconds"] > 0
    for library in ("minisd", "diffusers"):
        assert 0.1 < found["peak memory, step and decode at 64", library]["peak_gb"] < 5
    said = capsys.readouterr()
    assert said.out.strip() == str(path) and "ratio" in said.err and "GFLOP/s" in said.err
    assert Image.open(path.with_suffix(".png")).width > 300


def test_loading_is_measured_and_what_is_not_asked_for_is_not(process, tmp_path, monkeypatch):
    """One process stands for those that are started for each loading, and minisd's import for torch's alone."""
    shared, started = SimpleNamespace(library="minisd", close=lambda: 0), []
    shared.load, shared.peak, shared.ask = process.load, process.peak, process.ask
    monkeypatch.setattr(bench, "Process", lambda name, settings: started.append(name) or shared)
    seconds = bench._import_seconds
    monkeypatch.setattr(bench, "_import_seconds", lambda name: {"torch": 7.5}.get(name) or seconds(name))
    path = tmp_path / "bench.json"
    command = f"bench --model tiny --steps 0 --repeats 1 --threads 1 --device cpu --alone -o {path}"
    assert main(command.split()) == 0
    found = {row["what"]: row for row in json.loads(path.read_text())["rows"]}
    loading = {"import torch", "import minisd", "load, first step included"}
    loading |= {"load, files not in memory"} if hasattr(os, "posix_fadvise") else set()
    assert started == ["minisd"] * (4 if hasattr(os, "posix_fadvise") else 3)
    assert found.keys() == measured(192) | loading and all(found[what]["seconds"] > 0 for what in loading)
    assert found["import torch"]["seconds"] == 7.5
    assert Image.open(path.with_suffix(".png")).width > 300


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::cudnn_convolution", "convolution"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::_flash_attention_forward", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::addmm", "matrix product"),
        ("aten::silu", "element by element"),
        ("cudnn_generated_fort_native_sm90_convolution", operators.PYTHON),
    ],
)
def test_operators_of_cpus_and_gpus_are_told_apart(name, kind):
    assert operators.kind(name) == kind


def test_flops_are_those_of_diffusers_networks():
    """At full size, on the meta device; and close to the published 1,607 and 2,515 GFLOP.

    But for the time embedding, which minisd computes once for both predictions.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(SD1_UNET))
        vae = AutoencoderKL.from_config(dict(SD1_AUTOENCODER))
        latents, context = torch.empty(2, 4, 64, 64), torch.empty(2, 77, 768)
    with torch.no_grad(), FlopCounterMode(display=False) as step:
        unet(latents, torch.tensor(481.0, device="meta"), context)
    with torch.no_grad(), FlopCounterMode(display=False) as decode:
        vae.decode(latents[:1])
    counts = bench.flops(SD15, 512)
    assert counts == {"step": step.get_total_flops() - SD1_TIME_FLOPS, "decode": decode.get_total_flops()}
    assert counts["step"] == pytest.approx(1607e9, rel=0.01) and counts["decode"] == pytest.approx(2515e9, rel=0.01)


def test_rows_hold_medians_and_the_middle_half():
    times = [5.0, 1.0, 4.0, 2.0, 3.0]
    row = bench.row("x", "minisd", times, flop=6_000_000_000)
    assert (row["low"], row["seconds"], row["high"]) == (2.0, statistics.median(times), 4.0)
    assert row["gflops"] == 2.0


def test_short_times_and_slow_rates_keep_four_digits():
    row = bench.row("x", "torch", [0.000187654], flop=1_000_000)
    assert (row["seconds"], row["gflops"]) == (0.0001877, 5.329)
    row = bench.row("x", "torch", [120.12342], flop=1_000_000, peak=1_234_567)
    assert (row["seconds"], row["gflops"], row["peak_gb"]) == (120.1234, 8.325e-06, 0.001235)


def test_a_process_that_fails_says_why(process):
    with pytest.raises(RuntimeError, match="minisd failed at 'load'.*no model at"):
        process.ask("load", folder="nowhere", device="cpu", dtype="float32", threads=1, compiled=False)
    other = bench.Process("neither", bench.Settings(threads=1))
    with pytest.raises(RuntimeError, match="the process of neither ended at 'text'.*KeyError"):
        other.ask("text")
    other.close()


@pytest.mark.parametrize("values", [{"sizes": (100,)}, {"repeats": 0}, {"steps": -1}, {"sizes": (0,)}])
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="expected"):
        bench.Settings(**values)  # type: ignore[arg-type]


def test_trainings_are_measured_in_mixed_precision_when_asked(tmp_path, monkeypatch, capsys):
    asked: list[training.Settings] = []
    monkeypatch.setattr(training, "run", lambda settings, log: asked.append(settings) or {"parts": []})
    for dtype in ("bfloat16", "float32"):
        assert main(f"bench --training --threads 1 --dtype {dtype} -o {tmp_path / 'x.json'}".split()) == 0
    assert [settings.bfloat16 for settings in asked] == [True, False]
    assert main(f"bench --training --dtype float16 -o {tmp_path / 'y.json'}".split()) == 2
    assert "bfloat16" in capsys.readouterr().err and not (tmp_path / "y.json").exists()


def test_the_shipped_report_can_be_shown():
    report = json.loads((SHIPPED.parent / "bench" / "cpu.json").read_text())
    lines = bench.table(report).splitlines()
    assert report["settings"]["sizes"][0] == 512 and "ratio" in lines[0]
    step = next(line for line in lines if line.startswith("one guided UNet step at 512"))
    assert re.split(" {2,}", step) == [
        "one guided UNet step at 512", "5.61 ±0.063 s, 286 GFLOP/s (72%)", "6.24 ±0.025 s, 258 GFLOP/s (64%)", "0.90"
    ]  # fmt: skip


def test_the_command_measures_the_trainings(tmp_path, capsys, monkeypatch):
    recipes = training.RECIPES
    settings = training.Settings(steps=1, scenes=8, parts=("autoencoder",))
    monkeypatch.setattr(training, "Settings", lambda **_: settings)
    half = {name: replace(recipe, batch=recipe.batch // 2, read=recipe.read // 2) for name, recipe in recipes.items()}
    monkeypatch.setattr(training, "RECIPES", half)
    path = tmp_path / "training.json"
    assert main(f"bench --training --threads 1 -o {path}".split()) == 0
    (row,) = json.loads(path.read_text())["parts"]
    assert row["samples_per_second"] == pytest.approx(2 / row["seconds_per_step"], rel=0.01)
    assert row["gflops"] == pytest.approx(row["gflop_per_sample"] * row["samples_per_second"], rel=0.02)
    assert row["of_ceiling"] == pytest.approx(row["gflops"] / row["ceiling_gflops"], abs=0.002)
    assert sum(row["profile"].values()) == pytest.approx(1, abs=0.01)
    # what a small network of convolutions does most
    assert next(iter(row["profile"])) == "convolution"
    # forward, by diffusers' network; backward takes about twice as much; one step in four decodes a quarter once more
    with torch.device("meta"):
        vae, images = AutoencoderKL.from_config(to_dict(TINY.autoencoder)), torch.empty(1, 3, 192, 192)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae(images)
    with torch.no_grad(), FlopCounterMode(display=False) as decoder:
        vae.decode(torch.empty(1, 4, 12, 12, device="meta"))
    forward = counter.get_total_flops() + decoder.get_total_flops() / 4
    assert row["gflop_per_sample"] * 1e9 == pytest.approx(3 * forward, rel=0.03)
    said = capsys.readouterr()
    assert said.out.strip() == str(path) and "samples/s" in said.err and "share of the time" in said.err


def test_kinds_of_operators():
    seconds = {
        "aten::convolution_backward": 2.0, "aten::mkldnn_convolution": 1.0, "aten::addmm": 1.0, "aten::add_": 0.5,
        "aten::_scaled_dot_product_flash_attention_for_cpu": 1.0, "aten::_fused_adamw_": 0.5, "aten::copy_": 1.0,
        "Optimizer.step#AdamW.step": 0.25,
    }  # fmt: skip
    found = operators.shares(seconds, 10.0)
    expected = {"convolution": 0.3, "matrix product": 0.1, "element by element": 0.05, "attention": 0.1}
    expected |= {"optimiser, clipping, averages": 0.05, "copies and memory": 0.1, operators.PYTHON: 0.3}
    assert found == pytest.approx(expected)
    with pytest.raises(ValueError, match="parts of autoencoder, clip, unet"):
        training.Settings(parts=("vae",))


def test_peers(tmp_path, capsys):
    assert main(["bench", "--peer", "tensorrt", "-o", str(tmp_path / "bench.json")]) == 2
    assert "expected one of openvino, onnxruntime" in capsys.readouterr().err
    rows = [bench.row("decode at 192", name, [seconds]) for name, seconds in (("minisd", 3.0), ("openvino", 4.0))]
    report = {"rows": rows, "settings": {"libraries": ["minisd", "openvino"]}, "picture_difference": 1}
    header, line, last = bench.table(report).splitlines()
    assert header.split() == ["minisd", "openvino", "ratio"]
    assert line.split() == ["decode", "at", "192", "3", "s", "4", "s", "0.75"] and last.endswith("two pictures: 1/255")
