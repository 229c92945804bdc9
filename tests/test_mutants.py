"""benchmarks/mutants.py: the mutations, the tests that run, and which mutants count as killed."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LIMIT

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import mutants  # noqa: E402
import mutations  # noqa: E402

SOURCE = '''"""A docstring, 1 < 2."""
from functools import lru_cache

LEVEL: int = 5


@lru_cache(3)
def first(values: list[int], low=0) -> int:
    """Return what is above, not below."""
    print(low + 1)
    if low > 4 and not values:
        raise ValueError(f"{low + 1} values")
    return min(low * 2, sum(values[1:]))


def __repr__():
    return 1 + 1
'''
CHANGES = {
    "LEVEL: int = 6", "def first(values: list[int], low=1) -> int:", "    if (low >= 4) and not values:",
    "    if low > 5 and not values:", "    if low > 4 or not values:", "    if low > 4 and values:", "        pass",
    "    return None", "    return max(low * 2, sum(values[1:]))", "    return min(low / 2, sum(values[1:]))",
    "    return min(low * 3, sum(values[1:]))", "    return min(low * 2, sum(values[2:]))",
    "    return min(low * 2, sum(values[:1]))",
}  # fmt: skip
LINE = "A, B, C, D = 1, 2, 3, 4"
FILES = {
    "pyproject.toml": "[tool.pytest.ini_options]\npythonpath = ['.']\nmarkers = ['exhaustive']",
    "reslora/one.py": f"{LINE}\ndef wait():\n    while A != 1: pass",
    "tests/test_one.py": "from reslora.one import *\ndef test_wait(): wait()\ndef test_b(): assert B == 2",
    "tests/test_others.py": "import pytest\nfrom reslora.one import *\ndef test_broken(): assert False\n"
    "@pytest.mark.exhaustive\ndef test_c(): assert C == 3",
}
MUTANTS = ["A, B, C, D = 9, 2, 3, 4", "A, B, C, D = 1, 9, 3, 4", "A, B, C, D = 1, 2, 9, 4", "A, B, C, D = 1, 2, 3, 9"]
SCRIPT = f"""
import pathlib, shutil, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import mutants
root = pathlib.Path.cwd()
mutants.RESULT, mutants.LIBRARIES = root / "mutants.json", ["pytest"]
mutants.TEST_LIMITS = dict.fromkeys(mutants.STAGES, 20)
mutants.extract = lambda folder: shutil.copytree(root / "project", folder).name
sys.exit(mutants.main())
"""


@pytest.fixture(scope="module")
def sample() -> list[dict]:
    return mutations.sample(ROOT, 80, seed=0)


def test_mutations_are_those_of_the_code_alone(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(SOURCE)
    found = mutations.mutants_of(file, "file.py")
    assert {line[1:] for mutant in found for line in mutant["diff"] if line[0] == "+"} == CHANGES
    assert len(found) == len(CHANGES)


def test_operands_keep_their_operator(tmp_path):
    file = tmp_path / "file.py"
    file.write_text("x = a * b / c\n")
    added = {mutant["diff"][1] for mutant in mutations.mutants_of(file, "file.py")}
    assert added == {"+x = a * b * c", "+x = (a / b) / c"}


@pytest.mark.exhaustive
def test_sample_has_all_subjects_and_each_mutant_differs(sample):
    assert [mutant["number"] for mutant in sample] == list(range(1, 81))
    assert {mutant["subject"] for mutant in sample} == set(mutations.SUBJECTS)
    assert len({(mutant["file"], mutant["line"]) for mutant in sample}) == 80
    for mutant in sample:
        source = (ROOT / mutant["file"]).read_text()
        changed = mutations.apply(mutant["diff"], mutant["line"], source)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), mutant


def test_sample_is_a_function_of_the_seed(monkeypatch):
    for subject in set(mutations.SUBJECTS) - {"captions", "plan"}:
        monkeypatch.delitem(mutations.SUBJECTS, subject)
    assert mutations.sample(ROOT, 9, seed=1) == mutations.sample(ROOT, 9, seed=1) != mutations.sample(ROOT, 9, seed=2)


def test_a_mutant_is_applied_where_its_lines_have_moved_to():
    assert mutations.apply(["-b", "+c"], 1, "a\nb\na\nb\n") == "a\nc\na\nb\n"
    assert mutations.apply(["-b", "+c"], 4, "a\nb\na\nb\n") == "a\nb\na\nc\n"
    with pytest.raises(ValueError, match="no longer"):
        mutations.apply(["-d", "+c"], 1, "a\n")


def test_mapped_tests_come_first(sample):
    for name in {name for names in mutants.TESTS.values() for name in names}:
        assert (ROOT / "tests" / name).is_file(), name
    for file in {mutant["file"] for mutant in sample}:
        assert mutants.mapped_tests(ROOT, file), file
    mapped = mutants.arguments(ROOT, "reslora/ranks.py", "mapped")[1:]
    rest = mutants.arguments(ROOT, "reslora/ranks.py", "quick")[1:]
    assert mapped[0] == "tests/test_ranks.py" and not set(mapped) & set(rest)
    assert mutants.arguments(ROOT, "reslora/ranks.py", "exhaustive") == ["-m=exhaustive", *mapped, *rest]


@pytest.mark.exhaustive
def test_killed_is_what_fails_with_the_mutant_only(tmp_path):
    """Four mutants: a mapped test hangs, another fails, an exhaustive one fails, none fails. One test always fails."""
    for name, text in FILES.items():
        (file := tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    common = {"subject": "one", "file": "reslora/one.py", "line": 1, "stages": {}, "equivalent": ""}
    made = [{"number": number, "diff": [f"-{LINE}", f"+{line}"], **common} for number, line in enumerate(MUTANTS)]
    record = {"seed": 0, "count": 80, "commit": "", "failing_without_mutant": [], "mutants": made}
    (tmp_path / "mutants.json").write_text(json.dumps(record))
    status, printed = run(tmp_path, "--jobs", "2")
    assert status == 1 and printed.endswith(
        "not equivalent: 4 of 4; not finished: 0\nquick suite: kills 2 of 4 (50%; target 85%)\n"
        "quick and exhaustive suite: kill 3 of 4\n"
    )
    record = json.loads((tmp_path / "mutants.json").read_text())
    killed_by = [[stage["killed_by"] for stage in mutant["stages"].values()] for mutant in record["mutants"]]
    exhaustive = [None, None, "tests/test_others.py::test_c"]
    assert killed_by == [["tests/test_one.py::test_wait"], ["tests/test_one.py::test_b"], exhaustive, [None] * 3]
    assert record["failing_without_mutant"] == ["tests/test_others.py::test_broken"]

    for mutant in record["mutants"][2:]:
        mutant["equivalent"] = "nobody reads it"
    del record["mutants"][1]["stages"]["mapped"]
    (tmp_path / "mutants.json").write_text(json.dumps(record))
    status, printed = run(tmp_path)
    assert status == 0 and printed.count("mapped, ") == 1 and "quick suite: kills 2 of 2 (100%;" in printed
    assert run(tmp_path, "--seed", "1") == (1, "--seed 1: mutants.json has 0; give that, or remove the file\n")


def run(folder: Path, *flags: str) -> tuple[int, str]:
    command = [sys.executable, "-c", SCRIPT, *flags]
    found = subprocess.run(command, cwd=folder, text=True, stdout=-1, stderr=subprocess.STDOUT, timeout=LIMIT)
    return found.returncode, found.stdout
