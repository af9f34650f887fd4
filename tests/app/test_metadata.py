"""What pictures say of how they were drawn: this program's texts, and those of AUTOMATIC1111's web UI and its like."""

from __future__ import annotations

import io
import json
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from minisd.app.metadata import (
    Parameters,
    describe,
    parameters_text,
    parse_parameters,
    read_parameters,
    read_sampler,
    save_png,
)

Run = Callable[..., tuple[int, list[str], str]]
OLD = """a lighthouse on a cliff, (storm:1.3), <lora:ink wash:0.6>
Steps: of wood lead up to it

oil on canvas
Negative prompt: people, text
frame
Steps: 24, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 3141592653, Size: 640x448, Model hash: 0a1b2c3d4e, Model: \
coast_v2, Denoising strength: 0.45, Clip skip: 2, ENSD: 31337, Hires upscale: 1.5, Hires steps: 12, Hires upscaler: \
Latent (nearest-exact), Lora hashes: "ink wash: 0123456789ab, other: cdef01234567", Size-1: 640, Version: v1.6.0"""
NEW = """a lighthouse
Steps: 8, Sampler: Euler, Schedule type: Karras, CFG scale: 1, Seed: 5, Size: 512x512, Model: "coast, at 4:30", \
Hashes: {"model": "0a1b2c3d4e", "lora:ink, wash": "ab"}, Civitai resources: [{"type": "lora", "weight": 0.6}], \
Template: "a {lighthouse|mill}\\nby \\"the\\" sea", Version: f2.0.1"""


def test_an_older_text_of_the_web_ui():
    said = parse_parameters(OLD)
    assert said.prompt == (
        "a lighthouse on a cliff, (storm:1.3), <lora:ink wash:0.6>\nSteps: of wood lead up to it\n\noil on canvas"
    )
    assert said.negative_prompt == "people, text\nframe"
    assert said.settings == {
        "Steps": "24",
        "Sampler": "DPM++ 2M Karras",
        "CFG scale": "6.5",
        "Seed": "3141592653",
        "Size": "640x448",
        "Model hash": "0a1b2c3d4e",
        "Model": "coast_v2",
        "Denoising strength": "0.45",
        "Clip skip": "2",
        "ENSD": "31337",
        "Hires upscale": "1.5",
        "Hires steps": "12",
        "Hires upscaler": "Latent (nearest-exact)",
        "Lora hashes": "ink wash: 0123456789ab, other: cdef01234567",
        "Size-1": "640",
        "Version": "v1.6.0",
    }


def test_a_newer_text_with_json_and_quotes():
    said = parse_parameters(NEW.replace("\n", "\r\n"))
    assert (said.prompt, said.negative_prompt) == ("a lighthouse", "")
    assert said.settings["Model"] == "coast, at 4:30"
    assert json.loads(said.settings["Hashes"]) == {"model": "0a1b2c3d4e", "lora:ink, wash": "ab"}
    assert json.loads(said.settings["Civitai resources"]) == [{"type": "lora", "weight": 0.6}]
    assert said.settings["Template"] == 'a {lighthouse|mill}\nby "the" sea'
    assert list(said.settings)[-2:] == ["Template", "Version"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Parameters("")),
        ("only words: no settings", Parameters("only words: no settings")),
        ("a stair\nSteps: many", Parameters("a stair\nSteps: many")),
        ("Steps: 5", Parameters("", "", {"Steps": "5"})),
        ("Negative prompt: fog\nSteps: 5", Parameters("", "fog", {"Steps": "5"})),
        ("a\nNegative prompt:\nSteps: 5", Parameters("a", "", {"Steps": "5"})),
        ("a\nNegative prompt: b", Parameters("a", "b")),
        # values that should have been quoted
        ("a\nSteps: 5, Model: x, y, Seed: 1", Parameters("a", "", {"Steps": "5", "Model": "x, y", "Seed": "1"})),
        ('a\nSteps: 5, Model: "x" y, Seed: 1', Parameters("a", "", {"Steps": "5", "Model": '"x" y', "Seed": "1"})),
        ('a\nSteps: 5, Model: "x, Seed: 1', Parameters("a", "", {"Steps": "5", "Model": '"x', "Seed": "1"})),
        ("a\nSteps: 5, Model: , Seed: 1,", Parameters("a", "", {"Steps": "5", "Model": "", "Seed": "1,"})),
        ("a\nSteps: 5, At: 12:30", Parameters("a", "", {"Steps": "5", "At": "12:30"})),
    ],
)
def test_texts_at_the_edge_of_the_format(text, expected):
    assert parse_parameters(text) == expected


