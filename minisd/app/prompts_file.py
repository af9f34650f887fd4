"""Prompts files, with one prompt per line: plain text, or JSON with settings."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import typer

from minisd.app.jobs import Job, Source, assign_batches, slug
from minisd.io.configs import parse_json
from minisd.io.diffusers_folder import Defaults
from minisd.pipeline.settings import SETTINGS, Setting, Settings, format_number

MAX_IMAGES = 1_000_000  # per line
NAME = re.compile(r"\w(?:[\w .,()+=@-]*[\w)+=@-])?")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # reserved on Windows
KEYS: Mapping[str, Setting] = {
    "prompt": Setting(str),
    "negative_prompt": Setting(str),
    "seed": Setting(int),
    "preset": Setting(str),
    "images": Setting(int),
    "name": Setting(str),
    "image": Setting(str),
    "mask": Setting(str),
    **SETTINGS,
}
OTHERS = ("outpaint", "loras")  # keys whose values are lists or objects


@dataclass(frozen=True)
class Prompt:
    """A line of a prompts file: its location, for error messages, its values, and the folder of its pictures."""

    where: str
    values: Mapping[str, Any]
    folder: Path = Path()


def read_prompts(path: Path) -> list[Prompt]:
    """Read a .txt file with one prompt per line, or a .jsonl file with one object per line.

    Skips empty lines and, in .txt files, lines that start with #. Raises ValueError, with file and line number, for
    invalid UTF-8, unknown settings and values of the wrong type, and if the file contains no prompts.
    """
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"{path} must be a .txt file (one prompt per line) or a .jsonl file (one object per line)")
    prompts = []
    for number, raw in enumerate(re.split(rb"\r\n|\n|\r", path.read_bytes().removeprefix(b"\xef\xbb\xbf")), 1):
        where = f"{path}, line {number}"
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
        if not text or (kind == ".txt" and text.startswith("#")):
            continue
        try:
            values = {"prompt": text} if kind == ".txt" else _parse(text)
            for name, value in values.items():
                if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
                    raise ValueError(f"{name} has a null or surrogate character, which is not text: {value!r}")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        prompts.append(Prompt(where, values, path.parent))
    if not prompts:
        raise ValueError(f"{path} contains no prompts; expected one per line")
    return prompts


def _parse(text: str) -> dict[str, Any]:
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(f'not JSON ({error}); expected {{"prompt": "a fox"}}') from error
    if not isinstance(values, dict):
        raise ValueError('not an object; expected {"prompt": "a fox"}')
    if "prompt" not in values:
        raise ValueError('missing key "prompt"; expected {"prompt": "a fox"}')
    for name in values:
        if name not in KEYS and name not in OTHERS:
            raise ValueError(f"{name!r} is not a setting; expected one of {', '.join((*KEYS, *OTHERS))}")
    margins, loras = values.pop("outpaint", None), values.pop("loras", {})
    parsed = {name: KEYS[name].from_json(name, value) for name, value in values.items()}
    if margins is not None:
        if not isinstance(margins, list) or len(margins) != 4 or any(type(side) is not int for side in margins):
            raise ValueError(f"outpaint is {json.dumps(margins)}; expected pixels on the left, right, top and bottom")
        parsed["outpaint"] = tuple(margins)
    kinds = isinstance(loras, dict) and all(type(weight) in (int, float) for weight in loras.values())
    if not kinds or not all(re.fullmatch("[^<>:]+", name) for name in loras):
        raise ValueError(f'loras is {json.dumps(loras)}; expected weights by name, such as {{"style": 0.8}}')
    parsed["prompt"] += "".join(f" <lora:{name}:{format_number(weight)}>" for name, weight in loras.items())
    return parsed


def plan_jobs(
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
    batch: int,
    defaults: Defaults | Settings,
    side: int,
    source: Source | None = None,
) -> list[Job]:
    """Create the jobs for a list of prompts, with file names and batches.

    Args:
        options: The defaults for all lines, by the same keys.
        defaults, side: The model's default settings and native size in pixels, used if the options do not set them.

    Raises:
        ValueError: If settings are incompatible, or file names are duplicate or unsafe.
    """
    jobs: list[Job] = []
    taken: dict[str, str] = {}
    digits = max(4, len(str(len(prompts))))
    read = cache(partial(_read_source, source or Source()))  # many lines may begin with one picture
    for number, prompt in enumerate(prompts, 1):
        try:
            values = {**options, **prompt.values}
            images = 1 if values.get("images") is None else values["images"]
            if not 1 <= images <= MAX_IMAGES:
                raise ValueError(f"images={images}; expected an integer from 1 to {MAX_IMAGES}")
            files = (prompt.values.get(name) for name in ("image", "mask"))
            own = read(*(file and prompt.folder / file for file in files), prompt.values.get("outpaint"))
            job = Job.create(values, defaults, side, own)
            job = replace(job, where=prompt.where, seed_drawn=job.seed is None)
            name = prompt.values.get("name")
            stem = f"{number:0{digits}}-{slug(job.prompt)}" if name is None else _check_name(name)
            for at in range(images):
                file = f"{stem}.png" if images == 1 else f"{stem}-{at + 1}.png"
                # some file systems ignore case and Unicode normalization
                same = unicodedata.normalize("NFC", file).casefold()
                if same in taken:
                    raise ValueError(f"duplicate file name {file}, also used by {taken[same]}; choose another name")
                taken[same] = prompt.where
                jobs.append(replace(job, file=file, seed=None if job.seed is None else job.seed + at))
        except (ValueError, typer.BadParameter) as error:
            raise ValueError(f"{prompt.where}: {error}") from error
    return assign_batches(jobs, batch)


def _read_source(
    default: Source, image: Path | None, mask: Path | None, outpaint: tuple[int, int, int, int] | None
) -> Source:
    """Return the source of a line, whose own pictures and margins come before those of the command's options."""
    if not (image or mask or outpaint):
        return default
    for name, path in (("image", image), ("mask", mask)):
        if path and not path.is_file():
            raise ValueError(f"{name} {path} is not a file; paths start from the folder of the prompts file")
    mask = mask or (None if outpaint else default.mask)
    return Source.read(image or default.image, mask, outpaint or (None if mask else default.outpaint))


def _check_name(name: str) -> str:
    """Return the stem of a file name. Raises ValueError if it is not portable."""
    stem = name[:-4] if name.lower().endswith(".png") else name
    if not NAME.fullmatch(stem) or ".." in stem or RESERVED.fullmatch(stem) or len(stem.encode()) > 200:
        raise ValueError(
            f"name={name!r}; expected at most 200 letters, digits, spaces and . , ( ) + = @ - _, "
            "starting with a letter or digit, with no path and no .."
        )
    return stem
