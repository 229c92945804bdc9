"""The class of each shortcut, by its name in `reslora.config.SHORTCUTS`."""

from .base import Shortcut
from .block import BlockShortcut
from .input import InputShortcut
from .middle import MiddleShortcut

CLASSES: dict[str, type[Shortcut]] = {"input": InputShortcut, "block": BlockShortcut, "middle": MiddleShortcut}
