"""What the commands of `minisd train` share: running a task, its log, and errors of the caller."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer


@contextmanager
def told() -> Iterator[None]:
    """Within this block wrong values and missing files are the caller's fault, and told as such."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error


def check_new(output: Path, resume: bool) -> None:
    """Raise BadParameter for the folder of an earlier training that is not to be resumed."""
    from minisd.training.loop import CHECKPOINT

    if (output / CHECKPOINT).exists() and not resume:
        raise typer.BadParameter(
            f"{output / CHECKPOINT} is that of an earlier training, which would be lost; "
            "add --resume to go on with it, or choose another --output"
        )


def run(task: Any, output: Path, **choices: Any) -> None:
    """Run the task, and add a line about this sitting to `log.jsonl` in its folder."""
    from minisd.features.distributed import rank
    from minisd.training.export import Sitting, log_sitting
    from minisd.training.loop import Options, train

    check_new(output, choices["resume"])
    with told():
        options = Options(folder=output, **choices)
        trainer = train(task, options)
    if rank() == 0:
        steps, last = trainer.step - trainer.began[0], trainer.losses[-100:]
        log_sitting(
            output / "log.jsonl",
            Sitting(
                part=output.name,
                command=command_line(),
                minutes=round((trainer.elapsed - trainer.began[1]) / 60, 1),
                steps=steps,
                samples=steps * options.batch,
                loss=round(sum(line["loss"] for line in last) / max(len(last), 1), 5),
            ),
        )


def command_line() -> str:
    """What was typed: `minisd train …`, or this module under torchrun."""
    from minisd.features.distributed import world_size

    words = sys.argv[2:] if sys.argv[1:2] == ["train"] else sys.argv[1:]
    together = f"torchrun --nproc-per-node {world_size()} -m minisd.training.commands"
    return " ".join(["minisd train" if world_size() == 1 else together, *words])