@pytest.mark.parametrize(
    ("label", "schedule", "expected"),
    [
        ("DPM++ 2M Karras", None, ("dpmpp_2m", True, None)),
        ("DPM++ 2M", None, ("dpmpp_2m", False, None)),
        ("DPM++ 2M", "Karras", ("dpmpp_2m", True, None)),
        ("DPM++ 2M", "Automatic", ("dpmpp_2m", True, None)),
        ("DPM++ 2M", "Uniform", ("dpmpp_2m", False, None)),
        ("DPM++ 2M", "Exponential", ("dpmpp_2m", False, "exponential")),
        ("DPM++ 2M", "SGM Uniform", None),
        ("DPM++ 2M SDE Karras", None, ("dpmpp_2m_sde", True, None)),
        ("DPM++ 2M SDE Exponential", None, ("dpmpp_2m_sde", False, "exponential")),
        ("DPM++ 2M SDE", "Automatic", ("dpmpp_2m_sde", False, "exponential")),
        ("DPM++ SDE", "Automatic", ("dpmpp_sde", True, None)),
        ("DPM++ SDE", "Beta", ("dpmpp_sde", False, "beta")),
        ("DPM++ 3M SDE", None, None),
        ("Euler", None, ("euler", False, None)),
        ("Euler", "Automatic", ("euler", False, None)),
        ("euler a", None, ("euler_a", False, None)),
        ("Heun Karras", None, ("heun", True, None)),
        ("DDIM", None, ("ddim", False, None)),
        ("PLMS", None, ("pndm", False, None)),
        ("PNDM", None, ("pndm", False, None)),
        ("LCM", "Automatic", ("lcm", False, None)),
        ("UniPC", None, ("unipc", False, None)),
        ("", None, None),
    ],
)
def test_samplers_of_the_web_ui(label, schedule, expected):
    settings = {"Sampler": label} | ({} if schedule is None else {"Schedule type": schedule})
    assert read_sampler(settings) == expected


LINES = st.lists(
    st.sampled_from(["Negative prompt: x", "Negative prompt:", "Steps: 5", "Steps: 5, Seed: 3", "a", "\r"])
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('\n\r ,:"{}[]\\')) | LINES.map("\n".join)


@given(prompt=TEXT, negative=TEXT, values=st.dictionaries(st.sampled_from(["Model", "Seed", "A b-c/d", "Size"]), TEXT))
def test_any_text_survives_the_round_trip(prompt, negative, values):
    parsed = parse_parameters(parameters_text(prompt, negative, {"Steps": 20} | values))
    assert (parsed.prompt, parsed.negative_prompt) == (prompt.strip(), negative.strip())
    assert list(parsed.settings) == ["Steps", *values]
    assert {name: value.strip() for name, value in parsed.settings.items()} == {
        name: value.strip() for name, value in ({"Steps": "20"} | values).items()
    }


def test_plain_prompts_are_written_plainly():
    assert parameters_text("a\nb", "c", {"Steps": 2, "Seed": 3}) == "a\nb\nNegative prompt: c\nSteps: 2, Seed: 3"
    assert "Exact prompt" in parameters_text("a\nNegative prompt: b", "c", {"Steps": 2})


@pytest.mark.parametrize("settings", [{}, {"Seed": 1}, {"Steps": "many"}, {"Steps": 1, "a,b": 1}, {"Steps": 1, "": 1}])
def test_settings_that_cannot_be_written(settings):
    with pytest.raises(ValueError, match="expected Steps"):
        parameters_text("a", "", settings)


# Files


def comment(body: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = body
    return exif


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".png"])
@pytest.mark.parametrize(
    "body",
    [
        b"UNICODE\0" + OLD.encode("utf-16-be"),
        b"UNICODE\0" + OLD.encode("utf-16-le"),
        b"UNICODE\0" + OLD.encode("utf-16"),
        b"ASCII\0\0\0" + OLD.encode(),
        bytes(8) + OLD.encode(),
        OLD.encode(),
    ],
    ids=["big-endian", "little-endian", "marked", "ascii", "undefined", "bare"],
)
def test_exif_comments(tmp_path, suffix, body):
    path = tmp_path / f"picture{suffix}"
    # as bytes: in a PNG Pillow takes an Exif for empty that has no tags beside those of its IFD
    Image.new("RGB", (8, 8)).save(path, exif=comment(body).tobytes())
    assert read_parameters(path) == OLD


