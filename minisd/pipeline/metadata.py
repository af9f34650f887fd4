"""Generation metadata in image files, in two formats.

The `parameters` text is the format of AUTOMATIC1111's web UI and others:

    a fox in the snow
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 4, Seed: 7, Size: 128x128, Model: tiny, Version: minisd 0.1.0

PNG files store it in a text chunk, JPEG and WebP files in the EXIF UserComment, GIF files in the comment. The `minisd`
text chunk of a PNG is a complete and exact record in JSON (see `Job.record`), with a format version.
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
from typing import IO, Any, NamedTuple

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from minisd.io.configs import parse_json
from minisd.io.pictures import opened_picture
from minisd.pipeline.settings import SAMPLER_LABELS

KEY = "parameters"
RECORD_KEY = "minisd"
RECORD_FORMAT = 1
MAX_TEXT = 2**20  # characters per text, which is also Pillow's limit for compressed ones
MAX_JSON = 2**13  # characters per JSON value, to limit the parsing time of malformed texts
NEGATIVE = "Negative prompt:"
EXACT = ("Exact prompt", "Exact negative prompt")
NAME = re.compile(r'[^",:{}]{1,80}')  # a key
QUOTED = re.compile(r'"(?:\\.|[^"\\])*"')
STEPS = re.compile(r"Steps: *\d+ *(,|$)")
TEMPLATES = ("Template:", "Negative Template:")  # the prompts before wildcards were filled in, below the settings
USUAL_KEYS = {"Steps", "Sampler", "CFG scale", "Seed", "Size", "Model", "Model hash"}
# Keys of the JSON that other programs write, and of the text chunks they write it to.
PROGRAMS = {
    "ComfyUI": {"class_type", "nodes", "last_node_id"},
    "InvokeAI": {"positive_prompt", "generation_mode", "model_weights", "invokeai_metadata", "sd-metadata", "Dream"},
    "NovelAI": {"uc", "request_type", "signed_hash"},
    "Fooocus": {"adm_guidance", "refiner_switch", "fooocus_scheme"},
    "SwarmUI": {"sui_image_params"},
}


# the noise levels of the web UI's schedule type "Automatic"
AUTOMATIC = {"dpmpp_2m": "karras", "dpmpp_sde": "karras", "dpmpp_2m_sde": "exponential"}


@dataclass(frozen=True)
class Parameters:
    """A parsed `parameters` text. Settings keep their original keys and order."""

    prompt: str
    negative_prompt: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


def read_sampler(settings: Mapping[str, str]) -> tuple[str, bool, str | None] | None:
    """Return the sampler in the settings as (name, karras, sigmas), or None if it is not supported.

    The noise levels are a suffix of the sampler, as in "DPM++ 2M Karras", or, in newer files, a "Schedule type". Of the
    other schedule types, "Automatic" is the sampler's default in the web UI, and "Uniform" the spacing of timesteps.
    """
    names = {label.lower(): name for name, label in SAMPLER_LABELS.items()} | {"pndm": "pndm"}
    label = settings.get("Sampler", "").strip().lower()
    suffix = next((kind for kind in ("karras", "exponential") if label.endswith(f" {kind}")), "")
    name = names.get(label.removesuffix(suffix).strip())
    levels = settings.get("Schedule type", "").strip().lower() or suffix
    levels = AUTOMATIC.get(name or "", "") if levels == "automatic" else levels
    if name is None or levels not in ("", "uniform", "karras", "exponential", "beta"):
        return None
    return name, levels == "karras", levels if levels in ("exponential", "beta") else None


def parameters_text(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """Format a `parameters` text. `parse_parameters` is the inverse, up to surrounding whitespace.

    Values with a comma, colon or line break are quoted as in JSON. Ambiguous prompts, such as one with a line that
    starts with "Negative prompt:", are repeated in the settings.

    Raises ValueError if the first setting is not "Steps" with an integer, by which readers detect the settings line, or
    if a key is invalid.
    """
    values = {name: str(value) for name, value in settings.items()}
    bad = [name for name in values if not NAME.fullmatch(name) or name != name.strip() or name in EXACT]
    if bad or next(iter(values), "") != "Steps" or not re.fullmatch("[0-9]+", values["Steps"]):
        raise ValueError(f"settings={values}; expected Steps=… first, and keys without commas, colons or quotes")
    prompts = prompt.strip(), negative_prompt.strip()
    text = _join(*prompts, values)
    read = parse_parameters(text)
    if (read.prompt, read.negative_prompt) == prompts:
        return text
    # always quoted, even if not required
    return text + "".join(f", {name}: {json.dumps(value)}" for name, value in zip(EXACT, prompts, strict=True))


def parse_parameters(text: str) -> Parameters:
    """Parse a `parameters` text. Without a settings line at its end, the whole text is the prompt.

    A settings line begins with Steps or has at least three settings, two of them usual ones. Only templates may follow.
    """
    lines, templates = re.split(r"\r?\n", text.strip()), list[str]()
    if not _is_settings(lines[-1]):
        starts = [i for i, line in enumerate(lines) if line.startswith(TEMPLATES) and i and _is_settings(lines[i - 1])]
        lines, templates = (lines[: starts[0]], lines[starts[0] :]) if starts else (lines, templates)
    settings = _parse_settings(lines.pop().rstrip(", ")) if _is_settings(lines[-1]) else {}
    at = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    prompt, negative = "\n".join(lines[:at]), "\n".join(lines[at:]).removeprefix(NEGATIVE)
    prompt, negative = settings.pop(EXACT[0], prompt), settings.pop(EXACT[1], negative)
    for name in reversed(TEMPLATES):
        at = next((i for i, line in enumerate(templates) if line.startswith(name)), len(templates))
        if rest := "\n".join(templates[at:]).removeprefix(name).strip():
            settings[name.removesuffix(":")] = rest
        templates = templates[:at]
    return Parameters(prompt.strip(), negative.strip(), settings)


def _is_settings(line: str) -> bool:
    names = re.findall(r"(?:^|,)\s*(\w[^:,]{0,80}):", line)
    return bool(STEPS.match(line)) or (len(names) >= 3 and len(USUAL_KEYS & {*names}) >= 2)


def describe(parameters: Parameters) -> str:
    """Format parameters as a table, with minisd's name of the sampler."""
    rows = {"Prompt": parameters.prompt}
    if parameters.negative_prompt:
        rows["Negative prompt"] = parameters.negative_prompt
    rows |= parameters.settings
    if "Sampler" in rows:
        sampler = read_sampler(parameters.settings)
        more = "" if sampler is None else " --karras" if sampler[1] else f" --sigmas {sampler[2]}" if sampler[2] else ""
        option = "not supported" if sampler is None else f"--sampler {sampler[0]}{more}"
        rows["Sampler"] += f"  ({option})"
    width = max(map(len, rows))
    return "\n".join(
        f"{name:<{width}}  {textwrap.indent(value, ' ' * (width + 2)).lstrip()}".rstrip()
        for name, value in rows.items()
    )


