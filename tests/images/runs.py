"""Helpers to call train_sd.py, in this process or in another one, and to read the run's folder."""

import contextlib
import dataclasses
import gc
import hashlib
import io
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from launching import fork_server
from pipelines import image_folder
from safetensors.torch import load_file
from waiting import default_sigint, ended

import train_sd
from reslora.images.data.dataset import ImageDataset, sample, usable
from reslora.images.data.samples import TrainingData
from reslora.images.model.families import load_family
from reslora.options.images import Options
from reslora.runtime.log import read_log

SCRIPT = Path(train_sd.__file__)
FAMILY = load_family("StableDiffusionPipeline")
RESUME = ("--resume_from_checkpoint", "latest")


def load_images(options: Options) -> ImageDataset:
    """Return the images and captions of the one folder or dataset that the options name."""
    found = usable(options.model, options.data, options.training, options.output)
    return sample([found], options.data, options.training)[0]


# -- in this process -------------------------------------------------------------------------------------------------


def main(*flags) -> int:
    """Return the exit status of train_sd.py, also if argparse exits."""
    try:
        return train_sd.main(list(map(str, flags)))
    except SystemExit as error:
        return error.code


def train_family(folder: Path, *more: str) -> None:
    """Train the model in a folder, with captions of mixed lengths and a large learning rate."""
    captions = ["red disc", "blue", "red blue disc box"]
    image_folder(folder / "images", 6, lambda i: captions[i % 3])
    flags = ["--pretrained_model_name_or_path", folder / "model", "--train_data_dir", folder / "images"]
    flags += ["--output_dir", folder / "out", "--resolution", "32", "--rank", "2", "--train_batch_size", "3"]
    flags += ["--max_train_steps", "3", "--learning_rate", "0.05", "--validation_prompt", "blue box"]
    flags += ["--num_validation_images", "1", "--num_inference_steps", "2", "--guidance_scale", "2"]
    flags += ["--shortcut", "middle", "--merge_calibration_samples", "4", "--report_to", "none"]
    assert main(*flags, *more) == 0


def refused(capsys, *flags, quiet: bool = True) -> str:
    """Return the line with which the script refuses these flags; with `quiet`, it must be the only one on stderr."""
    capsys.readouterr()  # what was said while a model was made for the test
    status = main(*flags)
    captured = capsys.readouterr()
    assert status == 2
    lines = captured.err.splitlines()
    assert lines[-1].startswith("train_sd.py: error: ") and (len(lines) == 1 or not quiet), captured.err
    return lines[-1]


def failed(capsys, *flags) -> str:
    """Return the line with which a run of these flags fails."""
    status = main(*flags)
    errors = capsys.readouterr().err
    assert status == 1
    return last_line(errors)


def last_line(errors: str) -> str:
    """Return the last line of a run's stderr, after its progress bars; there must be no traceback."""
    errors = errors.replace("\r", "\n")
    assert "Traceback" not in errors, errors
    line = errors.splitlines()[-1]
    assert line.startswith("train_sd.py: "), errors
    return line


def printed(*flags) -> list[str]:
    """Return the lines on stdout of a run that succeeds."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(*flags) == 0
    return out.getvalue().splitlines()


def only(lines: list[str], *words: str) -> str:
    """Return the only line that contains all of these words."""
    found = [line for line in lines if all(word in line for word in words)]
    assert len(found) == 1, lines
    return found[0]


def without(flags: list[str], name: str) -> list[str]:
    """Return the flags without `name` and its one value."""
    at = flags.index(name)
    return [*flags[:at], *flags[at + 2 :]]


def parts(options: Options, *groups: str) -> list:
    """Return the groups of options with these names, as functions take them."""
    return [getattr(options, group) for group in groups]


def read_by(options: Options) -> dict:
    """Return the groups of options that `TrainingData` holds."""
    groups = "adapter", "data", "training", "validation"
    return dict(zip(groups, parts(options, *groups), strict=True))


def options_of(training_data: TrainingData) -> Options:
    """Return options with the groups of the training data."""
    return Options(**read_by(training_data))


def with_options(training_data: TrainingData, **values) -> TrainingData:
    """Return the training data with other values of some options."""
    return dataclasses.replace(training_data, **read_by(options_of(training_data).replace(**values)))


# -- what is on disk -------------------------------------------------------------------------------------------------


def digests(folder: Path, pattern: str) -> dict[str, str]:
    found = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob(pattern)}
    assert found
    return found


def final_weights(output: Path, method: str = "reslora", step: int = 4) -> dict[str, torch.Tensor]:
    name = "reslora_model.safetensors" if method == "reslora" else "adapter.safetensors"
    return load_file(output / method / f"checkpoint-{step}" / name)


def training_state(output: Path, step: int, method: str = "reslora") -> dict:
    return torch.load(output / method / f"checkpoint-{step}" / "trainer.pt", weights_only=True)


def assert_same(one: dict, other: dict, rtol: float = 0, atol: float = 0) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=atol, equal_nan=True, msg=name)


def assert_same_merge(report: dict, expected: dict) -> None:
    """Assert that two merge reports are equal; the errors of the blocks may differ by rounding."""
    errors = [[block.pop("error") for block in found["blocks"]] for found in (report, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3, abs=1e-5) and report == expected


def losses(output: Path, method: str = "reslora") -> list[tuple[int, str, float]]:
    return [(row["step"], row["split"], row["loss"]) for row in read_log(output / method / "log.jsonl")]


def flip_a_bit(path: Path) -> None:
    """Flip one bit in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0b100
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Truncate the file to its first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def killed_after(step: int, whole: Path, parts: Path, method: str = "reslora") -> None:
    """Turn `parts` into a run like `whole` that was killed after a step.

    It has the moved checkpoint of this step, and a log with later rows.
    """
    (parts / method).mkdir(parents=True)
    (whole / method / f"checkpoint-{step}").rename(parts / method / f"checkpoint-{step}")
    shutil.copy(whole / method / "log.jsonl", parts / method)


