"""Downloads, from a loopback server that speaks the part of the hub's protocol that its client uses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import forked
import numpy as np
import pytest
from checkpoints import SMALL, make_parts, write_folder
from PIL import Image

from minisd import StableDiffusion
from minisd.io.checkpoint import SHIPPED
from minisd.io.hub import choose_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "owner/name"
PARTS = ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
SMALL_FILES = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "vae/config.json",
}
# The files of an official repository, as published for Stable Diffusion 1.5.
PUBLISHED = SMALL_FILES | {
    ".gitattributes",
    "README.md",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "v1-5-pruned-emaonly.safetensors",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "safety_checker/pytorch_model.bin",
    "text_encoder/pytorch_model.bin",
    "text_encoder/pytorch_model.fp16.bin",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    *(f"{part}{variant}.safetensors" for part in PARTS for variant in ("", ".fp16")),
}

OTHERS = ["text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("variant, suffix", [(None, ""), ("fp16", ".fp16"), ("bf16", "")])
def test_one_variant_of_a_published_repository(variant, suffix):
    assert set(choose_files(PUBLISHED, variant)) == SMALL_FILES | {f"{part}{suffix}.safetensors" for part in PARTS}


def test_what_is_chosen_where_less_is_published():
    unet = [name for name in PUBLISHED if name.startswith("unet/diffusion_pytorch_model")]
    for best in (".safetensors", ".bin", ".fp16.safetensors"):
        chosen = choose_files(PUBLISHED - SMALL_FILES - {name for name in PUBLISHED if name not in unet + OTHERS})
        assert [name for name in chosen if name in unet] == [f"unet/diffusion_pytorch_model{best}"]
        unet.remove(f"unet/diffusion_pytorch_model{best}")
    assert choose_files({name for name in PUBLISHED if not name.startswith("vae/")}) == []
    assert choose_files({"README.md", "model.safetensors"}) == []


class Hub(ThreadingHTTPServer):
    """A hub with one repository. `faults` maps a path to a status, or to the bytes after which it hangs up."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.digests = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        self.status: tuple[int, str] | None = None
        self.hang_up: dict[str, int] = {}
        self.sent: list[tuple[str, int]] = []  # name, first byte
        self.once: dict[str, int] = {}  # as hang_up, but only at the first try
        self.commit = COMMIT
        self.headers: dict[str, dict[str, str]] = {}
        self.redirects: dict[str, str] = {}
        self.endless: set[str] = set()

    def handle_error(self, request: object, client_address: object) -> None: ...


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of the model's description, its file tree and its files, with byte ranges."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def reply(self, status: int, body: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
        if sent is not None:
            self.close_connection = True

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        if hub.status is not None:
            status, code = hub.status
            self.reply(status, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})
        elif re.fullmatch(r"/api/models/owner/\w+(/revision/\w+)?", path):
            siblings = [
                {"rfilename": name, "size": len(data), "lfs": self.lfs(name), "blobId": "b"}
                for name, data in hub.files.items()
            ]
            self.json({"_id": "1", "id": REPO, "modelId": REPO, "sha": hub.commit, "siblings": siblings})
        elif re.match(r"/api/models/owner/\w+/tree/", path):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": "b"}
                | ({"lfs": {"oid": hub.digests[name], "size": len(data), "pointerSize": 1}} if self.lfs(name) else {})
                for name, data in hub.files.items()
            ]
            self.json(entries)
        elif re.match(r"/owner/\w+/resolve/", path):
            self.file(path.split("/", 5)[5])
        else:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def lfs(self, name: str) -> dict[str, object] | None:
        if not name.endswith(".safetensors"):
            return None
        return {"sha256": self.server.digests[name], "size": len(self.server.files[name]), "pointerSize": 1}

    def json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def file(self, name: str) -> None:
        hub = self.server
        if name not in hub.files:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data, etag = hub.files[name], f'"{hub.digests[name]}"'
        headers = {"X-Repo-Commit": COMMIT, "ETag": etag, "Accept-Ranges": "bytes"}
        first = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, "0"])[1])
        if self.command == "GET":
            hub.sent.append((name, first))
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        cut = hub.once.pop(name, hub.hang_up.get(name)) if self.command == "GET" else None
        if name in hub.redirects:
            self.reply(302, b"", {"Location": hub.redirects[name]})
        elif name in hub.endless and self.command == "GET":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while True:  # until the client hangs up
                self.wfile.write(b"100000\r\n" + bytes(2**20) + b"\r\n")
        else:
            self.reply(206 if first else 200, data[first:], headers | hub.headers.get(name, {}), cut)
            self.close_connection |= name in hub.headers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("hub") / "model", make_parts(SMALL))
    (folder / "model.ckpt").write_bytes(b"never to be fetched" * 100)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/model.safetensors").write_bytes(b"never to be fetched" * 100)
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    with serving(folder) as server:
        yield server


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """A hub that serves this folder, within the block."""
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def settings(home: Path, endpoint: str, offline: bool = False) -> dict[str, str]:
    """The environment of a process that talks to this hub alone; the client reads it when imported."""
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP"))}
    own = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return kept | own


