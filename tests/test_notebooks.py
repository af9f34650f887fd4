"""The gate of the notebooks: what nbval does not see, and proof by mutation that gate and nbval catch a false output.

nbval itself runs every notebook (`--nbval`, see pyproject.toml) and compares what is printed and drawn. It passes a
notebook without outputs, though, and one that was never run; so the stored files are examined here.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import math
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
PAGES = [*sorted(FOLDER.glob("*.ipynb")), *sorted(FOLDER.glob("solutions/*.ipynb"))]
LESSONS = [page for page in PAGES if page.parent == FOLDER]
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|Users|root|tmp|work|opt|usr|var|mnt|private)/|[A-Z]:\\\\?\w")
IMAGES = ("image/png", "image/jpeg")
LAYERED = LESSONS[10:]  # with a core path, and deeper sections that are folded
# how many lines each notebook leaves to the reader
BLANK_LINES = dict.fromkeys([page.stem for page in LESSONS], 1)
BLANK_LINES |= dict.fromkeys(["02_autoencoder", "03_tokenizer", "06_schedule", "07_unet", "11_editing"], 2)
BLANK_LINES |= dict.fromkeys(["08_samplers", "14_speed"], 2)
BLANK_LINES["04_text_encoder"] = 3
TWO_LAYERS = ("05_attention", "06_schedule", "07_unet", "08_samplers", "09_guidance")
ANY_MODEL = ("05_attention.ipynb", "07_unet.ipynb")  # 00: test_browser.py; all of them: notebook_models.py


@pytest.fixture(scope="module")
def regenerate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("regenerate", FOLDER / "regenerate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def images(cell: NotebookNode) -> list[tuple[NotebookNode, str]]:
    return [(output, kind) for output in cell.outputs for kind in IMAGES if kind in output.get("data", {})]


def faults(notebook: NotebookNode) -> list[str]:
    """What is wrong with a stored notebook: empty where nothing is."""
    found, cells = [], code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"cells have not been run in order: {counts}")
    if not any(cell.outputs for cell in cells):
        found.append("no cell has an output")
    for number, cell in enumerate(cells, start=1):
        found += [f"cell {number} {fault}" for fault in cell_faults(cell)]
    for before, cell in zip([None, *notebook.cells], notebook.cells, strict=False):
        if cell.cell_type == "code" and (before is None or before.cell_type != "markdown"):
            found.append(f"no words before the cell that begins {cell.source[:30]!r}")
    texts = [cell.source for cell in notebook.cells]
    texts += [str(output) for cell in cells for output in cell.outputs if not set(IMAGES) & set(output.get("data", {}))]
    found += [f"absolute path near {text[m.start() :][:30]!r}" for text in texts if (m := ABSOLUTE.search(text))]
    if sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown") < sum(
        len(cell.source.splitlines()) for cell in cells
    ):
        found.append("more lines of code than words")
    return found


def cell_faults(cell: NotebookNode) -> list[str]:
    tags, pictures = set(cell.metadata.get("tags", [])), images(cell)
    compared = tags & {"compare-image", "nbval-ignore-output"}
    kinds = {output.output_type for output in cell.outputs}
    found = {
        "holds an error and has no tag raises-exception": "error" in kinds and "raises-exception" not in tags,
        "keeps what was written to stderr": any(output.get("name") == "stderr" for output in cell.outputs),
        "shows a picture and has no tag compare-image": pictures and not compared,
        "has the tag compare-image and no picture": "compare-image" in tags and not pictures,
        "shows a picture without alt text": not all(o.metadata.get(k, {}).get("alt", "").strip() for o, k in pictures),
        "is longer than 25 lines": len(cell.source.splitlines()) > 25,
    }
    return [fault for fault, is_there in found.items() if is_there]


def links(path: Path) -> list[str]:
    """Relative links of a page, in Markdown and HTML."""
    if path.suffix == ".ipynb":
        text = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    return [link for link in found if not link.startswith(("http://", "https://", "mailto:"))]


def headings(path: Path) -> set[str]:
    """The anchors that Jupyter gives a notebook's headings."""
    cells = nbformat.read(path, 4).cells if path.suffix == ".ipynb" else []
    return {
        line.lstrip("#").strip().replace(" ", "-")
        for cell in cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("#")
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_stored_notebook_is_complete(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert faults(notebook) == []
    assert path.stat().st_size < 1_000_000, "larger than 1 MB"


@pytest.mark.parametrize("path", [*PAGES, FOLDER / "README.md"], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for link in links(path):
        target, _, anchor = link.partition("#")
        page = (path.parent / target).resolve() if target else path
        assert page.exists(), f"{path.name} links to {link}"
        assert not anchor or page.suffix != ".ipynb" or anchor in headings(page), f"no heading for {link}"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_lesson_has_its_parts(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    for part in ("# ", "Predict, then run", "Break it", "Your turn", "You can now", "Papers", "**Time**", "**Memory**"):
        assert part in text, f"{path.name} has no {part!r}"
    assert path.name in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_answers_are_folded_until_they_are_asked_for(path, regenerate):
    """JupyterLab shows the first line of a folded output, so that line is not part of the answer."""
    notebook = nbformat.read(path, 4)
    cells = notebook.cells
    asked = [i for i, cell in enumerate(cells) if "Predict, then run" in cell.source and cell.cell_type == "markdown"]
    for i in asked:
        answer = next(cell for cell in cells[i:] if cell.cell_type == "code" and cell.outputs)
        assert "hide-output" in answer.metadata.get("tags", []), f"the answer to cell {i} can be seen"
    folded = [i for i, cell in enumerate(cells) if "outputs_hidden" in cell.metadata.get("jupyter", {})]
    assert folded == [i for i, cell in enumerate(cells) if "hide-output" in cell.metadata.get("tags", [])]
    for i in folded:
        assert cells[i].metadata.jupyter == {"outputs_hidden": True}
        assert cells[i].source.startswith('print("The answer, once you have yours:")\n')
        assert cells[i + 1].cell_type == "markdown", f"no words about the output of cell {i}"
    assert len(folded) >= len(asked) > 0
    assert [cell.metadata for cell in regenerate.strip(notebook).cells] == [cell.metadata for cell in cells]


def core_path(cells: list[NotebookNode]) -> list[NotebookNode]:
    """The cells that JupyterLab shows before the questions: a folded heading hides all up to the next of its level."""
    found, hidden = [], 0
    for cell in cells:
        heading = re.match(r"(#+) ", cell.source) if cell.cell_type == "markdown" else None
        if "## Check yourself" in cell.source:
            break
        if heading and len(heading[1]) <= hidden:
            hidden = 0
        if cell.metadata.get("jp-MarkdownHeadingCollapsed"):
            assert heading, "only a heading can be folded"
            hidden = hidden or len(heading[1])
        if not hidden:
            found.append(cell)
    return found


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_core_path_is_short(path):
    """At most 25 cells and 1,500 words before questions and exercises: 35 to 55 minutes.

    Formulas count as nothing, or as one word within a line; folded answers are not counted.
    """
    cells = nbformat.read(path, 4).cells
    core = core_path(cells[: your_turn(cells)])
    text = "\n".join(cell.source for cell in core if cell.cell_type == "markdown")
    prose = re.sub(r"<details>.*?</details>|\$\$.*?\$\$|```.*?```", "", text, flags=re.DOTALL)
    words = len(re.findall(r"[^\W_]+(?:['’.\-][^\W_]+)*", re.sub(r"\$[^$]*\$", "x", prose)))
    assert len(core) <= 25 and words <= 1500, (len(core), words)
    assert "core path" in cells[0].source.lower()


@pytest.mark.parametrize("path", LAYERED, ids=lambda path: path.stem)
def test_deeper_sections_are_folded(path):
    cells = nbformat.read(path, 4).cells
    for cell in cells:
        deeper = cell.cell_type == "markdown" and re.findall(r"^#+ (Deeper:)?.*$", cell.source, re.MULTILINE)
        assert bool(deeper and deeper[0]) == cell.metadata.get("jp-MarkdownHeadingCollapsed", False), cell.source[:40]
        assert not deeper or not any(deeper[1:]), f"a second heading to fold in {cell.source[:40]!r}"
    assert "**Core path**" in cells[0].source
    asked = next(cell.source for cell in cells if "## Check yourself" in cell.source)
    assert 3 <= asked.count("<details><summary>Answer</summary>") == asked.count("</details>") <= 5


@pytest.mark.parametrize("path", LAYERED, ids=lambda path: path.stem)
def test_lines_of_code_are_short(path):
    lines = [line for cell in code_cells(nbformat.read(path, 4)) for line in cell.source.splitlines()]
    assert [line for line in lines if len(line) > 100] == []


def your_turn(cells: list[NotebookNode]) -> int:
    """Where the exercises at the end of a lesson begin."""
    return next(i for i, cell in enumerate(cells) if "## Your turn" in cell.source)


def checks(cells: list[NotebookNode]) -> list[tuple[str, str]]:
    """The sources of cells that check an answer, and what they print."""
    said = [(cell.source, "".join(o.get("text", "") for o in cell.get("outputs", []))) for cell in cells]
    return [(source, text) for source, text in said if re.search(r"^check\(", source, re.MULTILINE)]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_blank_lines_have_a_folded_answer_and_the_next_cell_has_it(path):
    cells = nbformat.read(path, 4).cells
    lesson = cells[: your_turn(cells)]
    blanks = [i for i, cell in enumerate(lesson) if checks([cell])]
    assert len(blanks) == BLANK_LINES.get(path.stem, 0)
    for i in blanks:
        assert "raise NotImplementedError  # your line" in cells[i].source
        assert checks([cells[i]])[0][1].endswith("not yet\n")
        answer = re.match(
            r"<details><summary>Answer</summary>\n\n```python\n(.*?)\n```\n\n</details>", cells[i + 1].source, re.DOTALL
        )
        assert answer and answer[1] in cells[i + 2].source and cells[i + 2].cell_type == "code"


@pytest.mark.parametrize("name", TWO_LAYERS)
def test_sections_of_two_layers(name):
    """Sections headed "Deeper" are folded."""
    cells = nbformat.read(FOLDER / f"{name}.ipynb", 4).cells
    deeper = False
    for cell in cells[: your_turn(cells)]:
        heads = [line for line in cell.source.splitlines() if line.startswith("## ") and cell.cell_type == "markdown"]
        assert heads in ([], cell.source.splitlines()[:1]), f"a heading within a cell: {heads}"
        deeper = heads[0].startswith("## Deeper") if heads else deeper
        assert bool(cell.metadata.get("jp-MarkdownHeadingCollapsed")) == bool(heads and deeper), heads
    assert "**Core path**" in cells[0].source
    questions = sum(cell.source.count("<details><summary>Question") for cell in cells)
    assert 3 <= questions <= 5


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_only_code_that_plots_or_answers_is_folded(path):
    """Its first line says what it draws, or which blank it fills in, and its output can be seen."""
    for cell in nbformat.read(path, 4).cells:
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            assert cell.cell_type == "code" and "hide-input" in cell.metadata.tags
            assert cell.source.startswith(("# Plot: ", "# Answer: ")), cell.source[:60]
            assert ("compare-image" in cell.metadata.tags) == cell.source.startswith("# Plot: ")
            assert "hide-output" not in cell.metadata.tags


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_exercise_has_a_solution_that_passes_the_same_check(path):
    solutions = nbformat.read(FOLDER / "solutions" / f"{path.stem}_solutions.ipynb", 4).cells
    cells = nbformat.read(path, 4).cells
    asked, solved = checks(cells[your_turn(cells) :]), checks(solutions)
    assert 2 <= len(asked) <= 4
    assert [source for source, _ in asked] == [source for source, _ in solved]
    assert {text for _, text in asked} == {"not yet\n"}
    assert {text for _, text in solved} == {"yes\n"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ANY_MODEL)
def test_notebook_runs_on_a_model_of_other_widths(name, small_model, regenerate):
    notebook = regenerate.execute(nbformat.read(FOLDER / name, 4), FOLDER, str(small_model), timeout=280)
    said = "".join(o.get("text", "") for c in code_cells(notebook) for o in c.outputs)
    assert "Model: small (MINISD_MODEL), on" in said and "32 × 32 pixels" in said


# Proof that the gate closes: in every notebook, and with nbval itself on a small notebook that stands in for them.


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks_conftest", FOLDER / "conftest.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numbers_are_compared_as_numbers(gate):
    def same(text: str, stored: str) -> bool:
        return gate.same_text(text, stored, 0.01)

    for text, stored in (
        ("561.12%", "561.13%"), ("57.5", "57.1"), ("a  9.99 b", "a 10.00 b"), ("1.00e-05", "1.01e-05"),
        ("1,004", "1,000"), ("−0.51", "−0.52"), ("tensor([0.1000, 2.0])", "tensor([0.1001, 2.0])"), ("0.3", "0.2"),
    ):  # fmt: skip
        assert same(text, stored), (text, stored)
    for text, stored in (
        ("58.9", "57.1"), ("7", "8"), ("1,020", "1,000"), ("0.51", "−0.51"), ("1.3e-05", "1.3e-04"), ("9.9", "9.9 x"),
        ("a 1.0", "b 1.0"), ("float64", "float32"), ("1.0 2.0", "1.0"), ("True", "False"), ("x1 5", "x2 5"),
    ):  # fmt: skip
        assert not same(text, stored), (text, stored)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_changed_numbers_and_pictures_of_every_notebook(path, gate):
    """Each number that can show 3% is changed by 3%, each picture by 6 of 255, and found."""
    numbers = pictures = 0
    for cell in code_cells(nbformat.read(path, 4)):
        tags = cell.metadata.get("tags", [])
        if "nbval-ignore-output" in tags:
            continue
        for holder, key in gate._texts(cell.outputs).values():
            stored = holder[key]
            limit = gate._limit(tags, "numbers", gate.NUMBERS)
            for match in gate.NUMBER.finditer(stored if isinstance(stored, str) else ""):
                changed = three_percent_more(match[0])
                if changed and limit < 0.03:
                    text = stored[: match.start()] + changed + stored[match.end() :]
                    assert not gate.same_text(text, stored, limit), (stored, changed)
                    numbers += 1
        if "compare-image" in tags:
            outputs = copy.deepcopy(cell.outputs)
            for output, kind in images(NotebookNode(outputs=outputs)):
                output.data[kind] = shifted_by(6, output.data[kind])
            assert gate.picture_faults(outputs, cell.outputs, gate._limit(tags, "pictures", gate.PICTURES))
            pictures += 1
    assert path.parent != FOLDER or (numbers > 5 and pictures > 0)


def three_percent_more(number: str) -> str:
    """A number as it would be printed with 3% more, or 5 of its last digit if that is more; "" if it is 0."""
    digits = len(number.lower().partition("e")[0].partition(".")[2])
    value = float(number.replace(",", "").replace("−", "-"))
    if "e" in number.lower():
        return f"{value * 1.06:.{digits}e}" if digits else ""
    step = max(abs(value) * 0.031, 5 * 10.0**-digits if digits else 1.0)
    return f"{value + math.copysign(step, value):.{digits}f}" if value else ""


def shifted_by(levels: int, data: str) -> str:
    picture = Image.open(io.BytesIO(b64decode(data))).convert("RGB")
    buffer = io.BytesIO()
    moved = picture.point(lambda value: value + levels if value < 128 else value - levels)
    moved.save(buffer, format="PNG")
    return b64encode(buffer.getvalue()).decode()


SAMPLE = [
    ("markdown", "Words, more of them than lines of code: first a number, and then a picture of a slope.", []),
    ("code", "from PIL import Image\nfrom minisd.figures import show\nprint(f'{1 / 3:.4f}')", []),
    ("markdown", "The picture:", []),
    ("code", "show(Image.linear_gradient('L'), alt='A slope from black to white.')", ["compare-image"]),
]


@pytest.fixture(scope="module")
def sample(regenerate: ModuleType) -> NotebookNode:
    cells = []
    for kind, source, tags in SAMPLE:
        cell = (nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell)(source)
        cells.append(cell)
        if tags:
            cell.metadata["tags"] = tags
    return regenerate.execute(nbformat.v4.new_notebook(cells=cells), FOLDER, timeout=120)


def shifted(levels: int) -> Callable[[NotebookNode], None]:
    def change(notebook: NotebookNode) -> None:
        data = code_cells(notebook)[1].outputs[0]["data"]
        data["image/png"] = shifted_by(levels, data["image/png"])

    return change


def roughly(notebook: NotebookNode) -> None:
    code_cells(notebook)[0].outputs[0]["text"] = "0.3334\n"


def printed(notebook: NotebookNode) -> None:
    code_cells(notebook)[0].outputs[0]["text"] = "0.3433\n"


def without_picture(notebook: NotebookNode) -> None:
    code_cells(notebook)[1].outputs = []


def test_nbval_finds_every_changed_output(sample, tmp_path):
    changes = {
        "same": lambda notebook: None,
        "slightly": lambda notebook: (roughly(notebook), shifted(1)(notebook)),
        "clearly": lambda notebook: (printed(notebook), shifted(3)(notebook)),
        "removed": without_picture,
    }
    shutil.copy(FOLDER / "conftest.py", tmp_path)
    shutil.copy(FOLDER / "regenerate.py", tmp_path)
    for name, change in changes.items():
        notebook = copy.deepcopy(sample)
        change(notebook)
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-cell-timeout=120", "-p", "no:cacheprovider", "-rA"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "PYTEST_ADDOPTS": ""}
    options = {"capture_output": True, "text": True, "env": environment}
    report = subprocess.run([*command, "--rootdir", tmp_path, tmp_path], **options).stdout
    lines = re.findall(r"^(PASSED|FAILED) \S*?(\w+)\.ipynb::.*?Cell (\d)", report, re.MULTILINE)
    verdicts = {f"{name}:{cell}": verdict for verdict, name, cell in lines}
    expected = {f"{name}:{cell}": "PASSED" for name in changes for cell in (0, 1)}
    expected |= dict.fromkeys(("clearly:0", "clearly:1", "removed:1"), "FAILED")
    assert verdicts == expected, report


def unrun(notebook: NotebookNode) -> None:
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None


def out_of_order(notebook: NotebookNode) -> None:
    code_cells(notebook)[0].execution_count = 7


def failed(notebook: NotebookNode) -> None:
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
    code_cells(notebook)[0].outputs.append(error)


def with_path(notebook: NotebookNode) -> None:
    code_cells(notebook)[0].outputs[0]["text"] = "saved in /home/somebody/fox.png\n"


def untagged(notebook: NotebookNode) -> None:
    code_cells(notebook)[1].metadata["tags"] = []


def without_alt(notebook: NotebookNode) -> None:
    code_cells(notebook)[1].outputs[0].metadata["image/png"]["alt"] = ""


def wordless(notebook: NotebookNode) -> None:
    del notebook.cells[2]


def lengthy(notebook: NotebookNode) -> None:
    code_cells(notebook)[0].source += "\npass" * 30


def test_gate_passes_the_sample(sample):
    assert faults(sample) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (unrun, "have not been run"),
        (out_of_order, "in order"),
        (failed, "holds an error"),
        (with_path, "absolute path"),
        (untagged, "no tag compare-image"),
        (without_picture, "no picture"),
        (without_alt, "without alt text"),
        (wordless, "no words before"),
        (lengthy, "longer than 25 lines"),
    ],
)
def test_gate_finds_every_fault(sample, change, fault):
    notebook = copy.deepcopy(sample)
    change(notebook)
    assert any(fault in line for line in faults(notebook)), faults(notebook)


def test_running_again_gives_the_same_bytes(sample, regenerate):
    again = regenerate.execute(sample, FOLDER, timeout=120)
    assert nbformat.writes(again) == nbformat.writes(sample)
