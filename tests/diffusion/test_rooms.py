"""The rooms of `reslora/diffusion`: imports between them go one way."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "reslora" / "diffusion"
ROOMS = ("model", "data", "training", "output", "planning", "experiment")  # each may import those before it


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports when it is imported itself: not what only a type checker reads."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            target = folder.joinpath(*(node.module or "").split("."))
            if target.is_relative_to(PACKAGE) and target != PACKAGE:
                found.add(target.relative_to(PACKAGE).parts[0])
    return found & set(ROOMS)


@pytest.mark.parametrize("number", range(len(ROOMS)), ids=ROOMS)
def test_a_room_imports_only_those_before_it(number):
    files = sorted((PACKAGE / ROOMS[number]).rglob("*.py"))
    assert len(files) > 4
    for path in files:
        assert imported_rooms(path) <= set(ROOMS[: number + 1]), path


def test_what_is_common_to_all_imports_no_experiment():
    """And an experiment knows neither images nor texts: see tests/language/test_package.py."""
    for path in (PACKAGE.parent / "common").rglob("*.py"):
        assert "experiment" not in {
            (node.module or "").split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level == 2
        }, path
