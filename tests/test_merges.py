"""The registry of merges: each row has its function."""

import inspect

from reslora import merges, merging
from reslora.shortcuts import NAMES as SHORTCUTS
from reslora.shortcuts import PLAIN, shortcut_class


def test_every_merge_has_its_function():
    rows = [*merges.MERGES.values()]
    for shortcut in set(SHORTCUTS) - {PLAIN}:
        rows += shortcut_class(shortcut).merges.values()
    functions = {name for name, _ in inspect.getmembers(merging, inspect.isfunction) if name.startswith("merge_")}
    assert {row.function for row in rows} == functions
    assert all(row([]) == [] for row in rows)


def test_names_are_those_of_the_flag():
    assert merges.NAMES == ("auto", "none", "input", "weights", "lstsq")
