"""Location of the bundled models, data sets and configurations."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

ASSETS = _PACKAGE / "assets" if (_PACKAGE / "assets").is_dir() else _PACKAGE.parent / "assets"
"""The directory in the installed package; in a checkout, the repository's `assets/`."""