DESCRIBE = f"from minisd.io.checkpoint import describe; print(describe({REPO!r}))"


def begin(home: Path, endpoint: str, offline: bool = False, code: str = DESCRIBE, *arguments: str) -> forked.Child:
    with mock.patch.dict(os.environ, settings(home, endpoint, offline), clear=True):
        return forked.Child(forked.execute, code, *arguments)


def run(home: Path, endpoint: str, offline: bool = False, code: str = DESCRIBE, *arguments: str) -> forked.Done:
    """`describe("owner/name")`, or other code, in a process of its own."""
    return begin(home, endpoint, offline, code, *arguments).finish()


def endpoint_of(hub: Hub) -> str:
    return f"http://127.0.0.1:{hub.server_address[1]}"


CLOSED = "http://127.0.0.1:9"


def test_download_then_cache_then_offline(hub, tmp_path):
    first = run(tmp_path, endpoint_of(hub))
    assert "5,054,411 parameters" in first.out, first.err
    fetched = {name for name, _ in hub.sent}
    assert fetched == set(hub.files) - {"model.ckpt", "safety_checker/model.safetensors"} - {
        name for name in hub.files if name.startswith("tokenizer/") and name.endswith(".jinja")
    }
    size = sum(len(hub.files[name]) for name in fetched)
    assert f"{REPO}: downloading {len(fetched)} files, {size / 1e9:.2f} GB" in first.err
    hub.sent.clear()
    second = run(tmp_path, endpoint_of(hub))
    assert second.out == first.out
    assert "downloading" not in second.err
    assert hub.sent == []
    for place, offline in ((endpoint_of(hub), True), (CLOSED, False)):
        again = run(tmp_path, place, offline)
        assert again.out == first.out, again.err
    for status in (500, 429):
        hub.status = (status, "")
        assert run(tmp_path, endpoint_of(hub)).out == first.out


def test_only_the_autoencoder_is_downloaded(hub, folder, tmp_path):
    code = f"from minisd.io.checkpoint import describe; print(describe({str(folder)!r}, vae={REPO!r}))"
    first = run(tmp_path, endpoint_of(hub), False, code)
    assert "5,054,411 parameters" in first.out, first.err
    assert {name for name, _ in hub.sent} == {"model_index.json", "vae/config.json", f"{PARTS[2]}.safetensors"}
    assert run(tmp_path, CLOSED, True, code).out == first.out


@pytest.mark.parametrize("offline", [True, False])
def test_nothing_cached_and_no_hub(tmp_path, offline):
    result = run(tmp_path, CLOSED, offline)
    assert result.code == 1
    assert f"HubError: {REPO} is not in the cache and the hub cannot be reached" in result.err


@pytest.mark.parametrize(
    "status, code, message",
    [
        (401, "", "model owner/name does not exist on the hub or is private"),
        (404, "RepoNotFound", "model owner/name does not exist on the hub or is private"),
        (404, "RevisionNotFound", "model owner/name"),
        (403, "", "model owner/name does not exist on the hub or is private"),
        (403, "GatedRepo", "owner/name is gated; accept its terms on http"),
        (429, "", "is not in the cache and the hub cannot be reached"),
        (500, "", "is not in the cache and the hub cannot be reached"),
    ],
)
def test_refusals_are_explained(hub, tmp_path, status, code, message):
    hub.status = (status, code)
    result = run(tmp_path, endpoint_of(hub))
    assert result.code == 1
    assert f"HubError: {message}" in result.err or f"HubError: owner/name {message}" in result.err


