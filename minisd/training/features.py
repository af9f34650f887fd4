"""A small network that names what is in each cell of a scene, for the sake of its features.

Stable Diffusion's autoencoder was trained with LPIPS, a distance between the features that VGG, a classifier of
photographs, has of two pictures. For drawn scenes a network of their own world does the same: its features must tell a
robot's face from a smooth blue box, which a mean of pixels hardly does. It is not the judge of the evaluation, which
must not take part in the training of what it judges.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minisd.blocks import Downsample, ResBlock
from minisd.io.atomic import save_atomically
from minisd.training.data import Scenes
from minisd.training.layout_loss import layout_loss, layouts
from minisd.training.loop import Shuffled, channels_last
from minisd.training.scenes import object_names

WIDTHS = (16, 32, 64, 128)
GROUPS = 4


class SceneFeatures(nn.Module):
    """Images (n, 3, h, w) in [-1, 1] to the features of four stages, at full, half, quarter and eighth size."""

    def __init__(self) -> None:
        super().__init__()
        first, *others = WIDTHS
        self.stages = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(3, first, 3, padding=1), nn.SiLU(), nn.Conv2d(first, first, 3, padding=1))]
        )
        for before, after in zip(WIDTHS, others, strict=False):
            self.stages.append(nn.Sequential(Downsample(before, padding=1), ResBlock(before, after, GROUPS, 1e-5)))
        self.head = nn.Conv2d(WIDTHS[-1], 1 + len(object_names()) + 2, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features (n, c, h, w), (n, c, h/2, w/2), … with c of `WIDTHS`."""
        found, x = [], images
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def answer(self, images: Tensor) -> Tensor:
        """What `layout_loss` asks for, (n, 1 + objects + 2, h/8, w/8): the object in each cell, the place within it."""
        return self.head(F.silu(self(images)[-1]))

    @classmethod
    def load(cls, path: Path) -> SceneFeatures:
        """Read the weights that `FeaturesTask` exported; frozen."""
        model = cls()
        model.load_state_dict(load_file(path))
        return channels_last(model.eval().requires_grad_(False))


class FeaturesTask:
    """What `loop.train` needs to train the network on rendered scenes, a few minutes."""

    def __init__(self, scenes: Scenes, seed: int = 0) -> None:
        self.scenes, self.layout = scenes, layouts(scenes.descriptions)
        torch.manual_seed(seed)
        self.model: nn.Module = channels_last(SceneFeatures())
        self.order = Shuffled(len(scenes), seed)

    def loss(self, step: int, positions: range, local: slice, progress: float) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(self.model, SceneFeatures)
        indices = self.order(positions[local])
        images = self.scenes.images(indices).contiguous(memory_format=torch.channels_last)
        layout = self.layout[torch.tensor(indices)]
        answer = self.model.answer(images).float()
        there = layout.kind > 0
        right = (answer[:, :-2].argmax(1) == layout.kind)[there].float().mean()
        return layout_loss(answer, layout).mean(), {"accuracy": float(right)}

    def sheet(self, model: nn.Module) -> Image.Image | None:
        return None

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write `features.safetensors`."""
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_atomically(lambda path: save_file(weights, path), folder / "features.safetensors")
