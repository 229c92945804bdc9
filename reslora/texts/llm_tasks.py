"""The paper's language tasks: prompts and answers made from rows, sources of the rows, and comparison of answers.

Rows come from a directory of JSON Lines files, or from a data set on the Hub with the same columns; code from the Hub
is never run.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState

from ..errors import InvalidArgument, first_line, loaded_from_hub
from ..json_lines import data_lines
from ..runtime.processes import say

ANSWER = "The answer is"


@dataclass(frozen=True)
class Example:
    """A prompt and its target: reasoning and an answer. Evaluation compares only the answer."""

    prompt: str
    reasoning: str
    gold: str
    place: str = field(default="", compare=False, repr=False)
    """Origin of the example, for messages: a file or a data set on the Hub, and the row."""

    @property
    def answer(self) -> str:
        """The training target."""
        return f"{self.reasoning} {ANSWER} {self.gold}.".strip()


@dataclass(frozen=True)
class Task:
    """Location of a task on the Hub, its columns, and the conversion of a row to an example."""

    hub: tuple[str, ...]
    columns: dict[str, type]
    """Type of each column; `object` if `example` validates it."""
    example: Callable[[dict], Example]
    test_split: str = "test"
    tested_as: str | None = None
    """Another task whose test rows are used (MetaMathQA is tested on GSM8K)."""


def svamp(row: dict) -> Example:
    """Return an example: the equation is the reasoning, and its value the answer."""
    answer = str(row["Answer"]).strip()
    _expect(to_number(answer) is not None, f"Answer {answer!r} is not a number")
    return Example(f"{row['Body'].strip()} {row['Question'].strip()}", f"{row['Equation']}.", answer)


def gsm8k(row: dict) -> Example:
    """Return an example: the reasoning without calculator annotations; the answer is the number after `####`."""
    reasoning, mark, answer = re.sub(r"<<.*?>>", "", row["answer"]).rpartition("####")
    _expect(mark and to_number(answer) is not None, "answer has no number after '####'")
    return Example(row["question"].strip(), " ".join(reasoning.split()), answer.strip())


def metamathqa(row: dict) -> Example:
    """Return an example: the reasoning; the answer is the text after the last `The answer is:`."""
    reasoning, mark, answer = row["response"].rpartition(f"{ANSWER}:")
    _expect(bool(mark), f"response has no '{ANSWER}:'")
    return Example(row["query"].strip(), reasoning.strip(), answer.strip())


def mathqa(row: dict) -> Example:
    """Return an example: the rationale is the reasoning, and the letter of the correct option the answer."""
    options, correct = row["options"], str(row["correct"]).strip()
    letters = sorted(set(re.findall(r"([a-e]) \)", options)))
    _expect(correct in letters, f"correct {correct!r} is not one of the options {', '.join(letters)}")
    prompt = f"{row['Problem'].strip()}\nThere are {len(letters)} options: {options}\nPlease answer the correct option."
    reasoning = row["Rationale"].strip().strip('"').strip()
    return Example(prompt, f"{reasoning}.", correct)


def hellaswag(row: dict) -> Example:
    """Return an example without reasoning; the answer is the number of the correct ending."""
    endings, label = row["endings"], str(row["label"]).strip()
    allowed = [str(number) for number in range(len(endings))]
    _expect(label in allowed, f"label {label!r} is outside 0 to {len(endings) - 1}")
    options = "\n".join(f"{number}: {ending}" for number, ending in enumerate(endings))
    prompt = (
        f'Here is a sentence to be continued: "{row["ctx"]}"\n'
        f"There are {len(endings)} options as an ending:\n{options}\n"
        f"Please select the correct option and answer with a number between 0 and {len(endings) - 1}."
    )
    return Example(prompt, "", label)


TASKS = {
    "gsm8k": Task(("openai/gsm8k", "main"), {"question": str, "answer": str}, gsm8k),
    "svamp": Task(("ChilleD/SVAMP",), {"Body": str, "Question": str, "Equation": object, "Answer": object}, svamp),
    "mathqa": Task(("allenai/math_qa",), {"Problem": str, "Rationale": str, "options": str, "correct": object}, mathqa),
    "metamathqa": Task(("meta-math/MetaMathQA",), {"query": str, "response": str}, metamathqa, tested_as="gsm8k"),
    "hellaswag": Task(
        ("Rowan/hellaswag",), {"ctx": object, "endings": list, "label": object}, hellaswag, test_split="validation"
    ),
}


class BadRow(ValueError):
    """A row that is not an example of its task."""


def _expect(condition: object, problem: str) -> None:
    if not condition:
        raise BadRow(problem)


# -- answers -----------------------------------------------------------------------------------------------------------


def extract_answer(text: str) -> str | None:
    """Return the text after the last "The answer is" up to the end of its sentence; None without one."""
    _, mark, rest = text.rpartition(ANSWER)
    lines = rest.lstrip(": ").splitlines()
    return re.split(r"\.(?:\s|$)", lines[0])[0].strip() if mark and lines else None


_NUMBER = re.compile(
    r"(?P<sign>-?)"
    r"(?:(?:(?P<whole>\d+) )?(?P<top>\d+)/(?P<bottom>0*[1-9]\d*)|(?P<plain>(?:\d+\.?\d*|\.\d+)(?:e-?\d\d?)?))%?"
)


def to_number(text: str) -> Fraction | None:
    """Return the number that a text represents: 1,200.50, $3, -7, 3/4, 1 1/2, 50%, 2e3; None for anything else."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.strip().lower()).replace("$", "").replace("\u2212", "-").strip()
    found = _NUMBER.fullmatch(text.removeprefix("+"))
    if not found or len(text) > 100:
        return None
    if found["top"]:
        value = int(found["whole"] or 0) + Fraction(int(found["top"]), int(found["bottom"]))
    else:
        value = Fraction(found["plain"])
    return -value if found["sign"] else value


