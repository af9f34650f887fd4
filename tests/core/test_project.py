"""The project's files: that they agree with each other and with the code."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import minisd

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = ["README.md", "docs/structure.md", "docs/performance.md"]
ENGLISH = ["docs/library.md", "CHANGELOG.md", "tests/README.md", "SECURITY.md"]
CHINESE = [page.replace(".md", ".zh-CN.md") for page in PAGES]
PYTHON = {"cwd": ROOT, "check": True, "capture_output": True, "text": True}


def requirements(lines: list[str]) -> dict[str, str]:
    """Names, as an index spells them, to version ranges; conda's name for torch is pytorch."""
    parsed = [Requirement(line) for line in lines if not line.startswith("minisd[")]
    return {canonicalize_name(r.name.replace("pytorch", "torch")): str(r.specifier) for r in parsed}


EXTRAS = PROJECT["optional-dependencies"]
EVERYTHING = requirements([*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)])


def test_conda_environment():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *lines, pip = environment["dependencies"]
    assert {"python=3.11", "pip"} <= set(lines)
    conda = requirements([line for line in lines if line not in ("python=3.11", "pip")])
    assert conda == requirements([*PROJECT["dependencies"], *EXTRAS["notebooks"]])
    assert pip["pip"][-1] == "-e ."
    assert requirements(pip["pip"][:-1]).items() <= EVERYTHING.items()


def test_constraints():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))
    for name, specifier in EVERYTHING.items():
        assert Requirement(f"{name}{specifier}").specifier.contains(pins[name]), name


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_installed_versions(name):
    assert Requirement(f"{name}{EVERYTHING[name]}").specifier.contains(metadata.version(name), prereleases=True)


def test_declared_imports():
    """Core files use core requirements only, some others those of an extra; diffusers only to be measured beside."""
    import_names = {"pillow": "PIL", "huggingface-hub": "huggingface_hub", "resvg-py": "resvg_py", "ipython": "IPython"}
    extra_of = {
        "training": "train",
        "evaluation": "train",
        "figures.py": "notebooks",
        "bench": "notebooks",
        "app/web.py": "web",
        "io/onnx_files.py": "export",
        "bench/peers.py": "export",
        "lessons/drawing.py": "notebooks",
    }
    core = {import_names.get(name, name) for name in requirements(PROJECT["dependencies"])}
    for path in (ROOT / "minisd").rglob("*.py"):
        file = path.relative_to(ROOT / "minisd")
        extra = extra_of.get(file.as_posix(), extra_of.get(file.parts[0]))
        allowed = core | {"minisd"} | {import_names.get(name, name) for name in requirements(EXTRAS.get(extra, []))}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name} imports relatively"
                modules = [node.module or ""]
            for module in modules:
                top = module.partition(".")[0]
                assert top in allowed or top in sys.stdlib_module_names, f"{path.name} imports {module}"
                if top in ("diffusers", "transformers"):
                    assert path.relative_to(ROOT / "minisd").as_posix() == "bench/worker.py", f"{path} imports {module}"


def test_lazy_imports():
    code = "import sys, minisd; assert 'torch' not in sys.modules; minisd.StableDiffusion; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], **PYTHON).stdout.split())
    assert {"torch", "minisd.pipeline.stable_diffusion"} <= loaded
    assert not {"diffusers", "transformers", "matplotlib", "starlette", "minisd.training", "minisd.app.cli"} & loaded


def test_public_names():
    for name in minisd.__all__:
        assert getattr(minisd, name) is not None
    assert set(minisd.__all__) <= set(dir(minisd))
    with pytest.raises(AttributeError, match="UNNet"):
        minisd.UNNet  # noqa: B018


@pytest.mark.parametrize("page", [*PAGES, *CHINESE, *ENGLISH])
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


@pytest.fixture(scope="module")
def defined() -> set[str]:
    """The names of all tests."""
    nodes = [ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for path in (ROOT / "tests").rglob("test_*.py")]
    names = (node.name for each in nodes for node in each if isinstance(node, ast.FunctionDef))
    return {name for name in names if name.startswith("test_")}


def test_security_names_tests_that_exist(defined):
    named = set(re.findall(r"`(test_\w+)", (ROOT / "SECURITY.md").read_text(encoding="utf-8")))
    assert len(named) > 20 and named <= defined


def test_what_people_bring_names_tests_that_exist(defined):
    """Each row has a kind, its members, an oracle, and tests or "the same" as above."""
    text = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    table = text.partition("## What people bring")[2].partition("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 30
    for row in rows:
        assert len(row) == 4 and all(cell.strip() for cell in row), row
        names = re.findall(r"`([\w*/.]+)`", row[3])
        assert names or row[3].strip() == "the same", row
        for name in names:
            found = fnmatch.filter(defined, name) or (name.endswith(".py") and (ROOT / "tests" / name).is_file())
            assert found, f"{row[0].strip()}: {name}"


def test_versions():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == minisd.__version__
    assert citation["license"] == PROJECT["license"] == "MIT"


def test_wheel(tmp_path):
    build = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "-w", str(tmp_path), "."]
    subprocess.run([sys.executable, "-m", *build], **PYTHON)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tracked = subprocess.run(["git", "ls-files", "minisd"], **PYTHON).stdout.split()
    assert set(tracked) <= set(names)
    licences = {name.partition("/licenses/")[2] for name in names if ".dist-info/licenses/" in name}
    assert {"LICENSE", "NOTICE", "minisd/assets/licenses/CLIP-MIT.txt", "minisd/assets/sprites/LICENSE"} <= licences
