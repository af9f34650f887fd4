"""What a picture says of how it was drawn: the text `parameters` that the community's tools read and write.

    a fox in the snow
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 4, Seed: 7, Size: 128x128, Model: tiny, Version: minisd 0.1.0

PNG files carry it in a text chunk, JPEG and WebP files in the comment of their EXIF data.
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
from types import MappingProxyType

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from minisd.io.pictures import opened_picture

KEY = "parameters"
LONGEST = 2**20  # characters of a text that are read; Pillow unpacks no more of a compressed one either
LONGEST_JSON = 2**13  # of one value, or a text full of what is almost JSON would take minutes
NEGATIVE = "Negative prompt:"
EXACT = ("Exact prompt", "Exact negative prompt")
NAME = re.compile(r'[^",:{}]{1,80}')  # of a setting
QUOTED = re.compile(r'"(?:\\.|[^"\\])*"')
LABELS = MappingProxyType(
    {
        "ddpm": "DDPM",
        "ddim": "DDIM",
        "pndm": "PLMS",
        "euler": "Euler",
        "euler_a": "Euler a",
        "heun": "Heun",
        "dpmpp_2m": "DPM++ 2M",
        "lcm": "LCM",
    }
)


@dataclass(frozen=True)
class Parameters:
    """What a picture's text says. The settings keep the order and the names in which they were written."""

    prompt: str
    negative_prompt: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


def sampler_label(name: str, karras: bool = False) -> str:
    """The community's name of a sampler: "dpmpp_2m" with Karras' spacing is "DPM++ 2M Karras"."""
    return LABELS[name] + (" Karras" if karras else "")


def read_sampler(settings: Mapping[str, str]) -> tuple[str, bool] | None:
    """The sampler that the settings name, as (name, karras), or None where it is not known here.

    Karras' noise levels stand behind the sampler's name or, in newer files, in "Schedule type". There "Automatic"
    leaves the choice to the sampler, which for DPM++ 2M is Karras, and "Uniform" is any sampler's plain one.
    """
    names = {label.lower(): name for name, label in LABELS.items()} | {"pndm": "pndm"}
    label = settings.get("Sampler", "").strip().lower()
    schedule = settings.get("Schedule type", "").strip().lower()
    name = names.get(label.removesuffix(" karras"))
    if name is None or schedule not in ("", "automatic", "uniform", "karras"):
        return None
    return name, "karras" in (schedule, label.rpartition(" ")[2]) or (schedule, name) == ("automatic", "dpmpp_2m")


def parameters_text(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """Write the text. `parse_parameters` gives back the same, but for white space around the prompts and the values.

    The first setting is "Steps", a whole number, by which readers know the line; ValueError otherwise, and for names
    that the format cannot hold. A value with a comma, a colon or a line break is quoted as in JSON. Prompts that
    would be read as something else, such as one with a line that begins with "Negative prompt:", are repeated there.
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
    """Read the text, of this program or another one. Without a last line of settings, all is prompt."""
    *lines, last = re.split(r"\r?\n", text.strip())
    settings = _parse_settings(last) if re.match(r"Steps: *\d+ *(,|$)", last) else {}
    if not settings:
        lines = [*lines, last]
    at = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    prompt, negative = "\n".join(lines[:at]), "\n".join(lines[at:]).removeprefix(NEGATIVE)
    prompt, negative = settings.pop(EXACT[0], prompt), settings.pop(EXACT[1], negative)
    return Parameters(prompt.strip(), negative.strip(), settings)


def describe(parameters: Parameters) -> str:
    """The parameters as lines of a table, with what the sampler is called here."""
    rows = {"Prompt": parameters.prompt}
    if parameters.negative_prompt:
        rows["Negative prompt"] = parameters.negative_prompt
    rows |= parameters.settings
    if "Sampler" in rows:
        found = read_sampler(parameters.settings)
        ours = f"--sampler {found[0]}{' --karras' if found[1] else ''}" if found else "not known here"
        rows["Sampler"] += f"  ({ours})"
    width = max(map(len, rows))
    return "\n".join(
        f"{name:<{width}}  {textwrap.indent(value, ' ' * (width + 2)).lstrip()}".rstrip()
        for name, value in rows.items()
    )


def read_parameters(path: str | os.PathLike[str]) -> str | None:
    """The text of a picture file, or None where there is none. Raises OSError for what is no picture or is too large.

    It is read from a PNG's text chunk `parameters`, or from the EXIF UserComment of any kind of file.
    """
    with opened_picture(path) as picture:
        picture.load()  # a text chunk may also follow the pixels
        text = picture.info.get(KEY)
        if not isinstance(text, str):
            comment = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
            text = _decode_comment(comment) if isinstance(comment, bytes) else comment
    if isinstance(text, str) and len(text) > LONGEST:
        raise OSError(f"the text in {path} has {len(text):,} characters; at most {LONGEST:,} are read")
    return text if isinstance(text, str) and text.strip() else None


def _decode_comment(raw: bytes) -> str:
    """An EXIF UserComment: 8 bytes that name its encoding, and the text (EXIF 2.3, section 4.6.5)."""
    kind, body = raw[:8], raw[8:]
    if kind == b"UNICODE\0":
        # in either byte order. The settings are ASCII, so the half of their bytes that is 0 gives it away
        order = "utf-16-be" if body[::2].count(0) >= body[1::2].count(0) else "utf-16-le"
        marked = body[:2] in (b"\xff\xfe", b"\xfe\xff")
        text = body.decode("utf-16" if marked else order, "replace")
    else:
        text = (body if kind in (b"ASCII\0\0\0", bytes(8)) else raw).decode("utf-8", "replace")
    return text.strip("\0 ")


def save_png(picture: Image.Image, path: Path, text: str, overwrite: bool = False) -> Path:
    """Write a picture with its parameters, whole or not at all, and return the path that it got.

    Without `overwrite` a name that is taken gets a number: fox.png, fox-2.png, fox-3.png. Folders are made where
    they are missing. Raises OSError, having left nothing behind.
    """
    info = PngInfo()
    info.add_text(KEY, text)  # Latin-1 where that is enough, else UTF-8 in an iTXt chunk
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
    """Give a finished file this name or, where that is taken, this name and the first number that is free."""
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            os.link(temporary, candidate)  # unlike renaming it spares what is there, and no empty file comes first
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
    """`name: value, name: value …` A value may be quoted, or JSON; a comma that no name follows belongs to it."""
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
    """Where a value ends that begins at `start`: at the next comma, unless it is quoted or JSON and has one inside."""
    start += len(line[start:comma]) - len(line[start:comma].lstrip())
    end = comma
    if match := QUOTED.match(line, start):
        end = match.end()
    elif line[start : start + 1] in ("{", "["):
        try:
            end = start + json.JSONDecoder().raw_decode(line[start : start + LONGEST_JSON])[1]
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
