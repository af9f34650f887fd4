"""`python -m minisd.bench.gpu`: the table "Against diffusers, on a GPU" of docs/performance.md, in eight minutes.

First come pictures of the GPU beside those of the CPU. Then minisd and diffusers take turns as in `compare.py`: as they
are, and compiled. What does not fit into the time is skipped, and named.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from minisd.bench import compare
from minisd.bench.parity import parity
from minisd.bench.process import Budget, Process, loaded

Log = Callable[[str], None]
Row = dict[str, Any]

GRAPHS = "reduce-overhead"  # torch.compile's mode with CUDA graphs
# Seconds that must be left to begin with something.
ENOUGH = {"row": 5.0, "picture": 20.0, "not compiled": 30.0, "compiled": 120.0, "CUDA graphs": 90.0}
ATTENTION = {
    "FLASH_ATTENTION": "FlashAttention", "EFFICIENT_ATTENTION": "memory-efficient attention",
    "CUDNN_ATTENTION": "cuDNN's attention", "MATH": "attention as plain products",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        device: the GPU, or "cpu" to try the script out.
        dtype: the name of the weights' dtype.
        sizes: sides of pictures in pixels; the first is that of complete pictures and of what is compiled.
        steps: sampling steps of a complete picture.
        batch: pictures drawn together.
        repeats: how often each measurement is repeated.
        minutes: the time for everything.
        compiled: whether to measure compiled models, too.
    """

    device: str = "cuda"
    dtype: str = "float16"
    sizes: tuple[int, ...] = (512, 1024)
    steps: int = 20
    batch: int = 4
    repeats: int = 5
    minutes: float = 8.0
    compiled: bool = True

    def compare(self, **changes: Any) -> compare.Settings:
        """The settings of the worker processes."""
        libraries = compare.LIBRARIES if find_spec("diffusers") is not None else ("minisd",)
        own = compare.Settings(
            self.sizes, self.steps, self.repeats, self.device, self.dtype, os.cpu_count() or 1, libraries=libraries
        )
        return replace(own, **changes)


@dataclass(frozen=True)
class Task:
    """A request `do` to the worker processes, with its row's name and the key of the time it needs in `ENOUGH`."""

    what: str
    do: str
    arguments: dict[str, Any]
    kind: str = "row"
    optional: bool = False


