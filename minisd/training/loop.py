"""The training loop that all parts share: steps, averages, checkpoints, resuming, several processes.

Everything random in a step comes from (seed, step) and everything drawn from the data from (seed, position), so a run
that was killed and resumed repeats, bit for bit, the run that never stopped. Under `torchrun` each process takes its
slice of the same global batch and the gradients are averaged, which makes the same step as one process would.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from minisd.features.distributed import log, process_group, rank, world_size
from minisd.features.validate import check_float, check_int, check_writable
from minisd.io.atomic import save_atomically
from minisd.io.tensors import CheckpointError, read_pickle
from minisd.training.muon import Muon
from minisd.training.plain_attention import PlainAttention

CHECKPOINT = "checkpoint.pt"  # of a training, in its folder


@dataclass(frozen=True)
class Options:
    """How a training runs.

    folder: where checkpoints, curves and sheets go. steps: the length of the whole run. minutes: stop (and save) after
    so long; with steps=None the learning rate follows the clock instead and reaches its end at `minutes`. batch: the
    global batch, over all processes. decays: of the exponential moving averages kept beside the weights. bfloat16:
    mixed precision, products and convolutions in bfloat16 and all weights in float32, faster on a CPU with AMX. muon:
    Muon in the place of AdamW. compile: torch.compile the model first, which takes minutes and a C++ compiler.
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
        check_writable(self.folder)
        if self.batch % world_size():
            raise ValueError(f"batch={self.batch} does not divide over {world_size()} processes; choose a multiple")


class Task(Protocol):
    """What a part brings to the loop."""

    model: nn.Module

    def loss(self, step: int, positions: range, local: slice, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss over this process's slice of the global batch, and numbers worth logging.

        `positions` are the places of the whole global batch in the endless, shuffled stream of data.
        """
        ...

    def sheet(self, model: nn.Module) -> Image.Image | None:
        """Return a picture of what the model can do by now."""
        ...

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the part into `folder`, in the layout of a published model."""
        ...


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator whose state depends on all the given numbers, and on nothing else."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)


Part = TypeVar("Part", bound=nn.Module)


def channels_last(module: Part) -> Part:
    """Keep the module's weights channels last, the faster order for convolutions on a CPU; returns the module."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class Shuffled:
    """An endless stream of indices below `count`: every epoch is another permutation, any position can be asked for."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, positions: Iterable[int]) -> list[int]:
        return [self._index(position) for position in positions]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.count, generator=generator(self.seed, epoch))
        return int(self._order[place])


def learning_rate(options: Options, step: int, progress: float) -> float:
    """A short linear warm-up, a plateau, and from `decay_from` of the run on a linear descent to zero."""
    warm = min(1.0, (step + 1) / max(options.warmup, 1))
    descent = min(1.0, (1 - min(progress, 1.0)) / max(1 - options.decay_from, 1e-9))
    return options.lr * warm * descent


def average_gradients(parameters: list[nn.Parameter], *numbers: float) -> tuple[float, ...]:
    """Replace every gradient by its mean over all processes; return the means of the numbers too."""
    if world_size() == 1:
        return numbers
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [torch.tensor(numbers, dtype=torch.float32)])
    dist.all_reduce(flat)
    flat /= world_size()
    pieces = flat.split([gradient.numel() for gradient in gradients] + [len(numbers)])
    for gradient, piece in zip(gradients, pieces, strict=False):
        gradient.copy_(piece.view_as(gradient))
    return tuple(pieces[-1].tolist())


