"""What nbval leaves out: kernels without a user's settings, numbers compared as numbers, pictures by their pixels."""

from __future__ import annotations

import io
import os
import re
import sys
from base64 import b64decode
from collections import Counter
from copy import deepcopy
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile
from PIL import Image

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"
NUMBERS = 0.01  # relative difference of two numbers; one unit of the last digit is always allowed
PICTURES = 2.0  # mean absolute difference of two pictures, of 255
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)


@pytest.hookimpl(optionalhook=True, trylast=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `-n 2` each process takes a whole notebook at a time, in the order of the collection."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, IPyNbFile):
        collector.skip_compare += ("stderr",)
        collector.setup = MethodType(_set_up, collector)  # type: ignore[method-assign]


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, IPyNbCell):
        item.compare_outputs = MethodType(_compare, item)  # type: ignore[method-assign]


def _set_up(collector: IPyNbFile) -> None:
    """Start the kernel in the environment that `regenerate.py` gives it."""
    sys.path.insert(0, str(HERE))
    try:
        from regenerate import kernel_environment
    finally:
        sys.path.remove(str(HERE))
    before, wanted = dict(os.environ), kernel_environment()
    try:
        os.environ.clear()
        os.environ.update(wanted)
        IPyNbFile.setup(collector)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _compare(cell: IPyNbCell, test: list[Any], ref: list[Any], skip_compare: Any = None) -> bool:
    """nbval's comparison, without widgets, with numbers compared as numbers; then pictures, where a tag asks for it.

    Tags of a cell: `compare-image` compares its pictures, `numbers-within-5%` and `pictures-within-5` (of 255) allow
    more than the default, for what another processor computes differently.
    """
    tags = cell.cell.metadata.get("tags", [])
    test = [output for output in test if WIDGET not in output.get("data", {})]
    if not IPyNbCell.compare_outputs(cell, agreed(test, ref, _limit(tags, "numbers", NUMBERS)), ref, skip_compare):
        return False
    faults = picture_faults(test, ref, _limit(tags, "pictures", PICTURES)) if "compare-image" in tags else []
    cell.comparison_traceback += faults
    return not faults


def _limit(tags: list[str], kind: str, default: float) -> float:
    """What a tag such as `numbers-within-5%` allows."""
    found = [match for tag in tags if (match := re.fullmatch(rf"{kind}-within-([\d.]+)(%?)", tag))]
    return float(found[0][1]) / (100 if found[0][2] else 1) if found else default


def agreed(test: list[Any], ref: list[Any], tolerance: float) -> list[Any]:
    """The test's outputs, with the reference's text wherever the two differ by no more than their numbers may."""
    test, texts = deepcopy(test), _texts(ref)
    for place, (holder, key) in _texts(test).items():
        if place in texts:
            stored = texts[place][0][texts[place][1]]
            if same_text(holder[key], stored, tolerance):
                holder[key] = stored
    return test


def _texts(outputs: list[Any]) -> dict[tuple[str, int], tuple[Any, str]]:
    """Where the texts of outputs are, by their kind and their place among those of that kind."""
    found: dict[tuple[str, int], tuple[Any, str]] = {}
    counts: Counter[str] = Counter()
    for output in outputs:
        data = output.get("data", {})
        kinds = {output["name"]: (output, "text")} if "text" in output else {kind: (data, kind) for kind in data}
        for kind, holder in kinds.items():
            if not kind.startswith("image/"):
                found[kind, counts[kind]] = holder
                counts[kind] += 1
    return found


def same_text(text: Any, stored: Any, tolerance: float) -> bool:
    """Whether two texts have the same words, and numbers within a relative tolerance or one unit of the last digit.

    A whole number has no last digit that may differ: 7 is not 8.
    """
    if not isinstance(text, str) or not isinstance(stored, str):
        return bool(text == stored)
    if NUMBER.sub("#", text).split() != NUMBER.sub("#", stored).split():
        return False
    return all(_near(a, b, tolerance) for a, b in zip(NUMBER.findall(text), NUMBER.findall(stored), strict=True))


def _near(number: str, stored: str, tolerance: float) -> bool:
    a, b = (float(text.replace(",", "").replace("−", "-")) for text in (number, stored))
    mantissa, _, exponent = stored.lower().partition("e")
    digits = len(mantissa.partition(".")[2])
    unit = 10.0 ** (int(exponent or 0) - digits) if digits else 0.0
    return abs(a - b) <= max(tolerance * abs(b), 1.001 * unit)


def picture_faults(test: list[Any], ref: list[Any], tolerance: float) -> list[str]:
    """How the pictures of two lists of outputs differ: empty where they do not."""
    drawn, stored = _pictures(test), _pictures(ref)
    if len(drawn) != len(stored) or not drawn:
        return [f"{len(drawn)} pictures drawn, {len(stored)} stored"]
    return [fault for pair in zip(drawn, stored, strict=True) if (fault := _difference(*pair, tolerance))]


def _pictures(outputs: list[Any]) -> list[np.ndarray]:
    found = (output.get("data", {}).get(kind) for output in outputs for kind in ("image/png", "image/jpeg"))
    data = [one for one in found if one]
    return [np.asarray(Image.open(io.BytesIO(b64decode(one))).convert("RGB"), dtype=float) for one in data]


def _difference(drawn: np.ndarray, stored: np.ndarray, tolerance: float) -> str:
    if drawn.shape != stored.shape:
        return f"a picture of {drawn.shape} was drawn where {stored.shape} is stored"
    mean = float(np.abs(drawn - stored).mean())
    return f"a picture differs from the stored one by {mean:.2f}/255 in the mean" if mean > tolerance else ""
