"""Small training runs of each part, for the tests that kill them, resume them, or split them over processes."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from minisd.autoencoder import Autoencoder
from minisd.config import TINY
from minisd.text_encoder import TextEncoder
from minisd.training import loop
from minisd.training.autoencoder import AutoencoderTask, Weights
from minisd.training.clip import CLIPTask, ImageEncoderConfig
from minisd.training.data import Scenes
from minisd.training.layout_loss import layouts
from minisd.training.loop import Options, Task, rank
from minisd.training.scenes import vocabulary
from minisd.training.unet import UNetTask

AUTOENCODER = replace(TINY.autoencoder, block_out_channels=(8, 8, 16, 16), norm_num_groups=4)
TEXT = replace(TINY.text_encoder, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
UNET = replace(
    TINY.unet, block_out_channels=(16, 32, 32), norm_num_groups=8, cross_attention_dim=32, attention_head_dim=2
)


def small_task(part: str, folder: Path, output: Path) -> Task:
    scenes = Scenes(folder)
    if part == "autoencoder":
        # correlations are of a batch as a whole: of several processes each asks for those of its own share
        return AutoencoderTask(scenes, AUTOENCODER, whole_from=0.5, weights=Weights(correlation=0))
    if part == "clip":
        image = ImageEncoderConfig(widths=(16, 16), patch=16, groups=4, pooled=2, projection_dim=16)
        return CLIPTask(scenes, vocabulary(), TEXT, image)
    torch.manual_seed(1)
    latents = output / f"latents-{rank()}.safetensors"
    output.mkdir(parents=True, exist_ok=True)
    save_file({"latents": torch.randn(len(scenes), 4, 24, 24)}, latents)
    config = replace(TINY, text_encoder=TEXT, autoencoder=AUTOENCODER, unet=UNET)
    layout = layouts(scenes.descriptions)
    return UNetTask(latents, scenes.captions, Autoencoder(AUTOENCODER), TextEncoder(TEXT), config, layout=layout)


def count_lines(lines: list[dict[str, float]], path: Path) -> None:
    """In the place of `draw_curves`, which takes longer than a step of these trainings."""
    path.write_text(str(len(lines)))


def assert_same_run(mine: Path, whole: Path) -> None:
    """Two trainings ended alike: the losses of every step, and all bits of the weights and their averages."""
    assert (mine / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (mine, whole))
    assert one["model"].keys() == other["model"].keys()
    for key, value in one["model"].items():
        assert torch.equal(value, other["model"][key]), key
    for average, wanted in zip(one["averages"]["0.999"], other["averages"]["0.999"], strict=True):
        assert torch.equal(average, wanted)


def train_small(part: str, scenes: Path, output: Path, steps: int) -> None:
    """A whole training without pictures, alone or as one of several processes."""
    loop.draw_curves = count_lines
    options = Options(folder=output, steps=steps, batch=8, lr=1e-3, warmup=2, sheet_every=0)
    loop.train(small_task(part, scenes, output), options)
