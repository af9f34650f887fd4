"""The web page of `minisd serve`: prompt, settings, step-by-step previews, and attention maps for each word.

A Starlette application without sessions, cookies, uploads or files. The page is `page.html`, `page.css` and `page.js`.
It asks for a picture by one request, which is answered by one line of JSON per step; when the request ends, so does the
drawing. Pictures are drawn one at a time and exist in memory only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import secrets
import socket
from base64 import b64encode
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.requests import Request as WebRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minisd.app.jobs import model_side
from minisd.app.web_drawing import Preview, Request, Result, draw, overlay
from minisd.features.distributed import log
from minisd.features.presets import PRESETS
from minisd.features.prompts import MAX_CHARACTERS
from minisd.io.configs import parse_json
from minisd.io.diffusers_folder import Defaults
from minisd.pipeline.provenance import Provenance
from minisd.pipeline.settings import SAMPLER_LABELS, SETTINGS, Settings
from minisd.pipeline.stable_diffusion import StableDiffusion

ERRORS = (ValueError, TypeError, FloatingPointError, MemoryError)  # errors with user-facing messages
# the settings on the page, menus last
SHOWN = {
    name: SETTINGS[name]
    for name in sorted(SETTINGS, key=lambda name: bool(SETTINGS[name].choices))
    if SETTINGS[name].label
}
TEXTS = ("prompt", "negative_prompt", "seed")
MAX_BODY = 2**20  # bytes of a request
MAX_SECONDS = 10  # to send a request, or to take a part of the answer
MAX_WAITING = 32  # drawings
MAX_RESULTS = 16  # finished pictures whose word maps can be asked for
MAX_CONNECTIONS = 100
POLL_SECONDS = 0.25  # how often a drawing that waits looks whether its page still does
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Page:
    """The request handlers, with the queue of drawings and the latest results."""

    def __init__(self, sd: StableDiffusion, provenance: Provenance) -> None:
        self.sd, self.provenance = sd, provenance
        self.turn, self.waiting = asyncio.Lock(), 0
        self.results: OrderedDict[str, Result] = OrderedDict()
        self.worker = ThreadPoolExecutor(1)  # draws all pictures, so never two at a time

    async def draw(self, request: WebRequest) -> ASGIApp:
        """Answer with one JSON object per line: steps, then the result or an error."""
        try:
            values = await _read(request, {*TEXTS, *SHOWN, "preset"})
            settings = {name: _number(name, values[name]) for name in SHOWN if values.get(name)}
            settings["preset"] = values.get("preset") or None
            prompt, negative_prompt, seed = (values.get(name, "") for name in TEXTS)
            wanted = Request(prompt, negative_prompt, seed, settings)
        except ValueError as error:
            return PlainTextResponse(_said(error), 400)
        if self.waiting >= MAX_WAITING:
            return PlainTextResponse(f"{MAX_WAITING} drawings wait already; try again later", 503)

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_in_time(message: Message) -> None:  # a page that does not read holds up the others
                async with asyncio.timeout(MAX_SECONDS):
                    await send(message)

            self.waiting += 1
            events = self._events(request, wanted)
            try:
                with contextlib.suppress(TimeoutError):
                    await StreamingResponse(events, media_type="application/x-ndjson")(scope, receive, send_in_time)
            finally:
                self.waiting -= 1
                await events.aclose()

        return answer

    async def _events(self, request: WebRequest, wanted: Request) -> AsyncGenerator[str, None]:
        """Wait for the turn, then draw; give up at the next step once nobody waits for the picture."""
        turn = asyncio.create_task(self.turn.acquire())
        frames, loop = draw(self.sd, self.provenance, wanted), asyncio.get_running_loop()
        try:
            while not (await asyncio.wait({turn}, timeout=POLL_SECONDS))[0]:
                if await request.is_disconnected():
                    return
            while not await request.is_disconnected():
                frame = await loop.run_in_executor(self.worker, partial(next, frames, None))
                if frame is None:
                    return
                yield json.dumps(self._event(frame)) + "\n"
        except ERRORS as error:
            yield json.dumps({"error": _said(error)}) + "\n"
        except Exception as error:
            log(f"unexpected {type(error).__name__}: {error}")
            yield json.dumps({"error": f"unexpected {type(error).__name__}; see the terminal of the server"}) + "\n"
        finally:
            self.worker.submit(frames.close)
            if not turn.cancel() and not turn.cancelled():
                self.turn.release()

    def _event(self, frame: Preview | Result) -> dict[str, Any]:
        if isinstance(frame, Preview):
            return {"picture": _encode(_png(frame.picture)), "call": frame.call, "calls": frame.num_calls}
        number = secrets.token_urlsafe()
        self.results[number] = frame
        if len(self.results) > MAX_RESULTS:
            self.results.popitem(last=False)
        words = [word.text for word in frame.words]
        shown = {name: getattr(frame, name) for name in ("name", "seconds", "notes")}
        # a seed can be larger than the integers of JavaScript
        return {"id": number, "picture": _encode(frame.file), "seed": str(frame.seed), "words": words, **shown}

    async def look(self, request: WebRequest) -> Response:
        """Answer with the overlay of a word's attention map, and its description."""
        try:
            values = await _read(request, {"id", "word"})
            result = self.results.get(values.get("id", ""))
            if result is None:
                raise ValueError("this picture is no longer in memory; draw it again")
            index = _number("word", values.get("word", ""))
            if index not in range(len(result.words)):
                raise ValueError(f"expected the number of a word, below {len(result.words)}")
        except ValueError as error:
            return PlainTextResponse(str(error), 400)
        word, maps = result.words[index], result.maps
        weights = maps.of(word)
        mean = f"mean of {maps.layers} layers, {maps.heads} heads and {result.num_calls} calls of the UNet"
        share = f"{weights.max():.1%} of the cross-attention is on this word"
        text = f"“{word.text}”: where it is brightest, {share} ({mean})."
        return JSONResponse({"picture": _encode(_png(overlay(result.picture, weights))), "text": text})


