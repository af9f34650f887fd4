"""Pictures and captions of a folder: metadata.jsonl, metadata.csv or .txt files, repeats, and buckets of sizes."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisd.features.prompts import check_length
from minisd.features.validate import check_inside, check_strings
from minisd.images import from_pil
from minisd.io.configs import parse_json
from minisd.io.pictures import opened_picture, read_picture
from minisd.training.sampling_order import Shuffled, generator

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CAPTIONS = (".txt", ".caption")
REPEATS = re.compile(r"(\d{1,4})_(.+)")
CENTER = (0.5, 0.5)


@dataclass(frozen=True)
class Example:
    """A picture, its caption, and how often it occurs in an epoch."""

    path: Path
    text: str
    repeats: int = 1


def list_examples(folder: Path, caption: str | None = None) -> list[Example]:
    """List the pictures of a folder with their captions.

    With metadata.jsonl or metadata.csv, as in Hugging Face's imagefolder, these are the pictures it names in the column
    file_name, with the captions in the column text. Without, they are all pictures in the folder and below it, with the
    captions in text files of the same name beside them (fox.png, fox.txt); a picture without one has the caption
    `caption`, or else the name of its folder if that is like 10_name. In such a folder each picture counts 10 times.

    Raises:
        FileNotFoundError: If the folder has neither metadata nor pictures.
        ValueError: If a picture or a caption is missing or invalid; the message names it.
    """
    listings = [folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()]
    if len(listings) > 1:
        raise ValueError(f"{folder} has both metadata.jsonl and metadata.csv; delete one of them")
    if listings:
        examples = list(_listed(folder, listings[0]))
        if not examples:
            raise ValueError(f"{listings[0]} names no picture; one is enough to begin with, twenty are good")
        return examples
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not paths:
        raise FileNotFoundError(
            f'{folder / "metadata.jsonl"} is missing; write a line {{"file_name": …, "text": …}} for each picture, or '
            "put pictures there with their captions beside them, such as fox.png and fox.txt"
        )
    examples = []
    for path in paths:
        check_inside(folder, path.relative_to(folder).as_posix())
        repeats, name = _repeats(path)
        examples.append(Example(path, _caption(path, caption, name), repeats))
    return examples


def _listed(folder: Path, listing: Path) -> Iterator[Example]:
    for number, line in enumerate(_lines(listing), start=1):
        if isinstance(line, str) and not line.strip():
            continue
        try:
            item = parse_json(line) if isinstance(line, str) else line
            path, text = check_inside(folder, item["file_name"]), item["text"]
            if not isinstance(text, str):
                raise TypeError(f"text is {text!r:.80}; expected a string")
            (text,) = check_strings("text", text)
            check_length(text)
            with opened_picture(path):
                example = Example(path, text, _repeats(path)[0])
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(
                f"{listing}, line {number}: expected a picture and its text ({type(error).__name__}: {error})"
            ) from error
        yield example


def _lines(listing: Path) -> Iterable[Any]:
    """The lines of a listing: text for JSON, dictionaries for CSV. Only \\r and \\n end a line."""
    try:
        text = listing.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{listing} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    lines = re.split(r"\r\n|\n|\r", text)
    return lines if listing.suffix == ".jsonl" else csv.DictReader(lines)


def _repeats(path: Path) -> tuple[int, str | None]:
    """How often a picture occurs, and the name of what it shows, if its folder is named like 10_name."""
    match = REPEATS.fullmatch(path.parent.name)
    if match and not int(match[1]):
        raise ValueError(f"{path.parent} says 0 repeats; expected at least 1, or delete the folder")
    return (int(match[1]), match[2]) if match else (1, None)


def _caption(path: Path, caption: str | None, name: str | None) -> str:
    files = [path.with_suffix(suffix) for suffix in CAPTIONS if path.with_suffix(suffix).is_file()]
    if len(files) > 1:
        raise ValueError(f"{path} has the captions {files[0].name} and {files[1].name}; delete one of them")
    try:
        text = " ".join(files[0].read_text(encoding="utf-8-sig").split()) if files else caption
    except UnicodeDecodeError as error:
        raise ValueError(f"{files[0]} is not UTF-8 text ({error}); save it as UTF-8") from error
    text = name if text is None else text
    if text is None:
        raise ValueError(f"{path} has no caption; write {path.with_suffix('.txt').name} beside it, or pass a caption")
    check_length(text)
    return text


def bucket_sizes(side: int, step: int) -> list[tuple[int, int]]:
    """List sizes (width, height) of about the area side², in multiples of `step`, from 1:4 to 4:1.

    For side=512 and step=64 they are those of kohya's trainer: 512×512, 256×1024, 320×768 …
    """
    area, square = side * side, side // step * step
    sizes = {(square, square)}
    for short in range(max(side // 2 // step * step, step), 2 * side + 1, step):
        long = min(2 * side, area // short // step * step)
        if long >= side // 2:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest_size(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return that of the sizes whose aspect ratio is nearest to that of a picture, on a logarithmic scale."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda each: (abs(math.log(each[0] / each[1]) - ratio), each))


class Pictures:
    """The pictures of a folder, each scaled and cropped to the size of its bucket when it is asked for.

    Attributes:
        examples: The pictures and their captions.
        sizes: The size (width, height) of each in training.
        fixed: Whether a picture is cropped alike each time, so that its latents can be cached.
    """

    def __init__(
        self, examples: Sequence[Example], side: int, multiple: int, buckets: bool = False, crop: str = "center"
    ) -> None:
        if side < multiple or side % multiple:
            raise ValueError(f"side={side}; expected a multiple of {multiple} pixels")
        if crop not in ("center", "random"):
            raise ValueError(f"crop={crop!r}; expected 'center' or 'random'")
        self.examples, self.fixed = list(examples), crop == "center"
        step = max(min(64, side // 4 // multiple * multiple), multiple)
        sizes = bucket_sizes(side, step) if buckets else [(side, side)]
        self.sizes = []
        for example in self.examples:
            try:
                with opened_picture(example.path) as picture:
                    self.sizes.append(nearest_size(picture.size, sizes))
            except OSError as error:
                raise ValueError(str(error)) from error

    @property
    def texts(self) -> list[str]:
        """The captions."""
        return [example.text for example in self.examples]

    def image(self, index: int, place: tuple[float, float] = CENTER, flip: bool = False) -> Tensor:
        """Return a picture (1, 3, h, w) in [-1, 1].

        place: Where the crop lies between left and right, and between top and bottom, from 0 to 1.
        """
        try:
            cropped = from_pil(read_picture(self.examples[index].path, *self.sizes[index], place))
        except OSError as error:
            raise ValueError(str(error)) from error
        return cropped.flip(-1) if flip else cropped


class BucketOrder:
    """An endless stream of indices in which the batches hold pictures of one size; `Shuffled` for several sizes.

    In an epoch every picture occurs as often as its repeats say. The last batch of a bucket is filled up with pictures
    from its beginning.
    """

    def __init__(self, sizes: Sequence[Any], repeats: Sequence[int], seed: int) -> None:
        self.seed = seed
        self.items: dict[Any, list[int]] = {}
        for index, (size, count) in enumerate(zip(sizes, repeats, strict=True)):
            self.items.setdefault(size, []).extend([index] * count)
        (first, *others) = self.items.values()
        self.shuffled = None if others else Shuffled(len(first), seed)
        self._made: tuple[int, int] = (-1, -1)
        self._epoch: list[list[int]] = []

    def __call__(self, positions: range) -> list[int]:
        """Return the indices at the positions of one whole batch."""
        if self.shuffled is not None:
            (items,) = self.items.values()
            return [items[place] for place in self.shuffled(positions)]
        batch = len(positions)
        epoch, number = divmod(positions[0] // batch, sum(-(-len(items) // batch) for items in self.items.values()))
        if self._made != (epoch, batch):
            self._made, self._epoch = (epoch, batch), list(self._batches(epoch, batch))
        return self._epoch[number]

    def _batches(self, epoch: int, batch: int) -> Iterator[list[int]]:
        rng = generator(self.seed, epoch)
        batches = []
        for items in self.items.values():
            order = [items[place] for place in torch.randperm(len(items), generator=rng).tolist()]
            full = order * (2 + batch // len(order))
            batches += [full[start : start + batch] for start in range(0, len(order), batch)]
        for number in torch.randperm(len(batches), generator=rng).tolist():
            yield batches[number]
