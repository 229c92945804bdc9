"""Write captions with an image-text model: run `reslora-caption` on links to a folder's images, then store its texts.

The texts are stored like edits on the page: a text file or a table row is backed up first, and *Undo* restores it.
"""

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from reslora.formatting import pluralize

from .bases import is_hub_name
from .caption_files import Edit, caption_file, write
from .image_edits import ImageEdits, refuse_bundled
from .image_folders import OUTSIDE, Image, Images, read
from .launcher import environment
from .runs import RunError

PROCESSORS = ("processor_config.json", "preprocessor_config.json")
MODELS = "models"
"""Folder, in the folder of runs, of image-text models."""
EVERY = 0.5
"""Seconds between two counts of the written captions."""


@dataclass
class Job:
    """The captions of a folder that are being written."""

    folder: str
    total: int

    done: int = 0
    stopped: bool = False
    line: str = ""
    """What was done, once it has ended."""
    error: Exception | None = None


class Captioning:
    """Writes the captions of one folder at a time; a page that is closed does not end it."""

    def __init__(self, edits: ImageEdits) -> None:
        self.edits, self.jobs = edits, edits.jobs
        self.lock = threading.Lock()
        self.job: Job | None = None

    def models(self) -> dict[str, Path]:
        """Return the image-text models in the folder `models` of the runs folder, by name."""
        place = self.jobs.library.folder / MODELS
        found = {path.parent for file in PROCESSORS for path in place.glob(f"[!.]*/{file}")}
        return {path.name: path for path in sorted(found) if (path / "config.json").is_file()}

    def start(self, images: Images, model: object, prompt: str, prefix: str, overwrite: bool) -> Job:
        """Start to write captions, and return the job.

        Images with a caption are left out unless `overwrite`. Of several images with one caption file, the first is
        described. Raises `RunError` for an invalid model, for a caption file that cannot be decoded, if no image needs
        a caption, and while another folder is captioned.
        """
        if not isinstance(overwrite, bool):
            raise RunError("Say by true or false whether existing captions are replaced.")
        named = str(model or "").strip()
        word = str(self.models().get(named, named))
        if word == named and not is_hub_name(named):
            raise RunError(
                "Give an image-text model by its name on the hub, such as owner/model, or put its folder into "
                f"{MODELS} in the folder of runs and choose it from the list."
            )
        refuse_bundled(images.folder)
        if images.fixed:
            raise RunError(f"Captions cannot be changed here: {images.fixed}.")
        waiting = [image for image in images.images.values() if overwrite or not any(image.captions or ())]
        waiting = [image for image in waiting if image.problem != OUTSIDE and image.path.is_file()]
        first: dict[object, Image] = {}
        for image in waiting:
            first.setdefault(image.name if image.metadata else caption_file(image), image)
        waiting = list(first.values())
        if not waiting:
            raise RunError("Every image has a caption; check Replace existing captions to write new ones.")
        given = {"model": word, "prompt": str(prompt or ""), "prefix": str(prefix or "")}
        words = [f"--{name}={text}" for name, text in given.items() if text.strip()]
        with self.lock:
            if self.job and not self.job.line and not self.job.error:
                raise RunError(f"The captions of {self.job.folder} are being written; wait for them, or stop it first.")
            self.job = job = Job(images.folder.name, len(waiting))
        self.jobs.captioning = threading.Thread(target=self.work, args=(job, images, waiting, words), daemon=True)
        self.jobs.captioning.start()
        return job

    def work(self, job: Job, images: Images, waiting: Sequence[Image], words: Sequence[str]) -> None:
        """Run the command in a temporary folder, and store what it wrote."""
        try:
            with tempfile.TemporaryDirectory(prefix="captions-") as place:
                folder = Path(place)
                (folder / "images").mkdir()
                for number, image in enumerate(waiting):
                    (folder / "images" / f"{number:06d}{image.path.suffix}").symlink_to(image.path.resolve())
                reason = self.caption(job, folder, words)
                found = {
                    image.name: text.read_text(encoding="utf-8").strip()
                    for number, image in enumerate(waiting)
                    if (text := folder / "images" / f"{number:06d}.txt").is_file()
                }
            line = self.store(images, waiting, found)
            if reason and not job.stopped:
                raise RunError(f"{reason} {line}" if found else reason)
            job.line = f"Stopped. {line}" if job.stopped else line
        except OSError as error:
            job.error = RunError(f"The captions cannot be written ({error.strerror}).")
        except Exception as error:
            job.error = error

    def caption(self, job: Job, folder: Path, words: Sequence[str]) -> str:
        """Run `reslora-caption` on the folder `images` in `folder`; return why it failed, or an empty string."""
        images, log = folder / "images", folder / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "reslora.caption", str(images), *words], stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environment(),
            )  # fmt: skip
            while process.poll() is None:
                job.done = sum(1 for _ in images.glob("*.txt"))
                if self.jobs.closed.is_set() or job.stopped:
                    process.terminate()
                time.sleep(EVERY)
        if process.returncode == 0:
            return ""
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return self.jobs.without_folders((said or ["The captions could not be written."])[-1])[:300]

    def store(self, images: Images, waiting: Sequence[Image], found: dict[str, str]) -> str:
        """Store the captions of images whose captions are as they were, and return a line about them."""
        now = read(images.folder, images.options)
        same = [
            image for image in waiting
            if image.name in found and image.name in now.images and now.images[image.name].captions == image.captions
        ]  # fmt: skip
        if same:
            edits = [Edit(image.name, image.captions, (found[image.name],)) for image in same]
            write(now, edits, f"{pluralize(len(edits), 'caption')} by a model")
        left = len(waiting) - len(same)
        rest = f" {pluralize(left, 'image')} left as they were." if left else ""
        return f"{images.folder.name}: {pluralize(len(same), 'caption')} written.{rest}"

    def follow(self, job: Job) -> Iterator[int]:
        """Yield the number of captions until the job has ended; raise its error."""
        while not job.line and job.error is None:
            yield job.done
            time.sleep(EVERY)
        if job.error:
            raise job.error

    def stop(self) -> str:
        """Stop the job after the captions that are written, and return a sentence about it."""
        job = self.job
        if job is None or job.line or job.error:
            return "No captions are being written."
        job.stopped = True
        return f"{job.folder}: the captions that are written so far are stored."
