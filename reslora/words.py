"""Numbers and names in sentences."""

from __future__ import annotations

import unicodedata

CONTROLS = ("Cc", "Cf", "Zl", "Zp")
"""Unicode's categories of characters that a terminal obeys instead of showing them, or that hide others."""


def counted(number: int, what: str) -> str:
    """So many of something: 1 image, 2 images."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def are(number: int) -> str:
    """Return the verb for so many: 1 of 3 images is read, 2 of them are."""
    return "is" if number == 1 else "are"


def printable(text: str) -> str:
    """Return the text with its control characters escaped: a file name, or a caption, may hold a terminal's commands."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in CONTROLS else c for c in text)