def test_exif_comments_beyond_latin(tmp_path):
    text = "雪中的狐狸 🦊 Ā Ȁ\nSteps: 5, Seed: 1"
    for order in ("utf-16-be", "utf-16-le"):
        Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=comment(b"UNICODE\0" + text.encode(order)))
        assert read_parameters(tmp_path / "a.jpg") == text


def test_pictures_without_a_text(tmp_path):
    for number, exif in enumerate((None, comment(b"UNICODE\0"), comment(b"ASCII\0\0\0" + bytes(200)), comment(b""))):
        path = tmp_path / f"{number}.jpg"
        Image.new("RGB", (8, 8)).save(path, **({} if exif is None else {"exif": exif}))
        assert read_parameters(path) is None


def test_a_text_behind_the_pixels_and_a_compressed_one(tmp_path):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", OLD)
    info = PngInfo()
    info.add_itxt("parameters", "狐" + OLD, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png", pnginfo=info)
    assert read_parameters(tmp_path / "b.png") == "狐" + OLD
    data = (tmp_path / "a.png").read_bytes()
    at, end = data.index(b"tEXt") - 4, data.index(b"IDAT") - 4
    iend = data.index(b"IEND") - 4
    (tmp_path / "c.png").write_bytes(data[:at] + data[end:iend] + data[at:end] + data[iend:])
    assert read_parameters(tmp_path / "c.png") == OLD


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="PNG")
    data = buffer.getvalue()
    more = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return data[:33] + more + data[33:]


BOMB = zlib.compress(bytes(2**27), 9)


@pytest.mark.parametrize(
    "data",
    [
        png_with((b"zTXt", b"parameters\0\0" + BOMB)),
        png_with((b"iTXt", b"parameters\0\1\0\0\0" + BOMB)),
        png_with((b"tEXt", b"parameters\0" + b"a" * (2**20 + 1))),
        png_with(*[(b"zTXt", b"k%d\0\0" % n + zlib.compress(b"a" * 2**20)) for n in range(70)]),
        png_with()[:60],
        png_with()[:20],
        b"\x89PNG\r\n\x1a\n",
        b"",
        b"GIF89a",
    ],
    ids=["zTXt bomb", "iTXt bomb", "long", "many", "cut", "cut early", "signature", "empty", "gif"],
)
def test_malicious_and_broken_files_are_a_clear_error(run, data):
    Path("bad.png").write_bytes(data)
    began = time.process_time()
    code, lines, err = run("info", "bad.png")
    assert (code, lines) == (1, []) and err.startswith("error: ") and "bad.png" in err, err
    assert run("generate", "--like", "bad.png")[:2] == (1, [])
    assert time.process_time() - began < 5


def test_a_picture_of_too_many_pixels_is_refused(run):
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = b"IHDR" + header
    Path("bad.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + png_with()[33:]
    )
    code, lines, err = run("info", "bad.png")
    assert (code, lines) == (1, []) and "bad.png is not a valid image" in err and "exceeds limit" in err


@pytest.mark.parametrize("piece", [",", " ", ":", '"', "[", "a: [", 'a: "', 'a:["x,', 'a: "b" x,', 'a: \\",'])
def test_a_hostile_text_is_read_in_no_time(piece):
    began = time.process_time()
    parse_parameters("a\nSteps: 1, b: " + piece * (2**18 // len(piece)))
    assert time.process_time() - began < 5


# Reading it


def test_info_prints_a_table(run):
    info = PngInfo()
    info.add_text("parameters", OLD)
    Image.new("RGB", (8, 8)).save("old.png", pnginfo=info)
    code, lines, _ = run("info", "old.png")
    width = len("Denoising strength") + 2
    assert (code, lines[:7]) == (
        0,
        [
            "Prompt".ljust(width) + "a lighthouse on a cliff, (storm:1.3), <lora:ink wash:0.6>",
            " " * width + "Steps: of wood lead up to it",
            "",
            " " * width + "oil on canvas",
            "Negative prompt".ljust(width) + "people, text",
            " " * width + "frame",
            "Steps".ljust(width) + "24",
        ],
    )
    assert "Sampler".ljust(width) + "DPM++ 2M Karras  (--sampler dpmpp_2m --karras)" in lines
    assert run("info", "old.png", "--raw")[1] == OLD.splitlines()


def test_a_sampler_that_is_not_known_is_called_so():
    lines = describe(parse_parameters("a\nSteps: 5, Sampler: DPM++ SDE Karras, Seed: 1")).splitlines()
    assert lines == ["Prompt   a", "Steps    5", "Sampler  DPM++ SDE Karras  (not supported)", "Seed     1"]
