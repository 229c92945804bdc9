"""Format numbers and names in messages."""

import unicodedata
from collections.abc import Iterable

CONTROLS = ("Cc", "Cf", "Zl", "Zp")
"""Unicode categories of control characters, which a terminal interprets or which hide other characters."""


def pluralize(number: int, what: str) -> str:
    """Return a number and a noun, singular or plural: 1 image, 2 images."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def how_often(interval: int, steps: int) -> str:
    """Return how often something happens in a run of that many steps: every 5 steps, or at the last step."""
    return f"every {pluralize(interval, 'step')}" if interval < steps else "at the last step"


def is_or_are(number: int) -> str:
    """Return "is" for 1 and "are" for other numbers, as in "1 of 3 images is read"."""
    return "is" if number == 1 else "are"


def enumerated(words: Iterable[str]) -> str:
    """Join words to an enumeration, such as `one, two and three`."""
    *others, last = list(words) or [""]
    return f"{', '.join(others)} and {last}" if others else last


def printable(text: str) -> str:
    """Return the text with control characters escaped: file names and captions may contain terminal escape codes."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in CONTROLS else c for c in text)
