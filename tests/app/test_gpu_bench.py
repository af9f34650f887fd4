"""`python -m minisd.bench.gpu`, tried out on a CPU with the tiny model. Its times are of no interest here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minisd.bench import compare, gpu
from minisd.bench.gpu import Settings, main, markdown
from minisd.bench.parity import parity
from minisd.bench.process import Budget, loaded
from minisd.io.checkpoint import SHIPPED

TINY = Settings("cpu", "bfloat16", (64, 128), steps=1, batch=2, repeats=1, compiled=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_script_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert main(["--try-on-cpu", "--no-compile", "-o", str(path)]) == 0
    report = json.loads(path.read_text())
    found = {(row["what"], row["library"]) for row in report["rows"]}
    for what in ("text encoder, two prompts", "one step of the UNet with guidance, 128×128", "decode, 64×64",
                 "image, 64×64, 1 steps", "2 images together, 64×64, 1 steps"):  # fmt: skip
        assert {(what, "minisd"), (what, "diffusers")} <= found
    assert all(row["seconds"] or row["peak_gb"] for row in report["rows"])
    assert [row["within"] for row in report["parity"]] == [True] * 2
    assert "cuDNN" in " ".join(report["skipped"])  # which no CPU has
    assert capsys.readouterr().out.startswith("| | minisd | diffusers | ratio |")


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_the_table_by_hand():
    def row(what: str, library: str, seconds: float | None = None, peak: float | None = None) -> dict[str, Any]:
        return {"what": what, "library": library, "seconds": seconds, "peak_gb": peak}

    rows = [row("step", "minisd", 0.0384), row("step", "diffusers", 0.04), row("graphs", "minisd", 0.0213)]
    rows += [row("image", "minisd", 0.82), row("image", "diffusers", 1.07), row("peak", "minisd", None, 3.28)]
    parity = [{"model": "tiny", "device": "cuda", "dtype": "float16", "largest": 9, "mean": 0.25}]
    assert markdown({"rows": rows, "parity": parity, "skipped": ["compiled: 3 s left"]}).splitlines() == [
        "| | minisd | diffusers | ratio |",
        "|---|---|---|---|",
        "| step | 38.4 ms | 40 ms | 0.96 |",
        "| graphs | 21.3 ms |  |  |",
        "| image | 0.82 s | 1.07 s | 0.77 |",
        "| peak | 3.3 GB |  |  |",
        "",
        "- tiny, cuda, float16: from the CPU in float32 at most 9/255, on average 0.250/255",
        "- skipped: compiled: 3 s left",
    ]


def test_parity_compares_with_the_cpu_in_float32():
    same, *others = parity(SHIPPED, "cpu", "bfloat16")
    assert (same["largest"], same["mean"], same["within"], same["size"]) == (0, 0.0, True, 192)
    assert others[-1]["dtype"] == "bfloat16" and others[-1]["largest"] > 0


def test_pictures_that_differ_end_it(monkeypatch):
    monkeypatch.setattr(gpu, "parity", lambda *_: [{"model": "tiny", "within": False}])
    monkeypatch.setattr(gpu, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="nothing was timed.*tiny"):
        gpu.run(TINY, [SHIPPED], str)


def test_what_the_time_does_not_allow_is_named():
    budget = Budget(30)
    assert budget.allows("a step", 20) and not budget.allows("compiled", 120)
    assert len(budget.skipped) == 1 and "compiled: " in budget.skipped[0] and "at least 120" in budget.skipped[0]
    assert gpu.measure(Path("nowhere"), TINY.compare(), gpu.all_tasks(TINY), Budget(0), str) == []


def test_what_does_not_compile_is_named():
    settings, budget = TINY.compare(compiled="fastest", libraries=("minisd",)), Budget(300)
    assert gpu.measure(SHIPPED, settings, gpu.compiled_tasks(TINY), budget, str) == []
    assert "fastest" in budget.skipped[0]


def test_a_worker_ends_with_the_time():
    """A model is being loaded when the time is up."""
    settings, budget = TINY.compare(compiled=True, libraries=("minisd",)), Budget(0.5)
    with pytest.raises(RuntimeError, match="ended at 'load' with exit code -9"), loaded(SHIPPED, settings, budget):
        pytest.fail("loaded within half a second")


def test_settings_of_the_workers():
    settings = Settings().compare(compiled="reduce-overhead")
    assert (settings.sizes, settings.device, settings.dtype) == ((512, 1024), "cuda", "float16")
    assert settings.compiled == "reduce-overhead" and settings.libraries == compare.LIBRARIES
