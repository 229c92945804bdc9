"""Split examples into training, selection and test parts.

A task's validation file is the selection part, and its test file the test part. If a task has only one of these files,
the file is the test part. A part without a file is split off the training examples, by a hash of their content.

Near-duplicates are examples that are equal except for case, numbers and white space. They are never in two parts. Of
several near-duplicates, the selection or test part contains only one, because more would count as independent examples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from ..errors import InvalidArgument
from ..experiment.hashed_split import ENOUGH, cut, enough_of
from ..formatting import pluralize
from ..options.texts import ExperimentOptions
from ..seeds import derive

DEFAULT_SPLIT = 0.1

T = TypeVar("T")


@dataclass(frozen=True)
class Parts(Generic[T]):
    """Examples of the three parts; selection and test contain no near-duplicates."""

    train: Sequence[T]
    select: Sequence[T]
    test: Sequence[T]
    duplicates: int
    """Number of examples that are left out or moved because they are near-duplicates of another example."""
    files: Sequence[str]
    """Origin of the selection and test parts as text: a file of the task, or training examples."""
    enough: float = 1
    """Value of --test_split with which the test part has ENOUGH examples; 1 if no value is enough."""
    trained: int = 0
    """Number of training examples, after limits and without examples that are too long."""
    groups: Sequence[str] = ()
    """Examples have no groups."""

    def __str__(self) -> str:
        numbers = f"{self.trained} for training, {len(self.select)} in the selection split ({self.files[0]})"
        numbers += f", {len(self.test)} in the test split ({self.files[1]})"
        duplicates = pluralize(self.duplicates, "near-duplicate")
        return f"examples: {numbers}; {duplicates}, none in another split than the original"

    @property
    def test_ids(self) -> list[str]:
        """Identifier of each test example."""
        return [f"{derive('example', example):016x}" for example in self.test]

    def limited(self, select: int | None, test: int | None) -> Parts[T]:
        """Return the parts with at most `select` and `test` examples for selection and test.

        The examples are chosen by a hash of their content.
        """
        enough = self.enough if test is None or test >= ENOUGH else 1
        return replace(self, select=_fewer(self.select, select), test=_fewer(self.test, test), enough=enough)


def _fewer(examples: Sequence[T], limit: int | None) -> Sequence[T]:
    kept = set(sorted(examples, key=lambda example: derive("sample", example))[:limit])
    return [example for example in examples if example in kept]


def parts_of(files: Mapping[str, Sequence[T]], text: Callable[[T], str], shares: ExperimentOptions) -> Parts[T]:
    """Divide examples into a training, a selection and a test part.

    `files` holds the examples of `train`, and of `select` and `test` if the task has such files; a part without a file
    is split off the training examples. `text` returns the text of an example.

    Examples with equal `normalised` texts are near-duplicates. All examples with the same key are in the training part,
    or one of them is in the selection or test part and the others are left out.

    Raises `InvalidArgument` if a part would be empty when near-duplicates count once, or if --select_split or
    --test_split is given for a part that has a file.
    """
    keys = {example: normalised(text(example)) for part in files.values() for example in part}
    select, test = (_one_of_each(files.get(part, ()), keys) for part in ("select", "test"))
    words = ["a file of the task" if part else "of the training examples" for part in (select, test)]
    wanted = share_of("select_split", select, shares), share_of("test_split", test, shares)
    taken = {keys[example] for example in test}
    select = [example for example in select if keys[example] not in taken]
    taken |= {keys[example] for example in select}
    train = [example for example in files["train"] if keys[example] not in taken]
    found = list(dict.fromkeys(keys[example] for example in train))
    least = 1 + sum(share > 0 for share in wanted)
    if len(found) < least or not (select or wanted[0]):
        trained = f"{pluralize(len(found), 'example')} for training"
        problem = f"{trained} and {len(select)} for the selection split are too few, without near-duplicates"
        raise InvalidArgument("this experiment", problem, "give examples that differ in more than numbers and case")
    training_part, chosen, tested = ({found[number] for number in numbers} for numbers in cut(found, *wanted))
    select += _one_of_each([example for example in train if keys[example] in chosen], keys)
    test += _one_of_each([example for example in train if keys[example] in tested], keys)
    train = [example for example in train if keys[example] in training_part]
    enough = enough_of(found) if wanted[1] else 1
    return Parts(train, select, test, len(keys) - len(set(keys.values())), words, enough)


def _one_of_each(examples: Sequence[T], keys: Mapping[T, str]) -> list[T]:
    """Return one example of each key, the one with the lowest content hash; the returned examples stay in the given
    order.
    """
    first: dict[str, T] = {}
    for example in sorted(set(examples), key=lambda example: derive("example", example)):
        first.setdefault(keys[example], example)
    kept = set(first.values())
    return [example for example in dict.fromkeys(examples) if example in kept]


def share_of(name: str, own: Sequence, shares: ExperimentOptions) -> float:
    """Return the fraction of the training examples for a part; 0 if the part has a file, whose examples are `own`."""
    given = getattr(shares, name)
    if own and given:
        raise InvalidArgument(f"--{name} {given:g}", "the task has a file for this split", "leave it out")
    return 0 if own else given or DEFAULT_SPLIT


def normalised(text: str) -> str:
    """Return the text in lower case, with each number replaced by 0, and consecutive white space by one space."""
    return re.sub(r"\s+", " ", re.sub(r"\d+(?:[.,]\d+)*", "0", text.casefold())).strip()
