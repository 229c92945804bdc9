"""Numbers in sentences."""

from __future__ import annotations


def counted(number: int, what: str) -> str:
    """So many of something: 1 image, 2 images."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def are(number: int) -> str:
    """The verb for so many: 1 of 3 images is read, 2 of them are."""
    return "is" if number == 1 else "are"
