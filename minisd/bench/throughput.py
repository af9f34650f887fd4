"""`minisd bench --throughput`: a prompts file drawn by one process with all threads, or by one process per thread."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minisd.bench.compare import Settings as Machine
from minisd.bench.compare import machine
from minisd.features.distributed import child_environment


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        pictures: how many pictures are drawn in each way.
        repeats: how often, with the ways taking turns.
        threads: how many threads all processes have together.
    """

    pictures: int = 64
    repeats: int = 3
    threads: int = 2

    def __post_init__(self) -> None:
        if self.pictures < self.threads or self.repeats < 1 or self.threads < 2:
            raise ValueError(f"{self}; expected at least two threads, a picture per thread, and repeats ≥ 1")


def run(model: Path, settings: Settings, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Time complete commands, including their startup, and return the report. Raises RuntimeError if one fails."""
    from minisd.training.unet import PROMPTS

    single = [sys.executable, "-m", "minisd"]
    distributed = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(settings.threads), "-m", "minisd"),
    ]
    ways = {
        f"one process, {settings.threads} threads": (single, settings.threads),
        f"{settings.threads} processes, 1 thread each": (distributed, 1),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="minisd-bench-") as name:
        prompts = Path(name) / "prompts.txt"
        lines = [f"{PROMPTS[i % len(PROMPTS)]}\n" for i in range(settings.pictures)]
        prompts.write_text("".join(lines), encoding="utf-8")
        for turn in range(settings.repeats + 1):
            for way, (command, threads) in ways.items():
                log(f"{settings.pictures} pictures: {way}")
                seconds = _time(command, threads, model, prompts, Path(name) / f"{turn} {threads}")
                times[way] += [seconds] if turn else []  # the first turn warms up
    rows = [{"way": way, "seconds": [round(value, 2) for value in values]} for way, values in times.items()]
    first, second = (statistics.median(values) for values in times.values())
    report = {"settings": asdict(settings), "rows": rows, "throughput_ratio": round(first / second, 3)}
    return {"machine": machine(Machine(libraries=("minisd",)))} | report


def _time(command: list[str], threads: int, model: Path, prompts: Path, output: Path) -> float:
    environment = child_environment(OMP_NUM_THREADS=threads)
    arguments = ["generate", "--model", str(model), "--prompts", str(prompts), "--output", str(output), "--seed", "0"]
    started = time.perf_counter()
    process = subprocess.run([*command, *arguments, "--device", "cpu"], env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if process.returncode:
        error = process.stderr.strip()[-500:]
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}: {error}")
    return seconds


def table(report: dict[str, Any]) -> str:
    """Format the report as text."""
    pictures = report["settings"]["pictures"]
    lines = [f"{f'{pictures} pictures':<32}{'median':>10}{'from':>10}{'to':>10}{'pictures/s':>12}"]
    for row in report["rows"]:
        values = row["seconds"]
        median = statistics.median(values)
        spread = f"{median:>8.1f} s{min(values):>8.1f} s{max(values):>8.1f} s"
        lines.append(f"{row['way']:<32}{spread}{pictures / median:>12.2f}")
    lines.append(f"throughput of the second over the first: {report['throughput_ratio']}")
    return "\n".join(lines)
