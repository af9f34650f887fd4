"""Scenes rendered once and kept in a memory-mapped file, so that the trainings spend their time on training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from minisd.features.validate import check_int
from minisd.images import to_images
from minisd.io.atomic import save_atomically
from minisd.training.backgrounds import SIZE
from minisd.training.scenes import Scene, render, scene

HELD_OUT_SEED = 1_000_003


def render_scenes(folder: Path, count: int, seed: int = 0, **choices: Any) -> None:
    """Render scenes 0…count−1 of stream `seed` into `folder`: scenes.npy (count, 192, 192, 3) and scenes.jsonl.

    Raises ValueError where the disk has no room for them.
    """
    check_int("count", count, 1, 2**31)
    check_int("seed", seed, 0, 2**63 - 1)
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    need, free = count * SIZE * SIZE * 3, shutil.disk_usage(there).free
    if need > free:
        raise ValueError(f"{count} scenes take {need / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB; ask for fewer")
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [scene(seed, index, **choices) for index in range(count)]

    def write_pixels(path: Path) -> None:
        pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, SIZE, SIZE, 3))
        for index, one in enumerate(tqdm(scenes, unit="scene", mininterval=5)):
            pixels[index] = render(one)
        pixels.flush()

    save_atomically(write_pixels, folder / "scenes.npy")
    lines = "".join(json.dumps(asdict(one)) + "\n" for one in scenes)
    save_atomically(lambda path: path.write_text(lines, encoding="utf-8"), folder / "scenes.jsonl")


def pixels_of(scenes: Iterable[Scene]) -> Tensor:
    """Draw scenes; (n, 3, 192, 192) in [-1, 1]."""
    return to_images(np.stack([render(one) for one in scenes]))


class Scenes:
    """Rendered scenes: `pixels` (count, 192, 192, 3) uint8, memory-mapped, and the description of each."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "scenes.jsonl").exists():
            raise FileNotFoundError(f"no rendered scenes in {folder}; make them with: minisd train scenes {folder}")
        self.pixels: np.ndarray = np.load(folder / "scenes.npy", mmap_mode="r")
        self.descriptions = [
            json.loads(line) for line in (folder / "scenes.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        self.captions: list[str] = [description["caption"] for description in self.descriptions]

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, indices: list[int]) -> Tensor:
        """Pictures (n, 3, 192, 192) in [-1, 1], channels last in memory."""
        return to_images(self.pixels[indices])

    def held_out(self) -> np.ndarray:
        """Eight scenes (8, 192, 192, 3) uint8 of another stream, for the sheet."""
        return np.stack([render(scene(HELD_OUT_SEED, index)) for index in range(8)])
