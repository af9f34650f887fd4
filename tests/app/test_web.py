"""`minisd serve`: what it draws, its word maps, its messages, and its page in a real browser (see `browsers.py`)."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html import unescape
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from browsers import chromium, free_port, need_chromium, wait_for_server
from forked import Child, module
from page_client import Address, page_of
from PIL import Image
from safetensors.torch import save_file

from minisd import StableDiffusion, record_attention
from minisd.app.web import MAX_RESULTS, MAX_WAITING
from minisd.app.web_drawing import Preview, Request, Result, draw, overlay
from minisd.features.attention_maps import Word, WordMaps, split_words
from minisd.pipeline.metadata import parse_parameters
from minisd.pipeline.provenance import Provenance

PROMPT = "a red car on the beach"


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return StableDiffusion.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def small(small_model: Path) -> StableDiffusion:
    return StableDiffusion.from_pretrained(small_model, device="cpu")


@pytest.fixture(scope="module")
def page(small: StableDiffusion) -> Iterator[Address]:
    with page_of(small) as address:
        yield address


def ask(
    prompt: str,
    negative_prompt: str = "",
    seed: str = "",
    steps: float | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
) -> Request:
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "sampler": sampler}
    return Request(prompt, negative_prompt, seed, settings)


def finish(sd: StableDiffusion, request: Request, model: str | None = None) -> Result:
    *_, last = draw(sd, Provenance.of(sd, model), request)
    assert isinstance(last, Result)
    return last


# What is drawn


def test_previews_and_picture_are_those_of_denoise(sd):
    *previews, last = draw(sd, Provenance.of(sd, None), ask(PROMPT, "snow", "7", 6, 5.0, "heun"))
    steps = list(
        sd.denoise(PROMPT, negative_prompt="snow", seed=7, num_inference_steps=6, guidance_scale=5.0, sampler="heun")
    )
    assert len(previews) == len(steps) == 11
    for number, (preview, step) in enumerate(zip(previews, steps, strict=True), 1):
        assert isinstance(preview, Preview) and (preview.call, preview.num_calls) == (number, 11)
        assert preview.picture.tobytes() == sd.preview(step.x0)[0].tobytes()
    assert isinstance(last, Result) and last.picture.tobytes() == sd.decode(steps[-1].latents)[0].tobytes()


@pytest.mark.parametrize(
    "wanted, options",
    [
        (ask("red fox", seed="3"), ["--seed", "3"]),
        (ask("a (fox:1.3), snow", "red", "9223372036854775807", 2, 7.5, "euler_a"),
         ["--negative", "red", "--seed", "9223372036854775807", "--steps", "2", "--guidance", "7.5", "--sampler",
          "euler_a"]),
        (ask("fox " * 100, seed=" 0 ", guidance=1), ["--seed", "0", "--guidance", "1"]),
    ],
)  # fmt: skip
def test_the_file_is_the_one_that_generate_writes(run, small, small_model, wanted, options):
    code, lines, err = run("generate", wanted.prompt, *options)
    assert code == 0, err
    (path,) = map(Path, lines)
    drawn = finish(small, wanted, str(small_model))
    assert drawn.name == path.name
    assert drawn.file == path.read_bytes()


def test_a_seed_of_its_own_draws_the_picture_again(small):
    first, other = finish(small, ask("fox")), finish(small, ask("fox"))
    assert first.seed != other.seed
    assert finish(small, ask("fox", seed=str(first.seed))).file == first.file


def test_drawings_that_take_turns_between_threads_are_those_drawn_alone(sd):
    requests = [ask(PROMPT, seed="1", steps=4), ask("a cat in space", "night", "2", 4, 7.0, "ddim")]
    running = [draw(sd, Provenance.of(sd, None), request) for request in requests]
    with ThreadPoolExecutor(3) as threads:
        for _ in range(4):
            for steps in running:
                assert isinstance(threads.submit(next, steps).result(), Preview)
        together = list(threads.map(next, running))
    for request, drawn in zip(requests, together, strict=True):
        alone = finish(sd, request)
        assert isinstance(drawn, Result) and drawn.file == alone.file
        for word in alone.words:
            assert torch.equal(drawn.maps.of(word), alone.maps.of(word))


# Word maps


def maps_by_hand(sd: StableDiffusion, size: tuple[int, int], **choices: Any) -> np.ndarray[Any, Any]:
    """The mean weights (77, h, w) of all calls, layers and heads, from whole records, with numpy alone."""
    (height, width), rows, sizes = size, 77, {}
    total, count, steps = np.zeros((rows, height, width)), 0, sd.denoise(**choices)
    h, w = size
    for _ in range(4):
        sizes[h * w] = h, w
        h, w = -(-h // 2), -(-w // 2)
    while True:
        with record_attention(sd.unet) as records:
            if next(steps, None) is None:
                return total / count
        for name, weights in records:
            if name.split(".")[-1] == "attn2":
                mean = weights[-1].double().numpy().mean(0)  # (queries, keys), of the prompt and not the negative one
                h, w = sizes[len(mean)]
                mean = sum(np.split(mean, mean.shape[1] // rows, axis=1))
                down, across = np.arange(height) * h // height, np.arange(width) * w // width
                total += mean.T.reshape(rows, h, w)[:, down][:, :, across]
                count += 1


def test_word_maps_are_the_mean_of_what_is_recorded(sd):
    drawn = finish(sd, ask(PROMPT, "snow", "7", 3, 5.0))
    choices = {"negative_prompt": "snow", "seed": 7, "num_inference_steps": 3, "guidance_scale": 5.0}
    mine = maps_by_hand(sd, (24, 24), prompt=PROMPT, **choices)
    assert [word.text for word in drawn.words] == PROMPT.split()
    for place, word in enumerate(drawn.words, 1):
        assert word.rows == (place,)
        np.testing.assert_allclose(drawn.maps.of(word).numpy(), mine[place], atol=1e-5)
    assert np.ptp(mine[2]) > 0.1 and abs(mine[2] - mine[3]).max() > 0.1  # words differ, and so do places


def test_word_maps_of_odd_sizes_and_beside_a_longer_negative_prompt(sd):
    choices = {"prompt": PROMPT, "negative_prompt": "snow " * 80, "seed": 7, "num_inference_steps": 2}
    choices |= {"height": 8 * 10, "width": 8 * 17}
    maps, steps = WordMaps(sd.unet, 10, 17, rows=77), sd.denoise(**choices)
    for _ in range(2):
        with maps.watch():
            next(steps)
    mine = maps_by_hand(sd, (10, 17), **choices)
    np.testing.assert_allclose(maps.of(Word("red car", (2, 3))).numpy(), mine[2] + mine[3], atol=1e-5)
    np.testing.assert_allclose(maps.of(Word("everything", tuple(range(77)))).numpy(), 1, atol=1e-5)


def test_word_maps_need_a_call(sd):
    with pytest.raises(ValueError, match="draw inside"):
        WordMaps(sd.unet, 24, 24, 77).of(Word("a", (1,)))


def test_words_are_cut_as_the_tokenizer_cuts_them(sd):
    words = split_words("A (red:1.3) Fox, [un-believable] zzyzxq!", sd.tokenizer)
    ids = sd.tokenizer("A red Fox, un-believable zzyzxq!")[0]  # start, then the words
    assert [word.text for word in words] == ["a", "red", "fox", "un", "believable", "zzyzxq"]
    for word in words:
        assert sd.tokenizer.decode(ids[list(word.rows)]) == word.text
    assert len(words[-1].rows) > 1 and words[3].rows == (5,)  # a comma stands at 4
    assert split_words(", ! --", sd.tokenizer) == []


def test_words_of_the_second_chunk_stand_after_its_start(sd):
    words = split_words("fox " * 76 + "(snow:1.1)", sd.tokenizer)
    assert [word.rows for word in words[74:]] == [(75,), (78,), (79,)]


def test_guidance_zero_reads_no_words(small):
    assert finish(small, ask("red fox", guidance=0)).words == []
    assert len(finish(small, ask("red fox", guidance=1)).words) == 2


def test_overlay_is_dark_where_the_word_is_not_and_bright_where_it_is():
    picture = overlay(Image.new("RGB", (64, 64), (200, 0, 0)), torch.tensor([[0.0, 0.3], [0.0, 0.0]]))
    grey = 200 * 0.299
    for place, heat in (((2, 60), (0, 34, 78)), ((61, 2), (254, 232, 56))):
        expected = [0.45 * grey + 0.55 * channel for channel in heat]
        np.testing.assert_allclose(picture.getpixel(place), expected, atol=12)  # bicubic edges overshoot a little


# Messages


@pytest.mark.parametrize(
    "wanted, message",
    [
        (ask("  "), "the prompt is empty"),
        (ask("a (fox:99)"), "expected a number from -10 to 10"),
        (ask("fox " * 700), "expected at most 8"),
        (ask("fox", seed="seven"), "seed 'seven' is not an integer"),
        (ask("fox", seed="1.5"), "seed '1.5' is not an integer"),
        (ask("fox", seed="-1"), "-1"),
        (ask("fox", seed=str(2**63)), str(2**63)),
        (ask("fox", steps=0), "steps=0; expected an integer from 1 to 1000"),
        (ask("fox", steps=2.5), "steps"),
        (ask("fox", guidance=float("nan")), "guidance"),
        (ask("fox", sampler="magic"), "magic"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_said_on_the_page(page, wanted, message):
    (only,) = page.draw(**texts_of(wanted))
    assert message in only["error"] and "num_inference_steps" not in only["error"]


def texts_of(wanted: Request) -> dict[str, str]:
    """What the page sends: texts, empty where the model chooses."""
    settings = {name: "" if value is None else str(value) for name, value in wanted.settings.items()}
    return {"prompt": wanted.prompt, "negative_prompt": wanted.negative_prompt, "seed": wanted.seed, **settings}


def test_unknown_words_and_long_prompts_are_notes(small):
    drawn = finish(small, ask("zebra " + "snow " * 75, "blurry"))
    assert 'never learned "zebra", "blurry"' in drawn.notes[0] and "2 chunks" in drawn.notes[1]
    assert finish(small, ask("red fox")).notes == []


# Requests


def test_preset_of_a_request(page, small):
    events = list(page.draw(prompt="red fox", seed="3", preset="turbo"))
    assert [event["calls"] for event in events[:-1]] == [4] * 4
    assert any("needs a model distilled" in note for note in events[-1]["notes"])
    picture = Image.open(io.BytesIO(base64.b64decode(events[-1]["picture"])))
    assert picture.tobytes() == small("red fox", seed=3, preset="turbo").tobytes()
    assert "unknown preset 'quick'" in next(page.draw(prompt="fox", preset="quick"))["error"]
    # the menu says what the other fields show
    html = page.send("GET", "/").read().decode()
    fields = {name: json.loads(unescape(text)) for name, text in re.findall(r'value="(\w*)" data-fields="(.+?)"', html)}
    assert list(fields) == ["", "fast", "turbo"]
    assert fields["turbo"] == {"num_inference_steps": "4", "guidance_scale": "1", "eta": "", "sampler": "preset: LCM"}
    assert fields[""]["sampler"].startswith("model default: ")
    assert fields["fast"]["guidance_scale"] == fields[""]["guidance_scale"] == f"{small.defaults.guidance_scale:g}"


def test_events_of_a_request(page, small):
    wanted = ask("red fox", seed="3", steps=4)
    *steps, last = page.draw(**texts_of(wanted))
    assert [(step["call"], step["calls"]) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    drawn = finish(small, wanted)
    assert base64.b64decode(last["picture"]) == drawn.file
    assert (last["seed"], last["name"], last["words"], last["notes"]) == ("3", "red-fox-3.png", ["red", "fox"], [])
    status, shown = page.look(last["id"], "1")
    expected = np.asarray(overlay(drawn.picture, drawn.maps.of(drawn.words[1])))
    assert status == 200 and "“fox”: where it is brightest" in shown["text"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(shown["picture"])))), expected)
    for number, word in ((last["id"], "2"), (last["id"], "-1"), (last["id"], "x"), ("other", "0"), (last["id"], 0)):
        assert page.look(number, word)[0] == 400


def test_headers_of_every_answer(page):
    """The browser is told to run no other scripts; no other site is told that it may read anything."""
    requests: list[tuple[str, str, dict[str, str | None]]] = [
        ("GET", "/", {}), ("GET", "/page.js", {"Origin": None}), ("GET", "/none", {}), ("POST", "/draw", {}),
        ("GET", "/", {"Host": "evil.example"}), ("OPTIONS", "/draw", {"Origin": "http://evil.example"}),
        ("GET", "/", {"Origin": None, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}),
    ]  # fmt: skip
    for (method, place, headers), status in zip(requests, (200, 200, 404, 400, 403, 403, 200), strict=True):
        response = page.send(method, place, b"", headers)
        response.read()
        names = {name.lower() for name in response.headers}
        policy = response.headers["Content-Security-Policy"]
        assert response.status == status and "default-src 'none'; script-src 'self';" in policy, place
        assert not {name for name in names if name.startswith("access-control")} | ({"set-cookie", "server"} & names)
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert page.send("GET", "/", b"", {"Host": f"{socket.gethostname()}:1", "Origin": None}).status == 200
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "eA=="}
    assert page.send("GET", "/draw", b"", upgrade).status == 405


def test_the_latest_results_are_kept(page):
    first, *_ = [list(page.draw(prompt="fox", num_inference_steps="1"))[-1]["id"] for _ in range(MAX_RESULTS + 1)]
    assert page.look(first, "0") == (400, "this picture is no longer in memory; draw it again")


def send_drawings(page: Address, count: int) -> list[socket.socket]:
    """Ask for pictures of 300 steps, without waiting for an answer."""
    body = json.dumps({"prompt": "fox", "num_inference_steps": "300"})
    head = f"POST /draw HTTP/1.1\r\nHost: {page.own}\r\nContent-Type: application/json\r\n"
    sockets = [socket.create_connection((page.host, page.port), timeout=60) for _ in range(count)]
    for each in sockets:
        each.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return sockets


def test_a_drawing_that_nobody_waits_for_ends(page, small, monkeypatch):
    """Many pages that leave in the queue, and one that leaves while it is drawn to, cost the last one no picture."""
    calls = []
    forward = small.unet.forward
    monkeypatch.setattr(small.unet, "forward", lambda *inputs: calls.append(1) or forward(*inputs))
    first = page.draw(prompt="fox", num_inference_steps="300")
    assert next(first)["call"] == 1
    for _ in range(8):
        for each in send_drawings(page, 25):
            each.close()
    first.close()
    last: dict[str, Any] = {"status": 503}
    for _ in range(100):  # until the server has noticed that they left
        if last.get("status") == 503:
            time.sleep(0.1)
            last = list(page.draw(prompt="fox", seed="1", num_inference_steps="2"))[-1]
    assert base64.b64decode(last["picture"]) == finish(small, ask("fox", seed="1", steps=2)).file
    assert len(calls) < 300


def test_the_queue_is_bounded(page):
    drawing = page.draw(prompt="fox", num_inference_steps="1000")
    next(drawing)
    sockets = send_drawings(page, MAX_WAITING + 5)
    answers = [each.recv(12) for each in sockets]
    for each in sockets:
        each.close()
    drawing.close()
    assert {*answers} == {b"HTTP/1.1 200", b"HTTP/1.1 503"} and answers.count(b"HTTP/1.1 200") < MAX_WAITING + 5
    assert list(page.draw(prompt="fox", num_inference_steps="1"))[-1]["words"] == ["fox"]


# The command


def test_without_the_extra_it_says_how_to_get_it(run, tmp_path, monkeypatch):
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    (tmp_path / "starlette").mkdir()
    monkeypatch.setattr(metadata, "version", version)
    code, _, err = run("serve")
    assert code == 1 and 'pip install "minisd[web]"' in err


def test_a_port_in_use_is_named(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, err = run("serve", "--port", port)
    assert code == 1 and f"port {port}" in err and "choose another --port" in err


@pytest.mark.parametrize("host, warned", [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_other_hosts_than_loopback_are_warned_of(run, host, warned):
    code, _, err = run("serve", "missing.safetensors", "--host", host, "--port", str(free_port()))
    assert code == 1 and "missing.safetensors" in err
    assert ("anyone on the network" in err) == warned


def test_the_options_for_loading_a_model(small_model, tmp_path):
    """`serve` has those of `generate`."""
    other = StableDiffusion.from_pretrained(small_model, device="cpu")
    layer = other.unet.conv_in.weight
    torch.manual_seed(3)
    for parameter in other.autoencoder.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    other.save_pretrained(tmp_path / "other")
    factors = {"A": torch.randn(2, *layer.shape[1:]), "B": torch.randn(len(layer), 2, 1, 1)}
    lora = tmp_path / "style.safetensors"
    save_file({f"unet.conv_in.lora_{name}.weight": 0.3 * value for name, value in factors.items()}, lora)
    sd = StableDiffusion.from_pretrained(small_model, device="cpu", vae=tmp_path / "other")
    without = sd("fox", seed=7)
    sd.load_lora(lora, weight=0.5)
    expected = sd("fox", seed=7)
    assert not np.array_equal(expected, without)
    options = (str(small_model), "--vae", str(tmp_path / "other"), "--lora", f"{lora}:0.5", "--offload")
    with started(tmp_path, tmp_path / "log", *options) as url:
        host, port = url.removeprefix("http://").rstrip("/").split(":")
        *_, last = Address(host, int(port)).draw(prompt="fox", seed="7")
    picture = Image.open(io.BytesIO(base64.b64decode(last["picture"])))
    assert np.array_equal(picture, expected)
    texts = parse_parameters(picture.info["parameters"]).settings
    assert (texts["VAE"], texts["LoRA"]) == ("other", "style 0.5")


@pytest.mark.parametrize(("prompt", "note"), [("{fox|snow}", "'{fox|snow}' in the prompt is"), ("fox++", "InvokeAI")])
def test_warnings_of_the_model_are_on_the_page(small, prompt, note):
    assert note in " ".join(finish(small, ask(prompt, seed="7")).notes)


def test_help_of_the_command_waits_for_neither_torch_nor_starlette():
    code = "import sys; from minisd.app import cli; cli.main(['serve', '--help']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "minisd.app.serve" in loaded and not {"torch", "starlette", "uvicorn"} & set(loaded.split())


# The page


@contextmanager
def started(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """`minisd serve` in a folder, by default with the tiny model; gives the page's address."""
    port = free_port()
    process = Child(module, "minisd", "serve", *options, "--port", str(port), "--device", "cpu", cwd=folder)
    try:
        wait_for_server("minisd serve", f"http://127.0.0.1:{port}/", process, process.err)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.interrupt()
        code, out, err = process.finish(30)
        log.write_text(out + err)
        assert code == 0, err


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    need_chromium()
    folder, log = tmp_path_factory.mktemp("serve"), tmp_path_factory.mktemp("log") / "log"
    with started(folder, log) as address:
        yield address
    assert list(folder.iterdir()) == []
    assert "Traceback" not in log.read_text() and "stopped" in log.read_text()


