"""The three parts of a task's examples: by its files or by content, with near-duplicates never in two parts."""

import random
from dataclasses import replace

import pytest

from reslora.errors import InvalidArgument
from reslora.options.texts import ExperimentOptions
from reslora.texts.split import normalised, parts_of

WORDS = [f"{a} sees {b}" for a in ("Ida", "Ron", "Eva", "Tom", "Mia") for b in ("a cat", "a dog", "a car", "it", "us")]


def parts(shares: ExperimentOptions | None = None, **files: list[str]):
    return parts_of(files, str, shares or ExperimentOptions())


def test_case_digits_and_white_space_make_no_difference():
    assert (
        normalised(" Ron has\n1,200.5  CARDS, 3 of 44 ")
        == "ron has 0 cards, 0 of 0"
        == normalised("ron has 2 cards, 0 of 9")
    )
    assert normalised("Ron has two cards") != normalised("Ron has one card")


def test_a_tasks_own_files_choose_and_compare_and_what_repeats_them_is_left_out():
    found = parts(train=["a 1", "b", "B", "c", "d"], select=["C ", "e", "a 2"], test=["A 33", "f", "f"])
    assert (found.train, found.select, found.test) == (["b", "B", "d"], ["C ", "e"], ["A 33", "f"])
    assert found.duplicates == 4  # a 1, a 2, B, c
    said = str(replace(found, trained=7))
    assert said.startswith("examples: 7 for training") and said.count("(a file of the task)") == 2
    assert (
        len(set(found.test_ids)) == 2
        and found.test_ids == parts(train=["x"], select=["y"], test=["A 33", "f"]).test_ids
    )


def test_what_has_no_file_is_cut_out_by_content():
    """An added or moved example changes the part of no other example except its duplicates."""
    whole = parts(ExperimentOptions(select_split=0.3, test_split=0.3), train=[*WORDS, "IDA sees  a cat"])
    cut = [set(map(normalised, part)) for part in (whole.train, whole.select, whole.test)]
    assert sum(map(len, cut)) == len(set.union(*cut)) == len(WORDS) and whole.duplicates == 1
    assert [word for word in WORDS if word in whole.train] == [word for word in whole.train if word in WORDS]
    shuffled = random.Random(0).sample(WORDS, len(WORDS) - 3)
    again = parts(ExperimentOptions(select_split=0.3, test_split=0.3), train=shuffled)
    for part, before in zip((again.train, again.select, again.test), cut, strict=True):
        assert set(map(normalised, part)) <= before
    tested = parts(train=WORDS, test=WORDS[:2])
    assert tested.test == WORDS[:2] and tested.select and not set(tested.select) & set(WORDS[:2])
    assert "of the training examples" in str(tested)


@pytest.mark.parametrize(
    ("files", "shares", "words"),
    [
        ({"train": ["a", "b"]}, {}, "2 examples for training"),
        ({"train": ["a 1", "a 2"], "select": ["b"], "test": ["A 7"]}, {}, "0 examples for training"),
        ({"train": ["a", "c"], "select": ["b"], "test": ["B"]}, {}, "0 for the selection split"),
        ({"train": WORDS, "test": ["b"]}, {"test_split": 0.2}, "--test_split 0.2: the task has a file for this split"),
    ],
)
def test_too_few_and_shares_of_files_are_refused(files, shares, words):
    with pytest.raises(InvalidArgument, match=words):
        parts(ExperimentOptions(**shares), **files)
