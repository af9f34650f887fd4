"""The `minisd merge` command: a weighted sum of two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minisd.features.distributed import show

Source = Annotated[str, typer.Argument(help="Hub id, folder, file, or tiny.")]


def merge(
    first: Source,
    second: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder, or a .safetensors file.")],
    weight: Annotated[float, typer.Option(help="Share of the second model.")] = 0.5,
    base: Annotated[str | None, typer.Option(help="Add the difference of the second model to this one.")] = None,
    half: Annotated[bool, typer.Option("--float16", help="Save in float16.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output.")] = False,
) -> None:
    """Mix the text encoders and UNets of two models; the autoencoder and the settings are those of the first.

    \b
    Examples:
      minisd merge anime.safetensors photo.safetensors --weight 0.3 --output mixed.safetensors
      minisd merge mine tuned --base original --weight 1 --output sum/
    """
    import torch

    from minisd.pipeline.stable_diffusion import StableDiffusion

    if output.exists() and not overwrite:
        raise typer.BadParameter(f"--output {output} exists; choose another name, or add --overwrite")
    models = [StableDiffusion.from_pretrained(each, device="cpu", dtype=torch.float32) for each in (first, second)]
    third = None if base is None else StableDiffusion.from_pretrained(base, device="cpu", dtype=torch.float32)
    models[0].merge(models[1], weight, third)
    save = models[0].save_single_file if output.suffix == ".safetensors" else models[0].save_pretrained
    save(output, torch.float16 if half else None)
    show(output)
