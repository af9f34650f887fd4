"""The page of `minisd serve` in this process, and requests to it that a browser would, or would never, send."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from minisd import StableDiffusion
from minisd.app.serve import _listen
from minisd.app.web import build, server
from minisd.pipeline.provenance import Provenance


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @property
    def own(self) -> str:
        return f"{self.host}:{self.port}"

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str | None] | None = None,
        timeout: float = 60,
    ) -> http.client.HTTPResponse:
        """Send a request with these headers and no others, by default those of the page itself; None omits one."""
        usual = {"Host": self.own, "Origin": f"http://{self.own}", "Content-Type": "application/json"}
        wanted: dict[str, str | None] = {**usual, "Content-Length": str(len(body or b"")), **(headers or {})}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in wanted.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        return connection.getresponse()

    def draw(self, timeout: float = 60, **values: Any) -> Iterator[dict[str, Any]]:
        """Ask for a picture; yield what the server says of it. To close the iterator is to leave the page."""
        response = self.send("POST", "/draw", json.dumps(values).encode(), timeout=timeout)
        try:
            if response.status != 200:
                yield {"status": response.status, "error": response.read().decode()}
                return
            for line in response:
                yield json.loads(line)
        finally:
            response.close()

    def look(self, number: str, word: object) -> tuple[int, Any]:
        """Ask for the map of a word; return the status and what the server says."""
        response = self.send("POST", "/look", json.dumps({"id": number, "word": word}).encode())
        said = response.read()
        return response.status, json.loads(said) if response.status == 200 else said.decode()


@contextmanager
def page_of(sd: StableDiffusion) -> Iterator[Address]:
    """The page of a model on a free port of loopback, within the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with _listen("127.0.0.1", port) as listening:
        running = server(build(sd, Provenance.of(sd, None), "127.0.0.1"))
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()
        try:
            yield Address("127.0.0.1", port)
        finally:
            running.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