def read_parameters(path: str | os.PathLike[str]) -> str | None:
    """Return the `parameters` of an image file, or None. Raises OSError if the file is invalid or too large."""
    return read_texts(path).parameters


class Texts(NamedTuple):
    """The `parameters` and the record of an image file, each None if missing, and the program if it writes JSON."""

    parameters: str | None
    record: dict[str, Any] | None
    program: str = ""


def read_texts(path: str | os.PathLike[str]) -> Texts:
    """Return the generation metadata of an image file.

    A corrupted record or one of another format version is treated as missing, and so are texts in JSON, such as a
    ComfyUI workflow, which are not prompts. Raises OSError if the file is not an image, or a text is too large.
    """
    with opened_picture(path) as picture:
        picture.load()  # a text chunk may also follow the pixels
        texts, exif = {name: value for name, value in picture.info.items() if name != "exif"}, picture.getexif()
        comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
        # ComfyUI's WebP files have their JSON behind a name in the tags for the camera
        tags = (ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.ImageDescription)
        texts |= {tag.name: exif.get(tag) for tag in tags}
    text, record = texts.pop(KEY, None), texts.pop(RECORD_KEY, None)
    if not isinstance(text, str):
        text = _decode_comment(comment) if isinstance(comment, bytes) else comment
    if text is None and isinstance(comment := texts.get("comment"), bytes):  # also written by other software
        text = comment.decode("utf-8", "replace")
        text = text if parse_parameters(text[:MAX_TEXT]).settings else None
    for value in (text, record):
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise OSError(f"a text in {path} has {len(value):,} characters; expected at most {MAX_TEXT:,}")
    program = _other_program({KEY: text, **texts})
    text = None if _parse_object(text) else text
    return Texts(text if isinstance(text, str) and text.strip() else None, _parse_record(record), program)


