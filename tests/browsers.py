"""Headless Chromium and servers on loopback, for the tests that look at pages.

Needs Debian's `chromium` (or the path of another one in MINISD_CHROMIUM). Without it these tests are skipped, loudly,
but in CI (CI or MINISD_CI is set) they fail.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from forked import Child

CHROMIUM = os.environ.get("MINISD_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


def need_chromium() -> None:
    """Skip, or in CI fail, where there is no browser."""
    if CHROMIUM is not None:
        return
    message = "NO BROWSER: install Debian's chromium, or name one in MINISD_CHROMIUM, to test pages in it"
    if os.environ.get("CI") or os.environ.get("MINISD_CI"):
        pytest.fail(message)
    pytest.skip(message)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser that asks nobody but the pages it is sent to."""
    from playwright.sync_api import sync_playwright

    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-gpu"]
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet + sandbox)
        try:
            yield browser
        finally:
            browser.close()


def free_port() -> int:
    """A port of loopback on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_server(name: str, address: str, server: subprocess.Popen[bytes] | Child, log: Path) -> None:
    """Return once the address answers; fail with the end of the log when the server ends or two minutes pass."""
    for _ in range(240):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"{name} did not start: {log.read_text()[-2000:]}")
