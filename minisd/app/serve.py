"""The `minisd serve` command: load a model and serve the page of `web.py` until Ctrl-C."""

from __future__ import annotations

import ipaddress
import os
import socket
import webbrowser
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated

import typer

from minisd.app.options import LoadOptions, option_groups
from minisd.features.distributed import log, show


@dataclass(frozen=True)
class PageOptions(LoadOptions):
    """Options for loading a model, which is an argument."""

    model: Annotated[str | None, typer.Argument(help="Hub id, folder, .safetensors or .ckpt. [default: tiny]")] = None


@option_groups
def serve(
    loading: PageOptions,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Draw pictures in the browser, with step-by-step previews and attention maps for each word.

    By default the page is only accessible from this machine; see --host. There is no password.

    \b
    Examples:
      minisd serve
      minisd serve stable-diffusion-v1-5/stable-diffusion-v1-5 --port 8080 --open
      minisd serve model.safetensors --vae vae.safetensors --lora style.safetensors:0.8 --offload
    """
    for package in ("starlette", "uvicorn"):
        try:
            metadata.version(package)  # an import would also find a folder of that name
        except metadata.PackageNotFoundError:
            advice = 'which is not installed; run: pip install "minisd[web]"'
            raise OSError(f"minisd serve needs {package}, {advice}") from None
    with _listen(host, port) as listening:  # before loading a model
        if not _is_loopback(host):
            log(
                f"warning: --host {host} lets anyone on the network use this page and draw on this machine; "
                "there is no password. Omit --host to restrict access to this machine"
            )
        from minisd.pipeline.provenance import Provenance

        sd = loading.load()
        provenance = Provenance.of(sd, loading.model, loading.vae)
        log(f"{provenance.model} on {sd.device} in {provenance.precision}")
        from minisd.app.web import build, server

        app, address = build(sd, provenance, host), f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        show(address)
        log("press Ctrl-C to stop")
        if browser:
            webbrowser.open(address)
        with suppress(KeyboardInterrupt):
            server(app).run([listening])
        log("stopped")


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises OSError if the address is not available."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen()
        except OSError:
            listening.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot listen on {host}, port {port}: {reason}; choose another --port or --host") from error
    return listening


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