def run(settings: Settings, folders: Sequence[Path], log: Log = print) -> dict[str, Any]:
    """Compare pictures for all model folders, then measure the last; returns the report.

    Raises RuntimeError if the pictures differ, or if a process fails without compiling.
    """
    budget, pictures = Budget(60 * settings.minutes), list[Row]()
    for folder in folders:
        log(f"parity: {folder.name}")
        pictures += parity(folder, settings.device, settings.dtype)
    if wrong := [each for each in pictures if not each["within"]]:
        raise RuntimeError(f"pictures of {settings.device} differ from the CPU's, so nothing was timed: {wrong}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the worker processes
    folder = folders[-1]
    rows = measure(folder, settings.compare(), all_tasks(settings), budget, log)
    if settings.compiled:
        tasks = compiled_tasks(settings)
        rows += measure(folder, settings.compare(compiled=True), tasks, budget, log)
        graphs = settings.compare(compiled=GRAPHS, libraries=("minisd",))
        rows += measure(folder, graphs, tasks, budget, log)
    machine = compare.machine(settings.compare())
    return {
        "machine": machine, "settings": asdict(settings), "parity": pictures, "rows": rows, "skipped": budget.skipped,
    }  # fmt: skip


def all_tasks(settings: Settings) -> list[Task]:
    """Text, steps and decoding at all sizes, pictures alone and together, and a step with each kernel for attention."""
    first, tasks = settings.sizes[0], [Task("text encoder, two prompts", "text", {})]
    for name, do in (("one step of the UNet with guidance", "step"), ("decode", "decode")):
        tasks += [Task(f"{name}, {size}×{size}", do, {"size": size}) for size in settings.sizes]
    for count in dict.fromkeys((1, settings.batch)):
        name = "image" if count == 1 else f"{count} images together"
        options = {"size": first, "steps": settings.steps, "count": count}
        tasks.append(Task(f"{name}, {first}×{first}, {settings.steps} steps", "picture", options, "picture"))
    for kernel, name in ATTENTION.items():
        more: dict[str, Any] = {"size": first, "attention": kernel}
        tasks.append(Task(f"the step, {first}×{first}, {name}", "step", more, optional=True))
    return tasks


def compiled_tasks(settings: Settings) -> list[Task]:
    """A step, decoding and a picture, at the first size."""
    size = {"size": settings.sizes[0]}
    arguments = {"step": size, "decode": size, "picture": size | {"steps": settings.steps}}
    return [Task(f"{do}, {settings.sizes[0]}×{settings.sizes[0]}", do, each) for do, each in arguments.items()]


def measure(folder: Path, settings: compare.Settings, tasks: Sequence[Task], budget: Budget, log: Log) -> list[Row]:
    """Time the tasks, after peak memory if nothing is compiled. What fails to compile or takes too long is skipped.

    Raises RuntimeError if a process fails otherwise.
    """
    rows, first = list[Row](), settings.sizes[0]
    phase = "CUDA graphs" if settings.compiled == GRAPHS else "compiled" if settings.compiled else "not compiled"
    if not budget.allows(phase, ENOUGH[phase]):
        return rows
    try:
        with loaded(folder, settings, budget) as processes, tempfile.TemporaryDirectory() as temporary:
            for process in () if settings.compiled else processes:  # at first, since peak memory never decreases
                what = f"peak memory, one step and one decode at {first}×{first}"
                rows.append(compare.row(what, process.library, [], peak=process.peak(first)))
            for task in tasks:
                what = f"{task.what}, {phase}" if settings.compiled else task.what
                if budget.allows(what, ENOUGH[task.kind]):
                    log(what)
                    rows += _time(task, what, processes, settings.repeats, f"{temporary}/picture.png", budget)
    except RuntimeError as error:
        if not settings.compiled and budget.left > 0:
            raise
        budget.skipped.append(f"{phase}: {error}")
    return rows


def _time(task: Task, what: str, processes: Sequence[Process], repeats: int, path: str, budget: Budget) -> list[Row]:
    """Time one task; one that is optional is measured for minisd only, and may fail."""
    arguments = task.arguments | ({"path": path} if task.do == "picture" else {})
    among = processes[:1] if task.optional else processes
    try:
        return compare.in_turn(among, repeats, what, task.do, **arguments)
    except RuntimeError as error:
        if not task.optional or budget.left <= 0:
            raise
        budget.skipped.append(f"{what}: {error}")
        return []


def markdown(report: dict[str, Any]) -> str:
    """Format the report as the table of docs/performance.md, followed by the parity and by what was skipped."""
    by_what: dict[str, dict[str, Row]] = {}
    for row in report["rows"]:
        by_what.setdefault(row["what"], {})[row["library"]] = row
    lines = ["| | minisd | diffusers | ratio |", "|---|---|---|---|"]
    for what, rows in by_what.items():
        values = [_value(rows[name]) if name in rows else None for name in compare.LIBRARIES]
        ratio = "" if None in values else f"{values[0][0] / values[1][0]:.2f}"  # type: ignore[index]
        cells = ["" if value is None else value[1] for value in values]
        lines.append(f"| {what} | {cells[0]} | {cells[1]} | {ratio} |")
    lines.append("")
    for row in report["parity"]:
        place = f"{row['model']}, {row['device']}, {row['dtype']}"
        lines.append(
            f"- {place}: from the CPU in float32 at most {row['largest']}/255, on average {row['mean']:.3f}/255"
        )
    return "\n".join([*lines, *(f"- skipped: {each}" for each in report["skipped"])])


def _value(row: Row) -> tuple[float, str]:
    """The number of a row, and its text with a unit."""
    if row["seconds"] is None:
        return row["peak_gb"], f"{row['peak_gb']:.1f} GB"
    seconds = row["seconds"]
    return seconds, f"{seconds:.2f} s" if seconds >= 0.5 else f"{1000 * seconds:.3g} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    from minisd.io.checkpoint import SHIPPED

    parser = argparse.ArgumentParser(prog="python -m minisd.bench.gpu", description=__doc__)
    parser.add_argument("--output", "-o", type=Path, default=Path("runs/gpu.json"), help="a .json file")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything, 8 by default")
    parser.add_argument("--no-compile", action="store_true", help="measure the libraries as they are only")
    parser.add_argument("--try-on-cpu", action="store_true", help=argparse.SUPPRESS)  # the tiny model, for tests
    options = parser.parse_args(arguments)
    settings = Settings(minutes=options.minutes, compiled=not options.no_compile)
    with ExitStack() as stack:
        folders = [SHIPPED]
        if options.try_on_cpu:
            settings = replace(settings, device="cpu", dtype="bfloat16", sizes=(64, 128), steps=1, batch=2, repeats=1)
        elif not torch.cuda.is_available():
            print("error: torch finds no CUDA device here; `minisd bench` measures on a CPU", file=sys.stderr)
            return 2
        else:
            folders.append(stack.enter_context(compare.random_weights()))
        report = run(settings, folders, lambda text: print(text, file=sys.stderr))
    compare.write_json(report, options.output)
    print(markdown(report))
    print(options.output, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
