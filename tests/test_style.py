"""What CONTRIBUTING.md and DESIGN.md promise of every file and function outside the tests."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("reslora", "app", "benchmarks", "assets/make")
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
HANDLERS = {"draw in app/tabs/generate.py", "draw_grid in app/tabs/grid.py", "write_whole in app/tabs/stack.py"}
"""Gradio's: one argument for each component that is read."""


@pytest.fixture(scope="module")
def functions() -> dict[str, ast.FunctionDef]:
    """Every function, by its name and file."""
    found = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found.setdefault(f"{node.name} in {path.relative_to(ROOT)}", []).append(node)
    return found


def test_files_have_at_most_450_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_functions_have_at_most_60_lines(functions):
    lengths = {name: max(node.end_lineno - node.lineno + 1 for node in nodes) for name, nodes in functions.items()}
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_functions_take_at_most_five_arguments(functions):
    """Of the package and the application; `self` aside, and keyword-only ones included."""
    long = {name for name, nodes in functions.items() if max(map(count, nodes)) > 5}
    assert {name for name in long if name.split(" in ")[1].startswith(("reslora/", "app/"))} == HANDLERS


def count(function: ast.FunctionDef) -> int:
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in arguments)
