"""The layers of the package: every module imports only from its own layer and those before it, and in no circle."""

import ast
import graphlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "reslora"

# Each may import those before it, and itself. A module is in the layer that has its name or the longest part of it.
LAYERS = {
    "io": "io formatting errors checks attributes content_hash",
    "core": "config linking tracing wiring guards shortcuts merging regression calibration model ranks export "
    "checkpoint lycoris",
    "methods": "methods",
    "runtime": "runtime plots bundled json_lines losses seeds options.argument_parser options.values",
    "options": "options",
    "training": "training",
    "experiment": "experiment",
    "texts": "texts",
    "images": "images.generators images.context images.schedule images.cache_folder images.prompts",
    "images: models": "images.model",
    "images: refusals": "images.refusals",
    "images: data": "images.data",
    "images: what trains": "images.denoising images.initial_lora images.layers",
    "images: output": "images.output",
    "images: checks": "images.model_checks",
    "images: memory": "images.memory",
    "images: settings": "images.settings images.config_file images.experiment.requirements images.accelerator",
    "images: runs": "images.study images.requested images.run images.experiment images.planning images.comparison",
    "entries": "convert caption compare images.conversion images.captioning __init__",
}
ORDER = list(LAYERS)
EVERYWHERE = {"__init__": "__version__"}


def layer_of(module: str) -> int:
    """Return the number of a module's layer; raises an error if it has none."""
    names = {name: layer for layer, found in LAYERS.items() for name in found.split()}
    own = [name for name in names if f"{module}.".startswith(f"{name}.")]
    assert own, f"{module} is in no layer"
    return ORDER.index(names[max(own, key=len)])


def modules() -> dict[str, Path]:
    """Return every module by its name in the package."""
    found = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in found.items()}


def imported(path: Path, known: dict[str, Path], for_types: bool = False) -> set[str]:
    """Return the modules that a file imports anywhere; `for_types`: also those that only type checkers import."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            place = path.relative_to(PACKAGE).parts[: -node.level]
            start = ".".join((*place, *(node.module or "").split("."))).strip(".")
            for alias in node.names:
                if alias.name != EVERYWHERE.get(start or "__init__"):
                    full = f"{start}.{alias.name}".strip(".")
                    found.add(full if full in known else start or "__init__")
    return found


def test_imports_go_one_way():
    known = modules()
    assert len(known) > 150
    up = []
    for module, path in known.items():
        others = imported(path, known)
        if path.name == "__init__.py" and not others:
            continue  # it has a docstring alone
        here = layer_of(module)
        for other in others:
            there = layer_of(other)
            if there > here or (ORDER[there] == "texts" != ORDER[here]):
                up.append(f"{module} ({ORDER[here]}) imports {other} ({ORDER[there]})")
    assert not up, "\n".join(up)


def test_no_file_imports_itself_by_way_of_others():
    """Also not for type checkers alone."""
    known = modules()
    try:
        graphlib.TopologicalSorter({module: imported(path, known, True) for module, path in known.items()}).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None
