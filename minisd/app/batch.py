"""Many pictures from a file of prompts: read it, plan every picture, and draw those that are missing.

The plan is written first, as `manifest.jsonl` beside the pictures. It alone decides what is drawn together, so a run
that was killed and called again, or shared out by `torchrun`, writes the same files as one that was never broken.
"""

from __future__ import annotations

import json
import re
import signal
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisd import __version__
from minisd.app.drawing import Drawing, Means, draw, slug
from minisd.app.metadata import KEY, save_png
from minisd.features.distributed import first_alone, process_group, processes, rank, total
from minisd.io.atomic import save_atomically

if TYPE_CHECKING:
    from minisd.io.diffusers_folder import Defaults
    from minisd.pipeline.stable_diffusion import StableDiffusion

MANIFEST = "manifest.jsonl"
# what a killed process had not renamed yet
LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.png|\.manifest\.jsonl\.[0-9a-f]{8}\.tmp")
DO = "choose another folder for these pictures, or draw all of them anew with --overwrite"
NAME = re.compile(r"\w(?:[\w .,()+=@-]*[\w)+=@-])?")
KINDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "negative_prompt": (str,),
    "seed": (int,),
    "num_inference_steps": (int,),
    "guidance_scale": (int, float),
    "sampler": (str,),
    "spacing": (str,),
    "karras": (bool,),
    "width": (int,),
    "height": (int,),
    "clip_skip": (int,),
    "guidance_rescale": (int, float),
    "guidance_interval": (list,),
    "feature_reuse": (list,),
    "preset": (str,),
    "images": (int,),
    "name": (str,),
}


@dataclass(frozen=True)
class Line:
    """A line of a prompts file: where it is, for messages, and the settings that it gives."""

    where: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Planned:
    """One picture: its file, how it is drawn, its seed (None until one is drawn for it), and its line."""

    file: str
    drawing: Drawing
    seed: int | None
    where: str
    seed_drawn: bool = False
    place: tuple[int, int] | None = None

    def record(self, means: Means) -> dict[str, Any]:
        """The manifest's line."""
        drawing = dict(vars(self.drawing))
        for name in ("image", "mask"):
            drawing[name] = drawing[name] and drawing[name].name
        drawing["outpaint"] = drawing["outpaint"] and list(drawing["outpaint"])
        for name in ("guidance_interval", "feature_reuse"):  # where they are off, as in manifests from before they were
            value = drawing.pop(name)
            drawing |= {name: list(value)} if value else {}
        sampler = dict(vars(self.drawing.sampler))
        batch = dict(zip(("batch_size", "batch_pos"), self.place or (1, 0), strict=True))
        line = {"file": self.file, "seed": self.seed, "seed_drawn": self.seed_drawn} | drawing
        return line | {"sampler": sampler.pop("name")} | sampler | batch | vars(means) | {"version": __version__}

    def text(self, means: Means) -> str:
        """The picture's `parameters`."""
        left, right, top, bottom = self.drawing.outpaint or (0, 0, 0, 0)
        size = (self.drawing.width or 0) + left + right, (self.drawing.height or 0) + top + bottom
        return self.drawing.parameters(self.seed or 0, size, means, place=self.place)


def read_prompts(path: Path) -> list[Line]:
    """Read prompts, a line each, from a .txt file, or with settings, an object each, from a .jsonl file.

    Empty lines are skipped, and in a .txt file those that begin with #. Raises ValueError, naming file and line, for
    anything that is not UTF-8, for settings that are not known or of the wrong type, and where there is no prompt.
    """
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"{path} is no .txt file (a prompt a line) and no .jsonl file (an object a line)")
    lines = []
    for number, raw in enumerate(re.split(rb"\r\n|\n|\r", path.read_bytes().removeprefix(b"\xef\xbb\xbf")), 1):
        where = f"{path}, line {number}"
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
        if not text or (kind == ".txt" and text.startswith("#")):
            continue
        settings = {"prompt": text} if kind == ".txt" else _parse(text, where)
        for name, value in settings.items():
            if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
                raise ValueError(f"{where}: {name} has a character that is no text: {value!r}")
        lines.append(Line(where, settings))
    if not lines:
        raise ValueError(f"{path} has no prompt; write one on each line")
    return lines


