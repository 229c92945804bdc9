"""Registry of the shortcuts. Each shortcut is implemented in its own file and has a row here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Shortcut

PLAIN = "none"
"""Name for plain LoRA, without a shortcut (Eq. 1)."""

_CLASSES = {
    "input": "InputShortcut",
    "block": "BlockShortcut",
    "middle": "MiddleShortcut",
}

NAMES = (PLAIN, *_CLASSES)


def shortcut_class(name: str) -> type[Shortcut]:
    """Return the class of a shortcut; the first call imports its module, and torch."""
    return getattr(importlib.import_module(f".{name}", __name__), _CLASSES[name])