def same_answer(given: str | None, expected: str) -> bool:
    """Return whether two answers are equal, as numbers if both are numbers ("1,200" and "1200.0"), else as words."""
    if given is None:
        return False
    number, wanted = to_number(given), to_number(expected)
    if number is not None and wanted is not None:
        return abs(number - wanted) <= max(abs(number), abs(wanted)) / 1_000_000
    return given.lower().split() == expected.lower().split()


# -- rows --------------------------------------------------------------------------------------------------------------


def read_examples(name: str, split: str, data_dir: str | None, cache_dir: str | None = None) -> list[Example]:
    """Return the examples of a task's split, from `data_dir` or else from the Hub; empty if the split does not exist.

    Validation and test rows may be of another task (`Task.tested_as`). Validation splits on the Hub are not used.
    Raises `InvalidArgument` naming the first invalid row.
    """
    task = TASKS[name]
    if split != "train" and task.tested_as:
        task = TASKS[task.tested_as]
    if data_dir:
        path, rows = _local_rows(name, data_dir, split)
        unlabeled = rows and all(isinstance(row, dict) and row.get("label") == "" for row in rows)
        if split == "test" and task.test_split != "test" and unlabeled:
            say(f"{path}: skipped, because its labels are empty, as in the hub's file")
            rows = []
        return examples_of(task, path, rows)
    return [] if split == "validation" else examples_of(task, *_hub_rows(name, task, cache_dir, split))


def file_form(name: str) -> str:
    """Return the required form of a task's files, for messages."""
    task = TASKS[name]
    tested = f"; test rows: {', '.join(TASKS[task.tested_as].columns)}" if task.tested_as else ""
    columns = ", ".join(task.columns) + tested
    return f"give --data_dir DIR with train.jsonl and test.jsonl, a JSON object per line: {columns}"


def examples_of(task: Task, source: str, rows: list) -> list[Example]:
    """Return the rows as examples.

    Raises `InvalidArgument` naming the first invalid row.
    """
    examples = []
    for number, row in enumerate(rows, 1):
        try:
            _check_columns(task, row)
            examples.append(replace(task.example(row), place=f"{source} row {number}"))
        except BadRow as error:
            fix = f"its columns must be {', '.join(task.columns)}" if _missing(task, row) else "correct it"
            raise InvalidArgument(f"{source} row {number}", first_line(error), fix) from None
    return examples


def _missing(task: Task, row: object) -> list[str]:
    return [column for column in task.columns if not isinstance(row, dict) or column not in row]


def _check_columns(task: Task, row: Any) -> None:
    missing = _missing(task, row)
    _expect(not missing, f"no column {', '.join(missing)}")
    for column, kind in task.columns.items():
        value = row[column]
        _expect(value is not None, f"{column} is null")
        _expect(isinstance(value, kind), f"{column} is {value!r}, not a {'list' if kind is list else 'text'}")


def _local_rows(name: str, data_dir: str, split: str) -> tuple[str, list]:
    """Return the name and rows of DIR/<split>.jsonl; no rows if the file does not exist."""
    folder = Path(data_dir)
    if not folder.is_dir():
        raise InvalidArgument(f"--data_dir {folder}", "no such folder", file_form(name))
    path = folder / f"{split}.jsonl"
    rows = data_lines(path, str(path), file_form(name)) if path.is_file() else ()
    return str(path), [row for _, row in rows]


def _hub_rows(name: str, task: Task, cache_dir: str | None, split: str) -> tuple[str, list[dict]]:
    repository = task.hub[0]
    with loaded_from_hub(f"--task {name}, {repository}", file_form(name)), PartialState().main_process_first():
        loaded = datasets.load_dataset(
            *task.hub, split=task.test_split if split == "test" else split, cache_dir=cache_dir
        )
    return repository, list(loaded)
