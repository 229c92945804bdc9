"""train_sd.py killed and starved of disk: what is on disk is whole at every moment, and a resumed run ends the same.

Runs are processes of their own, forked from one that has the libraries loaded, so that each takes a second.
"""

import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_sd import assert_same, final_weights, pictures, tiny_pipeline

import train_sd

STEPS = 5
FORMATS = ["pytorch_lora_weights.safetensors", "kohya.safetensors", "peft/adapter_model.safetensors"]
FORMATS += ["unet/diffusion_pytorch_model.safetensors"]
LIBRARIES = ["torch", "accelerate", "datasets", "matplotlib.pyplot", "peft", "safetensors.torch", "transformers"]
LIBRARIES += ["diffusers.optimization", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"]
RESUME = ("--resume_from_checkpoint", "latest")


# -- runs that end badly ---------------------------------------------------------------------------------------------


@dataclass
class Watcher:
    """Hears of every file and folder that a run is about to write, rename or remove in its output folder."""

    output: Path
    snapshots: Path | None = None  # copies of the folder: what a kill at that moment would leave
    full_after: str | None = None  # once a folder of this name is in place, files cannot grow beyond ...
    largest_file: int = 0  # ... as many bytes
    busy: bool = False

    def __call__(self, event: str, args: tuple) -> None:
        if self.busy or event not in ("open", "os.rename", "os.rmdir", "shutil.rmtree"):
            return
        if event == "open" and args[1] in ("r", "rb", None):
            return
        if not isinstance(args[0], (str, os.PathLike)) or not str(args[0]).startswith(f"{self.output}/"):
            return
        self.busy = True  # what it does itself is not the run's doing
        if self.snapshots and self.output.is_dir():
            number = len(list(self.snapshots.iterdir()))
            shutil.copytree(self.output, self.snapshots / f"{number:03d}-{event}-{Path(args[0]).name.strip('.')}")
        if self.full_after and event == "os.rename" and Path(args[1]).name == self.full_after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest_file, resource.RLIM_INFINITY))
        self.busy = False


def run_and_exit(flags: list[str], output: str, messages: str, watcher: Watcher | None) -> None:
    """What the forked process does: train_sd.py with its stderr in a file."""
    multiprocessing.set_start_method("fork", force=True)  # what the data loader's workers are used to
    stderr = os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stderr, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if watcher:
        sys.addaudithook(watcher)
    sys.exit(train_sd.main([*flags, "--output_dir", output]))


