"""The house: what the core holds and imports, and how large files and functions may be."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from minisd import Sampler, StableDiffusion
from minisd.generate import generate

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "minisd"
CORE = sorted(path for path in PACKAGE.glob("*.py") if path.name not in ("figures.py", "__main__.py"))
FILES = sorted(PACKAGE.rglob("*.py"))

# Runs the statements of a child process, and prints the package's files whose functions they call.
TRACED = """
import sys
from pathlib import Path

import minisd

package, entered = str(Path(minisd.__file__).parent), set()


def entering(frame, event, _):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(package) and code.co_name != "<module>":
        entered.add(str(Path(code.co_filename).relative_to(package)))


{prepare}
sys.setprofile(entering)
{traced}
sys.setprofile(None)
print(*sorted(entered))
"""


def length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def entered_files(traced: str, prepare: str = "") -> list[str]:
    code = TRACED.format(prepare=prepare, traced=traced)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_core_size():
    sizes = {path.name: length(path) for path in CORE}
    assert len(sizes) <= 20
    assert sum(sizes.values()) <= 2000, sizes


def test_package_size():
    aside = {"training", "bench", "evaluation"}
    sizes = {path: length(path) for path in FILES if path.relative_to(PACKAGE).parts[0] not in aside}
    assert sum(sizes.values()) <= 12_940  # the aim is 6,800


def test_file_lengths():
    assert {str(path.relative_to(ROOT)): length(path) for path in FILES if length(path) > 400} == {}


def test_function_lengths():
    long = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                lines = node.end_lineno - node.lineno + 1
                if lines > 50:
                    long[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = lines
    assert long == {}


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_core_imports(path):
    """Besides itself and the standard library, the core imports torch, numpy, einops and Pillow only."""
    allowed = {"torch", "numpy", "einops", "PIL", *sys.stdlib_module_names}
    core = {f"minisd.{module.stem}" for module in CORE} | {"minisd"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = _typing_imports(tree) if path.name == "__init__.py" else set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            assert module in core or module.partition(".")[0] in allowed, f"{path.name} imports {module}"


def _typing_imports(tree: ast.Module) -> set[ast.stmt]:
    """`__init__` says the types of its lazy names under TYPE_CHECKING; nothing of that is imported."""
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    return {statement for node in tests if ast.unparse(node.test) == "TYPE_CHECKING" for statement in node.body}


def test_import_contracts_list_the_whole_core():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    core = {f"minisd.{path.stem}" for path in CORE if path.stem != "__init__"}
    assert set(contracts[0]["layers"][-1].split()) - {":"} == core
    assert set(contracts[1]["source_modules"]) == core
    rings = {f"minisd.{path.name}" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert set(" ".join(contracts[0]["layers"][:-1]).split()) - {":"} == rings | {"minisd.figures"}


def test_files_one_picture_enters():
    load = "from minisd import StableDiffusion\nsd = StableDiffusion.from_pretrained(device='cpu')"
    entered = entered_files('sd("a fox", seed=7, num_inference_steps=2)', load)
    assert len(entered) <= 22, entered  # the aim is 14


def test_files_generate_enters():
    """The core's own pipeline, on networks as the core defines them."""
    prepare = """
from minisd.generate import Model, generate
from minisd.io.checkpoint import load
loaded = load()
model = Model(loaded.config, loaded.tokenizer, loaded.text_encoder, loaded.unet, loaded.autoencoder)
"""
    entered = entered_files('generate(model, ["a fox"], num_inference_steps=2)', prepare)
    assert len(entered) <= 12, entered
    assert not [name for name in entered if "/" in name], entered


def test_generate_draws_what_the_public_class_draws():
    sd = StableDiffusion.from_pretrained(device="cpu")
    settings = {"negative_prompt": "a dog", "num_inference_steps": 4, "guidance_scale": 5.0}
    (expected,) = sd(["a fox"], seed=7, sampler="dpmpp_2m", **settings)
    (picture,) = generate(sd.model, ["a fox"], seeds=[7], sampler=Sampler("dpmpp_2m"), **settings)
    assert picture.tobytes() == expected.tobytes()
