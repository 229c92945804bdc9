"""What of a run's folder is of images."""

from __future__ import annotations

from pathlib import Path

from .arguments import Flags


def cache_folder(flags: Flags) -> Path:
    """Where encoded images and captions are kept, and models unpacked from single files."""
    return Path(flags.cache_dir) / "encoded" if flags.cache_dir else Path(flags.output_dir) / "cache"
