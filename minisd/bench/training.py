"""`minisd bench --training`: how fast the parts of the tiny model train on this machine, and where the time goes.

Each part runs steps of its recipe (minisd/assets/tiny/README.md) in this process, on freshly rendered scenes. FLOPs are
those torch counts, forward and backward. The ceiling is the speed of a large matrix product, timed in the same run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from minisd.bench.compare import Settings as Machine
from minisd.bench.compare import machine
from minisd.bench.operators import shares
from minisd.bench.worker import operator_seconds
from minisd.config import TINY
from minisd.io.checkpoint import SHIPPED
from minisd.io.diffusers_folder import load_autoencoder, load_text_encoder
from minisd.training.autoencoder import AutoencoderTask
from minisd.training.clip import CLIPTask
from minisd.training.data import Scenes, render_scenes
from minisd.training.layout_loss import layouts
from minisd.training.loop import Options, Task, Trainer
from minisd.training.scenes import vocabulary
from minisd.training.unet import UNetTask

CEILING_SIDE = 2048

# torch's counter knows the fused attention of GPUs only
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        steps: of each part, after four to warm up; a multiple of 4, since every fourth of the autoencoder does more.
        scenes: how many scenes are rendered.
        threads: of torch.
        bfloat16: train in mixed precision.
        parts: what is trained.
    """

    steps: int = 8
    scenes: int = 128
    threads: int = 1
    bfloat16: bool = False
    parts: tuple[str, ...] = ("autoencoder", "clip", "unet")

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in RECIPES]
        if unknown or self.steps < 1 or self.scenes < 1:
            raise ValueError(f"{self}; expected steps and scenes of 1 or more, and parts of {', '.join(RECIPES)}")


@dataclass(frozen=True)
class Recipe:
    """How a shipped part was trained: its task, its global batch, and how many samples of it a step uses."""

    batch: int
    read: int
    task: Callable[[Path], Task]


def _autoencoder(folder: Path) -> Task:
    return AutoencoderTask(Scenes(folder), TINY.autoencoder, whole_from=0)


def _clip(folder: Path) -> Task:
    return CLIPTask(Scenes(folder), vocabulary(), TINY.text_encoder)


def _unet(folder: Path) -> Task:
    data, side = Scenes(folder), TINY.unet.sample_size
    latents = torch.randn(len(data), 4, side, side, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents}, folder / "latents.safetensors")
    autoencoder, text_encoder = load_autoencoder(SHIPPED / "vae"), load_text_encoder(SHIPPED / "text_encoder")
    layout = layouts(data.descriptions)
    return UNetTask(folder / "latents.safetensors", data.captions, autoencoder, text_encoder, TINY, layout=layout)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        # full pictures: a quarter of the batch
        "autoencoder": Recipe(16, 4, _autoencoder),
        "clip": Recipe(64, 64, _clip),
        "unet": Recipe(32, 32, _unet),
    }
)


def run(settings: Settings | None = None, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure, and return the report: the machine, and for each part its speed, the ceiling and a profile."""
    settings = settings or Settings()
    torch.set_num_threads(settings.threads)
    rows = []
    with tempfile.TemporaryDirectory(prefix="minisd-bench-") as name:
        folder = Path(name)
        log(f"render {settings.scenes} scenes")
        render_scenes(folder, settings.scenes)
        for part in settings.parts:
            log(f"{part}: {settings.steps} steps")
            ceiling = [_product(settings.bfloat16) for _ in range(3)]
            row = measure(part, folder, settings)
            peak = 2 * CEILING_SIDE**3 / min(*ceiling, *(_product(settings.bfloat16) for _ in range(3))) / 1e9
            of_ceiling = round(row["gflops"] / peak, 3)
            rows.append(row | {"ceiling_gflops": round(peak, 1), "of_ceiling": of_ceiling})
    return {"machine": machine(Machine(libraries=("minisd",))), "settings": asdict(settings), "parts": rows}


def measure(part: str, folder: Path, settings: Settings) -> dict[str, Any]:
    """Measure one part on the scenes in `folder`: samples per second, FLOP per sample, FLOP/s, and a profile."""
    recipe = RECIPES[part]
    trainer = Trainer(recipe.task(folder), Options(folder, 1000, batch=recipe.batch, bfloat16=settings.bfloat16))
    trainer.task.model.train()
    # four steps, since every fourth of the autoencoder decodes once more; they also warm up
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        for _ in range(4):
            trainer.advance(0.5)
    flop = counter.get_total_flops() / 4
    started = time.perf_counter()
    for _ in range(settings.steps):
        trainer.advance(0.5)
    seconds = (time.perf_counter() - started) / settings.steps

    def steps() -> None:
        for _ in range(settings.steps):
            trainer.advance(0.5)

    measured = operator_seconds(steps)
    return {
        "part": part,
        "batch": recipe.batch,
        "samples_per_step": recipe.read,
        "seconds_per_step": round(seconds, 4),
        "samples_per_second": round(recipe.read / seconds, 4),
        "gflop_per_sample": round(flop / recipe.read / 1e9, 3),
        "gflops": round(flop / seconds / 1e9, 3),
        "profile": shares(measured["operators"], measured["seconds"]),
    }


def table(report: dict[str, Any]) -> str:
    """Format the report as text: a line for each part, then where the time goes."""
    lines = [f"{'':<14}{'samples/s':>12}{'s/step':>10}{'GFLOP/sample':>14}{'GFLOP/s':>10}{'ceiling':>10}{'share':>8}"]
    for row in report["parts"]:
        lines.append(
            f"{row['part']:<14}{row['samples_per_second']:>12}{row['seconds_per_step']:>10}"
            f"{row['gflop_per_sample']:>14}{row['gflops']:>10}{row['ceiling_gflops']:>10}{row['of_ceiling']:>8.0%}"
        )
    names = dict.fromkeys(name for row in report["parts"] for name in row["profile"])
    lines += ["", f"{'share of the time':<28}" + "".join(f"{row['part']:>14}" for row in report["parts"])]
    for name in names:
        lines.append(f"{name:<28}" + "".join(f"{row['profile'].get(name, 0):>14.1%}" for row in report["parts"]))
    return "\n".join(lines)


def _product(bfloat16: bool) -> float:
    """Time the product of two square matrices, in seconds."""
    a, b = (torch.ones(CEILING_SIDE, CEILING_SIDE, dtype=torch.bfloat16 if bfloat16 else None) for _ in range(2))
    started = time.perf_counter()
    a @ b
    return time.perf_counter() - started