class Guard:
    """Middleware that answers only requests to this server from its own page, and adds headers for the browser.

    A name that an attacker lets point at this machine (DNS rebinding) is not among the allowed hosts; the request of
    another site's page has another origin.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.names = app, {"localhost", socket.gethostname().lower(), host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        refused = None if self._is_own(headers) else PlainTextResponse("unknown host or origin", 403)
        await (refused or self.app)(scope, receive, send_guarded)

    def _is_own(self, headers: Headers) -> bool:
        host, *others = headers.getlist("host") or [""]
        if others or not self._is_allowed(host):
            return False
        origins = [origin.partition("://")[2] for origin in headers.getlist("origin")]
        site = headers.get("sec-fetch-site", "none")
        # links from other sites to the page are fine, requests by their scripts are not
        return all(origin.lower() == host.lower() for origin in origins) and (
            site in ("none", "same-origin") or headers.get("sec-fetch-mode") == "navigate"
        )

    def _is_allowed(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
        try:
            return bool(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
        except ValueError:
            return name.lower() in self.names


def build(sd: StableDiffusion, provenance: Provenance, host: str) -> ASGIApp:
    """Build the application for a model, for a server that listens on `host`."""
    page, folder, side = Page(sd, provenance), Path(__file__).parent, model_side(sd)
    title = f"{provenance.model} · {side}×{side} · {provenance.device}, {provenance.precision}"
    html = Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title), characters=MAX_CHARACTERS, fields=_fields(sd.defaults)
    )
    kinds = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
    contents = {name: html if not name else (folder / name).read_text(encoding="utf-8") for name in kinds}

    def content(name: str, request: WebRequest) -> Response:
        return Response(contents[name], media_type=kinds[name])

    routes = [Route(f"/{name}", partial(content, name)) for name in kinds]
    routes += [Route("/draw", page.draw, methods=["POST"]), Route("/look", page.look, methods=["POST"])]
    return Guard(Starlette(routes=routes), host)


def server(app: ASGIApp) -> uvicorn.Server:
    """Return a server without logs, proxies and WebSockets; `run` serves on listening sockets until Ctrl-C."""
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


async def _read(request: WebRequest, names: set[str]) -> dict[str, str]:
    """Read a JSON object of texts from the body. Raises ValueError for anything else."""
    body = b""
    if request.headers.get("content-type") != "application/json":
        raise ValueError("expected application/json")
    try:
        async with asyncio.timeout(MAX_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise ValueError(f"the request has more than {MAX_BODY:,} bytes; shorten the prompts")
    except (TimeoutError, ClientDisconnect) as error:
        raise ValueError("the request is incomplete") from error
    values = parse_json(body.decode("utf-8"))
    if not isinstance(values, Mapping) or not names >= values.keys():
        raise ValueError(f"expected an object with {', '.join(sorted(names))}")
    if not all(isinstance(value, str) for value in values.values()):
        raise ValueError("expected texts only")
    return dict(values)


def _said(error: Exception) -> str:
    """Return the message of an error, with the settings named as on the page."""
    message = str(error)
    for name, setting in SHOWN.items():
        message = message.replace(name, setting.label.lower())
    return message


def _number(name: str, text: str) -> Any:
    """Convert the text of a field; that of a menu stays as it is."""
    if name in SHOWN and SHOWN[name].choices:
        return text
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    raise ValueError(f"{name} {text[:40]!r} is not a number")


def _texts(settings: Settings, source: str) -> dict[str, str]:
    """Return what the settings on the page show before they are changed, by name; menus name the `source`."""
    texts = {}
    for name, setting in SHOWN.items():
        value = getattr(settings, name)
        texts[name] = "" if value is None else setting.to_text(value)
        if setting.choices:
            texts[name] = f"{source}: {settings.texts()[setting.png]}"
    return texts


def _fields(defaults: Defaults) -> str:
    """Return the HTML of the settings on the page, with the model's defaults, and of the presets with theirs."""
    fields, texts = "", _texts(Settings.choose({}, defaults), "model default")
    for name, setting in SHOWN.items():
        common = f'name="{name}" autocomplete="off"'
        if setting.choices:
            labels = SAMPLER_LABELS if name == "sampler" else {choice: choice for choice in setting.choices}
            options = _options({"": texts[name], **labels})
            widget = f"<select {common}>{options}</select>"
        else:
            step = "1" if setting.kind is int else "any"
            widget = f'<input type="number" step="{step}" value="{escape(texts[name])}" {common}>'
        wide = ' class="wide"' if setting.choices else ""
        fields += f'<label id="{setting.label.lower()}"{wide}>{setting.label} {widget}</label>\n'
    shown = {name: _texts(Settings.choose({"preset": name}, defaults), "preset") for name in PRESETS}
    labels = {"": "none"} | {name: f"{name}: {preset.description}" for name, preset in PRESETS.items()}
    options = _options(labels, {"": texts} | shown)
    return fields + f'<label id="preset" class="wide">Preset <select name="preset">{options}</select></label>\n'


def _options(labels: Mapping[str, str], fields: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Return the HTML of a menu's options by value; `fields` has what the other fields show once one is chosen."""
    more = {value: f' data-fields="{escape(json.dumps(texts))}"' for value, texts in (fields or {}).items()}
    rows = (f'<option value="{value}"{more.get(value, "")}>{escape(label)}</option>' for value, label in labels.items())
    return "".join(rows)


def _png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _encode(file: bytes) -> str:
    return b64encode(file).decode()
