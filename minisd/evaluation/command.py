"""The `minisd evaluate` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minisd.features.distributed import log, show


def evaluate(
    model: Annotated[Path | None, typer.Option(help="Model folder. [default: the tiny one]")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report and the pictures.")] = Path(
        "runs/evaluation"
    ),
    count: Annotated[int, typer.Option(min=1, help="How many held-out prompts to draw.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Number of sampling steps.")] = 20,
    guidance: Annotated[float | None, typer.Option(help="[default: the model's]")] = None,
) -> None:
    """Draw prompts whose combinations were held out of training, and judge the pictures.

    Writes evaluation.json and evaluation.png. After an interruption, the same command continues.
    """
    from minisd.evaluation.measure import Settings, evaluate_model
    from minisd.features.validate import check_writable

    check_writable(output)
    result = evaluate_model(model, output, Settings(count=count, steps=steps, guidance=guidance))
    for name, shares in result["attributes"].items():
        drawn, real = ("{share} [{low}, {high}] of {of}".format(**shares[kind]) for kind in ("drawn", "real"))
        line = f"{name:<12} drawn {drawn:<32} real scenes {real}"
        log(line + ("" if shares["quoted"] else "  (judge below 97%)"))
    show(output / "evaluation.json")
