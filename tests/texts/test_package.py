"""The imports of the package: it imports the core, not the text-to-image part, and only scripts import it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "reslora"


def imported(path: Path) -> set[str]:
    """Return dotted names of everything that a file imports, anywhere in it; those of the package from its root."""
    place, names = path.relative_to(ROOT).parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(place[: len(place) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def files(folder: str) -> list[Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("texts"), ids=lambda path: path.name)
def test_no_file_imports_diffusers(path):
    """And no file imports the text-to-image part: see tests/test_layers.py."""
    assert "diffusers" not in {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", files("texts"), ids=lambda path: path.name)
def test_imports_stand_at_the_top(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = [
        node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in tree.body
    ]
    assert not inside


@pytest.mark.parametrize("name", ["train_llm.py", "train_glue.py"])
def test_entries_are_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) < 100
