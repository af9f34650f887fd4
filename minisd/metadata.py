"""What a picture says of how it was drawn: the text chunk `parameters` that the community's tools read and write.

    a fox in the snow
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 4, Seed: 7, Size: 128x128, Model: tiny, Version: minisd 0.1.0
"""

from __future__ import annotations

import itertools
import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minisd.images import opened_picture

KEY = "parameters"
NEGATIVE = "Negative prompt: "
SETTING = re.compile(r'\s*([\w /-]+?):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
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
    """What a picture's text chunk says. The settings keep the order and the names in which they were written."""

    prompt: str
    negative_prompt: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


def sampler_label(name: str, karras: bool = False) -> str:
    """The community's name of a sampler: "dpmpp_2m" with Karras' spacing is "DPM++ 2M Karras"."""
    return LABELS[name] + (" Karras" if karras else "")


def parameters_text(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """Write the chunk's text. A value with a comma, a colon or a line break is quoted as in JSON."""
    lines = [prompt.strip(), f"{NEGATIVE}{negative_prompt.strip()}"] if negative_prompt.strip() else [prompt.strip()]
    return "\n".join([*lines, ", ".join(f"{key}: {_quote(str(value))}" for key, value in settings.items())])


def parse_parameters(text: str) -> Parameters:
    """Read the chunk's text, of this program or another one. Without a last line of settings, all is prompt."""
    *lines, last = text.strip().split("\n")
    settings = {key: _unquote(value) for key, value in SETTING.findall(last)} if last.startswith("Steps: ") else {}
    if not settings:
        lines = [*lines, last]
    at = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[at:]).removeprefix(NEGATIVE)
    return Parameters("\n".join(lines[:at]).strip(), negative.strip(), settings)


def read_parameters(path: str | os.PathLike[str]) -> str | None:
    """The text chunk of a picture file, or None where there is none. Raises OSError for what is no picture."""
    with opened_picture(path) as picture:
        picture.load()  # a text chunk may also follow the pixels
        text = picture.info.get(KEY)
    return text if isinstance(text, str) else None


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
        if overwrite:
            os.replace(temporary, path)
        final = path if overwrite else _number(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return final


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


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:"\n]', value) else value


def _unquote(value: str) -> str:
    if not value.startswith('"'):
        return value.strip()
    try:
        return str(json.loads(value))
    except ValueError:
        return value
