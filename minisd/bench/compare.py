"""`minisd bench`: minisd and diffusers on this machine, with the same weights.

Times are comparable only within one run. So each library loads the same folder into a process of its own, and the
processes take turns, A B A B …; the table has the medians, the interquartile ranges, and the ratio of the medians.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minisd.bench.peers import exported
from minisd.bench.process import Process
from minisd.config import SD15, ModelConfig
from minisd.features.distributed import child_environment
from minisd.io.atomic import save_atomically

CEILING_SIDE = 4096
LIBRARIES = ("minisd", "diffusers")
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        sizes: sides of pictures in pixels; the complete picture has the first.
        steps: sampling steps of the complete picture; 0 skips it.
        repeats: how often each measurement is repeated.
        device: "cpu" or "cuda".
        dtype: the name of the weights' dtype.
        threads: of each process.
        compiled: compile the UNet and the decoder, or the mode of `torch.compile` to do it in.
        loading: also measure imports and loading.
        libraries: "minisd" and, if they are installed, "diffusers" and the names of `peers.PEERS`.
    """

    sizes: tuple[int, ...] = (512,)
    steps: int = 20
    repeats: int = 5
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2
    compiled: bool | str = False
    loading: bool = True
    libraries: tuple[str, ...] = LIBRARIES

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.steps < 0:
            raise ValueError(f"repeats={self.repeats}, steps={self.steps}; expected repeats ≥ 1 and steps ≥ 0")
        for size in self.sizes:
            if not 64 <= size <= 8192 or size % 64:
                raise ValueError(f"size={size}; expected a multiple of 64 from 64 to 8192, such as 512")


@contextmanager
def random_weights(config: ModelConfig = SD15) -> Iterator[Path]:
    """Create a temporary model folder in diffusers' layout, with random weights."""
    from minisd.autoencoder import Autoencoder
    from minisd.pipeline.stable_diffusion import StableDiffusion
    from minisd.text_encoder import TextEncoder
    from minisd.tokenizer import Tokenizer
    from minisd.unet import UNet

    with tempfile.TemporaryDirectory(prefix="minisd-bench-") as folder:
        torch.manual_seed(0)
        parts: list[nn.Module] = [TextEncoder(config.text_encoder), UNet(config.unet), Autoencoder(config.autoencoder)]
        StableDiffusion(config, Tokenizer.from_pretrained(), *parts).save_pretrained(folder)  # type: ignore[arg-type]
        del parts
        yield Path(folder)


def flops(config: ModelConfig, size: int) -> dict[str, int]:
    """Count the floating-point operations of a step with guidance and of decoding, at a size in pixels.

    Nothing is computed: the networks run on the meta device.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from minisd.autoencoder import Autoencoder
    from minisd.unet import UNet

    side = size // config.autoencoder.downscale
    with torch.device("meta"):
        unet, autoencoder = UNet(config.unet), Autoencoder(config.autoencoder)
        latents, t = torch.empty(2, 4, side, side), torch.tensor(481.0)
        context = torch.empty(2, 77, config.text_encoder.hidden_size)
    counts = {}
    calls: dict[str, Callable[[], object]] = {
        "step": lambda: unet(latents, t, context),
        "decode": lambda: autoencoder.decode(latents[:1]),
    }
    for name, call in calls.items():
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            call()
        counts[name] = counter.get_total_flops()
    return counts


def run(source: str | Path, settings: Settings, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure a model folder, and return the report: machine, settings, rows (see `row`), profile, picture difference.

    Raises RuntimeError, with the reason, if a process fails.
    """
    from minisd.io.checkpoint import open_checkpoint

    config = open_checkpoint(source).config
    rows = []
    if settings.loading:
        for name in ["torch", *(name for name in settings.libraries if name in LIBRARIES)]:
            log(f"import {name}")
            rows.append(row(f"import {name}", name, [_import_seconds(name) for _ in range(settings.repeats)]))
        rows += _cold_loads(source, settings, log)
    with ExitStack() as stack:
        graphs = stack.enter_context(exported(source, settings.libraries, log))
        processes = []
        loads: dict[str, list[float]] = {name: [] for name in settings.libraries}
        # the first pair fills the page cache and is not counted
        for last in (False, False, True) if settings.loading else (True,):
            for name in settings.libraries:
                log(f"load: {name}")
                process = Process(name, settings)
                if last:
                    stack.callback(process.close)
                    processes.append(process)
                loads[name].append(process.load(source, settings, graphs.get(name)))
                if not last:
                    process.close()
        if settings.loading:
            known = {name: times for name, times in loads.items() if name in LIBRARIES}
            rows += [row("load, first step included", name, times[1:]) for name, times in known.items()]
        rows += _measure(processes, config, settings, log)
        report: dict[str, Any] = {"machine": machine(settings), "settings": asdict(settings), "rows": rows}
        if not settings.compiled:  # a compiled step has few operators, without names
            report["profile"] = _profiles(processes, settings, log)
        if settings.steps:
            report["picture_difference"] = _pictures(processes, settings, rows, log)
    return report


