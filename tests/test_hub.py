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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checkpoints import SMALL, make_parts, write_folder

from minisd.hub import choose_files

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
def test_one_variant_of_a_published_repository(variant: str | None, suffix: str) -> None:
    assert set(choose_files(PUBLISHED, variant)) == SMALL_FILES | {f"{part}{suffix}.safetensors" for part in PARTS}


def test_what_is_chosen_where_less_is_published() -> None:
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
        elif re.fullmatch(rf"/api/models/{REPO}(/revision/\w+)?", path):
            siblings = [
                {"rfilename": name, "size": len(data), "lfs": self.lfs(name), "blobId": "b"}
                for name, data in hub.files.items()
            ]
            self.json({"_id": "1", "id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"/api/models/{REPO}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": "b"}
                | ({"lfs": {"oid": hub.digests[name], "size": len(data), "pointerSize": 1}} if self.lfs(name) else {})
                for name, data in hub.files.items()
            ]
            self.json(entries)
        elif path.startswith(f"/{REPO}/resolve/"):
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
        cut = hub.hang_up.get(name) if self.command == "GET" else None
        self.reply(206 if first else 200, data[first:], headers, cut)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("hub") / "model", make_parts(SMALL))
    (folder / "model.ckpt").write_bytes(b"never to be fetched" * 100)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/model.safetensors").write_bytes(b"never to be fetched" * 100)
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(home: Path, endpoint: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """`describe("owner/name")` in a process of its own, since the client reads its settings when imported."""
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP"))}
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    code = f"from minisd.checkpoint import describe; print(describe({REPO!r}))"
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | settings, capture_output=True, text=True, timeout=120
    )


def endpoint_of(hub: Hub) -> str:
    return f"http://127.0.0.1:{hub.server_address[1]}"


CLOSED = "http://127.0.0.1:9"


def test_download_then_cache_then_offline(hub: Hub, tmp_path: Path) -> None:
    first = run(tmp_path, endpoint_of(hub))
    assert "5,054,411 parameters" in first.stdout, first.stderr
    fetched = {name for name, _ in hub.sent}
    assert fetched == set(hub.files) - {"model.ckpt", "safety_checker/model.safetensors"} - {
        name for name in hub.files if name.startswith("tokenizer/") and name.endswith(".jinja")
    }
    size = sum(len(hub.files[name]) for name in fetched)
    assert f"{REPO}: downloading {len(fetched)} files, {size / 1e9:.2f} GB" in first.stderr
    hub.sent.clear()
    second = run(tmp_path, endpoint_of(hub))
    assert second.stdout == first.stdout
    assert "downloading" not in second.stderr
    assert hub.sent == []
    for place, offline in ((endpoint_of(hub), True), (CLOSED, False)):
        again = run(tmp_path, place, offline)
        assert again.stdout == first.stdout, again.stderr
    hub.status = (500, "")
    assert run(tmp_path, endpoint_of(hub)).stdout == first.stdout


@pytest.mark.parametrize("offline", [True, False])
def test_nothing_cached_and_no_hub(tmp_path: Path, offline: bool) -> None:
    result = run(tmp_path, CLOSED, offline)
    assert result.returncode == 1
    assert f"HubError: {REPO} is not in the cache and the hub cannot be reached" in result.stderr


@pytest.mark.parametrize(
    "status, code, message",
    [
        (401, "", "the hub has no model owner/name, or it is private"),
        (404, "RepoNotFound", "the hub has no model owner/name, or it is private"),
        (404, "RevisionNotFound", "the hub has no model owner/name"),
        (403, "GatedRepo", "owner/name is gated; accept its terms on http"),
        (429, "", "is not in the cache and the hub cannot be reached"),
        (500, "", "is not in the cache and the hub cannot be reached"),
    ],
)
def test_refusals_are_explained(hub: Hub, tmp_path: Path, status: int, code: str, message: str) -> None:
    hub.status = (status, code)
    result = run(tmp_path, endpoint_of(hub))
    assert result.returncode == 1
    assert f"HubError: {message}" in result.stderr or f"HubError: owner/name {message}" in result.stderr


def test_cut_download_goes_on_with_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    name = "unet/diffusion_pytorch_model.safetensors"
    hub.hang_up[name] = len(hub.files[name]) // 2
    broken = run(tmp_path, endpoint_of(hub))
    assert f"HubError: the download of {REPO} broke off" in broken.stderr
    done = {sent for sent, _ in hub.sent} - {name}
    hub.hang_up.clear()
    hub.sent.clear()
    result = run(tmp_path, endpoint_of(hub))
    assert "5,054,411 parameters" in result.stdout, result.stderr
    assert (name, 0) in hub.sent
    assert not done & {sent for sent, _ in hub.sent}
    assert "downloading" in result.stderr


def test_damage_that_keeps_the_size_is_caught(hub: Hub, tmp_path: Path) -> None:
    name = "unet/diffusion_pytorch_model.safetensors"
    good = hub.files[name]
    hub.files[name] = good[:-100] + bytes([good[-100] ^ 1]) + good[-99:]
    result = run(tmp_path, endpoint_of(hub))
    assert f"CheckpointError: {name} arrived damaged" in result.stderr
    hub.files[name] = good
    assert "5,054,411 parameters" in run(tmp_path, endpoint_of(hub)).stdout


def test_repository_without_a_folder(hub: Hub, tmp_path: Path) -> None:
    del hub.files["vae/diffusion_pytorch_model.safetensors"]
    result = run(tmp_path, endpoint_of(hub))
    assert "CheckpointError: owner/name holds no Stable Diffusion folder" in result.stderr
    assert hub.sent == []
