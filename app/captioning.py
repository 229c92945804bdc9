"""Write captions with an image-text model: run `reslora-caption` on links to the images, then store its texts."""

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
from .image_edits import ImageEdits
from .image_folders import Image
from .launcher import environment
from .runs import RunError

FOLDER = "models"
"""Folder of the runs folder with the user's models."""
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
MODELS = "models"
"""Folder, in the folder of runs, of image-text models."""
EVERY = 0.5
"""Seconds between two counts of the written captions."""


@dataclass
class Job:
    """The captions of a folder that are being written."""

    folder: str
    images: Sequence[Image]
    options: Sequence[str]
    done: int = 0
    stopped: bool = False
    line: str = ""
    """What was done, once it has ended."""
    error: str = ""


class Captioning:
    """Writes the captions of one folder at a time, in a thread: closing the page does not stop it."""

    def __init__(self, edits: ImageEdits) -> None:
        self.edits, self.jobs = edits, edits.jobs
        self.job: Job | None = None

    def models(self) -> dict[str, Path]:
        """Return the image-text models in the folder `models` of the runs folder, by name."""
        place = self.jobs.library.folder / MODELS
        found = {path.parent for file in PROCESSORS for path in place.glob(f"[!.]*/{file}")}
        return {path.name: path for path in sorted(found) if (path / "config.json").is_file()}

    def start(self, folder: str, model: str, prompt: str = "", prefix: str = "", overwrite: bool = False) -> Job:
        """Start to write captions, and return the job; images with a caption are left out unless `overwrite`.

        Raises `RunError` for an invalid model, if no image needs a caption, and while another folder is captioned.
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
            if self.job and not (self.job.line or self.job.error):
                raise RunError(f"The captions of {self.job.folder} are being written; wait for them, or stop it first.")
            waiting = [image for image in images.images.values() if image.size]
            if overwrite is not True:
                waiting = [image for image in waiting if not any(image.captions)]
            if not waiting:
                raise RunError("Every image has a caption; check Replace existing captions to write new ones.")
            self.job = job = Job(folder, waiting, options)
        self.jobs.captioning = threading.Thread(target=self.work, args=(job,), daemon=True)
        self.jobs.captioning.start()
        return job

    def work(self, job: Job) -> None:
        """Run the command in a temporary folder, and store what it wrote."""
        try:
            with tempfile.TemporaryDirectory(prefix="captions-") as place:
                images = Path(place, "images")
                images.mkdir()
                for number, image in enumerate(job.images):
                    (images / f"{number:06d}{image.path.suffix}").symlink_to(image.path.resolve())
                reason = self.run(job, images)
                texts = [images / f"{number:06d}.txt" for number in range(len(job.images))]
                found = {
                    image.name: [text.read_text(encoding="utf-8").strip()]
                    for image, text in zip(job.images, texts, strict=True) if text.is_file()
                }  # fmt: skip
            line = self.store(job, found)
            if reason and not job.stopped:
                raise RunError(f"{reason} {line}" if found else reason)
            job.line = f"Stopped. {line}" if job.stopped else line
        except OSError as error:
            job.error = f"The captions cannot be written ({error.strerror})."
        except RunError as error:
            job.error = str(error)

    def run(self, job: Job, images: Path) -> str:
        """Run `reslora-caption` on a folder; return why it failed, or an empty string."""
        log = images.with_name("log")
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "reslora.caption", str(images), *job.options], stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, cwd=images.parent, env=environment(),
            )  # fmt: skip
            while process.poll() is None:
                job.done = sum(1 for _ in images.glob("*.txt"))
                if self.jobs.closed.is_set() or job.stopped:
                    process.terminate()
                time.sleep(EVERY)
        if process.returncode == 0:
            return ""
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return self.jobs.without_folders((lines or ["The captions could not be written."])[-1])[:300]

    def store(self, job: Job, found: dict[str, list[str]]) -> str:
        """Store the captions of images whose captions are as they were, and return a line about them."""
        with self.edits.changing(job.folder) as images:
            was = {image.name: image.captions for image in job.images}
            same = {
                name: text for name, text in found.items()
                if name in images.images and images.images[name].captions == was[name]
            }  # fmt: skip
            if same:
                self.edits.write_captions(images, same, "a model's")
        left = len(job.images) - len(same)
        rest = f" {pluralize(left, 'image')} left as they were." if left else ""
        return f"{job.folder}: {pluralize(len(same), 'caption')} written.{rest}"

    def follow(self, job: Job) -> Iterator[int]:
        """Yield the number of captions until the job has ended. Raises `RunError` if it failed."""
        while not (job.line or job.error):
            yield job.done
            time.sleep(EVERY)
        if job.error:
            raise RunError(job.error)

    def stop(self) -> str:
        """Stop the job after the captions that are written, and return a sentence about it."""
        job = self.job
        if job is None or job.line or job.error:
            return "No captions are being written."
        job.stopped = True
        return f"{job.folder}: the captions that are written so far are stored."
