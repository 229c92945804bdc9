"""Mutants for `mutants.py`: one expression or statement of the source changed.

Text, annotations, decorators, printed output and `__repr__` are left out, because tests should not check them.
"""

from __future__ import annotations

import ast
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SUBJECTS = {
    "shortcuts": ["reslora/shortcuts/*.py"],
    "merging": ["reslora/merging.py", "reslora/merges.py", "reslora/regression.py", "reslora/calibration.py"],
    "chains": ["reslora/chains.py", "reslora/tracing.py", "reslora/wiring.py"],
    "objectives": ["reslora/images/model/objective.py", "reslora/images/model/loss.py"],
    "captions": ["reslora/images/data/captions.py"],
    "plan": ["reslora/images/data/plan.py", "reslora/images/data/buckets.py"],
    "exports": [
        *("reslora/export.py", "reslora/ranks.py", "reslora/images/output/exports.py"),
        "reslora/images/model/lora_files/writing.py",
    ],
    "statistics": ["reslora/experiment/statistics.py"],
    "resume": [
        *("reslora/checkpoint.py", "reslora/training/checkpoints.py"),
        "reslora/training/state.py",
    ],
}
OPERATORS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
}  # fmt: skip
FUNCTIONS = {"min": "max", "max": "min", "all": "any", "any": "all"}
PRINTING = {"print", "say", "warn"}
NOT_SWAPPED = {*FUNCTIONS, "isclose", "equal", "allclose", "isinstance", "issubclass", "getattr", "hasattr", "setattr"}
"""Functions that are symmetric, or that always fail with swapped arguments."""
NOT_TESTED = {"strict", "flush", "indent"}
"""Keyword arguments that only assert, or that only change the look of a file."""
OPERATIONS = (ast.BinOp, ast.BoolOp, ast.Compare, ast.UnaryOp)


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the possible replacements of a node."""
    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS and not _is_text(node):
            yield ast.BinOp(left, OPERATORS[type(op)](), right)
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in OPERATORS and not _is_text(value):
            yield ast.AugAssign(target, OPERATORS[type(op)](), value)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(OPERATORS[type(op)](), values)
        case ast.Compare(left=left, ops=[op, *ops], comparators=comparators):
            yield ast.Compare(left, [OPERATORS[type(op)](), *ops], comparators)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Slice(lower=lower, upper=upper, step=step) if (lower is None) != (upper is None):
            yield ast.Slice(upper, lower, step)
        case ast.Call(func=function, args=arguments, keywords=keywords):
            if (name := _name(function)) in FUNCTIONS and isinstance(function, ast.Name):
                yield ast.Call(ast.Name(FUNCTIONS[name]), arguments, keywords)
            if len(arguments) > 1 and name not in NOT_SWAPPED and ast.dump(arguments[0]) != ast.dump(arguments[1]):
                yield ast.Call(function, [arguments[1], arguments[0], *arguments[2:]], keywords)
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Delete():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]):
            yield ast.Pass()
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()


def _is_text(node: ast.AST) -> bool:
    """Return whether an expression is text, or a path that ends with a constant; another operator would always fail."""
    match node:
        case ast.BinOp(op=ast.Div(), right=ast.Name(name) | ast.Attribute(attr=name)) if name.isupper():
            return True
        case ast.BinOp(left=left, right=right):
            return _is_text(left) or _is_text(right)
        case ast.Constant(value=str()) | ast.JoinedStr():
            return True
    return False


def _name(node: ast.AST) -> str:
    """Return the last component of a name, or an empty string."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def replacements(parent: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
    """Yield the kind of each mutation below `parent`, the node, and the source text to put in its place."""
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if not isinstance(node, ast.AST) or _left_out(node):
                continue
            found = [(type(node).__name__, variant) for variant in variants(node)]
            if field in ("test", "ifs") and isinstance(node, (ast.Name, ast.Attribute, ast.Call, ast.Subscript)):
                found.append(("condition", ast.UnaryOp(ast.Not(), node)))
            for kind, variant in found:
                nested = isinstance(parent, OPERATIONS) and isinstance(variant, (*OPERATIONS, ast.IfExp))
                yield kind, node, f"({ast.unparse(variant)})" if nested else ast.unparse(variant)
            if not isinstance(node, ast.Raise):  # its children are the message
                yield from replacements(node)


def _left_out(node: ast.AST) -> bool:
    """Return whether a node is text, prints something, or never runs."""
    match node:
        case ast.JoinedStr() | ast.FunctionDef(name="__repr__" | "__str__") | ast.If(test=ast.Name("TYPE_CHECKING")):
            return True
        case ast.Call(func=function) | ast.Expr(value=ast.Call(func=function)):
            return _name(function) in PRINTING
        case ast.keyword(arg=name):
            return name in NOT_TESTED
    return False


def mutants_of(path: Path, name: str) -> list[dict]:
    """Return all mutants of the file `path`, which is called `name` in the repository."""
    source = path.read_bytes()
    lines, found = source.splitlines(keepends=True), []
    for kind, node, text in replacements(ast.parse(source)):
        first, last = node.lineno - 1, node.end_lineno
        old = b"".join(lines[first:last])
        end = len(old) - len(lines[last - 1]) + node.end_col_offset
        new = old[: node.col_offset] + text.encode() + old[end:]
        removed, added = ([*map(str.rstrip, part.decode().splitlines())] for part in (old, new))
        diff = [f"-{line}" for line in removed] + [f"+{line}" for line in added]
        found.append({"file": name, "line": node.lineno, "kind": kind, "diff": diff})
    return found


def apply(diff: list[str], line: int, text: str) -> str:
    """Return `text` with a mutant applied, at the match nearest to `line` (from 1)."""
    lines = text.splitlines()
    old, new = ([changed[1:] for changed in diff if changed[0] == sign] for sign in "-+")
    places = [place for place in range(len(lines)) if lines[place : place + len(old)] == old]
    if not places:
        raise ValueError("the lines are no longer in the file")
    place = min(places, key=lambda place: abs(place - line + 1))
    lines[place : place + len(old)] = new
    return "\n".join(lines) + "\n"


def sample(tree: Path, count: int, seed: int) -> list[dict]:
    """Return `count` mutants: about equally many per subject, of many kinds, at most one per line."""
    chosen = []
    for number, (subject, patterns) in enumerate(SUBJECTS.items()):
        files = sorted(path for pattern in patterns for path in tree.glob(pattern))
        pool = [mutant for path in files for mutant in mutants_of(path, path.relative_to(tree).as_posix())]
        random.Random(f"{seed} {subject}").shuffle(pool)
        counts = defaultdict(itertools.count)
        turns = {id(mutant): next(counts[mutant["kind"]]) for mutant in pool}
        lines = {}
        for mutant in sorted(pool, key=lambda mutant: turns[id(mutant)]):  # the first of each kind, the second, ...
            lines.setdefault((mutant["file"], mutant["line"]), mutant)
        share = count // len(SUBJECTS) + (number < count % len(SUBJECTS))
        for mutant in list(lines.values())[:share]:
            chosen.append({"number": len(chosen) + 1, "subject": subject, **mutant, "stages": {}, "equivalent": ""})
    return chosen
