"""The training loop that all parts share: steps, averages, checkpoints, resuming, several processes.

Everything random in a step comes from (seed, step) and everything drawn from the data from (seed, position), so a run
that was killed and resumed repeats, bit for bit, the run that never stopped. Under `torchrun` each process takes its
slice of the same global batch and the gradients are averaged, which makes the same step as one process would.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
from minisd.io.atomic import save_atomically
from minisd.io.tensors import CheckpointError, read_pickle
from minisd.training.options import Options as Options
from minisd.training.options import learning_rate as learning_rate
from minisd.training.options import make_optimizer
from minisd.training.plain_attention import PlainAttention
from minisd.training.sampling_order import Shuffled as Shuffled
from minisd.training.sampling_order import generator as generator

CHECKPOINT = "checkpoint.pt"  # of a training, in its folder


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


Part = TypeVar("Part", bound=nn.Module)


def channels_last(module: Part) -> Part:
    """Keep the module's weights channels last, the faster order for convolutions on a CPU; returns the module."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def average_gradients(parameters: list[nn.Parameter], *numbers: float) -> tuple[float, ...]:
    """Replace every gradient by its mean over all processes; return the means of the numbers too."""
    if world_size() == 1:
        return numbers
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [gradients[0].new_tensor(numbers)])
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


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tensorboard_writer(folder: Path, step: int) -> Any:
    """Open TensorBoard's log from a step on. Raises ValueError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("TensorBoard is not installed; run pip install tensorboard") from error
    return SummaryWriter(folder, purge_step=step)  # type: ignore[no-untyped-call]


class Trainer:
    """The state of a run (weights, their averages, optimiser, step, seconds) and the loop around it."""

    def __init__(self, task: Task, options: Options) -> None:
        self.task, self.options = task, options
        if options.compile:
            task.model.compile(dynamic=False)
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        factors = getattr(task, "rate_factors", {})
        groups = [
            {"params": params, "factor": factor}
            for factor in sorted({factors.get(p, 1.0) for p in self.parameters}, reverse=True)
            if (params := [p for p in self.parameters if factors.get(p, 1.0) == factor])
        ]
        self.optimizer = make_optimizer(options, groups)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.float16)
        self.averages = {decay: [p.detach().clone() for p in self.parameters] for decay in options.decays}
        self.step, self.elapsed = 0, 0.0
        self.losses: list[dict[str, float]] = []
        self.writer: Any = None
        self.sheet_seconds, self.sheet_due = 0.0, 0.0  # how long the last sheet took, and when the next may come
        self.told = False  # that curves need matplotlib
        if options.resume:
            self.load()
        self.began = self.step, self.elapsed  # of this sitting

    @property
    def checkpoint(self) -> Path:
        """The file that holds the whole state."""
        return self.options.folder / CHECKPOINT

    def save(self) -> None:
        """Write losses, state, curves and what is exported; each file appears whole or not at all.

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
            "scaler": self.scaler.state_dict(),
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
            self.task.export(model, self.options.folder / "export")
            if self.options.keep:
                self.task.export(model, self.options.folder / f"export-{self.step:06d}")

    def draw_sheet(self) -> None:
        """Draw samples with the averaged weights."""
        if rank():
            return
        began = time.monotonic()
        with self.averaged() as model:
            sheet = self.task.sheet(model)
        if sheet is not None:
            save_atomically(
                lambda path: sheet.save(path, format="PNG"), self.options.folder / f"sheet-{self.step:06d}.png"
            )
        self.sheet_seconds = time.monotonic() - began
        self.sheet_due = time.monotonic() + 9 * self.sheet_seconds

    def load(self) -> None:
        """Continue from the folder's checkpoint.

        Raises FileNotFoundError when there is none, and CheckpointError for one that is damaged or of another task.
        """
        if not self.checkpoint.exists():
            raise FileNotFoundError(f"nothing to resume: {self.checkpoint} does not exist; start without --resume")
        for path in list(self.options.folder.rglob(".*.tmp")) if rank() == 0 else ():
            remove(path)  # what a killed run was writing
        try:
            state = read_pickle(self.checkpoint)
            self.task.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state.get("scaler", {}) if self.options.float16 else {})
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
        """Within this block the model has its averaged weights (of the slowest average, unless one is named).

        Without averages it has those of the last step.
        """
        values = self.averages[decay or max(self.averages)] if self.averages else []
        own = [p.detach().clone() for p in self.parameters] if values else []
        self._assign(values)
        self.task.model.eval()
        try:
            yield self.task.model
        finally:
            self._assign(own)
            self.task.model.train()

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters if values else (), values, strict=True):
            parameter.copy_(value)

    def progress(self) -> float:
        """The finished fraction of the run: of its steps if they were given, else of its minutes."""
        if self.options.steps is not None:
            return self.step / self.options.steps
        return self.elapsed / 60 / (self.options.minutes or 1)

    def advance(self, progress: float) -> dict[str, float]:
        """Make one step: loss, gradients, clipping, AdamW, averages. Raises FloatingPointError for a loss of NaN."""
        options = self.options
        loss, details = self._backward(progress)
        values = average_gradients(self.parameters, loss, *details.values())
        if not math.isfinite(values[0]):
            raise FloatingPointError(f"the loss is {values[0]} at step {self.step}; lower the learning rate")
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, options.clip)
        lr = learning_rate(options, self.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("factor", 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        for decay, average in self.averages.items():
            # a young average forgets faster, so that it does not remember the random start
            weight = 1 - min(decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(average, [p.detach() for p in self.parameters], weight)
        return {"loss": values[0]} | dict(zip(details, values[1:], strict=True)) | {"lr": lr}

    def _backward(self, progress: float) -> tuple[float, dict[str, float]]:
        """Set the gradients of this process's share of the batch, piece by piece; return the loss and the details."""
        options = self.options
        first, pieces = self.step * options.batch, options.accumulate
        share = options.batch // world_size() // pieces
        sums: Counter[str] = Counter()
        total = 0.0
        for piece in range(pieces):
            start = (rank() * pieces + piece) * share
            with self.precision():
                loss, details = self.task.loss(
                    self.step, range(first, first + options.batch), slice(start, start + share), progress
                )
            if piece == 0:
                self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss / pieces).backward()
            total += float(loss.detach()) / pieces
            for name, value in details.items():
                sums[name] += value / pieces  # type: ignore[assignment]
        return total, dict(sums)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Within this block, products and convolutions are computed as the options say."""
        half = self.options.bfloat16 or self.options.float16
        dtype = torch.float16 if self.options.float16 else torch.bfloat16
        # what is computed again on the way back is computed outside this block
        plain = self.options.bfloat16 and self.device.type == "cpu" and not getattr(self.task, "checkpointing", False)
        with torch.autocast(self.device.type, dtype, enabled=half), PlainAttention() if plain else nullcontext():
            yield

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
            if self._save_due(since_save):
                self.save()
                saved = time.monotonic()
                if options.sheet_every is None and time.monotonic() >= self.sheet_due:
                    self.draw_sheet()
            self.losses.append(self.advance(progress))
            self._log()
            bar.update()
            if options.sheet_every and self.step % options.sheet_every == 0 and self.step != options.steps:
                self.draw_sheet()
            if self.step % 20 == 0:
                recent = self.losses[-100:]
                bar.set_postfix({key: f"{sum(x[key] for x in recent) / len(recent):.4g}" for key in recent[-1]})
        bar.close()
        self.save()
        if options.sheet_every != 0:
            self.draw_sheet()
        if self.writer is not None:
            self.writer.close()

    def _save_due(self, seconds: float) -> bool:
        every = self.options.save_every
        if every is None:
            return seconds > 60 * self.options.save_minutes
        return self.step % every == 0 and self.step > self.began[0]

    def _log(self) -> None:
        """Write the last line for TensorBoard, if that is wanted."""
        if self.options.tensorboard and rank() == 0:
            if self.writer is None:
                self.writer = tensorboard_writer(self.options.folder / "tensorboard", self.step)
            for name, value in self.losses[-1].items():
                self.writer.add_scalar(name, value, self.step)

    def _agree(self, *numbers: float) -> tuple[float, ...]:
        if world_size() == 1:
            return numbers
        values = torch.tensor(numbers, dtype=torch.float32 if self.device.type == "mps" else torch.float64)
        values = values.to(self.device)  # NCCL knows GPUs only
        dist.broadcast(values, 0)
        return tuple(values.tolist())


def train(task: Task, options: Options) -> Trainer:
    """Run a training to its end, export the averaged weights to `options.folder / "export"`, and return the trainer."""
    with process_group(next(task.model.parameters()).device):
        trainer = Trainer(task, options)
        trainer.run()
        if world_size() > 1:
            dist.barrier()
    return trainer
