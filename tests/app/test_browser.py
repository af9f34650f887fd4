"""JupyterLab in a real browser: headless Chromium (see `browsers.py`) runs the tour, and moves its slider.

The tour draws with a small random model here: its 32×32 pictures take a moment.
"""

from __future__ import annotations

import base64
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest
from browsers import chromium, free_port, need_chromium, wait_for_server

TOUR = Path(__file__).parents[2] / "notebooks/00_tour.ipynb"
SECONDS_TO_RUN = 400  # for all cells of one notebook; a quiet machine needs a tenth of it

pytestmark = pytest.mark.timeout(1000)


class Lab(NamedTuple):
    """A JupyterLab server on loopback, over a folder with a copy of the tour."""

    address: str
    folder: Path


@pytest.fixture(scope="module")
def lab(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    need_chromium()
    folder = tmp_path_factory.mktemp("lab")
    notebook = nbformat.read(TOUR, 4)
    for cell in notebook.cells:  # with the stored outputs, a run that never began would look finished
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, folder / TOUR.name)
    port = free_port()
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--expose-app-in-browser",
        "--ServerApp.port_retries=0",
    ]  # fmt: skip
    if os.geteuid() == 0:
        command.append("--allow-root")
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_SETTINGS_DIR")
    places = {name: str(folder / name) for name in own}
    quiet = folder / "JUPYTERLAB_SETTINGS_DIR/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # no window that asks about news
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"} | places
    environment["MINISD_MODEL"] = str(small_model)  # what the shipped model draws, nbval compares
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            wait_for_server("JupyterLab", f"http://127.0.0.1:{port}/api?token={token}", server, folder / "server.log")
            yield Lab(f"http://127.0.0.1:{port}/lab/tree/{{}}?reset&token={token}", folder)
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def browser(lab: Lab) -> Iterator[Any]:
    with chromium() as opened:
        yield opened


# Of the notebook that is open: for each code cell, its execution count, and the name and text of an error in it.
CELLS = """() => Array.from(window.jupyterapp.shell.currentWidget.content.model.cells)
    .filter(cell => cell.type === "code")
    .map(cell => ({
        count: cell.executionCount,
        tags: cell.getMetadata("tags") || [],
        errors: cell.sharedModel.getOutputs().filter(o => o.output_type === "error").map(o => o.ename + o.evalue),
    }))"""


@pytest.fixture(scope="module")
def tour(browser: Any, lab: Lab) -> Iterator[Any]:
    """The page of the tour after Run → Run All Cells, when all have run."""
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(120_000)
    page.goto(lab.address.format(TOUR.name))
    page.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell.currentWidget?.sessionContext")
    page.evaluate(
        """async () => {
            const context = window.jupyterapp.shell.currentWidget.sessionContext;
            await context.ready;
            await context.session.kernel.info;
        }"""
    )
    cells = page.evaluate(CELLS)
    assert len(cells) > 5 and all(cell["count"] is None for cell in cells)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    deadline = time.monotonic() + SECONDS_TO_RUN
    while time.monotonic() < deadline:
        cells = page.evaluate(CELLS)
        unexpected = [cell for cell in cells if cell["errors"] and "raises-exception" not in cell["tags"]]
        assert not unexpected, unexpected
        if all(cell["count"] for cell in cells):
            break
        page.wait_for_timeout(500)
    assert [cell["count"] for cell in cells] == list(range(1, len(cells) + 1)), "not every cell has run, in order"
    yield page
    page.close()


def frame(page: Any) -> bytes:
    """The PNG file that the picture beneath the slider shows, once it shows one."""
    picture = page.locator(".widget-vbox img.widget-image").first
    picture.wait_for()
    # in one breath: a new picture takes away the address of the one before
    encoded = picture.evaluate(
        """async image => {
            const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
            return btoa(bytes.reduce((text, byte) => text + String.fromCharCode(byte), ""));
        }"""
    )
    return base64.b64decode(encoded)


def test_the_tour_runs_in_jupyterlab(tour):
    pictures = tour.evaluate(
        """() => Array.from(window.jupyterapp.shell.currentWidget.content.model.cells).filter(c => c.type === "code")
            .flatMap(cell => cell.sharedModel.getOutputs()).filter(o => o.data && o.data["image/png"]).length"""
    )
    assert pictures >= 5


def test_a_slider_moves_and_the_picture_changes(lab, tour):
    # cells off the screen are not in the page: scroll to the one that makes the slider
    tour.evaluate(
        """async () => {
            const notebook = window.jupyterapp.shell.currentWidget.content;
            const cells = Array.from(notebook.model.cells);
            const place = cells.findIndex(c => c.type === "code" && c.sharedModel.getSource().includes("slider("));
            notebook.activeCellIndex = place;
            await notebook.scrollToItem(place, "start");
        }"""
    )
    before = frame(tour)
    handle = tour.locator(".widget-slider .noUi-handle, .widget-hslider .noUi-handle").first
    handle.focus()
    for _ in range(3):
        tour.keyboard.press("ArrowRight")
    deadline = time.monotonic() + 120
    while frame(tour) == before and time.monotonic() < deadline:
        tour.wait_for_timeout(300)
    after = frame(tour)
    assert before.startswith(b"\x89PNG") and after.startswith(b"\x89PNG") and after != before
    tour.screenshot(path=str(lab.folder / "slider.png"))
