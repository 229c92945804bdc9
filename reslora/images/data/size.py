"""Height and width of training images."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Size:
    """Height and width in pixels."""

    height: int
    width: int
