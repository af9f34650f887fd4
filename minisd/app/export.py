"""The `minisd export` command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from minisd.features.distributed import log, show

if TYPE_CHECKING:
    from minisd.pipeline.stable_diffusion import StableDiffusion


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder or file.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder, with one graph for each part.")],
    to: Annotated[Literal["onnx", "openvino"], typer.Option(help="Format of the graphs.")] = "onnx",
) -> None:
    """Write a model's networks as ONNX or OpenVINO graphs in float32, each compared with the network itself.

    FOLDER gets text_encoder/, unet/, vae_encoder/ and vae_decoder/ with a graph each, and the tokenizer and all
    configurations as diffusers writes them. Batch, height, width and the number of tokens of a graph may vary.

    \b
    Examples:
      minisd export tiny exported
      minisd export v1-5-pruned-emaonly.safetensors exported --to openvino
    """
    import torch

    from minisd.pipeline.stable_diffusion import StableDiffusion

    _check(folder, to)
    sd = StableDiffusion.from_pretrained(None if model == "tiny" else model, device="cpu", dtype=torch.float32)
    for name, apart in export_graphs(sd, folder, to).items():
        log(f"{name}: differs from the network by {apart:.0e} of the largest number")
    show(folder)


def export_graphs(sd: StableDiffusion, folder: Path, to: Literal["onnx", "openvino"] = "onnx") -> dict[str, float]:
    """Write a float32 model's networks as graphs into a new folder, and return how far each is from its network.

    Raises:
        FileExistsError: If the folder exists.
        ImportError: If a package that writes the format is missing.
        ValueError: If the model has LoRAs that are not fused, which a graph can't hold, or an autoencoder other than
            Stable Diffusion's, or if a graph answers otherwise than its network.
    """
    from minisd.autoencoder import Autoencoder
    from minisd.io.atomic import replaced_folder
    from minisd.io.diffusers_folder import Loaded, write_settings
    from minisd.io.onnx_files import parts, write_part

    _check(folder, to)
    sd.check_fused()
    if not isinstance(sd.autoencoder, Autoencoder):
        raise ValueError("only Stable Diffusion's own autoencoder can be exported; load the model without vae=")
    with replaced_folder(folder) as new:
        graphs = parts(sd.text_encoder, sd.unet, sd.autoencoder).items()
        apart = {name: write_part(part, new / name, to) for name, part in graphs}
        write_settings(Loaded(**vars(sd.model), defaults=sd.defaults), new)
        shutil.copy(new / "vae/config.json", new / "vae_encoder/config.json")
        (new / "vae/config.json").rename(new / "vae_decoder/config.json")
        (new / "vae").rmdir()
    return apart


def _check(folder: Path, to: str) -> None:
    from minisd.io.onnx_files import check_installed

    check_installed(to)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; choose a new folder")
