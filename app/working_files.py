"""Make temporary files for downloads."""

import shutil
import tempfile
import threading
from collections import deque
from pathlib import Path

KEPT = 200


class WorkingFiles:
    """New files in a temporary folder. Only the newest `KEPT` are retained, because Gradio serves copies of them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="images-"))
        self.made: deque[Path] = deque()
        self.lock = threading.Lock()

    def new(self, name: str) -> Path:
        """Return the path of a file with this name in a new folder."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        with self.lock:
            self.made.append(folder)
            old = self.made.popleft() if len(self.made) > KEPT else None
        if old:
            shutil.rmtree(old, ignore_errors=True)
        return folder / name