@pytest.fixture(scope="module")
def browser(server: str) -> Iterator[Any]:
    with chromium() as opened:
        yield opened


# Keeps every picture that the page has shown, and every status.
WATCH = """() => {
    window.seen = { pictures: [], texts: [] };
    const look = () => {
        const picture = document.querySelector("#view img")?.src, text = document.querySelector("#status").innerText;
        if (picture && seen.pictures.at(-1) !== picture) seen.pictures.push(picture);
        if (seen.texts.at(-1) !== text) seen.texts.push(text);
    };
    new MutationObserver(look).observe(document.body, { childList: true, subtree: true, attributes: true });
}"""


class Opened(NamedTuple):
    """A page in the browser, with all that it asked for and complained of."""

    page: Any
    asked: list[str]
    complaints: list[str]

    @classmethod
    def at(cls, browser: Any, address: str, width: int = 1100, height: int = 900) -> Opened:
        page = browser.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
        page.set_default_timeout(60_000)
        asked: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        page.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        page.locator("#draw").wait_for()
        page.evaluate(WATCH)
        return cls(page, asked, complaints)

    def draw(self, **fields: str) -> None:
        for name, text in fields.items():
            self.page.locator(f"#{name}").locator("input, textarea").first.fill(text)
        self.page.locator("#draw").click()

    def wait(self, text: str) -> None:
        """Until the status says so, now or at a moment that has passed."""
        self.page.wait_for_function("text => window.seen.texts.some(seen => seen.includes(text))", arg=text)

    def choose(self, word: str) -> None:
        """Click a word below the picture."""
        self.page.locator("#words label").get_by_text(word, exact=True).click()

    def picture(self) -> str:
        return str(self.page.locator("#view img").get_attribute("src"))

    def close(self) -> None:
        self.page.close()
        others = [url for url in self.asked if not re.match(r"(http|ws)://127\.0\.0\.1:\d+/|data:", url)]
        assert others == [] and self.complaints == []


