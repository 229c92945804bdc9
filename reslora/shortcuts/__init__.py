"""Registry of the shortcuts. One file implements each shortcut; a new shortcut needs a file and a row here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Shortcut

PLAIN = "none"
"""Plain LoRA without a shortcut (Eq. 1)."""

_CLASSES = {
    "input": "InputShortcut",
    "block": "BlockShortcut",
    "middle": "MiddleShortcut",
    "gated": "GatedShortcut",
}

NAMES = (PLAIN, *_CLASSES)


def shortcut_class(name: str) -> type[Shortcut]:
    """Return the class of a shortcut; the first use imports its file, and torch."""
    return getattr(importlib.import_module(f".{name}", __name__), _CLASSES[name])