def _parse(text: str, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key comes twice")
        return dict(pairs)

    try:
        settings = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{where} is not JSON ({error}); expected {{"prompt": "a fox"}}') from error
    if not isinstance(settings, dict):
        raise ValueError(f'{where} is no object; expected {{"prompt": "a fox"}}')
    if "prompt" not in settings:
        raise ValueError(f"{where} has no prompt")
    for name, value in settings.items():
        if name not in KINDS:
            raise ValueError(f"{where}: {name!r} is not known; expected some of {', '.join(KINDS)}")
        # a bool is an int in Python, and must not be taken for one here
        if not isinstance(value, KINDS[name]) or (isinstance(value, bool) and bool not in KINDS[name]):
            expected = {str: "a string", int: "a whole number", bool: "true or false", list: "a list"}[KINDS[name][0]]
            expected = "a number" if float in KINDS[name] else expected
            raise ValueError(f"{where}: {name} is {json.dumps(value)}; expected {expected}")
        if isinstance(value, list) and not (len(value) == 2 and all(type(one) in (int, float) for one in value)):
            raise ValueError(f"{where}: {name} is {json.dumps(value)}; expected a list of two numbers")
    return settings


def make_plan(
    lines: Sequence[Line], options: Mapping[str, Any], batch: int, defaults: Defaults, side: int
) -> list[Planned]:
    """Decide every picture's file, and which are drawn together, at most `batch`.

    options: for what a line does not say, by the same names. defaults, side: the model's own settings, and the width
    and height of its pictures, for what the options do not say either.
    Raises ValueError, naming the line, for settings that do not go together, and for names that are taken or unsafe.
    """
    plan: list[Planned] = []
    taken: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        settings = {**options, **line.settings}
        count, first = settings.get("images"), settings.get("seed")
        count = 1 if count is None else count
        if count < 1:
            raise ValueError(f"{line.where}: images is {count}; expected 1 or more")
        settings |= {name: side for name in ("width", "height") if settings.get(name) is None}
        try:
            drawing = Drawing.choose(settings, defaults)
        except ValueError as error:
            raise ValueError(f"{line.where}: {error}") from error
        stem = _safe(line) or f"{number:0{max(4, len(str(len(lines))))}}-{slug(drawing.prompt)}"
        for at in range(count):
            file = f"{stem}.png" if count == 1 else f"{stem}-{at + 1}.png"
            # some file systems take upper and lower case, and the ways to write an accent, for the same
            same = unicodedata.normalize("NFC", file).casefold()
            if same in taken:
                raise ValueError(f"{line.where}: its picture would be {file}, as that of {taken[same]}; name it anew")
            taken[same] = line.where
            plan.append(Planned(file, drawing, None if first is None else first + at, line.where, first is None))
    return [replace(one, place=place) for one, place in zip(plan, _places(plan, batch), strict=True)]


def _safe(line: Line) -> str:
    name = str(line.settings.get("name", ""))
    stem = name[:-4] if name.lower().endswith(".png") else name
    reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", stem, re.IGNORECASE)
    if "name" in line.settings and (
        not NAME.fullmatch(stem) or ".." in stem or reserved or len(stem.encode()) > 200 or "\n" in stem
    ):
        raise ValueError(
            f"{line.where}: name is {name!r}; expected at most 200 letters, digits, spaces and . , ( ) + = @ - _, "
            "beginning with a letter or digit, with no path and no .."
        )
    return stem


def _places(plan: Sequence[Planned], batch: int) -> Iterator[tuple[int, int] | None]:
    """The size of the batch of each picture, and its place: neighbours of equal settings are drawn together."""
    for _, group in groupby(plan, lambda one: _kind(one.drawing)):
        some = list(group)
        size = batch if some[0].drawing.image is None else 1
        for first in range(0, len(some), size):
            count = min(size, len(some) - first)
            yield from [(count, at) for at in range(count)] if count > 1 else [None]


def _kind(drawing: Drawing) -> tuple[Any, ...]:
    """What two drawings must share to be drawn together: everything but the prompts."""
    return tuple(value for name, value in vars(drawing).items() if name not in ("prompt", "negative_prompt"))


def check_plan(plan: Sequence[Planned], sd: StableDiffusion) -> None:
    """Raise ValueError, naming the line, for the first picture that the model cannot draw."""
    from minisd.features.prompts import read
    from minisd.noise import seeds

    known: set[Any] = set()
    for one in plan:
        kind = _kind(one.drawing)
        try:
            if one.seed is not None:
                seeds(one.seed, 1)
            for text in {one.drawing.prompt, one.drawing.negative_prompt} - known:
                read(text, sd.tokenizer)
                known.add(text)
            if kind not in known:
                one.drawing.check(sd)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{one.where}: {error}") from error
        known.add(kind)


def settle(plan: Sequence[Planned], means: Means, folder: Path, overwrite: bool) -> None:
    """Write the manifest of a new run, with a seed for each picture, or see that the one there is of this plan.

    Removes what a killed run left half-written. Raises ValueError where the folder holds other pictures.
    """
    from minisd.noise import seeds

    path = folder / MANIFEST
    if path.exists() and not overwrite:
        read_seeds(plan, means, folder)
        _clean(folder)
        return
    if not overwrite and (there := [one.file for one in plan if (folder / one.file).exists()]):
        raise ValueError(f"{folder} has a {there[0]} already, and no {MANIFEST}; {DO}")
    seeded: list[Planned] = []
    for one in plan:
        if one.seed_drawn:
            # the pictures of one line follow each other, and so do their seeds
            follows = seeded and seeded[-1].where == one.where
            one = replace(one, seed=(seeded[-1].seed or 0) + 1 if follows else seeds(None, 1)[0])
        seeded.append(one)
    lines = [json.dumps(one.record(means), ensure_ascii=False) + "\n" for one in seeded]
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    save_atomically(lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"), path)


def _clean(folder: Path) -> None:
    for file in folder.iterdir():
        if LEFTOVER.fullmatch(file.name):
            file.unlink(missing_ok=True)


def read_seeds(plan: Sequence[Planned], means: Means, folder: Path) -> list[Planned]:
    """The plan with the seeds that the manifest in the folder says. Raises ValueError where it is of another plan."""
    from minisd.noise import seeds

    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
        lines = [json.loads(line) for line in text.split("\n")]  # splitlines() would break at U+2028 too
        numbers = seeds([line["seed"] for line in lines], len(lines))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); {DO}") from error
    if len(lines) != len(plan):
        raise ValueError(f"{path} is for {len(lines)} pictures, this is for {len(plan)}: other prompts; {DO}")
    for number, (line, one, seed) in enumerate(zip(lines, plan, numbers, strict=True), 1):
        expected = (replace(one, seed=seed) if one.seed_drawn else one).record(means)
        if line != expected:
            names = sorted({**line, **expected}, key="file".__eq__)  # a file's name follows from its prompt
            name = next(name for name in names if line.get(name) != expected.get(name))
            raise ValueError(
                f"{path} belongs to other prompts or settings: on line {number}, {name} is {line.get(name)!r}, and now "
                f"{expected.get(name)!r}; {DO}"
            )
    return [replace(one, seed=seed) for one, seed in zip(plan, numbers, strict=True)]


def batches(plan: Sequence[Planned]) -> list[list[Planned]]:
    """The pictures that are drawn together, in order."""
    found: list[list[Planned]] = []
    for one in plan:
        if one.place and one.place[1]:
            found[-1].append(one)
        else:
            found.append([one])
    return found


def is_there(path: Path, text: str) -> bool:
    """Whether a file is a PNG, whole, that says exactly this of how it was drawn."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            said = picture.info.get(KEY)
            picture.verify()  # every checksum, to the end
    except Exception:  # missing, truncated, or something else
        return False
    return said == text


def _prepare(plan: Sequence[Planned], sd: StableDiffusion, means: Means, folder: Path, overwrite: bool) -> None:
    check_plan(plan, sd)
    settle(plan, means, folder, overwrite)


def draw_many(
    sd: StableDiffusion,
    plan: Sequence[Planned],
    means: Means,
    folder: Path,
    *,
    overwrite: bool,
    quiet: bool,
    say: Callable[[str], None],
) -> None:
    """Draw what is missing of a plan, in as many processes as torchrun started, and print the names of new files."""
    if processes() > 1:  # torchrun ends the others when one fails: let them clean up
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with process_group(sd.device):
        first_alone(partial(_prepare, plan, sd, means, folder, overwrite))
        plan = read_seeds(plan, means, folder)
        say(f"{len(plan)} pictures, planned in {folder / MANIFEST}")
        started, drawn, there = time.perf_counter(), 0, 0
        for batch in batches(plan)[rank() :: processes()]:
            texts = [one.text(means) for one in batch]
            files = [folder / one.file for one in batch]
            missing = [overwrite or not is_there(*each) for each in zip(files, texts, strict=True)]
            there += missing.count(False)
            if not any(missing):
                continue
            seeds = [one.seed or 0 for one in batch]
            pictures = draw(sd, [one.drawing for one in batch], seeds, False if quiet or rank() else None)
            for picture, file, text, absent in zip(pictures, files, texts, missing, strict=True):
                if absent:
                    print(save_png(picture, file, text, overwrite=True), flush=True)
                    drawn += 1
        drawn, there = total(drawn, there)
        say(f"{drawn} drawn, {there} were there already, in {time.perf_counter() - started:.1f} s")