# -- in processes of their own ---------------------------------------------------------------------------------------


HALF = 100
"""Bytes of a file in whose midst a run is killed."""


@dataclass
class Watcher:
    """An audit hook of a run, called when the run is about to write, rename or remove in its output folder.

    It copies the folder, limits the size of files, or kills the process.
    """

    output: Path
    snapshots: Path | None = None  # copies of the folder: what a kill at that moment would leave
    full_after: str | None = None  # once a folder of this name is in place, files cannot grow beyond ...
    largest_file: int = 0  # ... as many bytes
    killed_at: str | None = None  # regular expression of the event and the path inside the output folder, as "open-a/b"
    busy: bool = False

    def __call__(self, event: str, args: tuple) -> None:
        if self.busy or event not in ("open", "os.rename", "os.rmdir", "shutil.rmtree"):
            return
        if event == "open" and args[1] in ("r", "rb", None):
            return
        if not isinstance(args[0], (str, os.PathLike)) or not str(args[0]).startswith(f"{self.output}/"):
            return
        self.busy = True  # what it does itself is not the run's doing
        if self.killed_at and re.fullmatch(self.killed_at, f"{event}-{Path(args[0]).relative_to(self.output)}"):
            if event != "open":
                os.kill(os.getpid(), signal.SIGKILL)
            # The system kills who writes beyond a limit, half-way: Python has turned that off.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # by which it would leave all its memory on disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, HALF))
        if self.snapshots and self.output.is_dir():
            number = len(list(self.snapshots.iterdir()))
            shutil.copytree(self.output, self.snapshots / f"{number:03d}-{event}-{Path(args[0]).name.strip('.')}")
        if self.full_after and event == "os.rename" and Path(args[1]).name == self.full_after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest_file, resource.RLIM_INFINITY))
        self.busy = False


def run_and_exit(flags: list[str], output: str, messages: str, watcher: Watcher | None, first: Callable) -> None:
    """Call `first`, then run train_sd.py with its stderr in a file: the work of a forked process."""
    first()
    gc.freeze()  # what the libraries left
    multiprocessing.set_start_method("fork", force=True)  # what the data loader's workers are used to
    stderr = os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stderr, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if watcher:
        sys.addaudithook(watcher)
    sys.exit(train_sd.main([*flags, "--output_dir", output]))


class Runs:
    """Start runs with the same flags, forked from a server that has imported the libraries and never trains itself."""

    def __init__(self, flags: list[str], folder: Path):
        self.context = fork_server()
        self.flags, self.messages = flags, folder / "stderr.txt"

    def start(self, output: Path, *flags: str, watcher: Watcher | None = None, first: Callable = default_sigint):
        arguments = ([*self.flags, *flags], str(output), str(self.messages), watcher, first)
        process = self.context.Process(target=run_and_exit, args=arguments)
        process.start()
        return process

    def finish(self, output: Path, *flags: str, watcher: Watcher | None = None) -> int:
        """Wait for a run, and return its exit status; minus the signal if one ended it."""
        process = self.start(output, *flags, watcher=watcher)
        return ended(process)

    def last_line(self) -> str:
        return last_line(self.messages.read_text())
