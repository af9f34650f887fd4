"""Options of a training run: lengths, rates, precision, and what is saved when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from minisd.features.distributed import world_size
from minisd.features.validate import check_float, check_int, check_writable
from minisd.training.muon import Muon

OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "muon")
SCHEDULES = ("plateau", "constant", "linear", "cosine")


@dataclass(frozen=True)
class Options:
    """Options of a training run.

    folder: where checkpoints, curves and sheets go. steps: the length of the whole run. minutes: stop (and save) after
    so long; with steps=None the learning rate follows the clock instead and reaches its end at `minutes`. batch: the
    global batch, over all processes. decays: of the exponential moving averages kept beside the weights. bfloat16:
    mixed precision, products and convolutions in bfloat16 and all weights in float32, faster on a CPU with AMX.
    float16: the same in float16, with a scaled loss. muon: Muon in the place of AdamW. compile: torch.compile the model
    first, which takes minutes and a C++ compiler.

    accumulate: compute the batch in so many pieces, one after the other, which takes less memory and gives the same
    step. optimizer: one of `OPTIMIZERS`. schedule: one of `SCHEDULES`, see `learning_rate`. save_every: save every so
    many steps instead of every `save_minutes`. keep: keep the export of every save, in export-000500 and so on.
    sheet_every: draw samples every so many steps, 0 for never; by default at every save, but in at most a tenth of the
    time. tensorboard: write the losses for TensorBoard too.
    """

    folder: Path
    steps: int | None = None
    minutes: float | None = None
    batch: int = 32
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup: int = 100
    decay_from: float = 0.3
    clip: float = 1.0
    decays: tuple[float, ...] = (0.999,)
    seed: int = 0
    save_minutes: float = 5.0
    resume: bool = False
    bfloat16: bool = False
    muon: bool = False
    compile: bool = False
    float16: bool = False
    accumulate: int = 1
    optimizer: str = "adamw"
    schedule: str = "plateau"
    save_every: int | None = None
    keep: bool = False
    sheet_every: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("say how long to train: steps, minutes, or both")
        if self.steps is not None:
            check_int("steps", self.steps, 1, 2**31)
        if self.minutes is not None:
            check_float("minutes", self.minutes, 0, 1e6)
        check_int("batch", self.batch, 1, 2**20)
        check_int("seed", self.seed, 0, 2**63 - 1)
        check_float("lr", self.lr, 0)
        check_int("accumulate", self.accumulate, 1, 2**20)
        for name, every, least in (("save_every", self.save_every, 1), ("sheet_every", self.sheet_every, 0)):
            if every is not None:
                check_int(name, every, least, 2**31)
        _check_known("optimizer", self.optimizer, OPTIMIZERS)
        _check_known("schedule", self.schedule, SCHEDULES)
        if self.bfloat16 and self.float16:
            raise ValueError("bfloat16 and float16 exclude each other; choose one")
        check_writable(self.folder)
        if self.batch % world_size():
            raise ValueError(f"batch={self.batch} does not divide over {world_size()} processes; choose a multiple")
        if self.batch % (world_size() * self.accumulate):
            raise ValueError(f"batch={self.batch} does not divide into {self.accumulate} pieces; choose a multiple")


def _check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(known)}")


def learning_rate(options: Options, step: int, progress: float) -> float:
    """The learning rate of a step: a short linear warm-up, and then what `options.schedule` says.

    "plateau" stays there until `decay_from` of the run, and descends linearly to zero from there on. "constant" stays.
    "linear" and "cosine" descend from the end of the warm-up on, as diffusers' schedules of these names do.
    """
    warm = min(1.0, (step + 1) / max(options.warmup, 1))
    progress = min(progress, 1.0)
    if options.schedule == "constant":
        return options.lr * warm
    if options.schedule == "plateau":
        descent = min(1.0, (1 - progress) / max(1 - options.decay_from, 1e-9))
        return options.lr * warm * descent
    begin = 0.0 if options.steps is None else min(options.warmup / options.steps, 1.0)
    left = min(1.0, (1 - progress) / max(1 - begin, 1e-9))
    # linear: the share of the descent that is left; cosine: ½ (1 + cos π s) of its other part s
    return options.lr * warm * (left if options.schedule == "linear" else (1 + math.cos(math.pi * (1 - left))) / 2)


def make_optimizer(options: Options, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build the optimizer for groups of parameters, each with the factor of its learning rate under "factor".

    Raises ValueError if it needs a library that is not installed.
    """
    settings: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.muon or options.optimizer == "muon":
        return Muon(groups, betas=options.betas, **settings)
    if options.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, **settings)
    if options.optimizer == "adamw8bit":
        try:
            AdamW8bit = import_module("bitsandbytes.optim").AdamW8bit
        except ImportError as error:
            raise ValueError("adamw8bit needs bitsandbytes; run pip install bitsandbytes, or use adafactor") from error
        return AdamW8bit(groups, betas=options.betas, **settings)  # type: ignore[no-any-return]
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda", "mps", "xpu")
    return torch.optim.AdamW(groups, betas=options.betas, fused=fused, **settings)