def draw_curves(lines: list[dict[str, float]], path: Path) -> None:
    """Draw every logged number against the step, as it is and smoothed over a fiftieth of the run."""
    from matplotlib.figure import Figure

    names = [name for name in (lines[0] if lines else {}) if name != "lr"]
    figure = Figure(figsize=(4 * max(len(names), 1), 3), layout="constrained")
    for place, name in enumerate(names):
        values = np.array([line[name] for line in lines])
        width = max(len(values) // 50, 1)
        axes = figure.add_subplot(1, len(names), place + 1)
        axes.plot(values, color="0.8", linewidth=0.5)
        axes.plot(np.arange(width - 1, len(values)), np.convolve(values, np.ones(width) / width, "valid"))
        axes.set(title=name, xlabel="step")
    figure.savefig(path, format="png", dpi=72)


class Trainer:
    """The state of a run (weights, their averages, optimiser, step, seconds) and the loop around it."""

    def __init__(self, task: Task, options: Options) -> None:
        self.task, self.options = task, options
        if options.compile:
            task.model.compile(dynamic=False)
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        settings: dict[str, Any] = {"lr": options.lr, "betas": options.betas, "weight_decay": options.weight_decay}
        self.optimizer: torch.optim.Optimizer = (
            Muon(self.parameters, **settings)
            if options.muon
            else torch.optim.AdamW(self.parameters, fused=True, **settings)
        )
        self.averages = {decay: [p.detach().clone() for p in self.parameters] for decay in options.decays}
        self.step, self.elapsed = 0, 0.0
        self.losses: list[dict[str, float]] = []
        self.told = False  # that curves need matplotlib
        if options.resume:
            self.load()
        self.began = self.step, self.elapsed  # of this sitting

    @property
    def checkpoint(self) -> Path:
        """The file that holds the whole state."""
        return self.options.folder / CHECKPOINT

    def save(self) -> None:
        """Write losses, state, curves and sample sheet; each file appears whole or not at all.

        The losses come first: after a kill between the two they know a few steps too many, which `load` drops.
        """
        if rank():
            return
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "model": self.task.model.state_dict(),
            "averages": {str(decay): values for decay, values in self.averages.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        lines = "".join(json.dumps(line) + "\n" for line in self.losses)
        save_atomically(lambda path: path.write_text(lines, encoding="utf-8"), self.options.folder / "losses.jsonl")
        save_atomically(lambda path: torch.save(state, path), self.checkpoint)
        if find_spec("matplotlib") is not None:
            save_atomically(lambda path: draw_curves(self.losses, path), self.options.folder / "curves.png")
        elif not self.told:
            self.told = True
            log(f"matplotlib is not installed, so no curves are drawn; the losses are in {self.options.folder}")
        with self.averaged() as model:
            sheet = self.task.sheet(model)
        if sheet is not None:
            save_atomically(
                lambda path: sheet.save(path, format="PNG"), self.options.folder / f"sheet-{self.step:06d}.png"
            )

    def load(self) -> None:
        """Continue from the folder's checkpoint.

        Raises FileNotFoundError when there is none, and CheckpointError for one that is damaged or of another task.
        """
        if not self.checkpoint.exists():
            raise FileNotFoundError(f"nothing to resume: {self.checkpoint} does not exist; start without --resume")
        for path in self.options.folder.rglob(".*.tmp") if rank() == 0 else ():
            path.unlink(missing_ok=True)  # what a killed run was writing
        try:
            state = read_pickle(self.checkpoint)
            self.task.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.averages = {float(decay): values for decay, values in state["averages"].items()}
            self.step, self.elapsed = state["step"], state["elapsed"]
            losses = self.options.folder / "losses.jsonl"
            if losses.exists():
                self.losses = [json.loads(line) for line in losses.read_text(encoding="utf-8").splitlines()][
                    : self.step
                ]
        except (RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines()]
            more = f" and {len(lines) - 2} more" if len(lines) > 2 else ""
            raise CheckpointError(
                f"{self.checkpoint} cannot be resumed with these options ({' '.join(lines[:2])}{more}); "
                "repeat those that it began with, or delete it"
            ) from error

    @contextmanager
    def averaged(self, decay: float | None = None) -> Iterator[nn.Module]:
        """Within this block the model has its averaged weights (of the slowest average, unless one is named)."""
        values = self.averages[decay or max(self.averages)]
        own = [p.detach().clone() for p in self.parameters]
        self._assign(values)
        self.task.model.eval()
        try:
            yield self.task.model
        finally:
            self._assign(own)
            self.task.model.train()

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def progress(self) -> float:
        """The finished fraction of the run: of its steps if they were given, else of its minutes."""
        if self.options.steps is not None:
            return self.step / self.options.steps
        return self.elapsed / 60 / (self.options.minutes or 1)

    def advance(self, progress: float) -> dict[str, float]:
        """Make one step: loss, gradients, clipping, AdamW, averages. Raises FloatingPointError for a loss of NaN."""
        options = self.options
        first = self.step * options.batch
        share = options.batch // world_size()
        local = slice(rank() * share, (rank() + 1) * share)
        attention = PlainAttention() if options.bfloat16 else nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16), attention:
            loss, details = self.task.loss(self.step, range(first, first + options.batch), local, progress)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        values = average_gradients(self.parameters, float(loss.detach()), *details.values())
        if not math.isfinite(values[0]):
            raise FloatingPointError(f"the loss is {values[0]} at step {self.step}; lower the learning rate")
        nn.utils.clip_grad_norm_(self.parameters, options.clip)
        lr = learning_rate(options, self.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.step += 1
        for decay, average in self.averages.items():
            # a young average forgets faster, so that it does not remember the random start
            weight = 1 - min(decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(average, [p.detach() for p in self.parameters], weight)
        return {"loss": values[0]} | dict(zip(details, values[1:], strict=True)) | {"lr": lr}

    def run(self) -> None:
        """Train until the steps or the minutes are over, saving on the way and at the end."""
        options = self.options
        self.task.model.train()
        began, saved = time.monotonic() - self.elapsed, time.monotonic()
        bar = tqdm(total=options.steps, initial=self.step, disable=rank() > 0, mininterval=10, unit="step")
        while True:
            self.elapsed = time.monotonic() - began
            # all processes must agree on the time, so that they stop and decay together
            elapsed = self._agree(self.elapsed, time.monotonic() - saved)
            self.elapsed, since_save = elapsed
            progress = self.progress()
            out_of_time = options.minutes is not None and self.elapsed >= 60 * options.minutes
            if progress >= 1 or out_of_time:
                break
            if since_save > 60 * options.save_minutes:
                self.save()
                saved = time.monotonic()
            self.losses.append(self.advance(progress))
            bar.update()
            if self.step % 20 == 0:
                recent = self.losses[-100:]
                bar.set_postfix({key: f"{sum(x[key] for x in recent) / len(recent):.4g}" for key in recent[-1]})
        bar.close()
        self.save()

    def _agree(self, *numbers: float) -> tuple[float, ...]:
        if world_size() == 1:
            return numbers
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.broadcast(values, 0)
        return tuple(values.tolist())


def train(task: Task, options: Options) -> Trainer:
    """Run a training to its end, export the averaged weights to `options.folder / "export"`, and return the trainer."""
    with process_group():
        trainer = Trainer(task, options)
        trainer.run()
        if rank() == 0:
            with trainer.averaged() as model:
                task.export(model, options.folder / "export")
        if world_size() > 1:
            dist.barrier()
    return trainer
