"""Latents of a folder's pictures, encoded once or, where crops are random, in every step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from minisd.features.validate import check_int, check_strings
from minisd.io.atomic import save_atomically
from minisd.pipeline.stable_diffusion import StableDiffusion
from minisd.training.folder_data import CENTER, SUFFIXES, BucketOrder, Pictures


class Latents:
    """The latents of pictures, (1, 4, h, w) each, and the order in which training sees them.

    The latents are the means of the encoder's distributions, scaled. flip: whether mirrored pictures are wanted too.
    """

    def __init__(self, sd: StableDiffusion, pictures: Pictures, flip: bool, seed: int) -> None:
        self.sd, self.pictures, self.flip = sd, pictures, flip
        repeats = [example.repeats for example in pictures.examples]
        self.order = BucketOrder(pictures.sizes, repeats, seed)
        self.cached: list[list[Tensor]] = []
        if pictures.fixed:
            sides = (False, True) if flip else (False,)
            self.cached = [[self._encode(index, flip=side) for side in sides] for index in range(len(pictures.sizes))]

    def __call__(self, indices: Sequence[int], local: slice, rng: torch.Generator) -> Tensor:
        """Return latents (n, 4, h, w) of a slice of a batch of pictures of one size.

        What is random about them comes from the generator, for the whole batch.
        """
        count = len(indices)
        flips = (torch.rand(count, generator=rng) < 0.5).tolist() if self.flip else [False] * count
        places = torch.rand(count, 2, generator=rng).tolist()
        chosen = list(zip(indices, flips, places, strict=True))[local]
        if self.cached:
            rows = [self.cached[index][flip] for index, flip, _ in chosen]
        else:
            rows = [self._encode(index, (x, y), flip) for index, flip, (x, y) in chosen]
        return torch.cat(rows).to(self.sd.device)

    def _encode(self, index: int, place: tuple[float, float] = CENTER, flip: bool = False) -> Tensor:
        image = self.pictures.image(index, place, flip)
        return self.sd.encode_image(image).float().cpu().clone()


def draw_class_pictures(sd: StableDiffusion, folder: Path, prompt: str, count: int, side: int) -> None:
    """Draw pictures of a prompt into a folder until it has `count`; picture i has seed i and is only drawn once."""
    check_int("class_count", count, 1, 1_000_000)
    check_strings("class_prompt", prompt)
    others = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.name[:6] != "class-"]
    for number in range(count - len(others)):
        path = folder / f"class-{number:06d}.png"
        if not path.exists():
            picture = sd(prompt, seed=number, width=side, height=side, progress=False)
            save_atomically(lambda target, picture=picture: picture.save(target, format="PNG"), path)  # type: ignore[misc]
