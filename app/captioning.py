"""Write captions with an image-text model: run `reslora-caption` on links to the images, then store its texts."""

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from reslora.formatting import pluralize

from .bases import is_hub_name
from .image_edits import ImageEdits
from .image_folders import Image
from .launcher import environment
from .runs import RunError

MODELS = "models"
"""Folder, in the folder of runs, of image-text models."""
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
EVERY = 0.5
"""Seconds between two counts of the written captions."""


class Captioning:
    """Writes the captions of one folder at a time."""

    def __init__(self, edits: ImageEdits) -> None:
        self.edits, self.jobs = edits, edits.jobs
        self.stopped = threading.Event()

    def models(self) -> dict[str, Path]:
        """Return the image-text models in the folder `models` of the runs folder, by name."""
        place = self.jobs.library.folder / MODELS
        found = {path.parent for file in PROCESSORS for path in place.glob(f"[!.]*/{file}")}
        return {path.name: path for path in sorted(found) if (path / "config.json").is_file()}

    def write(
        self, folder: str, model: str, prompt: str = "", prefix: str = "", overwrite: bool = False
    ) -> Iterator[tuple[str, float]]:
        """Write captions, and yield lines about the progress, each with the completed fraction; the last is the result.

        Images with a caption are left out unless `overwrite`. If the iterator is closed, or after `stopped` is set, the
        captions that are written so far are stored. Raises `RunError` for an invalid model, if no image needs a
        caption, if the model fails, and while captions are being written.
        """
        named = str(model or "").strip()
        path = self.models().get(named)
        if path is None and not is_hub_name(named):
            raise RunError(
                "Give an image-text model by its name on the hub, such as owner/model, or put its folder into "
                f"{MODELS} in the folder of runs and choose it from the list."
            )
        given = {"model": path or named, "prompt": prompt, "prefix": prefix}
        options = [f"--{name}={text}" for name, text in given.items() if str(text or "").strip()]
        with self.edits.changing(folder) as images:
            found = [image for image in images.images.values() if image.size]
            waiting = [image for image in found if overwrite is True or not any(image.captions)]
        if not waiting:
            raise RunError("Every image has a caption; check Replace existing captions to write new ones.")
        if not self.jobs.captioning.acquire(blocking=False):
            raise RunError("Captions are being written; wait for them, or stop it first.")
        with contextlib.ExitStack() as stack:
            stack.callback(self.jobs.captioning.release)
            self.stopped.clear()
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="captions-")))
            texts = {}
            for number, image in enumerate(waiting):
                link = place / f"{number:06d}{image.path.suffix}"
                link.symlink_to(image.path.resolve())
                texts[image] = link.with_suffix(".txt")
            try:
                for done in self.run(place, options):
                    progress = f"{done:,} of {pluralize(len(texts), 'caption')}" if done else "loading the model"
                    yield f"{folder}: {progress}", done / len(texts)
            finally:
                line = self.store(folder, texts)
            yield line, 1.0

    def run(self, images: Path, options: Sequence[str]) -> Iterator[int]:
        """Run `reslora-caption` on a folder, and yield the number of captions. Raises `RunError` if it fails."""
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "reslora.caption", str(images), *options], stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, cwd=images, env=environment(),
            )  # fmt: skip
            try:
                while (failed := process.poll()) is None and not (self.jobs.closed.is_set() or self.stopped.is_set()):
                    yield sum(1 for _ in images.glob("*.txt"))
                    time.sleep(EVERY)
            finally:
                process.terminate()
                process.wait()
            log.seek(0)
            if failed:
                lines = [line for line in log if line.strip()]
                raise RunError(self.jobs.without_folders((lines or ["The captions could not be written."])[-1])[:300])

    def store(self, folder: str, texts: dict[Image, Path]) -> str:
        """Store new captions of images whose captions have not changed meanwhile, and return a line about them."""
        with self.edits.changing(folder) as images:
            same = {}
            for image, path in texts.items():
                now = images.images.get(image.name)
                if now and now.captions == image.captions and path.is_file():
                    same[image.name] = [path.read_text(encoding="utf-8").strip()]
            if same:
                self.edits.write_captions(images, same, f"a model's {pluralize(len(same), 'caption')}")
        left = len(texts) - len(same)
        rest = f" {pluralize(left, 'image')} left as they were." if left else ""
        return f"{folder}: {pluralize(len(same), 'caption')} written.{rest}"