def _cold_loads(source: str | Path, settings: Settings, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Time loading with the files evicted from the page cache, on Linux only.

    Files that a process has mapped are not evicted, so no other worker may be running yet.
    """
    if not hasattr(os, "posix_fadvise"):
        return []
    rows = []
    for name in (name for name in settings.libraries if name in LIBRARIES):
        log(f"load, cold: {name}")
        for path in Path(source).rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        process = Process(name, settings)
        rows.append(row("load, files not in memory", name, [process.load(source, settings)]))
        process.close()
    return rows


def _measure(
    processes: Sequence[Process], config: ModelConfig, settings: Settings, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    repeats, first = settings.repeats, settings.sizes[0]
    for process in processes:  # before anything else: peak memory never decreases
        if process.library not in LIBRARIES:  # minisd's own weights are in memory too
            continue
        log(f"peak memory: {process.library}")
        rows.append(row(f"peak memory, step and decode at {first}", process.library, [], peak=process.peak(first)))
    ceiling = [processes[0].ask("ceiling", side=CEILING_SIDE)["seconds"] for _ in range(settings.repeats + 1)][1:]
    rows.append(row(f"matrix product {CEILING_SIDE}³", "torch", ceiling, 2 * CEILING_SIDE**3))
    log("text encoder, steps and decoding")
    rows += in_turn(processes, repeats, "text encoder, two prompts", "text")
    for size in settings.sizes:
        cost = flops(config, size)
        rows += in_turn(processes, repeats, f"one guided UNet step at {size}", "step", cost["step"], size=size)
        rows += in_turn(processes, repeats, f"decode at {size}", "decode", cost["decode"], size=size)
    return rows


def in_turn(
    processes: Sequence[Process], repeats: int, what: str, do: str, flop: int = 0, **arguments: Any
) -> list[dict[str, Any]]:
    """Time one request to each process, in turn, after a first turn that warms up. Returns a row for each."""
    turns = [[process.ask(do, **arguments)["seconds"] for process in processes] for _ in range(repeats + 1)]
    times = zip(*turns[1:], strict=True)
    return [row(what, process.library, each, flop) for process, each in zip(processes, times, strict=True)]


def _profiles(processes: Sequence[Process], settings: Settings, log: Callable[[str], None]) -> dict[str, Any]:
    """Profile a step and a decoding: for each library, the share of the time per kind of operator."""
    from minisd.bench.operators import shares

    profiles: dict[str, Any] = {}
    for what in ("step", "decode"):
        for process in processes:
            log(f"profile of one {what}: {process.library}")
            answer = process.ask("profile", what=what, size=settings.sizes[0])
            profiles.setdefault(what, {})[process.library] = shares(answer["operators"], answer["seconds"])
    return profiles


def _pictures(
    processes: Sequence[Process], settings: Settings, rows: list[dict[str, Any]], log: Callable[[str], None]
) -> int | None:
    """Time complete pictures; return the largest difference of the others' to the first library's, in 1/255."""
    import numpy as np
    from PIL import Image

    size, pixels = settings.sizes[0], []
    what = f"picture {size}×{size}, {settings.steps} steps"
    log(what)
    # on a CPU one picture takes minutes, and its steps are warm already; on a GPU the first one is discarded
    turns = settings.repeats + 1 if settings.device.startswith("cuda") else 1
    with tempfile.TemporaryDirectory() as folder:
        times: dict[str, list[float]] = {process.library: [] for process in processes}
        for _ in range(turns):
            for process in processes:
                path = Path(folder) / f"{process.library}.png"
                answer = process.ask("picture", size=size, steps=settings.steps, path=str(path))
                times[process.library].append(answer["seconds"])
        for process in processes:
            rows.append(row(what, process.library, times[process.library][-settings.repeats :]))
            pixels.append(np.asarray(Image.open(Path(folder) / f"{process.library}.png"), dtype=int))
    return max((int(np.abs(pixels[0] - other).max()) for other in pixels[1:]), default=None)


def row(what: str, library: str, times: Sequence[float], flop: int = 0, peak: int | None = None) -> dict[str, Any]:
    """Make one row of the report: median and quartiles of the times, GFLOP/s, peak memory; None is not measured.

    Args:
        what: what was measured.
        library: "minisd", "diffusers" or "torch".
        times: in seconds.
        flop: floating-point operations of one repetition.
        peak: in bytes.
    """
    low = median = high = None
    rate = 0.0
    if times:
        quarters = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
        low, median, high = (_rounded(value, 4) for value in quarters)
        rate = flop / quarters[1] / 1e9 if quarters[1] else 0.0
    return {
        "what": what,
        "library": library,
        "seconds": median,
        "low": low,
        "high": high,
        "gflops": _rounded(rate, 1) if rate else None,
        "peak_gb": None if peak is None else _rounded(peak / 1e9, 3),
    }


def _rounded(value: float, decimals: int) -> float:
    """Round to so many decimals, or to four significant digits if that is more."""
    return round(value, max(decimals, 3 - math.floor(math.log10(value)))) if value else value


def _import_seconds(name: str) -> float:
    """Time `import name` in a new process, without the start of the interpreter, in seconds."""
    statement = "from diffusers import StableDiffusionPipeline" if name == "diffusers" else f"import {name}"
    if name == "minisd":
        statement += "; minisd.StableDiffusion"
    code = f"import time; s = time.perf_counter(); {statement}; print(time.perf_counter() - s)"
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=True)
    return float(process.stdout.split()[-1])


def machine(settings: Settings) -> dict[str, Any]:
    """Describe the machine and the versions that the measurements were made with."""
    if settings.device.startswith("cuda"):
        chip = torch.cuda.get_device_name()
    else:
        chip = platform.processor() or platform.machine()
        info = Path("/proc/cpuinfo")
        if info.exists():
            lines = info.read_text(encoding="utf-8").splitlines()
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
            chip = names[0] if names else chip
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if settings.device == "cpu":
        from minisd.features.fast import onednn_is_faster

        versions["products"] = "oneDNN" if onednn_is_faster() else "torch's default"
    if "diffusers" in settings.libraries:
        from importlib.metadata import version

        versions["diffusers"] = version("diffusers")
    return {"chip": chip, "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d"), **versions}


def table(report: dict[str, Any]) -> str:
    """Format the report as text: a line for each measurement, and a column for each library.

    After ± stands half of the interquartile range; percentages are relative to the speed of the matrix product. `ratio`
    is minisd's figure divided by that of the library before it.
    """
    by_what: dict[str, dict[str, dict[str, Any]]] = {}
    ceiling = next((line["gflops"] for line in report["rows"] if line["what"].startswith("matrix product")), None)
    for line in report["rows"]:
        by_what.setdefault(_what(line), {})[line["library"]] = line
    others = [name for name in report["settings"]["libraries"] if name != "minisd"]
    lines = [f"{'':<36}  {'minisd':>34}" + "".join(f"  {name:>34}{'ratio':>8}" for name in others)]
    for what, rows in by_what.items():
        own = rows.get("minisd") or rows.get("torch")
        text = f"{what:<36}  {_cell(own, ceiling):>34}"
        for name in others:
            text += f"  {_cell(rows.get(name), ceiling):>34}{_ratio(rows.get('minisd'), rows.get(name)):>8}"
        lines.append(text)
    if report.get("picture_difference") is not None:
        pictures = "the two pictures" if len(others) < 2 else "the pictures"
        lines.append(f"largest difference of {pictures}: {report['picture_difference']}/255")
    for what, profiles in report.get("profile", {}).items():
        lines += ["", f"where the time of one {what} goes"]
        for kind in dict.fromkeys(kind for profile in profiles.values() for kind in profile):
            cells = [f"{profiles[name].get(kind, 0):.1%}" if name in profiles else "" for name in ("minisd", *others)]
            lines.append(f"{kind:<36}  {cells[0]:>34}" + "".join(f"  {cell:>34}" for cell in cells[1:]))
    return "\n".join(lines)


def _ratio(own: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    if own is None or other is None:
        return ""
    key = "peak_gb" if own["seconds"] is None else "seconds"
    return f"{own[key] / other[key]:.2f}"


def _what(line: dict[str, Any]) -> str:
    """The name of a row, the same for both libraries."""
    return "import" if line["what"] == f"import {line['library']}" != "import torch" else str(line["what"])


def _cell(line: dict[str, Any] | None, ceiling: float | None) -> str:
    if line is None:
        return ""
    if line["seconds"] is None:
        return f"{line['peak_gb']:.2f} GB"
    speed = f", {line['gflops']:.0f} GFLOP/s" if line["gflops"] else ""
    if speed and ceiling and line["gflops"] != ceiling:
        speed += f" ({line['gflops'] / ceiling:.0%})"
    spread = f" ±{(line['high'] - line['low']) / 2:.2g}" if line["high"] != line["low"] else ""
    return f"{line['seconds']:.3g}{spread} s{speed}"


def draw(report: dict[str, Any], path: Path) -> None:
    """Plot the times as bars, one group for each that was measured for all libraries."""
    from matplotlib.figure import Figure

    libraries = report["settings"]["libraries"]
    times: dict[str, dict[str, float]] = {}
    for line in report["rows"]:
        if line["seconds"] and line["library"] in libraries:
            times.setdefault(line["library"], {})[_what(line)] = line["seconds"]
    shared = [what for what in times["minisd"] if all(what in seconds for seconds in times.values())]
    figure = Figure(figsize=(7, 0.55 * len(shared) + 1.2), layout="constrained")
    axes, height = figure.add_subplot(), 0.8 / len(times)
    for index, ((library, seconds), colour) in enumerate(zip(times.items(), COLOURS, strict=False)):
        places = [place + height * (index - (len(times) - 1) / 2) for place in range(len(shared))]
        axes.barh(places, [seconds[what] for what in shared], 0.9 * height, color=colour, label=library)
    axes.set_yticks(range(len(shared)), shared)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="seconds", title=report["machine"]["chip"])
    axes.legend()
    save_atomically(lambda target: figure.savefig(target, format="png", dpi=100), path)


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON, atomically."""
    save_atomically(lambda target: target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"), path)


def write(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON and, if matplotlib is installed, its plot beside it; both atomically."""
    write_json(report, path)
    if find_spec("matplotlib") is not None:
        draw(report, path.with_suffix(".png"))
