"""Reference of experiment.json from its types: `python docs/experiment_json_page.py > docs/experiment_json.md`."""

import ast
import inspect
import itertools
from collections.abc import Iterator
from typing import get_args

from reslora.experiment import record

HEAD = """# experiment.json

`python docs/experiment_json_page.py > docs/experiment_json.md` writes this page.

An [experiment](experiments.md) writes `experiment.json` into its output folder, and writes it again after every run.
Keys and meanings stay the same as long as `format` is {version}; later versions may add keys. A key marked with * may
be missing. A lower loss is better; a loss that is not finite is `null`. A *label* is the name of what is compared:
a method, or a variant of it. An *arm* is one training run. [`reslora-compare`](statistics.md#answers) makes tables and
checks claims.
"""
JSON = {"str": "string", "int": "integer", "float": "number", "list": "list", "Any": "value"}


def reference() -> str:
    """Return the page in Markdown."""
    known = {node.name: node for node in ast.parse(inspect.getsource(record)).body if isinstance(node, ast.ClassDef)}
    names, parts = ["Experiment"], [HEAD.format(version=record.FORMAT)]
    for name in names:  # grows: a type follows the one whose keys have it
        bases = [base.id for base in known[name].bases if base.id in known]
        fields = [field for each in (*bases, name) for field in fields_of(known[each])]
        text = " ".join(ast.get_docstring(known[name]).split())
        parts.append(f"## {name}\n\n{text}\n\n| key | type | meaning |\n|---|---|---|")
        parts += [row_of(*field) for field in fields]
        parts.append("")
        used = dict.fromkeys(node.id for _, kind, _ in fields for node in ast.walk(kind) if isinstance(node, ast.Name))
        names += [word for word in used if word in known and word not in names]
    return "\n".join(parts)


def fields_of(kind: ast.ClassDef) -> Iterator[tuple[str, ast.expr, str]]:
    """Yield the name, the type and the description of each key of a class."""
    for field, after in itertools.pairwise([*kind.body, None]):
        if isinstance(field, ast.AnnAssign):
            text = after.value.value if isinstance(after, ast.Expr) else ""
            yield field.target.id, field.annotation, " ".join(text.split())


def row_of(name: str, kind: ast.expr, text: str) -> str:
    """Return the table row of a key."""
    optional = "*" * ast.unparse(kind).startswith("NotRequired")
    return f"| `{name}`{optional} | {in_words(kind)} | {text.replace('None', '`null`')} |"


def in_words(kind: ast.expr, plural: str = "") -> str:
    """Return a type as JSON calls it."""
    if isinstance(kind, ast.BinOp):
        return f"{in_words(kind.left, plural)} or {in_words(kind.right, plural)}"
    if isinstance(kind, ast.Constant):
        return f"null{plural}"
    if isinstance(kind, ast.Name):
        if values := get_args(getattr(record, kind.id, None)):
            return ", ".join(f"`{value}`" for value in values)
        return f"{JSON[kind.id]}{plural}" if kind.id in JSON else f"[{kind.id}](#{kind.id.lower()})"
    of = kind.slice
    inner = {
        "NotRequired": lambda: in_words(of),
        "Literal": lambda: ", ".join(f"`{value.value}`" for value in of.elts),
        "list": lambda: f"list{plural} of {in_words(of, 's')}",
        "dict": lambda: f"object{plural} with {in_words(of.elts[1], 's')}",
        "tuple": lambda: f"list of {len(of.elts)} {in_words(of.elts[0], 's')}",
    }
    return inner[kind.value.id]()


if __name__ == "__main__":
    print(reference(), end="")