def pixels(url: str) -> np.ndarray[Any, Any]:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_a_picture_its_words_and_its_file(server, browser, run, tmp_path):
    opened = Opened.at(browser, server)
    opened.draw(prompt=PROMPT, seed="7", steps="8", guidance="5")
    opened.wait("drawn in")
    seen = opened.page.evaluate("window.seen")
    assert len({picture for picture in seen["pictures"] if pixels(picture).shape == (24, 24, 3)}) >= 3
    assert any("of 8" in text for text in seen["texts"])

    code, (written,), _ = run("generate", PROMPT, "--seed", "7", "--steps", "8", "--guidance", "5", model=None)
    expected = (tmp_path / written).read_bytes()
    assert code == 0 and base64.b64decode(opened.picture().partition(",")[2]) == expected
    with opened.page.expect_download() as download:
        opened.page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == Path(written).name
    saved = Path(download.value.path()).read_bytes()
    assert saved == expected
    text = Image.open(io.BytesIO(saved)).info["parameters"]
    assert parse_parameters(text).prompt == PROMPT and parse_parameters(text).settings["Seed"] == "7"

    shown = {"picture": opened.picture()}
    for word in ("red", "beach"):
        opened.choose(word)
        opened.wait(f"“{word}”")
        shown[word] = opened.picture()
    assert len(set(shown.values())) == 3
    red, beach = pixels(shown["red"]).astype(int), pixels(shown["beach"]).astype(int)
    assert np.abs(red - beach).mean() > 10
    opened.choose("picture")
    opened.page.wait_for_function("src => document.querySelector('#view img').src === src", arg=shown["picture"])
    opened.close()


