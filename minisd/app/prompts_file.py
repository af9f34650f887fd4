"""Prompts files: many pictures from a file, each line a prompt or, in JSON, a prompt with settings of its own."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minisd.app.jobs import Job, Source, assign_batches, slug
from minisd.io.diffusers_folder import Defaults
from minisd.pipeline.settings import SETTINGS, Setting, Settings

MAX_IMAGES = 1_000_000  # of one line
NAME = re.compile(r"\w(?:[\w .,()+=@-]*[\w)+=@-])?")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names on Windows
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
    """A line of a prompts file: where it is, for messages, and the values that it gives."""

    where: str
    values: Mapping[str, Any]


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts, one a line, from a .txt file or, with settings, one object a line, from a .jsonl file.

    Empty lines are skipped, and in a .txt file those that begin with #. Raises ValueError, naming file and line, for
    anything that is not UTF-8, for unknown settings or values of the wrong type, and if there is no prompt.
    """
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"{path} is neither a .txt file (a prompt a line) nor a .jsonl file (an object a line)")
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
                    raise ValueError(f"{name} has a character that is not text: {value!r}")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        prompts.append(Prompt(where, values))
    if not prompts:
        raise ValueError(f"{path} has no prompt; write one on each line")
    return prompts


def _parse(text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key comes twice")
        return dict(pairs)

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'not JSON ({error}); expected {{"prompt": "a fox"}}') from error
    if not isinstance(values, dict):
        raise ValueError('not an object; expected {"prompt": "a fox"}')
    if "prompt" not in values:
        raise ValueError("it has no prompt")
    for name in values:
        if name not in KEYS:
            raise ValueError(f"{name!r} is not a setting; expected some of {', '.join(KEYS)}")
    return {name: KEYS[name].from_json(name, value) for name, value in values.items()}


def plan_jobs(
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
    batch: int,
    defaults: Defaults | Settings,
    side: int,
    source: Source | None = None,
) -> list[Job]:
    """Decide the file of every picture, and which are drawn together, at most `batch`.

    Args:
        options: What a line does not say, by the same names.
        defaults, side: The model's own settings, and the size of its pictures, for what the options do not say either.

    Raises:
        ValueError: Naming the line, for settings that do not go together, and for names that are taken or unsafe.
    """
    jobs: list[Job] = []
    taken: dict[str, str] = {}
    digits = max(4, len(str(len(prompts))))
    for number, prompt in enumerate(prompts, 1):
        try:
            values = {**options, **prompt.values}
            images = 1 if values.get("images") is None else values["images"]
            if not 1 <= images <= MAX_IMAGES:
                raise ValueError(f"images is {images}; expected 1 or more, at most {MAX_IMAGES}")
            job = Job.create(values, defaults, side, source)
            job = replace(job, where=prompt.where, seed_drawn=job.seed is None)
            name = prompt.values.get("name")
            stem = f"{number:0{digits}}-{slug(job.prompt)}" if name is None else _check_name(name)
            for at in range(images):
                file = f"{stem}.png" if images == 1 else f"{stem}-{at + 1}.png"
                # some file systems ignore case and how an accent is written
                same = unicodedata.normalize("NFC", file).casefold()
                if same in taken:
                    raise ValueError(f"its picture would be {file}, as that of {taken[same]}; choose another name")
                taken[same] = prompt.where
                jobs.append(replace(job, file=file, seed=None if job.seed is None else job.seed + at))
        except ValueError as error:
            raise ValueError(f"{prompt.where}: {error}") from error
    return assign_batches(jobs, batch)


def _check_name(name: str) -> str:
    """The stem of a file name. Raises ValueError for one that is not safe everywhere."""
    stem = name[:-4] if name.lower().endswith(".png") else name
    if not NAME.fullmatch(stem) or ".." in stem or RESERVED.fullmatch(stem) or len(stem.encode()) > 200:
        raise ValueError(
            f"name is {name!r}; expected at most 200 letters, digits, spaces and . , ( ) + = @ - _, "
            "beginning with a letter or digit, with no path and no .."
        )
    return stem
