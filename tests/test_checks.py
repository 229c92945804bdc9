"""Checks shared by all scripts: bounds of numbers, and writable folders."""

import math
from pathlib import Path

import pytest
from core_models import assert_one_line

from reslora.checks import check_writable, is_number, is_whole, number_in_words, whole_in_words
from reslora.errors import InvalidArgument


@pytest.mark.parametrize(("value", "expected"), [(1, True), (4, False), (True, False)])
def test_whole_numbers_are_in_bounds(value, expected):
    assert is_whole(value, 1, 3) is expected


@pytest.mark.parametrize(
    ("value", "exclusive", "expected"),
    [(0, False, True), (0, True, False), (math.nan, False, False)],
)
def test_numbers_are_in_bounds(value, exclusive, expected):
    assert is_number(value, 0, below=1, exclusive=exclusive) is expected


@pytest.mark.parametrize("value", [math.inf, 10**309])
def test_what_no_float_holds_is_no_number(value):
    assert not is_number(value, 0) and not is_number(-value, -math.inf)


def test_bounds_are_said_in_words():
    assert whole_in_words(1) == "a whole number of at least 1"
    assert whole_in_words(0, 7) == "a whole number of 0 to 7"
    assert number_in_words(0) == "a finite number of at least 0"
    assert number_in_words(-math.inf) == "a finite number"
    assert number_in_words(0, below=1, exclusive=True) == "a finite number above 0 and below 1"


def test_a_folder_that_can_be_made_is_writable(tmp_path):
    check_writable(tmp_path / "a" / "b", "--output_dir a/b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument) as error:
        check_writable(Path(tmp_path / folder), "--output_dir x")
    assert_one_line(error, "--output_dir x", "not a writable folder")