def test_a_prompt_is_shown_as_text(server, browser):
    opened = Opened.at(browser, server)
    hostile = '<img src=x onerror="document.title=1">fox" \'<&amp;'
    opened.draw(prompt=hostile, negative=hostile, seed="1", steps="1")
    opened.wait("drawn in")
    assert opened.page.locator("#view img").get_attribute("alt") == hostile
    assert opened.page.locator("section img").count() == 1 and opened.page.title() == "minisd"
    opened.choose("onerror")
    opened.wait("“onerror”")
    opened.draw(seed=hostile[:40])
    opened.page.get_by_role("alert").get_by_text(f"seed {hostile[:40]!r} is not an integer").wait_for()
    opened.complaints[:] = [line for line in opened.complaints if "400 (Bad Request)" not in line]
    opened.close()


def test_two_pages_at_once_new_runs_stops_and_mistakes(server, browser):
    one, two = Opened.at(browser, server), Opened.at(browser, server)
    one.draw(prompt="a cat in space", seed="1", steps="400")
    one.wait("Step 1 of 400")
    two.draw(prompt=PROMPT, seed="2", steps="3")
    one.draw(prompt="a dog in the snow", seed="3", steps="4")
    two.wait("Seed 2, drawn")
    one.wait("Seed 3, drawn")
    assert one.picture() != two.picture()

    one.draw(steps="300")
    one.wait("Step 1 of 300")
    one.page.locator("#stop").click()
    one.page.get_by_text(re.compile(r"Stopped after step \d+ of 300")).wait_for()

    two.draw(steps="0")
    two.page.get_by_role("alert").get_by_text("steps=0; expected an integer from 1 to 1000").wait_for()
    two.draw(prompt="a zebra in the snow", steps="2")
    two.page.get_by_text('this model never learned "zebra"').wait_for()
    assert two.page.get_by_role("alert").count() == 0
    for opened in (one, two):
        opened.close()
