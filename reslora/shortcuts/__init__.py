"""The shortcuts by name: a new one is a file that says how it is wired, computed and merged, and a row here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Shortcut

PLAIN = "none"
"""No shortcut: plain LoRA (Eq. 1)."""

_CLASSES = {
    "input": "InputShortcut",
    "block": "BlockShortcut",
    "middle": "MiddleShortcut",
}

NAMES = (PLAIN, *_CLASSES)


def shortcut_class(name: str) -> type[Shortcut]:
    """Return the class of a shortcut, from the file of its name; torch is not imported before somebody asks."""
    return getattr(importlib.import_module(f".{name}", __name__), _CLASSES[name])
