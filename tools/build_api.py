"""Build the API pages from the docstrings: HTML, one page per module.

pip install pdoc && python tools/build_api.py site/api
"""

from __future__ import annotations

import argparse
import pkgutil
from pathlib import Path

import pdoc

import minisd

PACKAGES = ("features", "io", "pipeline", "training", "evaluation")  # beside the core; commands and benches have --help


def modules() -> list[str]:
    """List the modules that get a page: the package itself, the core, and the packages around it."""
    core = [f"minisd.{item.name}" for item in pkgutil.iter_modules(minisd.__path__) if not item.ispkg]
    found = ["minisd", *(name for name in core if name != "minisd.__main__")]
    for package in PACKAGES:
        module = pkgutil.resolve_name(f"minisd.{package}")
        found += [
            module.__name__,
            *(f"{module.__name__}.{item.name}" for item in pkgutil.iter_modules(module.__path__)),
        ]
    return [name for name in found if not name.rpartition(".")[2].startswith("_")]


def build(folder: Path, names: list[str]) -> None:
    """Write the pages of the modules into `folder`."""
    for name in minisd.__all__:
        setattr(minisd, name, getattr(minisd, name))  # they are imported at first use, which pdoc does not trigger
    pdoc.render.configure(docformat="google", math=True, footer_text=f"minisd {minisd.__version__}")
    pdoc.pdoc(*names, output_directory=folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pages go")
    build(parser.parse_args().folder, modules())
