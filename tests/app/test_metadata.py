"""What pictures say of how they were drawn: this program's texts, and those of AUTOMATIC1111's web UI and its like."""

from __future__ import annotations

import io
import json
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from minisd.pipeline.metadata import (
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
        ("a\nSteps: 5, Model: , Seed: 1,", Parameters("a", "", {"Steps": "5", "Model": "", "Seed": "1"})),
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
    lines = describe(parse_parameters("a\nSteps: 5, Sampler: DPM++ 3M SDE Karras, Seed: 1")).splitlines()
    assert lines == ["Prompt   a", "Steps    5", "Sampler  DPM++ 3M SDE Karras  (not supported)", "Seed     1"]


# What other programs write

MODEL = "Model hash: 0a1b2c3d4e, Model: coast_v2, Version: v1.10.1"
COMMON = {"Steps": "20", "Sampler": "Euler a", "CFG scale": "7", "Seed": "5", "Size": "512x512"}
LINE = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512"
VARIANTS: dict[str, tuple[str, Parameters]] = {
    "template lines": (
        f"a red fox\nNegative prompt: blur\n{LINE}\nTemplate: a {{red|blue}} fox\nNegative Template: __bad__",
        Parameters("a red fox", "blur", COMMON | {"Template": "a {red|blue} fox", "Negative Template": "__bad__"}),
    ),
    "a template of several lines": (
        f"a fox\n{LINE}\nTemplate: a\n__animal__, Steps: 3",
        Parameters("a fox", "", COMMON | {"Template": "a\n__animal__, Steps: 3"}),
    ),
    "a template in the settings": (
        f'a fox\n{LINE}, Template: "a {{red|blue}}, fox"',
        Parameters("a fox", "", COMMON | {"Template": "a {red|blue}, fox"}),
    ),
    "a negative template only": (
        f"a fox\n{LINE}\nNegative Template: x", Parameters("a fox", "", COMMON | {"Negative Template": "x"}),
    ),
    "Size first": (
        "a fox\nSize: 512x512, Seed: 5, Steps: 20, Sampler: Euler a, CFG scale: 7", Parameters("a fox", "", COMMON),
    ),
    "Model first": (
        "a fox\nNegative prompt: b\nModel: x, Seed: 5, Sampler: DDIM",
        Parameters("a fox", "b", {"Model": "x", "Seed": "5", "Sampler": "DDIM"}),
    ),
    "no prompt": (LINE, Parameters("", "", COMMON)),
    "no prompt, a negative one": (f"Negative prompt: b\n{LINE}", Parameters("", "b", COMMON)),
    "Windows' line ends": (f"a fox\r\nNegative prompt: b\r\n{LINE}", Parameters("a fox", "b", COMMON)),
    "a trailing comma": (f"a fox\n{LINE}, ", Parameters("a fox", "", COMMON)),
    "ADetailer": (
        f'a fox\n{LINE}, ADetailer model: face_yolov8n.pt, ADetailer prompt: "face, Steps: 3, [SEP]\\nsmile", '
        "ADetailer confidence: 0.3, ADetailer version: 24.1.2",
        Parameters("a fox", "", COMMON | {
            "ADetailer model": "face_yolov8n.pt", "ADetailer prompt": "face, Steps: 3, [SEP]\nsmile",
            "ADetailer confidence": "0.3", "ADetailer version": "24.1.2",
        }),
    ),
    "ControlNet": (
        f'a fox\n{LINE}, ControlNet 0: "Module: canny, Model: control_v11p [d14c016b], Weight: 1", Version: v1.7.0',
        Parameters("a fox", "", COMMON | {
            "ControlNet 0": "Module: canny, Model: control_v11p [d14c016b], Weight: 1", "Version": "v1.7.0",
        }),
    ),
    "hashes": (
        f'a fox\n{LINE}, Lora hashes: "ink: 0123, b: 4567", TI hashes: "bad: 89ab", Hashes: '
        '{"model": "0a1b", "lora:ink": "0123"}',
        Parameters("a fox", "", COMMON | {
            "Lora hashes": "ink: 0123, b: 4567", "TI hashes": "bad: 89ab",
            "Hashes": '{"model": "0a1b", "lora:ink": "0123"}',
        }),
    ),
    "Civitai": (
        f'a fox\n{LINE}, Civitai resources: [{{"type":"checkpoint","modelVersionId":4384}}], Civitai metadata: {{}}',
        Parameters("a fox", "", COMMON | {
            "Civitai resources": '[{"type":"checkpoint","modelVersionId":4384}]', "Civitai metadata": "{}",
        }),
    ),
    "SD.Next": (
        "a fox\nNegative prompt: b\nSteps: 20, Size: 512x512, Sampler: Euler a, CFG scale: 7, Seed: 5, App: SD.Next, "
        "Parser: native",
        Parameters("a fox", "b", COMMON | {"App": "SD.Next", "Parser": "native"}),
    ),
    "an escaped quote": (
        f'a fox\n{LINE}, Model: "a \\"b\\", c"', Parameters("a fox", "", COMMON | {"Model": 'a "b", c'}),
    ),
    "a prompt like settings": ("cat: big, dog: small, fox: red", Parameters("cat: big, dog: small, fox: red")),
    "settings in the prompt": (
        f"a fox\nSteps: 5, Seed: 3\nTemplate: no\n{LINE}",
        Parameters("a fox\nSteps: 5, Seed: 3\nTemplate: no", "", COMMON),
    ),
    "a prompt that names a template": ("a fox\nTemplate: a cat", Parameters("a fox\nTemplate: a cat")),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_texts_of_the_web_ui_and_its_extensions(name):
    text, expected = VARIANTS[name]
    assert parse_parameters(text) == expected


KSAMPLER = {"3": {"class_type": "KSampler", "inputs": {"seed": 5, "steps": 20}}}
INVOKE = {"generation_mode": "txt2img", "positive_prompt": "a fox", "steps": 20, "app_version": "4.2.0"}
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "graph": ("ComfyUI", {"prompt": json.dumps(KSAMPLER)}),
    "workflow": ("ComfyUI", {"workflow": json.dumps({"last_node_id": 9, "nodes": [], "links": []})}),
    "both": ("ComfyUI", {"prompt": json.dumps(KSAMPLER), "workflow": '{"nodes": []}'}),
    "graph in parameters": ("ComfyUI", {"parameters": json.dumps(KSAMPLER)}),
    "invokeai_metadata": ("InvokeAI", {"invokeai_metadata": json.dumps(INVOKE), "invokeai_graph": "{}"}),
    "sd-metadata": ("InvokeAI", {"sd-metadata": '{"model": "stable diffusion", "image": {"seed": 5}}'}),
    "Dream": ("InvokeAI", {"Dream": '"a fox" -s 50 -S 5 -W 512 -H 512 -C 7.5 -A k_lms'}),
    "metadata in parameters": ("InvokeAI", {"parameters": json.dumps(INVOKE)}),
    "NovelAI": ("NovelAI", {"Software": "NovelAI", "Comment": '{"prompt": "a fox", "uc": "", "steps": 28}'}),
    "Fooocus": ("Fooocus", {"parameters": '{"adm_guidance": "(1.5, 0.8, 0.3)", "prompt": "a fox"}'}),
    "SwarmUI": ("SwarmUI", {"parameters": '{"sui_image_params": {"prompt": "a fox"}}'}),
    "unknown": ("another program", {"parameters": '{"prompt": "a fox", "sampler": "x"}'}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_json_of_other_programs_is_no_prompt(run, name):
    program, texts = FOREIGN[name]
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (8, 8)).save("theirs.png", pnginfo=info)
    assert read_parameters("theirs.png") is None
    for command in (("info", "theirs.png"), ("generate", "--like", "theirs.png")):
        code, lines, err = run(*command)
        assert (code, lines) == (1, []) and f"has the JSON of {program}, which is not read" in err


def test_json_of_comfyui_in_webp(run):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = f"workflow:{json.dumps({'nodes': [], 'links': []})}"
    exif[ExifTags.Base.Model] = f"prompt:{json.dumps(KSAMPLER)}"
    Image.new("RGB", (8, 8)).save("theirs.webp", exif=exif)
    code, _, err = run("info", "theirs.webp")
    assert code == 1 and "JSON of ComfyUI" in err


@pytest.mark.parametrize("prompt", ["{red|blue} fox", "{", "[1, 2]", '"a fox"', "{}", "null"])
def test_prompts_that_only_look_like_json(tmp_path, prompt):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "ours.png", f"{prompt}\n{LINE}")
    assert parse_parameters(read_parameters(tmp_path / "ours.png") or "").prompt == prompt


CODINGS = ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-16"]


@pytest.mark.parametrize(
    "text", [f"a fox\n{LINE}", f"雪中的狐狸，清晨\n{LINE}", f"Füchsin im Schnee 🦊\n{LINE}", "雪中的狐狸"]
)
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_codings_behind_the_unicode_marker(tmp_path, text, coding, suffix):
    path = tmp_path / f"theirs{suffix}"
    Image.new("RGB", (8, 8)).save(path, exif=comment(b"UNICODE\0" + text.encode(coding)))
    if text == "雪中的狐狸" and coding == "utf-16-le":
        pytest.skip("without a space, sign or settings nothing tells the byte order")
    assert read_parameters(path) == text


def test_comments_of_gif_and_jpeg(tmp_path):
    picture = Image.new("RGB", (8, 8))
    picture.save(tmp_path / "theirs.gif", comment=f"狐狸\n{LINE}".encode())
    assert read_parameters(tmp_path / "theirs.gif") == f"狐狸\n{LINE}"
    picture.save(tmp_path / "theirs.jpg", comment=b"CREATOR: gd-jpeg v1.0 (using IJG JPEG v62), quality = 90")
    assert read_parameters(tmp_path / "theirs.jpg") is None


def test_what_cannot_be_drawn_again_is_named(run):
    text = (
        f"a fox\n{LINE}, Hires upscale: 2, Hires upscaler: Latent, ADetailer model: face.pt, Variation seed: 3, "
        "RNG: CPU, VAE hash: 01, VAE: coast.vae.pt, Template: x, Version: v1.10.1"
    )
    save_png(Image.new("RGB", (8, 8)), Path("theirs.png"), text)
    code, _, err = run("generate", "--like", "theirs.png", "--width", "32", "--height", "32", "--steps", "1")
    assert code == 0, err
    assert (
        "unsupported settings, which are ignored: Hires upscale: 2, Hires upscaler: Latent, ADetailer model: face.pt, "
        "Variation seed: 3, RNG: CPU\n" in err
    )
    assert "drawn with the autoencoder coast.vae.pt, not the model's own; if you have it, pass it with --vae" in err