def no_metadata(path: str | os.PathLike[str], program: str) -> OSError:
    """Return the error for an image without `parameters`, which names the program that wrote something else."""
    found = f"has the JSON of {program}, which is not read" if program else "has no generation metadata"
    return OSError(
        f"{path} {found}; expected a `parameters` text, as in images drawn by minisd or AUTOMATIC1111's web UI"
    )


def _other_program(texts: Mapping[Any, Any]) -> str:
    """Return the program that wrote the texts, if it is one of those that write JSON, or ""."""
    found = ""
    for name, text in texts.items():
        content = _parse_object(text)
        keys = {str(name), *content, *(key for value in content.values() if isinstance(value, dict) for key in value)}
        for program, known in PROGRAMS.items():
            if known & keys:
                return program
        found = found or ("another program" if content else "")
    return found


def _parse_object(text: Any) -> dict[str, Any]:
    """Parse a text as a JSON object, ignoring a name before it as in "Workflow: {…}"; empty if it is none."""
    match = re.match(r"\s*(?:[Ww]orkflow|[Pp]rompt)?:?\s*(?=\{)", text) if isinstance(text, str) else None
    if not match or len(text) > MAX_TEXT:
        return {}
    try:
        content = json.loads(text[match.end() :].rstrip("\0 \n"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _parse_record(text: Any) -> dict[str, Any] | None:
    try:
        record = parse_json(text)
    except (TypeError, ValueError):
        return None
    return record if isinstance(record, dict) and record.pop("format", None) == RECORD_FORMAT else None


def _decode_comment(raw: bytes) -> str:
    """Decode an EXIF UserComment: an 8-byte encoding name, then the text (EXIF 2.3, section 4.6.5)."""
    kind, body = raw[:8], raw[8:]
    if kind == b"UNICODE\0":
        # the settings are ASCII, so the positions of zero bytes reveal the byte order; UTF-8 has no zero bytes
        order = "utf-16-be" if body[::2].count(0) >= body[1::2].count(0) else "utf-16-le"
        marked = body[:2] in (b"\xff\xfe", b"\xfe\xff")
        if 0 not in body.rstrip(b"\0") and not marked and body.decode(errors="ignore").encode() == body:
            order = "utf-8-sig"
        text = body.decode("utf-16" if marked else order, "replace")
    else:
        text = (body if kind in (b"ASCII\0\0\0", bytes(8)) else raw).decode("utf-8", "replace")
    return text.strip("\0 ")


def save_png(
    picture: Image.Image, path: Path, text: str, overwrite: bool = False, record: Mapping[str, Any] | None = None
) -> Path:
    """Save an image with its `parameters` and record atomically, and return its path.

    Creates missing folders. Unless `overwrite` is set, a number is added to existing names: fox.png, fox-2.png. Raises
    OSError on failure, leaving no files behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid.uuid4().hex}.png"
    try:
        write_png(picture, temporary, text, record)
        if not overwrite:
            return _number(temporary, path)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_png(picture: Image.Image, file: Path | IO[bytes], text: str, record: Mapping[str, Any] | None = None) -> None:
    """Write an image with its `parameters` and record to a file or a stream."""
    info = PngInfo()
    info.add_text(KEY, text)  # Latin-1 if possible, else UTF-8 in an iTXt chunk
    if record is not None:
        info.add_text(RECORD_KEY, json.dumps({"format": RECORD_FORMAT} | dict(record)))
    picture.save(file, format="PNG", pnginfo=info)


def _number(temporary: Path, path: Path) -> Path:
    """Rename a finished file to `path`, adding the first free number if it exists."""
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            os.link(temporary, candidate)  # unlike rename, fails if the target exists
        except FileExistsError:
            continue
        except OSError:  # a file system without hard links
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
    """Parse `key: value, key: value …`. Values may be quoted or JSON, and may contain commas not followed by a key."""
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
    """Return the end of the value at `start`: the next comma that is not inside quotes or JSON."""
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
        return str(parse_json(value))
    except ValueError:
        return value
