"""`minisd bench` on the tiny model. Its times are of no interest here: that it measures the same thing twice is."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from minisd import bench
from minisd.checkpoint import SHIPPED
from minisd.cli import main
from minisd.config import SD15
from tests.parity import SD1_AUTOENCODER, SD1_UNET


@pytest.mark.timeout(600)
def test_the_command_measures_both_libraries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    assert main(f"bench --model tiny --steps 2 --repeats 1 --threads 1 --device cpu -o {path}".split()) == 0
    report = json.loads(path.read_text())
    assert report["picture_difference"] <= 1  # both drew the same picture
    found = {(row["what"], row["library"]): row for row in report["rows"]}
    for what in ("load, first step included", "text encoder, two prompts", "one guided UNet step at 128",
                 "decode at 128", "picture 128×128, 2 steps"):  # fmt: skip
        assert found[what, "minisd"]["seconds"] > 0 and found[what, "diffusers"]["seconds"] > 0
    for library in ("minisd", "diffusers"):
        assert 0.1 < found["peak memory, step and decode at 128", library]["peak_gb"] < 5
    # importing diffusers' pipeline takes longer than minisd, which imports neither of the two
    assert found["import minisd", "minisd"]["seconds"] < found["import diffusers", "diffusers"]["seconds"]
    said = capsys.readouterr()
    assert said.out.strip() == str(path) and "ratio" in said.err and "GFLOP/s" in said.err
    assert Image.open(path.with_suffix(".png")).width > 300


def test_flops_are_those_of_diffusers_networks() -> None:
    """At full size, on the meta device; and close to the published 1,607 and 2,515 GFLOP."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(SD1_UNET))
        vae = AutoencoderKL.from_config(dict(SD1_AUTOENCODER))
        latents, context = torch.empty(2, 4, 64, 64), torch.empty(2, 77, 768)
    with torch.no_grad(), FlopCounterMode(display=False) as step:
        unet(latents, torch.tensor(481.0, device="meta"), context)
    with torch.no_grad(), FlopCounterMode(display=False) as decode:
        vae.decode(latents[:1])
    counts = bench.flops(SD15, 512)
    assert counts == {"step": step.get_total_flops(), "decode": decode.get_total_flops()}
    assert counts["step"] == pytest.approx(1607e9, rel=0.01) and counts["decode"] == pytest.approx(2515e9, rel=0.01)


def test_rows_hold_medians_and_the_middle_half() -> None:
    times = [5.0, 1.0, 4.0, 2.0, 3.0]
    row = bench.row("x", "minisd", times, flop=6_000_000_000)
    assert (row["low"], row["seconds"], row["high"]) == (2.0, statistics.median(times), 4.0)
    assert row["gflops"] == 2.0


def test_a_process_that_fails_says_why() -> None:
    process = bench.Process("minisd", bench.Settings(threads=1))
    with pytest.raises(RuntimeError, match="minisd failed at 'load'.*no model at"):
        process.ask("load", folder="nowhere", device="cpu", dtype="float32", threads=1, compiled=False)
    process.close()
    process = bench.Process("neither", bench.Settings(threads=1))
    with pytest.raises(RuntimeError, match="the process of neither ended at 'text'.*KeyError"):
        process.ask("text")
    process.close()


@pytest.mark.parametrize("values", [{"sizes": (100,)}, {"repeats": 0}, {"steps": -1}, {"sizes": (0,)}])
def test_settings_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        bench.Settings(**values)  # type: ignore[arg-type]


def test_the_shipped_report_can_be_shown() -> None:
    report = json.loads((SHIPPED.parent / "bench" / "cpu.json").read_text())
    assert report["settings"]["sizes"][0] == 512 and "ratio" in bench.table(report)
