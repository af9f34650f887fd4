"""How a picture was drawn, written into its file: twice, for other programs and for this one.

The text `parameters` is the one that AUTOMATIC1111's web UI and others read and write:

    a fox in the snow
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 4, Seed: 7, Size: 128x128, Model: tiny, Version: minisd 0.1.0

PNG files have it in a text chunk, JPEG and WebP files in the comment of their EXIF data. The text `minisd` of a PNG is
JSON: the same again, complete and exact (see `Job.record`), and the version of its format.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import textwrap
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from minisd.io.pictures import opened_picture
from minisd.pipeline.settings import SAMPLER_LABELS

KEY = "parameters"
RECORD_KEY = "minisd"
RECORD_FORMAT = 1
MAX_TEXT = 2**20  # characters of a text that are read; Pillow unpacks no more of a compressed one either
MAX_JSON = 2**13  # characters of one value, or a text full of what is almost JSON would take minutes
NEGATIVE = "Negative prompt:"
EXACT = ("Exact prompt", "Exact negative prompt")
NAME = re.compile(r'[^",:{}]{1,80}')  # of a setting
QUOTED = re.compile(r'"(?:\\.|[^"\\])*"')


@dataclass(frozen=True)
class Parameters:
    """A parsed `parameters` text. The settings keep the order and the names in which they were written."""

    prompt: str
    negative_prompt: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


def read_sampler(settings: Mapping[str, str]) -> tuple[str, bool] | None:
    """The sampler that the settings name, as (name, karras), or None if it is unknown here.

    "Karras" is written after the sampler's name or, in newer files, in "Schedule type". There "Automatic" leaves the
    choice to the sampler, which for DPM++ 2M is Karras, and "Uniform" means the sampler's plain noise levels.
    """
    names = {label.lower(): name for name, label in SAMPLER_LABELS.items()} | {"pndm": "pndm"}
    label = settings.get("Sampler", "").strip().lower()
    schedule = settings.get("Schedule type", "").strip().lower()
    name = names.get(label.removesuffix(" karras"))
    if name is None or schedule not in ("", "automatic", "uniform", "karras"):
        return None
    return name, "karras" in (schedule, label.rpartition(" ")[2]) or (schedule, name) == ("automatic", "dpmpp_2m")


def parameters_text(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """Write the text. `parse_parameters` returns the same, but for white space around the prompts and the values.

    Values with a comma, a colon or a line break are quoted as in JSON. Prompts that would be parsed as something else,
    such as one with a line that begins with "Negative prompt:", are repeated among the settings.

    Raises ValueError unless the first setting is "Steps", a whole number, by which readers recognise the line, and for
    names that the format cannot hold.
    """
    values = {name: str(value) for name, value in settings.items()}
    bad = [name for name in values if not NAME.fullmatch(name) or name != name.strip() or name in EXACT]
    if bad or next(iter(values), "") != "Steps" or not re.fullmatch("[0-9]+", values["Steps"]):
        raise ValueError(f"settings={values}; expected Steps=… first, and names without commas, colons and quotes")
    prompts = prompt.strip(), negative_prompt.strip()
    text = _join(*prompts, values)
    read = parse_parameters(text)
    if (read.prompt, read.negative_prompt) == prompts:
        return text
    # always quoted, even where the value alone would not need it
    return text + "".join(f", {name}: {json.dumps(value)}" for name, value in zip(EXACT, prompts, strict=True))


def parse_parameters(text: str) -> Parameters:
    """Parse the text, of this program or another one. Without a last line of settings, all of it is the prompt."""
    *lines, last = re.split(r"\r?\n", text.strip())
    settings = _parse_settings(last) if re.match(r"Steps: *\d+ *(,|$)", last) else {}
    if not settings:
        lines = [*lines, last]
    at = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    prompt, negative = "\n".join(lines[:at]), "\n".join(lines[at:]).removeprefix(NEGATIVE)
    prompt, negative = settings.pop(EXACT[0], prompt), settings.pop(EXACT[1], negative)
    return Parameters(prompt.strip(), negative.strip(), settings)


def describe(parameters: Parameters) -> str:
    """The parameters as a table, with the name that the sampler has here."""
    rows = {"Prompt": parameters.prompt}
    if parameters.negative_prompt:
        rows["Negative prompt"] = parameters.negative_prompt
    rows |= parameters.settings
    if "Sampler" in rows:
        sampler = read_sampler(parameters.settings)
        option = f"--sampler {sampler[0]}{' --karras' if sampler[1] else ''}" if sampler else "unknown here"
        rows["Sampler"] += f"  ({option})"
    width = max(map(len, rows))
    return "\n".join(
        f"{name:<{width}}  {textwrap.indent(value, ' ' * (width + 2)).lstrip()}".rstrip()
        for name, value in rows.items()
    )


def read_parameters(path: str | os.PathLike[str]) -> str | None:
    """The `parameters` of a picture file, or None. Raises OSError if it is not a picture, or is too large."""
    return read_texts(path)[0]


def read_texts(path: str | os.PathLike[str]) -> tuple[str | None, dict[str, Any] | None]:
    """The `parameters` of a picture file of any kind, and the record of a PNG; None where there is none.

    A record that is damaged, or of another format, counts as none. Raises OSError if the file is no picture, or if a
    text is too large.
    """
    with opened_picture(path) as picture:
        picture.load()  # a text chunk may also follow the pixels
        text, record = picture.info.get(KEY), picture.info.get(RECORD_KEY)
        if not isinstance(text, str):
            comment = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
            text = _decode_comment(comment) if isinstance(comment, bytes) else comment
    for value in (text, record):
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise OSError(f"a text in {path} has {len(value):,} characters; at most {MAX_TEXT:,} are read")
    return text if isinstance(text, str) and text.strip() else None, _parse_record(record)


def _parse_record(text: Any) -> dict[str, Any] | None:
    try:
        record = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.pop("format", None) == RECORD_FORMAT else None


def _decode_comment(raw: bytes) -> str:
    """An EXIF UserComment: 8 bytes that name the encoding, then the text (EXIF 2.3, section 4.6.5)."""
    kind, body = raw[:8], raw[8:]
    if kind == b"UNICODE\0":
        # the settings are ASCII, so the half of the bytes that is 0 shows the byte order
        order = "utf-16-be" if body[::2].count(0) >= body[1::2].count(0) else "utf-16-le"
        marked = body[:2] in (b"\xff\xfe", b"\xfe\xff")
        text = body.decode("utf-16" if marked else order, "replace")
    else:
        text = (body if kind in (b"ASCII\0\0\0", bytes(8)) else raw).decode("utf-8", "replace")
    return text.strip("\0 ")


def save_png(
    picture: Image.Image, path: Path, text: str, overwrite: bool = False, record: Mapping[str, Any] | None = None
) -> Path:
    """Write a picture with its `parameters` and its record, completely or not at all, and return its path.

    Without `overwrite` a name that is taken gets a number: fox.png, fox-2.png, fox-3.png. Missing folders are made.
    Raises OSError, leaving nothing behind.
    """
    info = PngInfo()
    info.add_text(KEY, text)  # Latin-1 if that is enough, else UTF-8 in an iTXt chunk
    if record is not None:
        info.add_text(RECORD_KEY, json.dumps({"format": RECORD_FORMAT} | dict(record)))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid.uuid4().hex}.png"
    try:
        picture.save(temporary, format="PNG", pnginfo=info)
        if not overwrite:
            return _number(temporary, path)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _number(temporary: Path, path: Path) -> Path:
    """Give a finished file this name or, if it is taken, this name and the first free number."""
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            os.link(temporary, candidate)  # unlike a renaming it fails if the name is taken
        except FileExistsError:
            continue
        except OSError:  # a drive without links
            try:
                candidate.open("xb").close()
            except FileExistsError:
                continue
            try:
                os.replace(temporary, candidate)
            except OSError:
                candidate.unlink()
                raise
        return candidate
    raise AssertionError("unreachable")


def _join(prompt: str, negative: str, settings: Mapping[str, str]) -> str:
    lines = [prompt, f"{NEGATIVE} {negative}"] if negative else [prompt]
    return "\n".join([*lines, ", ".join(f"{name}: {_quote(value)}" for name, value in settings.items())])


def _parse_settings(line: str) -> dict[str, str]:
    """`name: value, name: value …` A value may be quoted, or JSON; a comma that no name follows is part of it."""
    places: dict[str, tuple[int, int]] = {}
    name, at = "", 0
    while at <= len(line):
        comma = line.find(",", at)
        end = len(line) if comma < 0 else comma
        colon = line.find(":", at, end)
        if colon >= 0 and NAME.fullmatch(key := line[at:colon].strip()):
            name, start = key, colon + 1
            end = _end_of_value(line, start, end)
        else:
            start = places[name][0] if name else at
        places[name] = start, end
        at = end + 1
    return {name: _unquote(line[start:end].strip()) for name, (start, end) in places.items()}


def _end_of_value(line: str, start: int, comma: int) -> int:
    """Where the value that begins at `start` ends: at the next comma, unless that is inside quotes or JSON."""
    start += len(line[start:comma]) - len(line[start:comma].lstrip())
    end = comma
    if match := QUOTED.match(line, start):
        end = match.end()
    elif line[start : start + 1] in ("{", "["):
        try:
            end = start + json.JSONDecoder().raw_decode(line[start : start + MAX_JSON])[1]
        except (ValueError, RecursionError):
            return comma
    rest = re.compile(r"\s*(?=,|$)").match(line, end)
    return rest.end() if rest else comma


def _quote(value: str) -> str:
    plain = value == value.strip() and not re.search(r'[,:"\r\n]', value) and value[:1] not in ("{", "[")
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquote(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
