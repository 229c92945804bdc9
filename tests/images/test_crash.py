"""Runs that are killed or have a full disk: files are complete at every moment, and a resumed run is the same.

Runs are processes forked from one that has imported the libraries, so that each takes a second.
"""

import filecmp
import re
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from images.conftest import STEPS
from images.runs import HALF, RESUME, Watcher, assert_same, final_weights, losses, training_state
from reslora.runtime.checkpoint_folders import checkpoints_of, step_of

pytestmark = pytest.mark.exhaustive

FORMATS = ["pytorch_lora_weights.safetensors", "kohya.safetensors", "peft/adapter_model.safetensors"]
FORMATS += ["unet/diffusion_pytorch_model.safetensors"]
MERGE = ["exports.json", "merge.json"]


def checkpoints(output: Path) -> list[int]:
    return sorted(step_of(path) for path in checkpoints_of(output / "reslora"))


def assert_nothing_is_half_written(output: Path, whole: Path) -> None:
    """Assert that every file under its final name equals that of the uninterrupted run, tensor by tensor."""
    for step in checkpoints(output):
        assert_same(final_weights(output, step=step), final_weights(whole, step=step))
        if same_bytes(output, whole, f"checkpoint-{step}/trainer.pt"):
            continue
        state, wanted = (training_state(folder, step) for folder in (output, whole))
        assert state["lr_scheduler"] == wanted["lr_scheduler"]
        for index, moments in wanted["optimizer"]["state"].items():
            assert_same(moments, state["optimizer"]["state"][index])
    for name in FORMATS:
        if (output / "reslora" / name).exists() and not same_bytes(output, whole, name):
            assert_same(load_file(output / "reslora" / name), load_file(whole / "reslora" / name))


def same_bytes(output: Path, whole: Path, name: str) -> bool:
    """Return whether a file equals that of the uninterrupted run byte by byte, so that it need not be parsed."""
    return filecmp.cmp(output / "reslora" / name, whole / "reslora" / name, shallow=False)


def assert_ends_like(output: Path, whole: Path) -> None:
    assert checkpoints(output)[-1] == STEPS
    assert all((output / "reslora" / name).is_file() for name in FORMATS)
    assert_nothing_is_half_written(output, whole)
    assert not hidden(output)
    assert losses(output) == losses(whole)


def hidden(output: Path) -> list[Path]:
    """Return hidden files: neither a lock nor temporary files may remain."""
    return [path for path in output.rglob(".*") if path.name != ".gitignore"]


# -- kills -----------------------------------------------------------------------------------------------------------


# What is written is first called otherwise: ".", the name, and whose it is.
MOMENTS = [
    r"open-reslora/\.checkpoint-2.*/\.+reslora_model\.safetensors.*",
    r"open-reslora/\.checkpoint-3.*/trainer\.pt",
    r"os.rename-reslora/\.checkpoint-3[^/]*",
    r"os.rmdir-reslora/\.checkpoint-2.*",
    r"open-reslora/\.unet.*/diffusion_pytorch_model\.safetensors",
    r"open-reslora/\.+pytorch_lora_weights\.safetensors.*",
    r"os.rename-reslora/\.+exports\.json.*",
]


def test_killed_again_and_again_within_saves_and_exports(runs, whole, tmp_path):
    """Each time at the next of these moments, also with half-written files, and resumed from what remains."""
    output, flags = tmp_path / "out", ("--dataloader_num_workers", "1", "--checkpoints_total_limit", "2", *RESUME)
    for moment in MOMENTS:
        status = runs.finish(output, *flags, watcher=Watcher(output, killed_at=moment))
        assert status == -(signal.SIGXFSZ if moment.startswith("open") else signal.SIGKILL), moment
        assert checkpoints(output)
        opened = [path for path in output.rglob("*") if re.fullmatch(moment, f"open-{path.relative_to(output)}")]
        assert [path.stat().st_size for path in opened] == [HALF] * moment.startswith("open"), moment
        assert_nothing_is_half_written(output, whole)
    assert runs.finish(output, *flags) == 0
    assert_ends_like(output, whole)


def test_killed_between_any_two_disk_operations(runs, whole, tmp_path):
    """After a kill at any moment the folder is complete; an old checkpoint is removed only after the new one."""
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
    """A finished run that is extended replaces its exports, never only half of them."""
    snapshots, output = tmp_path / "snapshots", tmp_path / "out"
    snapshots.mkdir()
    shutil.copytree(whole, output)
    longer = ("--max_train_steps", str(STEPS + 2))  # the first of these has a rate of 0 still
    assert runs.finish(output, *RESUME, *longer, watcher=Watcher(output, snapshots)) == 0
    assert not any(same_bytes(output, whole, name) for name in (*MERGE, *FORMATS))
    versions = [{name: load_file(f / "reslora" / name) for name in FORMATS} for f in (whole, output)]
    for snapshot in snapshots.iterdir():
        if (snapshot / "reslora" / "exports.json").exists():  # which says that all beside it is of one merge
            assert any(all(same_bytes(snapshot, f, name) for name in (*MERGE, *FORMATS)) for f in (whole, output))
        for name in FORMATS:
            if (snapshot / "reslora" / name).exists():
                tensors = load_file(snapshot / "reslora" / name)
                assert any(all(v[name][k].equal(t) for k, t in tensors.items()) for v in versions)
    assert not hidden(output)


# -- a full disk -----------------------------------------------------------------------------------------------------


def test_disk_full_while_saving(runs, whole, tmp_path):
    """A limit on file sizes stands for the full disk: writing fails half-way too."""
    sizes = {path.name: path.stat().st_size for path in (whole / "reslora" / "checkpoint-2").iterdir()}
    assert sizes["trainer.json"] < 30_000 < sizes["trainer.pt"]
    output = tmp_path / "out"
    assert runs.finish(output, watcher=Watcher(output, full_after="checkpoint-2", largest_file=30_000)) == 1
    assert str(output / "reslora") in runs.last_line()
    assert checkpoints(output) == [1, 2]
    assert_nothing_is_half_written(output, whole)
    assert not hidden(output)
    assert runs.finish(output, *RESUME) == 0
    assert_ends_like(output, whole)


def test_disk_full_while_exporting(runs, whole, tmp_path):
    output, name = tmp_path / "out", f"checkpoint-{STEPS}"
    limit = (whole / "reslora" / FORMATS[-1]).stat().st_size // 2
    assert runs.finish(output, watcher=Watcher(output, full_after=name, largest_file=limit)) == 1
    assert str(output / "reslora") in runs.last_line()
    assert not (output / "reslora" / "unet").exists() and not (output / "reslora" / "exports.json").exists()
    assert_nothing_is_half_written(output, whole)
    assert runs.finish(output, *RESUME) == 0
    assert_ends_like(output, whole)
