"""The API pages that `tools/build_api.py` makes of the docstrings."""

from __future__ import annotations

import inspect
import runpy
from html.parser import HTMLParser
from pathlib import Path

import pytest

import minisd

ROOT = Path(__file__).parents[2]


class Anchors(HTMLParser):
    """The names a page can be jumped to, and its text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.names, self.text = set[str](), ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names |= {value for name, value in attrs if name == "id" and value}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # pdoc cannot read annotations of names imported for type checkers only
def test_every_public_name_has_a_section(tmp_path):
    tool = runpy.run_path(str(ROOT / "tools/build_api.py"))
    assert {"minisd", "minisd.generate", "minisd.io.single_file", "minisd.training.loop"} <= set(tool["modules"]())
    bases = {each.__module__ for each in minisd.StableDiffusion.__mro__ if each.__module__.startswith("minisd")}
    tool["build"](tmp_path, ["minisd", "minisd.schedule", *bases])
    page = Anchors(tmp_path / "minisd.html")
    assert set(minisd.__all__) - {"__version__"} <= page.names
    methods = [name for name, _ in inspect.getmembers(minisd.StableDiffusion, inspect.isfunction) if name[0] != "_"]
    assert {"inpaint", "save"} <= set(methods) <= set(page.text.split())  # inherited ones are links
    assert " ".join(minisd.Schedule.__doc__.split()[:6]) in " ".join(page.text.split())
    assert (tmp_path / "minisd/schedule.html").exists() and (tmp_path / "index.html").exists()
