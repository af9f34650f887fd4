"""What nbval leaves out: kernels without a user's settings, stored pictures compared by their pixels, no widgets."""

from __future__ import annotations

import io
import os
import sys
from base64 import b64decode
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile
from PIL import Image

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"
TOLERANCE = 2.0  # mean absolute difference of two pictures, of 255


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
    """nbval's comparison, without widgets; then the pictures of a cell with the tag `compare-image`, pixel by pixel."""
    test = [output for output in test if WIDGET not in output.get("data", {})]
    if not IPyNbCell.compare_outputs(cell, test, ref, skip_compare):
        return False
    if "compare-image" not in cell.cell.metadata.get("tags", []):
        return True
    drawn, stored = _pictures(test), _pictures(ref)
    faults = [] if len(drawn) == len(stored) > 0 else [f"{len(drawn)} pictures drawn, {len(stored)} stored"]
    faults += [fault for pair in zip(drawn, stored, strict=False) if (fault := _difference(*pair))]
    cell.comparison_traceback += faults
    return not faults


def _pictures(outputs: list[Any]) -> list[np.ndarray]:
    found = (output.get("data", {}).get(kind) for output in outputs for kind in ("image/png", "image/jpeg"))
    data = [one for one in found if one]
    return [np.asarray(Image.open(io.BytesIO(b64decode(one))).convert("RGB"), dtype=float) for one in data]


def _difference(drawn: np.ndarray, stored: np.ndarray) -> str:
    if drawn.shape != stored.shape:
        return f"a picture of {drawn.shape} was drawn where {stored.shape} is stored"
    mean = float(np.abs(drawn - stored).mean())
    return f"a picture differs from the stored one by {mean:.2f}/255 in the mean" if mean > TOLERANCE else ""
