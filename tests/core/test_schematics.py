"""The schematics of the notebooks: they are what their script draws, and stand in a notebook with their description."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("build_schematics", ROOT / "tools/build_schematics.py")
assert spec and spec.loader
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def test_every_file_has_its_function() -> None:
    assert {path.stem for path in build.FOLDER.glob("*")} == set(build.SCHEMATICS)


@pytest.mark.parametrize("name", build.SCHEMATICS)
def test_the_file_is_what_the_script_draws(name: str) -> None:
    stored, drawn = (build.FOLDER / f"{name}.svg").read_text(encoding="utf-8"), build.SCHEMATICS[name]().svg()
    ElementTree.fromstring(stored)
    # another machine may round the computed paths otherwise
    numbers = re.compile(r"\d+(?:\.\d+)?")
    assert numbers.sub("0", stored) == numbers.sub("0", drawn)
    pairs = zip(numbers.findall(stored), numbers.findall(drawn), strict=True)
    assert all(float(a) == pytest.approx(float(b), abs=0.2) for a, b in pairs)


@pytest.mark.parametrize("name", build.SCHEMATICS)
def test_a_notebook_shows_it_and_describes_it(name: str) -> None:
    described = f"![{build.SCHEMATICS[name]().alt}](images/{name}.svg)"
    cells = [c for p in sorted(ROOT.glob("notebooks/*.ipynb")) for c in json.loads(p.read_text("utf-8"))["cells"]]
    assert sum(described in "".join(cell["source"]) for cell in cells) >= 1


def test_the_counts_of_guidance_are_those_of_the_notebook() -> None:
    cells = json.loads((ROOT / "notebooks/09_guidance.ipynb").read_text("utf-8"))["cells"]
    found = re.search(r"^FOUND = (\{.*?\})$", "\n".join("".join(cell["source"]) for cell in cells), re.MULTILINE)
    assert found and ast.literal_eval(found[1]) == {scale: row[:2] for scale, row in build.SCALE_COUNTS.items()}
