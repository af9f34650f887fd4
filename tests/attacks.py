"""Attacks on what SECURITY.md promises, by kind and by seed: `hunt.py` runs many of each, `test_trust.py` some.

Each function makes a number of attempts in a folder and returns how they ended: "refused", by an error of a documented
type or a status of 400 and more; "harmless", accepted, and without the effect that the attack is for; or "HOLE: …".
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import random
import struct
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hostile_pickles import archive, archives_read_in_two_ways, programs
from PIL import Image, ImageFile
from safetensors.torch import save_file

from minisd import StableDiffusion
from minisd.app import cli
from minisd.bench import compare
from minisd.bench.process import Process
from minisd.features.distributed import show
from minisd.features.prompts import find_unknown_words, read
from minisd.features.textual_inversion import add_token
from minisd.features.validate import check_inside, dtype_of
from minisd.io import hub
from minisd.io.adapter_files import save_lora
from minisd.io.configs import parse_json
from minisd.io.pictures import read_picture
from minisd.io.tensors import CheckpointError, read_header
from minisd.lora import LoRA, LowRank
from minisd.pipeline.metadata import read_parameters, write_png
from minisd.tokenizer import Tokenizer

Attack = Callable[[int, random.Random, Path], Counter[str]]
SECONDS = 5.0  # of processor time, for a text of any kind
ESCAPES = [
    "\x1b[2J",
    "\x1b]0;x\x07",
    "\x9b31m",
    "\r",
    "\b",
    "\x00",
    "\x7f",
    "\u202e",
    "\u2066",
    "\x85",
    "\u2028",
    "\x1bP",
]


class Killed(BaseException):
    """A kill, for which no handler of errors can stand in."""


def downloads(attempts: int, rng: random.Random, folder: Path) -> Counter[str]:
    """Files damaged at their size, and kills while they are verified: no later run may trust a damaged one."""
    found = Counter[str]()
    for number in range(attempts):
        snapshot = folder / f"models--{number}/snapshots/{number:040}"
        names = {f"part{i}.safetensors": rng.randbytes(64) for i in range(rng.randint(1, 5))}
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in names.items()}
        snapshot.mkdir(parents=True)
        damaged = set()
        for name, data in names.items():
            if rng.random() < 0.4:
                damaged.add(name)
                data = bytes([data[0] ^ 1]) + data[1:]
            (snapshot / name).write_bytes(data)
        hashed, kill = [0], rng.randint(0, 6)

        def digest(stream: Any, kind: str, hashed: list[int] = hashed, kill: int = kill) -> Any:
            hashed[0] += 1
            if hashed[0] > kill:
                raise Killed
            return hashlib.sha256(stream.read())

        with mock.patch.object(hub.hashlib, "file_digest", digest), contextlib.suppress(Killed, CheckpointError):
            hub._verify(snapshot, digests)
        left = {name for name in damaged if (snapshot / name).exists()}
        try:
            hub._verify(snapshot, {name: digests[name] for name in names if (snapshot / name).exists()})
            found["HOLE: a damaged file is trusted" if left else "harmless"] += 1
        except CheckpointError:
            found["refused" if left else "HOLE: a good file is refused"] += 1
    return found


def archives(attempts: int, rng: random.Random, folder: Path) -> Counter[str]:
    """Zip archives that two readers read in two ways, with bytes changed at random in their tables."""
    canary, path, found = folder / "ran", folder / "model.ckpt", Counter[str]()
    bad, harmless = [*programs(canary).values()], [b"\x80\x02}.", b"\x80\x02}X\x01\0\0\0aK\x01s."]
    for _ in range(attempts):
        pair = [rng.choice(harmless), rng.choice(bad + harmless)]
        rng.shuffle(pair)
        data = bytearray(rng.choice([*archives_read_in_two_ways(*pair).values(), archive(pair[0])]))
        for _ in range(rng.choice([0, 0, 1, 2, 4])):
            data[rng.randrange(len(data))] = rng.choice([0, 1, 255, rng.randrange(256)])
        path.write_bytes(data)
        try:
            read_header(path)
        except CheckpointError:
            found["refused"] += 1
        else:
            (name,) = {each for each in zipfile.ZipFile(path).namelist() if each.endswith("/data.pkl")}
            one = zipfile.ZipFile(path).read(name)
            two = bytes(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))
            found["harmless" if one == two else "HOLE: two readings"] += 1
        if canary.exists():
            found["HOLE: code ran"] += 1
            canary.unlink()
    return found


def paths(attempts: int, rng: random.Random, folder: Path) -> Counter[str]:
    """Names of files in data files: anything but a regular file in the folder is refused."""
    inside, found = folder / "in", Counter[str]()
    (inside / "sub").mkdir(parents=True)
    for place in (inside / "a.png", inside / "sub/a.png", folder / "a.png", inside / "C:a.png", inside / "..\\a.png"):
        place.write_bytes(b"x")
    (inside / "link.png").symlink_to(folder / "a.png")
    (inside / "out").symlink_to(folder)
    os.mkfifo(inside / "pipe.png")
    parts = [
        "a.png",
        "sub",
        "..",
        ".",
        "out",
        "link.png",
        "pipe.png",
        "C:",
        "C:a.png",
        "",
        "\0",
        "in",
        "..\\a.png",
        "~",
    ]
    for _ in range(attempts):
        name: Any = rng.choice(["/", "/", "/", "\\"]).join(rng.choices(parts, k=rng.randint(1, 4)))
        name = rng.choice([name] * 8 + [str(folder / "a.png"), f"//host/{name}", f"\\\\?\\{name}", 7, None, [name]])
        try:
            path = check_inside(inside, name)
        except ValueError:
            found["refused"] += 1
            continue
        real = os.path.realpath(path)
        own = os.path.commonpath([real, os.path.realpath(inside)]) == os.path.realpath(inside)
        found["harmless" if own and os.path.isfile(real) else f"HOLE: {name!r}"] += 1
    return found


def terminal(attempts: int, rng: random.Random, folder: Path) -> Counter[str]:
    """Texts of pictures, class names in configurations, names of files: none steers the terminal, in any encoding."""
    found, path = Counter[str](), folder / "x.png"
    for number in range(attempts):
        text = "".join(rng.choice([*ESCAPES, "狐狸", "é", "a fox", " ", "\n"]) for _ in range(rng.randint(1, 9)))
        encoding = rng.choice(["utf-8", "cp1252", "ascii", "cp437", "koi8-r", "cp932"])
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=e) for e in ("strict", "backslashreplace")]
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            if number % 3 == 0:
                write_png(Image.new("RGB", (1, 1)), path, f"{text}\nSteps: 1, Sampler: {text}")
                code = cli.main(["info", str(path), *rng.choice([[], ["--raw"]])])
            elif number % 3 == 1:
                (folder / "model_index.json").write_text(json.dumps({"_class_name": text}))
                code = cli.main(["info", str(folder)]) - 1
            else:
                code = cli.main(["info", text.replace("\0", "") or "x"]) and 0
                show(text)
        output = ""
        for stream in streams:
            stream.flush()
            output += stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        bad = {
            letter for letter in output if letter not in "\n\t" and unicodedata.category(letter) in ("Cc", "Zl", "Cs")
        }
        bad |= {x for x in output if unicodedata.bidirectional(x) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI")}
        found[f"HOLE: {bad}" if bad else f"HOLE: exit code {code}" if code else "harmless"] += 1
    return found


def texts(attempts: int, rng: random.Random, folder: Path) -> Counter[str]:
    """Prompts and words whose reading could take time that grows with the square of their length."""
    found, tokenizer = Counter[str](), Tokenizer.from_pretrained()
    embeddings = torch.ones(len(tokenizer.vocabulary), 1)
    pieces = [
        "(:",
        "(",
        "[",
        ")",
        "a\u0301\u0316",
        "\u0301\u0316",
        "\u0958\u0344",
        "\u1100\u1161\u11a8",
        "(a:1.1)",
        "\\(",
        ":",
    ]
    pieces += ["((a", "1.", "\U0001f600", "中", "ab", "!?", "\ud800", "e", "(a:1e", " a", "<|startoftext|>"]
    for _ in range(attempts):
        size = int(10 ** rng.uniform(0, 6))
        cycle = rng.choices(pieces, k=rng.randint(1, 3)) + [" "] * rng.randint(0, 1)
        text = ("".join(cycle) * size)[:size]
        started = time.process_time()
        refused = False
        for attempt in (
            lambda text=text: read(text, tokenizer),
            lambda text=text: find_unknown_words(text, tokenizer, embeddings),
            lambda text=text, size=size: add_token(tokenizer, text, 1 + size % 700),
        ):
            try:
                attempt()
            except ValueError:
                refused = True
        seconds = time.process_time() - started
        slow = f"HOLE: {seconds:.0f} s for {size} characters of {''.join(cycle)!r}"
        found[slow if seconds > SECONDS else "refused" if refused else "harmless"] += 1
    return found


def modules(attempts: int, rng: random.Random, folder: Path) -> Counter[str]:
    """Modules of usual names in the working folder, beside which child processes are started."""
    canary, found, before = folder / "ran", Counter[str](), Path.cwd()
    names = ["torch", "json", "numpy", "time", "minisd", "diffusers", "typing", "sitecustomize", "encodings", "PIL"]
    os.chdir(folder)
    try:
        for number in range(attempts):
            for name in rng.sample(names, 3):
                (folder / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')")
            if number % 10 == 0:  # by -m
                process = Process("minisd", compare.Settings())
                with contextlib.suppress(RuntimeError):
                    process.ask("nothing")
                process.close()
            else:  # by -c
                compare._import_seconds(rng.choice(["json", "typing", "time"]))
            found["HOLE: a module of the folder ran" if canary.exists() else "harmless"] += 1
            for path in folder.iterdir():
                path.unlink() if path.is_file() else None
    finally:
        os.chdir(before)
    return found


def threads(attempts: int, rng: random.Random, folder: Path) -> Counter[str]:
    """Changes of a model while another thread draws: the old picture, or the change is refused."""
    from checkpoints import SMALL, make_parts, write_folder

    sd = StableDiffusion.from_pretrained(write_folder(folder / "model", make_parts(SMALL)), device="cpu")
    update = LowRank(sd.unet.conv_in, 2)
    torch.nn.init.ones_(update.lora_B)
    save_lora(LoRA({"unet.conv_in": update}), folder / "style.safetensors")
    width = sd.text_encoder.token_embedding.weight.shape[1]
    save_file({"<new>": torch.ones(1, width)}, folder / "word.safetensors")
    settings: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "progress": False}
    expected, found = sd("fox", **settings).tobytes(), Counter[str]()
    changes = [
        lambda: sd.load_lora(folder / "style.safetensors", "style"),
        lambda: sd.load_textual_inversion(folder / "word.safetensors"),
        sd.compile,
    ]
    for _ in range(attempts):
        refused: list[RuntimeError] = []

        def change(attempt: Callable[[], object], refused: list[RuntimeError] = refused) -> None:
            try:
                attempt()
            except RuntimeError as error:
                refused.append(error)

        at, latents = rng.randint(0, 1), None
        for step in sd.denoise("fox", seed=3, num_inference_steps=2):
            latents = step.latents
            if step.index == at:
                thread = threading.Thread(target=change, args=(rng.choice(changes),))
                thread.start()
                thread.join()
        assert latents is not None
        same = sd.decode(latents)[0].tobytes() == expected
        found["HOLE: another picture" if not same else "refused" if refused else "harmless"] += 1
        sd.unload_lora()
    return found


def costs(attempts: int, rng: random.Random, folder: Path) -> Counter[str]:
    """Pictures larger than they look, JSON that is deep or repeats keys, names of precisions."""
    found, path = Counter[str](), folder / "x.png"
    for number in range(attempts):
        if number % 3 == 0:
            width = int(10 ** rng.uniform(2, 4.5))
            height = int(10 ** rng.uniform(5, 8.2)) // width + 1
            bits, kind = rng.choice([(1, 0), (8, 0), (16, 0), (8, 2), (8, 3), (8, 4), (8, 6), (16, 6)])
            header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
            chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
            data = b"".join(
                struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
                for name, body in chunks
            )
            path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
            large = width * height > 2**25
            with (
                mock.patch.object(ImageFile.ImageFile, "load", side_effect=AssertionError)
                if large
                else contextlib.nullcontext()
            ):
                try:
                    rng.choice([lambda: read_picture(path, 8, 8), lambda: read_parameters(path)])()
                    found["HOLE: a large picture is read" if large else "harmless"] += 1
                except OSError as error:
                    decoded = isinstance(error.__cause__, AssertionError)
                    found["HOLE: it is decoded" if decoded else "refused"] += 1
        elif number % 3 == 1:
            depth, repeated = int(10 ** rng.uniform(0, 6)), rng.random() < 0.3
            opening = rng.choice(["[", '{"a":', '[{"a":'])
            closing = "".join({"[": "]", "{": "}"}[letter] for letter in reversed(opening) if letter in "[{")
            inner = '{"b": 1, "b": 2}' if repeated else "1"
            try:
                parse_json(opening * depth + inner + closing * depth)
                deep = depth * len(closing) + repeated > 64
                found["HOLE: parsed" if deep or repeated else "harmless"] += 1
            except ValueError:
                found["refused"] += 1
        else:
            name = rng.choice([rng.choice(dir(torch)), "load", "hub", "os", "float32", "__class__", "float16 ", ""])
            try:
                dtype = dtype_of(name)
                found["harmless" if dtype.is_floating_point and str(dtype) == f"torch.{name}" else "HOLE: " + name] += 1
            except ValueError:
                found["refused"] += 1
    return found


HOSTS = """evil.example evil.example:7860 127.0.0.1.evil.example localhost.evil.example [::1].evil.example
    localhost@evil.example evil.example:127.0.0.1 xn--127-0.example 127.0.0.1:x 127.1.evil localhost.""".split()  # noqa: SIM905
ORIGINS = """http://evil.example null https://127.0.0.1.evil.example file:// http://localhost http://127.0.0.1
    http://127.0.0.1:1 chrome-extension://x http://0.0.0.0:7860""".split()  # noqa: SIM905