def test_cut_download_goes_on_with_what_is_missing(hub, tmp_path):
    name = "unet/diffusion_pytorch_model.safetensors"
    hub.hang_up[name] = len(hub.files[name]) // 2
    broken = run(tmp_path, endpoint_of(hub))
    assert f"HubError: the download of {REPO} failed" in broken.err
    done = {sent for sent, _ in hub.sent} - {name}
    hub.hang_up.clear()
    hub.sent.clear()
    result = run(tmp_path, endpoint_of(hub))
    assert "5,054,411 parameters" in result.out, result.err
    assert (name, 0) in hub.sent
    assert not done & {sent for sent, _ in hub.sent}
    assert "downloading" in result.err


def test_damage_that_keeps_the_size_is_caught(hub, tmp_path):
    name = "unet/diffusion_pytorch_model.safetensors"
    good = hub.files[name]
    hub.files[name] = good[:-100] + bytes([good[-100] ^ 1]) + good[-99:]
    result = run(tmp_path, endpoint_of(hub))
    assert f"CheckpointError: {name} was corrupted in transit" in result.err
    hub.files[name] = good
    assert "5,054,411 parameters" in run(tmp_path, endpoint_of(hub)).out


def damage(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def test_every_damaged_file_is_caught_and_good_ones_are_hashed_once(hub, tmp_path):
    """All damaged files are removed in one run, a run that is killed before it hashes leaves nothing trusted."""
    weights = sorted(name for name in hub.files if name.endswith(".safetensors") and "checker" not in name)
    good = dict(hub.files)
    for name in weights[:2]:
        hub.files[name] = damage(good[name])
    result = run(tmp_path, endpoint_of(hub))
    assert all(f"{name} was corrupted in transit" in result.err for name in weights[:2])
    (record,) = tmp_path.rglob("minisd-verified-*.json")
    known = json.loads(record.read_text())
    assert {name for name in known if known[name][2]} == {weights[2]}
    hub.files |= good
    assert "5,054,411 parameters" in run(tmp_path, endpoint_of(hub)).out
    assert all(entry[2] for entry in json.loads(record.read_text()).values())


KILLED = """
import os, minisd.io.hub as hub
hub._check_places = lambda *_: os._exit(9)
hub.download("owner/name")
"""


@pytest.mark.parametrize("offline", [False, True])
def test_a_run_killed_before_it_verifies_leaves_nothing_trusted(hub, tmp_path, offline):
    name = "unet/diffusion_pytorch_model.safetensors"
    good = dict(hub.files)
    hub.files[name] = damage(good[name])
    assert run(tmp_path, endpoint_of(hub), False, KILLED).code == 9
    assert [*tmp_path.rglob("diffusion_pytorch_model.safetensors")]
    for _ in range(2):
        result = run(tmp_path, endpoint_of(hub), offline)
        assert f"CheckpointError: {name} was corrupted in transit" in result.err or _ and offline
        assert result.code == 1
    hub.files |= good
    assert "5,054,411 parameters" in run(tmp_path, endpoint_of(hub)).out
    # what is recorded is not hashed again; what has changed since then is
    (stored,) = {path.resolve() for path in tmp_path.rglob(name)}
    stored.write_bytes(damage(stored.read_bytes()))
    assert "was corrupted in transit" in run(tmp_path, endpoint_of(hub), True).err


def test_repository_without_a_folder(hub, tmp_path):
    del hub.files["vae/diffusion_pytorch_model.safetensors"]
    result = run(tmp_path, endpoint_of(hub))
    assert "CheckpointError: owner/name is not a Stable Diffusion model" in result.err
    assert hub.sent == []


DRAW = f"""
import sys
from minisd import StableDiffusion
sd = StableDiffusion.from_pretrained({REPO!r}, device="cpu")
sd("a fox in the snow", seed=7, num_inference_steps=2).save(sys.argv[1])
"""


def test_the_tiny_model_from_the_hub_draws_as_the_shipped_one(tmp_path):
    shipped = StableDiffusion.from_pretrained(device="cpu")("a fox in the snow", seed=7, num_inference_steps=2)
    with serving(SHIPPED) as hub:
        for offline in (False, True):
            result = run(tmp_path / "home", endpoint_of(hub), offline, DRAW, str(tmp_path / "fox.png"))
            assert result.code == 0, result.err
            drawn = np.asarray(Image.open(tmp_path / "fox.png"))
            (tmp_path / "fox.png").unlink()
            assert np.array_equal(drawn, np.asarray(shipped))
        assert {name.partition("/")[0] for name, _ in hub.sent} == {
            "minisd.json", "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae",
        }  # fmt: skip


def test_a_cut_connection_is_taken_up_where_it_broke(hub, tmp_path):
    name = "unet/diffusion_pytorch_model.safetensors"
    hub.once[name] = len(hub.files[name]) - 1000
    result = run(tmp_path, endpoint_of(hub))
    assert "5,054,411 parameters" in result.out, result.err
    (first, again) = (start for sent, start in hub.sent if sent == name)
    assert first == 0 and again == 10 * 2**20  # the client writes 10 MB at a time
    (stored,) = tmp_path.rglob(name)
    assert hashlib.sha256(stored.read_bytes()).hexdigest() == hub.digests[name]
    assert not [*tmp_path.rglob("*.incomplete")]


def test_two_processes_download_into_one_cache(hub, tmp_path):
    both = [begin(tmp_path, endpoint_of(hub)) for _ in range(2)]
    for process in both:
        result = process.finish()
        assert "5,054,411 parameters" in result.out, result.err
    stored = {path for path in tmp_path.rglob("*.safetensors")}
    assert len(stored) == 3 and not [*tmp_path.rglob("*.incomplete")]
    for path in stored:
        name = "/".join(path.parts[-2:])
        assert hashlib.sha256(path.read_bytes()).hexdigest() == hub.digests[name]


ATTEMPTS = """
import sys
from minisd.io.checkpoint import describe
for line in sys.stdin:
    try:
        describe(line.strip())
        print("loaded", flush=True)
    except Exception as error:
        print(type(error).__name__, str(error).replace("\\n", " "), flush=True)
"""


def test_a_hub_that_lies(hub, folder, tmp_path):
    """Each lie with a repository of its own, in one process; nothing loads, and nothing is written outside."""
    config, weights = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
    outside, home = tmp_path / "outside", tmp_path / "home"
    outside.mkdir()
    (outside / "secret.json").write_text("{}")

    def lie(number: int) -> str:
        if number == 0:
            hub.redirects[config] = f"file://{outside}/secret.json"
            return "HubError the download of .* failed"
        if number == 1:
            hub.endless.add(config)
            return "HubError the download of .* failed .*received more than"
        if number == 2:
            hub.headers[config] = {"Content-Length": str(len(hub.files[config]) - 10)}
            return "(HubError the download of .* failed|CheckpointError .*config.json is not JSON)"
        if number == 3:
            hub.headers[weights] = {"ETag": f'"{outside}/written"'}
            return "HubError http.* placed unet/diffusion_pytorch_model.safetensors at .*; do not trust it"
        if number == 4:
            hub.commit = "../../../outside"
            return "HubError .* sent an invalid commit hash for owner/lie4 .*; do not trust it"
        if number == 5:
            more = [f"unet/../../{outside.name}/x.safetensors", "/etc/x.safetensors", "vae/*.safetensors"]
            hub.files |= dict.fromkeys(more, b"x")
            hub.digests |= dict.fromkeys(more, "0" * 64)
            return "loaded"
        hub.digests = dict.fromkeys(hub.digests, "0" * 64)
        return "CheckpointError .* was corrupted in transit"

    process = subprocess.Popen(
        [sys.executable, "-c", ATTEMPTS],
        env=settings(home, endpoint_of(hub)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    good = dict(hub.files), dict(hub.digests)
    for number in range(7):
        expected = lie(number)
        process.stdin.write(f"owner/lie{number}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert re.match(expected, answer), (number, answer)
        hub.files, hub.digests, hub.commit = *map(dict, good), COMMIT
        for faults in (hub.redirects, hub.headers, hub.endless):
            faults.clear()
    assert not {name for name, _ in hub.sent if ".." in name or "*" in name or "/etc" in name}
    process.stdin.close()
    assert process.wait(60) == 0
    # the client itself follows such an ETag, once, to a new file: what HF_ENDPOINT names must be trusted that far
    assert {path.name for path in outside.iterdir()} <= {"secret.json", "written", "written.lock"}
    assert not [path for path in home.rglob("*") if path.name == "secret.json"]
