"""Prompts files, with one prompt per line: plain text, or JSON with settings."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minisd.app.jobs import Job, Source, assign_batches, slug
from minisd.io.configs import parse_json
from minisd.io.diffusers_folder import Defaults
from minisd.pipeline.settings import SETTINGS, Setting, Settings

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
} | {name: setting for name, setting in SETTINGS.items() if setting.in_file}


@dataclass(frozen=True)
class Prompt:
    """A line of a prompts file: its location, for error messages, and its values."""

    where: str
    values: Mapping[str, Any]


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
        prompts.append(Prompt(where, values))
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
        if name not in KEYS:
            raise ValueError(f"{name!r} is not a setting; expected one of {', '.join(KEYS)}")
    return {name: KEYS[name].from_json(name, value) for name, value in values.items()}


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
    for number, prompt in enumerate(prompts, 1):
        try:
            values = {**options, **prompt.values}
            images = 1 if values.get("images") is None else values["images"]
            if not 1 <= images <= MAX_IMAGES:
                raise ValueError(f"images={images}; expected an integer from 1 to {MAX_IMAGES}")
            job = Job.create(values, defaults, side, source)
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
        except ValueError as error:
            raise ValueError(f"{prompt.where}: {error}") from error
    return assign_batches(jobs, batch)


def _check_name(name: str) -> str:
    """Return the stem of a file name. Raises ValueError if it is not portable."""
    stem = name[:-4] if name.lower().endswith(".png") else name
    if not NAME.fullmatch(stem) or ".." in stem or RESERVED.fullmatch(stem) or len(stem.encode()) > 200:
        raise ValueError(
            f"name={name!r}; expected at most 200 letters, digits, spaces and . , ( ) + = @ - _, "
            "starting with a letter or digit, with no path and no .."
        )
    return stem
