"""Every name that a notebook uses is defined before, also for those who run only the core path."""

from __future__ import annotations

import ast
import builtins
import re
import symtable
from collections.abc import Iterator

import nbformat
import pytest
from nbformat import NotebookNode
from test_notebooks import LESSONS, code_cells, core_path, your_turn


def loaded_and_bound(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell takes from cells before it, and those that it binds for cells after it.

    What the body of a function takes may also be bound further down in the cell.
    """
    loaded: set[str] = set()
    inside: set[str] = set()
    bound: set[str] = set()
    for statement in ast.parse(source).body:
        table = symtable.symtable(ast.unparse(statement), "cell", "exec")
        own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
        used = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced()}
        if isinstance(statement, ast.AugAssign):
            used |= own
        elif not isinstance(statement, ast.Assign):
            used -= own
        loaded |= used - bound
        bound |= own
        for scope in scopes_in(table):
            inside |= {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global()}
    return loaded | (inside - bound), bound


def scopes_in(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    for scope in table.get_children():
        yield scope
        yield from scopes_in(scope)


def undefined(cells: list[NotebookNode]) -> list[str]:
    """The names that code cells use before one of them has bound them, each with the beginning of the cell."""
    known, found = set(dir(builtins)), []
    for cell in cells:
        loaded, bound = loaded_and_bound(cell.source)
        found += [f"{name} in {cell.source[:40]!r}" for name in sorted(loaded - known)]
        known |= bound
    return found


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_core_path_defines_what_it_uses(path):
    notebook = nbformat.read(path, 4)
    core = core_path(notebook.cells[: your_turn(notebook.cells)])
    assert undefined([cell for cell in core if cell.cell_type == "code"]) == []
    assert undefined(code_cells(notebook)) == []


def rebound(cells: list[NotebookNode], core: list[NotebookNode]) -> list[str]:
    """The names that mean something else in a folded cell if the core path has been run first, in one go.

    cells: those of a lesson; core: those of them that are not folded. Imports bind the same thing everywhere.
    """
    binds = [(cell, *loaded_and_bound(cell.source)) for cell in cells if cell.cell_type == "code"]
    shown, found = {id(cell) for cell in core}, []
    for place, (cell, loaded, _) in enumerate(binds):
        for name in sorted(loaded) if id(cell) not in shown else []:
            before = [one for one, _, bound in binds[:place] if name in bound]
            folded = [one for one in before if id(one) not in shown]
            latest = folded or [one for one, _, bound in binds if name in bound and id(one) in shown]
            if before and before[-1] is not latest[-1]:
                imports = rf"^(from|import) .*\b{name}\b"
                if not all(re.search(imports, one.source, re.M) for one in (before[-1], latest[-1])):
                    found.append(f"{name} in {cell.source[:40]!r}")
    return found


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_folded_sections_can_be_run_after_the_core_path(path):
    notebook = nbformat.read(path, 4)
    cells = notebook.cells[: your_turn(notebook.cells)]
    assert rebound(cells, core_path(cells)) == []


def test_rebound_names_are_found():
    first, folded, user, last = (nbformat.v4.new_code_cell(text) for text in ("x = 1", "x = 2", "print(x)", "x = 3"))
    assert rebound([first, user, last], [first, last]) == ["x in 'print(x)'"]
    assert rebound([folded, first, user], [first]) == ["x in 'print(x)'"]
    assert rebound([first, folded, user, last], [first, last]) == []


@pytest.mark.parametrize(
    "source",
    [
        "x = x + 1",
        "x += 1",
        "print(x)\nx = 1",
        "def f():\n    return x",
        "y = [x for y in range(3)]",
        "class A(x): pass",
        "y = lambda: (lambda: x)",
        "for y in x: pass",
    ],
)
def test_missing_names_are_found(source):
    x, cell = nbformat.v4.new_code_cell("x = 1"), nbformat.v4.new_code_cell(source)
    assert [line.split()[0] for line in undefined([cell, x])] == ["x"]
    assert undefined([x, cell]) == []


@pytest.mark.parametrize(
    "source",
    [
        "import a.b as c, d.e\nc, d",
        "def f(x):\n    return x + g()\n\ndef g(): return 1",
        "y = [x for x in range(3)]",
        "for i in range(3):\n    print(i)",
        "f = lambda x, *rest: (x, rest)",
        "with open(0) as f:\n    f",
        "try: pass\nexcept ValueError as error: error",
    ],
)
def test_names_bound_in_a_cell_are_known(source):
    assert undefined([nbformat.v4.new_code_cell(source)]) == []