PLACES = """/upload /gradio_api/upload /file=/etc/passwd /gradio_api/file=/etc/passwd /../../etc/passwd /page.html
    /%2e%2e/%2e%2e/etc/passwd /..%2fweb.py /page.css/../web.py /page.js%00.py /static//etc/passwd //etc/passwd /web.py
    /proxy=http://evil.example/x /config /queue/join /docs /openapi.json /\\..\\web.py""".split()  # noqa: SIM905
FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
OBJECTS: list[Any] = [FILE, {"url": "http://evil.example/x"}, ["a"], 5, None, True, {}, [[]], 1e308]


def page(attempts: int, rng: random.Random, folder: Path) -> Counter[str]:
    """The page of `minisd serve`: hosts, origins, uploads, objects, traversal, floods, texts that could freeze it."""
    from checkpoints import SMALL, make_parts, write_folder
    from page_client import page_of

    sd = StableDiffusion.from_pretrained(write_folder(folder / "model", make_parts(SMALL)), device="cpu")
    found, drawing = Counter[str](), json.dumps({"prompt": "fox", "num_inference_steps": "1"}).encode()
    freezing = [
        "(:" * 25_000,
        "a\u0301\u0316" * 16_000,
        "\u0301\u0316" * 100_000,
        "(" * 40_000,
        "[(" * 9_000,
        " a" * 25_000,
    ]
    secret = folder / "secret.txt"
    secret.write_text("the secret")

    def attack(kind: str) -> tuple[str, str, bytes, dict[str, str | None]]:
        if kind == "host":
            return rng.choice([("POST", "/draw"), ("GET", "/")]) + (
                drawing,
                {"Host": rng.choice(HOSTS), "Origin": None},
            )
        if kind == "origin":
            site = rng.choice([{"Origin": rng.choice(ORIGINS)}, {"Origin": None, "Sec-Fetch-Site": "cross-site"}])
            return "POST", rng.choice(["/draw", "/look"]), drawing, site
        if kind == "upload":
            form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n12\r\n--x--\r\n'
            kinds = ["multipart/form-data; boundary=x", "text/plain", "application/x-www-form-urlencoded", None]
            return (
                rng.choice(["POST", "PUT"]),
                rng.choice([*PLACES, "/draw", "/"]),
                form,
                {"Content-Type": rng.choice(kinds)},
            )
        if kind == "object":
            names = [
                "prompt",
                "negative_prompt",
                "seed",
                "num_inference_steps",
                "sampler",
                "model",
                "__class__",
                "lora",
            ]
            name, value = rng.choice(names), rng.choice(OBJECTS)
            value = str(secret) if name in ("model", "__class__", "lora") else value
            return "POST", "/draw", json.dumps({"prompt": "fox", name: value}).encode(), {}
        if kind == "traversal":
            places = [*PLACES, f"/{secret}", f"/file={secret}"]
            return rng.choice(["GET", "HEAD", "OPTIONS", "DELETE"]), rng.choice(places), b"", {}
        bodies = [b"[" * 300_000, b'{"prompt": "a", "prompt": "b"}', b"\xff", b"", b"x" * 2**21, rng.randbytes(99)]
        bodies += [json.dumps({"prompt": text}).encode() for text in freezing]
        return "POST", "/draw", rng.choice(bodies), {}

    with page_of(sd) as address:
        before = {*folder.rglob("*")}
        for number in range(attempts):
            kind = ("host", "origin", "upload", "object", "traversal", "freezing")[number % 6]
            method, place, body, headers = attack(kind)
            started = time.monotonic()
            try:
                response = address.send(method, place, body, headers)
                status, said = response.status, response.read()
            except OSError:  # the server hangs up on a body that is too large
                status, said = 400, b""
            refused = status >= 400 or (kind == "freezing" and set(json.loads(said)) == {"error"})
            hole = b"the secret" in said or b"root:" in said or b"import" in said or not refused
            hole |= time.monotonic() - started > 4 * SECONDS
            found[f"HOLE: {method} {place} {headers} {body[:80]!r}: {status}" if hole else "refused"] += 1
        for _ in range(attempts // 6):  # pages that leave before their turn
            address_of_left = address.draw(prompt="fox", num_inference_steps="50")
            next(address_of_left)
            address_of_left.close()
            found["harmless"] += 1
        drawn = [*address.draw(prompt="fox", seed="1", num_inference_steps="2")][-1]
        whole = base64.b64decode(drawn["picture"]).startswith(b"\x89PNG")
        found["harmless" if whole and {*folder.rglob("*")} == before else "HOLE: files are left"] += 1
    return found


# each kind with the share of the attempts that it gets: those that start processes or draw are few
KINDS: dict[str, tuple[Attack, float]] = {
    "downloads": (downloads, 0.12),
    "archives": (archives, 0.3),
    "paths": (paths, 0.2),
    "terminal": (terminal, 0.1),
    "texts": (texts, 0.03),
    "page": (page, 0.06),
    "modules": (modules, 0.002),
    "threads": (threads, 0.01),
    "costs": (costs, 0.15),
}
