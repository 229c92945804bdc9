"""Files that are made for a visitor to download."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from pathlib import Path

KEPT = 200


class WorkingFiles:
    """New files in a temporary folder; old ones go, for Gradio has copied what it served."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="images-"))

    def new(self, name: str) -> Path:
        """A path of that name to write to, in a folder of its own."""
        for old in sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        folder = self.folder / uuid.uuid4().hex
        folder.mkdir()
        return folder / name