class Runs:
    """Starts runs with the same flags; the server they are forked from never trains itself."""

    def __init__(self, flags: list[str], folder: Path):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(LIBRARIES)
        self.flags, self.messages = flags, folder / "stderr.txt"

    def start(self, output: Path, *flags: str, watcher: Watcher | None = None):
        arguments = ([*self.flags, *flags], str(output), str(self.messages), watcher)
        process = self.context.Process(target=run_and_exit, args=arguments)
        process.start()
        return process

    def finish(self, output: Path, *flags: str, watcher: Watcher | None = None) -> int:
        """Exit status of a run that is waited for; minus the signal where one ended it."""
        process = self.start(output, *flags, watcher=watcher)
        process.join()
        return process.exitcode

    def last_line(self) -> str:
        """The line the run ended with; there was no traceback."""
        text = self.messages.read_text().replace("\r", "\n")
        assert "Traceback" not in text, text
        return text.splitlines()[-1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """Mid-epoch (5 pictures, 4 samples a step), mid-accumulation and with dropout, saving at every step."""
    folder = tmp_path_factory.mktemp("crash")
    flags = ["--pretrained_model_name_or_path", str(tiny_pipeline(folder / "model")), "--rank", "2"]
    flags += ["--train_data_dir", str(pictures(folder / "pictures", count=5)), "--resolution", "32"]
    flags += ["--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--lora_dropout", "0.2"]
    flags += ["--max_train_steps", str(STEPS), "--checkpointing_steps", "1", "--learning_rate", "1e-2"]
    flags += ["--lr_scheduler", "cosine", "--lr_warmup_steps", "1", "--merge_calibration_samples", "2"]
    flags += ["--num_inference_steps", "1", "--num_validation_images", "1", "--report_to", "none"]
    return Runs(flags, folder)


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert runs.finish(output) == 0
    return output


def checkpoints(output: Path) -> list[int]:
    return sorted(train_sd.step_of(path) for path in train_sd.checkpoints_of(output / "reslora"))


def assert_nothing_is_half_written(output: Path, whole: Path) -> None:
    """Every file under its final name is what the uninterrupted run has there, tensor by tensor."""
    for step in checkpoints(output):
        assert_same(final_weights(output, step=step), final_weights(whole, step=step))
        state, wanted = (training_state(folder, step) for folder in (output, whole))
        assert state["lr_scheduler"] == wanted["lr_scheduler"]
        for index, moments in wanted["optimizer"]["state"].items():
            assert_same(moments, state["optimizer"]["state"][index])
    for name in FORMATS:
        if (output / "reslora" / name).exists():
            assert_same(load_file(output / "reslora" / name), load_file(whole / "reslora" / name))


def training_state(output: Path, step: int) -> dict:
    return torch.load(output / "reslora" / f"checkpoint-{step}" / "trainer.pt", weights_only=True)


def assert_ends_like(output: Path, whole: Path) -> None:
    assert checkpoints(output)[-1] == STEPS
    assert all((output / "reslora" / name).is_file() for name in FORMATS)
    assert_nothing_is_half_written(output, whole)
    assert not [path for path in output.rglob(".*") if path.name != ".gitignore"]  # neither a lock nor leftovers
    assert training_losses(output) == training_losses(whole)


def training_losses(output: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in train_sd.read_log(output / "reslora" / "log.jsonl")]


# -- SIGKILL ---------------------------------------------------------------------------------------------------------


def test_killed_at_random_moments(runs, whole, tmp_path):
    """Killed again and again, a random while after it got one step further, until a run comes to its end."""
    output, chance, kills = tmp_path / "out", random.Random(0), 0
    flags = ("--dataloader_num_workers", "1", "--checkpoints_total_limit", "2", *RESUME)
    while True:
        process, before = runs.start(output, *flags), checkpoints(output)
        while process.is_alive() and checkpoints(output) == before:
            time.sleep(0.002)
        process.join(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, runs.last_line()
        assert checkpoints(output)
        assert_nothing_is_half_written(output, whole)
        kills += 1
        if checkpoints(output)[-1] == STEPS:
            break
    assert kills > 1
    assert runs.finish(output, *flags) == 0
    assert_ends_like(output, whole)


def test_killed_between_any_two_disk_operations(runs, whole, tmp_path):
    """Whatever a kill would leave, at any moment of the run, is whole, and an old checkpoint outlives its successor."""
    snapshots, newest, rotations = tmp_path / "snapshots", 0, 0
    snapshots.mkdir()
    flags = ("--checkpoints_total_limit", "1")
    assert runs.finish(tmp_path / "out", *flags, watcher=Watcher(tmp_path / "out", snapshots)) == 0
    found = sorted(snapshots.iterdir())
    for snapshot in found:
        steps = checkpoints(snapshot)
        assert len(steps) <= 2 and max(steps, default=0) >= newest
        newest, rotations = max(steps, default=0), rotations + (len(steps) == 2)
    for snapshot in found[::2]:
        assert_nothing_is_half_written(snapshot, whole)
    assert newest == STEPS and rotations >= STEPS - 1
    moments = ["open-trainer.json", "os.rename-checkpoint-4", "shutil.rmtree", "os.rename-unet"]
    for moment in moments:
        snapshot = [path for path in found if moment in path.name][-1]
        assert runs.finish(snapshot, *flags, *RESUME) == 0
        assert_ends_like(snapshot, whole)


def test_killed_while_replacing_its_exports(runs, whole, tmp_path):
    """A finished run that goes on for longer replaces what it exported: never by half."""
    snapshots, output = tmp_path / "snapshots", tmp_path / "out"
    snapshots.mkdir()
    shutil.copytree(whole, output)
    assert runs.finish(output, *RESUME, "--max_train_steps", str(STEPS + 1), watcher=Watcher(output, snapshots)) == 0
    versions = [{name: load_file(f / "reslora" / name) for name in FORMATS} for f in (whole, output)]
    for snapshot in snapshots.iterdir():
        for name in FORMATS:
            if (snapshot / "reslora" / name).exists():
                tensors = load_file(snapshot / "reslora" / name)
                assert any(all(v[name][k].equal(t) for k, t in tensors.items()) for v in versions)
    assert not [path for path in output.rglob(".*")]


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("largest_file", "too_large"), [(1_500, "reslora_model.safetensors"), (30_000, "trainer.pt")])
def test_disk_full_while_saving(runs, whole, tmp_path, largest_file, too_large):
    """A limit on the size of files stands for the full disk: writing fails half-way, as it does there."""
    sizes = {path.name: path.stat().st_size for path in (whole / "reslora" / "checkpoint-2").iterdir()}
    assert sizes["trainer.json"] < largest_file < sizes[too_large]
    output = tmp_path / "out"
    assert runs.finish(output, watcher=Watcher(output, full_after="checkpoint-2", largest_file=largest_file)) == 1
    assert runs.last_line().startswith("train_sd.py: ")
    assert checkpoints(output) == [1, 2]
    assert_nothing_is_half_written(output, whole)
    assert not [path for path in output.rglob(".*")]
    assert runs.finish(output, *RESUME) == 0
    assert_ends_like(output, whole)


def test_disk_full_while_exporting(runs, whole, tmp_path):
    output, name = tmp_path / "out", f"checkpoint-{STEPS}"
    limit = (whole / "reslora" / FORMATS[-1]).stat().st_size // 2
    assert runs.finish(output, watcher=Watcher(output, full_after=name, largest_file=limit)) == 1
    assert runs.last_line().startswith("train_sd.py: ")
    assert not (output / "reslora" / "unet").exists() and not (output / "reslora" / "exports.json").exists()
    assert_nothing_is_half_written(output, whole)
    assert runs.finish(output, *RESUME) == 0
    assert_ends_like(output, whole)


# -- rotation and damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "kept"), [(1, [5]), (3, [3, 4, 5])])
def test_rotation_keeps_the_newest_and_leaves_the_rest_alone(runs, tmp_path, limit, kept):
    """Neither stray folders nor unfinished checkpoints are counted or removed."""
    method = tmp_path / "out" / "reslora"
    for name in ("checkpoint-best", "checkpoint-3-backup", "checkpoint-99"):
        (method / name).mkdir(parents=True)
        (method / name / "mine.txt").write_text("mine")
    assert runs.finish(tmp_path / "out", "--checkpoints_total_limit", str(limit)) == 0
    names = {f"checkpoint-{step}" for step in kept} | {"checkpoint-best", "checkpoint-3-backup", "checkpoint-99"}
    assert {path.name for path in method.glob("checkpoint-*")} == names
    assert (method / "checkpoint-best" / "mine.txt").read_text() == "mine"


DAMAGES = {
    "trainer.pt cut short": lambda folder: cut(folder / "trainer.pt"),
    "trainer.pt gone": lambda folder: (folder / "trainer.pt").unlink(),
    "trainer.json empty": lambda folder: (folder / "trainer.json").write_text(""),
    "weights empty": lambda folder: (folder / "reslora_model.safetensors").write_bytes(b""),
    "configuration cut short": lambda folder: cut(folder / "reslora_config.json"),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_latest_goes_back_to_the_newest_that_is_whole(runs, whole, tmp_path):
    """Every kind of damage at once, each in a checkpoint of its own, the newest in all of them."""
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / "reslora" / "exports.json").unlink()
    for step, damage in zip(range(STEPS, 0, -1), list(DAMAGES.values())[: STEPS - 1], strict=False):
        damage(output / "reslora" / f"checkpoint-{step}")
    assert runs.finish(output, *RESUME) == 0
    assert_ends_like(output, whole)


def test_rotation_does_not_count_what_is_damaged(runs, whole, tmp_path):
    """The newest was damaged, the run goes on from before it: what it saves from then on must stay."""
    output, snapshots = tmp_path / "out", tmp_path / "snapshots"
    snapshots.mkdir()
    shutil.copytree(whole / "reslora", output / "reslora")
    (output / "reslora" / "exports.json").unlink()
    for step in (4, 5):
        cut(output / "reslora" / f"checkpoint-{step}" / "trainer.pt")
    flags = ("--checkpoints_total_limit", "1", *RESUME)
    assert runs.finish(output, *flags, watcher=Watcher(output, snapshots)) == 0
    for snapshot in snapshots.iterdir():
        assert any(is_whole(path) for path in train_sd.checkpoints_of(snapshot / "reslora"))
    assert_ends_like(output, whole)


def is_whole(checkpoint: Path) -> bool:
    with contextlib.suppress(RuntimeError, OSError):
        return bool(torch.load(checkpoint / "trainer.pt", weights_only=True))
    return False


@pytest.mark.parametrize("damage", DAMAGES)
def test_named_checkpoint_that_is_damaged_is_refused(runs, whole, tmp_path, damage):
    shutil.copytree(whole / "reslora" / "checkpoint-2", tmp_path / "reslora" / "checkpoint-2")
    DAMAGES[damage](tmp_path / "reslora" / "checkpoint-2")
    assert runs.finish(tmp_path, "--resume_from_checkpoint", "checkpoint-2") == 2
    assert "--resume_from_checkpoint" in runs.last_line() and "damaged" in runs.last_line()
