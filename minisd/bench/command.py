"""The `minisd bench` command; the benchmarks are in the other files of this folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from minisd.features.distributed import log, show
from minisd.features.presets import PRESETS

CORES = os.cpu_count() or 1
Model = Annotated[
    str | None, typer.Option(help='A model folder, "tiny", or "full": SD 1.5 with random weights. [default: full]')
]
Output = Annotated[Path, typer.Option("--output", "-o", help="A .json file; a plot is written beside it.")]
Sizes = Annotated[list[int] | None, typer.Option(help="In pixels; may be repeated. [default: 512, with tiny 192]")]
Steps = Annotated[int, typer.Option(min=0, help="Number of sampling steps of the complete picture; 0 skips it.")]
Repeats = Annotated[int, typer.Option(min=1, help="How often each measurement is repeated.")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu. [default: the first there is]")]
DType = Annotated[
    Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="[default: float16 on cuda, else float32]")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of each process, on a CPU. [default: all cores]")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the UNet and the decoder of both libraries.")]
Alone = Annotated[bool, typer.Option("--alone", help="Measure minisd only, without diffusers.")]
Peers = Annotated[
    list[str] | None,
    typer.Option("--peer", help="Also measure openvino or onnxruntime, on an export of the model. May be repeated."),
]
Loading = Annotated[bool, typer.Option("--loading/--no-loading", help="Measure imports and loading too.")]
PresetName: Any = Annotated[
    Literal[tuple(PRESETS)] | None,
    typer.Option(help="Compare this preset with --steps without it, instead of with diffusers."),
]
Pictures = Annotated[
    int | None,
    typer.Option(min=1, help="How many, with --preset [default: 256, full: 1] or --throughput [default: 64]."),
]
Training = Annotated[bool, typer.Option("--training", help="Measure training steps of the tiny model's parts instead.")]
Throughput = Annotated[
    bool, typer.Option("--throughput", help="Draw a prompts file with one process, and with one per thread.")
]


def bench(
    model: Model = None,
    output: Output = Path("runs/bench.json"),
    size: Sizes = None,
    steps: Steps = 20,
    repeats: Repeats = 5,
    device: Device = None,
    dtype: DType = None,
    threads: Threads = CORES,
    compiled: Compile = False,
    alone: Alone = False,
    peer: Peers = None,
    loading: Loading = True,
    preset: PresetName = None,
    pictures: Pictures = None,
    train: Training = False,
    throughput: Throughput = False,
) -> None:
    """Time minisd and diffusers in turn, with the same weights: import, load, text, step, decode, picture; and memory.

    Nothing else should be running. At full size on two cores this takes about half an hour, with --steps 2 a third.

    \b
    Examples:
      minisd bench
      minisd bench --model tiny --size 192 --size 384
      minisd bench --peer openvino --dtype bfloat16 --no-loading
      minisd bench --preset fast --model tiny
      minisd bench --preset fast
      minisd bench --preset turbo --steps 20
      minisd bench --training --threads 1 --dtype bfloat16
      minisd bench --throughput
    """
    from minisd.features.validate import check_writable

    check_writable(output.parent)
    if train:
        _training(output, repeats, threads, dtype)
    elif throughput:
        _throughput(model or "tiny", output, repeats, threads, pictures or 64)
    elif preset is not None:
        _preset(preset, model or "full", output, steps, pictures, *_device_and_dtype(device, dtype), threads)
    else:
        place, kind = _device_and_dtype(device, dtype)
        sizes = tuple(size or [192 if model == "tiny" else 512])
        options = {"steps": steps, "repeats": repeats, "device": place, "dtype": kind, "threads": threads}
        _compare(model or "full", output, alone, peer or [], sizes=sizes, compiled=compiled, loading=loading, **options)


def _device_and_dtype(device: str | None, dtype: str | None) -> tuple[str, str]:
    from minisd.pipeline.memory import best_device, usable_device

    try:
        place = str(best_device() if device is None else usable_device(device))
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from error
    return place, dtype or ("float16" if place.startswith("cuda") else "float32")


def _compare(model: str, output: Path, alone: bool, peers: Sequence[str], **options: Any) -> None:
    from importlib.util import find_spec

    from minisd.bench import compare
    from minisd.bench.peers import PEERS
    from minisd.io.onnx_files import check_installed

    libraries: tuple[str, ...] = ("minisd",) if alone or find_spec("diffusers") is None else compare.LIBRARIES
    for name in peers:
        if name not in PEERS:
            raise typer.BadParameter(f"--peer {name}; expected one of {', '.join(PEERS)}")
        check_installed(PEERS[name])
    libraries += tuple(dict.fromkeys(peers))
    with _model(model) as folder:
        report = compare.run(folder, compare.Settings(libraries=libraries, **options), log=log)
    compare.write(report, output)
    log(compare.table(report))
    show(output)


def _model(name: str) -> AbstractContextManager[Path]:
    """The folder of the model to measure: the shipped one, a temporary one with random weights, or an existing one."""
    from minisd.bench.compare import random_weights
    from minisd.io.checkpoint import SHIPPED

    if name == "full":
        return random_weights()
    return nullcontext(SHIPPED if name == "tiny" else Path(name))


def _preset(
    preset: str, model: str, output: Path, steps: int, pictures: int | None, device: str, dtype: str, threads: int
) -> None:
    import torch

    from minisd.bench import compare
    from minisd.bench import preset as presets
    from minisd.io.atomic import save_atomically
    from minisd.pipeline.stable_diffusion import StableDiffusion

    torch.set_num_threads(threads)
    settings = presets.Settings(preset, pictures or (1 if model == "full" else 256), steps=steps)
    with _model(model) as folder:
        sd = StableDiffusion.from_pretrained(folder, device=device, dtype=getattr(torch, dtype))
        report, picture = presets.run(sd, settings, log=log)
    machine = compare.machine(compare.Settings(device=device, libraries=("minisd",)))
    report["machine"] = machine | {"dtype": dtype, "threads": threads}
    compare.write_json(report, output)
    save_atomically(lambda path: picture.save(path, format="PNG"), output.with_suffix(".png"))
    log(presets.table(report))
    show(output)


def _training(output: Path, repeats: int, threads: int, dtype: str | None) -> None:
    from minisd.bench import compare
    from minisd.bench import training as trainings

    if dtype == "float16":
        raise typer.BadParameter("--training runs in float32, or with --dtype bfloat16 in mixed precision")
    settings = trainings.Settings(steps=4 * repeats, threads=threads, bfloat16=dtype == "bfloat16")
    report = trainings.run(settings, log=log)
    compare.write_json(report, output)
    log(trainings.table(report))
    show(output)


def _throughput(model: str, output: Path, repeats: int, threads: int, pictures: int) -> None:
    from minisd.bench import compare
    from minisd.bench import throughput as throughputs

    with _model(model) as folder:
        report = throughputs.run(folder, throughputs.Settings(pictures, repeats, threads), log=log)
    compare.write_json(report, output)
    log(throughputs.table(report))
    show(output)
