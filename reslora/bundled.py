"""Location of the bundled models, data sets and configurations."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

ASSETS = _PACKAGE / "assets" if (_PACKAGE / "assets").is_dir() else _PACKAGE.parent / "assets"
"""Directory of the bundled files: `assets/` in the installed package or in a checkout of the repository."""
