"""Rebuild the stored outputs of the notebooks: `python notebooks/regenerate.py [notebook …]`, without names all.

Each notebook is stripped, run from top to bottom in a fresh kernel on the shipped model, and written in one piece.
Nothing that changes from run to run is kept (timings, widget state, versions), so a second run gives the same bytes.
With `--check` nothing is written, and the exit status is 1 where a notebook would change.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
WIDGET = "application/vnd.jupyter.widget-view+json"
FOLDED = "jp-MarkdownHeadingCollapsed"  # of a heading in JupyterLab: its section is folded
HIDDEN = {"hide-output": "outputs_hidden", "hide-input": "source_hidden"}  # tag: what JupyterLab folds
DROPPED = ("MPLBACKEND", "MINISD_MODEL", "MINISD_DTYPE")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebooks() -> list[Path]:
    """All notebooks in reading order, then the solutions."""
    return [*sorted(HERE.glob("*.ipynb")), *sorted(HERE.glob("solutions/*.ipynb"))]


def kernel_environment(model: str | None = None, dtype: str | None = None) -> dict[str, str]:
    """The environment that a kernel gets: no network, one style of plots, and the shipped model or the one given
    (in a dtype, if that is given too).

    And one thread: with more, sums are taken in another order, and after 200 steps of training rounding can be seen.
    """
    environment = {key: value for key, value in os.environ.items() if key not in DROPPED}
    paths = [str(HERE.parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    chosen = {"MINISD_MODEL": model, "MINISD_DTYPE": dtype}
    return environment | {key: value for key, value in chosen.items() if value}


def strip(notebook: NotebookNode) -> NotebookNode:
    """A copy without outputs, execution counts, and all metadata but tags and folds; cells are numbered anew.

    JupyterLab folds the outputs of cells with the tag `hide-output`, so that their readers can guess first, the code of
    cells with `hide-input`, which only plots or holds an answer, and the sections whose heading has FOLDED.
    """
    cells = []
    for number, cell in enumerate(notebook.cells):
        tags = sorted(cell.metadata.get("tags", []))
        new = {"id": f"cell-{number:02}", "cell_type": cell.cell_type, "source": cell.source}
        new["metadata"] = {"tags": tags} if tags else {}
        if hidden := {key: True for tag, key in HIDDEN.items() if tag in tags}:
            new["metadata"]["jupyter"] = hidden
        if cell.metadata.get(FOLDED):
            new["metadata"][FOLDED] = True
        cells.append(new | ({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {}))
    return nbformat.from_dict({"nbformat": 4, "nbformat_minor": 5, "metadata": METADATA, "cells": cells})


def execute(
    notebook: NotebookNode, folder: Path, model: str | None = None, timeout: int = 600, dtype: str | None = None
) -> NotebookNode:
    """Run a stripped copy in a fresh kernel that works in `folder`; raise CellExecutionError where a cell fails.

    Widgets and what was written to stderr are left out, and text that was printed in pieces is joined.
    """
    fresh = strip(notebook)
    client = NotebookClient(
        fresh,
        kernel_name="python3",
        timeout=timeout,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=kernel_environment(model, dtype))
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _passing(output)]
    fresh.metadata = nbformat.from_dict(METADATA)
    return fresh


def _passing(output: NotebookNode) -> bool:
    return output.get("name") == "stderr" or WIDGET in output.get("data", {})


def write(notebook: NotebookNode, path: Path) -> None:
    """Write beside the old file, then take its place."""
    new = path.with_suffix(".new")
    new.write_text(nbformat.writes(notebook), encoding="utf-8", newline="\n")
    os.replace(new, path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Rebuild the stored outputs of the notebooks.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="which ones; by default all")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a notebook would change")
    choices = parser.parse_args()
    changed = 0
    for path in choices.notebooks or notebooks():
        began, before = time.time(), path.read_text(encoding="utf-8")
        fresh = execute(nbformat.reads(before, as_version=4), path.resolve().parent)
        same = nbformat.writes(fresh) == before.removesuffix("\n") or nbformat.writes(fresh) == before
        changed += not same
        if not same and not choices.check:
            write(fresh, path)
        print(f"{path.name}: {'unchanged' if same else 'changed'}, {time.time() - began:.0f} s", flush=True)
    return 1 if choices.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
