"""Pictures as input: read whole, whatever kind they are, or refused by name."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from minisd.io.pictures import read_picture
from minisd.pipeline.metadata import read_parameters


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def empty_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is so large."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


SCENE = Image.fromarray(
    np.kron(np.array([[[250, 10, 10], [10, 250, 10]], [[10, 10, 250], [250, 250, 10]]]), np.ones((8, 8, 1))).astype(
        np.uint8
    )
)
CORNERS = {"left top": (2, 2), "right top": (13, 2), "left bottom": (2, 13), "right bottom": (13, 13)}


def corners(picture: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(round(x / 125) for x in picture.getpixel(place)) for place in CORNERS.values()]


READABLE: dict[str, bytes] = {
    "PNG": encoded(SCENE),
    "JPEG": encoded(SCENE, "JPEG", quality=95),
    "WebP": encoded(SCENE, "WEBP", lossless=True),
    "GIF": encoded(SCENE, "GIF"),
    "BMP": encoded(SCENE, "BMP"),
    "TIFF": encoded(SCENE, "TIFF"),
    "palette": encoded(SCENE.quantize(4)),
    "CMYK": encoded(SCENE.convert("CMYK"), "TIFF"),
    "alpha": encoded(SCENE.convert("RGBA")),
    "animated": encoded(SCENE, "GIF", save_all=True, append_images=[Image.new("RGB", SCENE.size)]),
    "animated PNG": encoded(SCENE, "PNG", save_all=True, append_images=[Image.new("RGB", SCENE.size)]),
    "turned by EXIF": encoded(SCENE.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=turned(6)),
    "unknown orientation": encoded(SCENE, "JPEG", quality=95, exif=turned(99)),
    "broken EXIF": encoded(SCENE, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"),
}


@pytest.mark.filterwarnings("error")
def test_pictures_of_every_kind_are_read(tmp_path):
    """All of them show the same four corners, whatever the file is called."""
    assert corners(SCENE) == [(2, 0, 0), (0, 2, 0), (0, 0, 2), (2, 2, 0)]
    for name, content in READABLE.items():
        (tmp_path / "x.png").write_bytes(content)
        assert corners(read_picture(tmp_path / "x.png", 16, 16)) == corners(SCENE), name
        assert read_parameters(tmp_path / "x.png") is None
    (tmp_path / "x.png").write_bytes(encoded(Image.fromarray(np.full((5, 9), 32_768, np.uint16))))
    assert read_picture(tmp_path / "x.png", 16, 16).getpixel((3, 3)) == (128, 128, 128)
    (tmp_path / "x.png").write_bytes(encoded(Image.new("LA", (5, 9), (0, 128))))
    assert read_picture(tmp_path / "x.png", 16, 16).getpixel((3, 3)) == (127, 127, 127)
    for size in ((1, 1), (60_000, 1), (1, 60_000)):
        (tmp_path / "x.png").write_bytes(encoded(Image.new("RGB", size, "red")))
        assert read_picture(tmp_path / "x.png", 16, 24).getcolors() == [(384, (255, 0, 0))]


PNG = encoded(SCENE)
UNREADABLE: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(100),
    "a web page": b"<!DOCTYPE html><html></html>",
    "a vector drawing": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a PDF": b"%PDF-1.4\n1 0 obj",
    "PostScript, which Pillow would give to another program": encoded(SCENE, "EPS"),
    "2.5 billion pixels": empty_png(50_000, 50_000),
    "as many as can be written": empty_png(2**31 - 1, 2**31 - 1),
    "no width": empty_png(0, 5),
    "text that grows to 128 MB": PNG[:33] + chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(2**27))) + PNG[33:],
} | {
    f"{name}, cut to {share}": content[: int(share * len(content))]
    for name, content in READABLE.items()
    for share in (0.0, 0.05, 0.5)
    if (name, share) not in (("animated", 0.5), ("animated PNG", 0.5))  # whose first picture is whole
}  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_what_is_no_picture_is_refused_by_name(tmp_path):
    path = tmp_path / "x.png"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, content in UNREADABLE.items():
        path.write_bytes(content)
        with pytest.raises(OSError, match=re.escape(str(path))) as caught:
            read_picture(path, 16, 16)
        assert "use a PNG, JPEG or WebP file" in str(caught.value), name
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 100e6
    for missing in (tmp_path / "none.png", tmp_path):
        with pytest.raises(OSError, match=re.escape(str(missing))):
            read_picture(missing, 16, 16)


MEASURE = """
import resource, sys
from pathlib import Path
from minisd.pipeline.metadata import read_parameters
from minisd.io.pictures import read_picture
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for read in (lambda path: read_picture(path, 64, 64).size, read_parameters):
    try:
        print(read(Path(sys.argv[1])))
    except OSError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("kind, side, limit, said", [
    ("81-megapixel PNG", 9000, 100e6, "is 9000×9000; expected at most 33,554,432 pixels: scale it down"),
    ("81-megapixel JPEG", 9000, 300e6, "(64, 64)"),
    ("the largest PNG that is read, with alpha", 5792, 700e6, "(64, 64)"),
])  # fmt: skip
def test_large_pictures_cost_bounded_memory(tmp_path, kind, side, limit, said):
    path = tmp_path / "x"
    picture = Image.new("LA" if "alpha" in kind else "L", (side, side), (9, 9) if "alpha" in kind else 9)
    picture.save(path, "JPEG" if "JPEG" in kind else "PNG")
    assert path.stat().st_size < 1.5e6
    output = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    *lines, cost = output.stdout.splitlines()
    assert said in lines[0] and int(cost) < limit, output.stdout


@pytest.mark.timeout(20)
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    for read in (lambda path: read_picture(path, 16, 16), read_parameters):
        with pytest.raises(OSError, match="is not a regular file"):
            read(tmp_path / "x.png")


def test_postscript_is_given_to_no_program(tmp_path, monkeypatch):
    """Pillow alone would call Ghostscript, for which a script stands here that leaves a file."""
    path, canary = tmp_path / "x.png", tmp_path / "ran"
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {canary}\n")
    script.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(script))
    path.write_bytes(encoded(SCENE, "EPS"))
    with contextlib.suppress(OSError, SyntaxError), Image.open(path) as opened:
        opened.load()
    assert canary.exists(), "the test shows nothing"
    canary.unlink()
    for read in (lambda: read_picture(path, 16, 16), lambda: read_parameters(path)):
        with pytest.raises(OSError, match="cannot identify image file"):
            read()
    assert not canary.exists()
