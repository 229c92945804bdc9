"""Loading in this process or in workers: errors are one line, and no process remains."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal

import PIL.Image
import pytest
from torch.utils.data import DataLoader, Dataset
from waiting import wait_until

from images.runs import cut, main
from reslora.errors import RunFailed
from reslora.images.data.loaders import stream, worker_options
from reslora.training import loop


class Items(Dataset):
    """Ten numbers; one of them cannot be loaded, or kills the worker that loads it."""

    def __init__(self, trouble: str = "") -> None:
        self.trouble = trouble

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        if index == 3 and self.trouble == "gone":
            raise FileNotFoundError(2, "No such file", "3.png")
        if index == 3 and self.trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def loader(processes: int, trouble: str = "") -> DataLoader:
    return DataLoader(Items(trouble), batch_size=None, **worker_options(processes))


def no_process_is_left() -> None:
    """Torch waits for its processes for five seconds only."""
    wait_until(lambda: not multiprocessing.active_children(), "the end of the processes")


@pytest.mark.parametrize("processes", [0, 1])
def test_everything_is_loaded_in_order(processes):
    assert list(stream(loader(processes))) == list(range(10))
    no_process_is_left()


@pytest.mark.parametrize("processes", [0, 1])
def test_what_cannot_be_loaded_is_named(processes):
    with pytest.raises(RunFailed, match=r"3\.png") as error:
        list(stream(loader(processes, "gone")))
    assert "\n" not in str(error.value)
    no_process_is_left()


@pytest.mark.exhaustive
def test_a_process_that_dies_is_a_failed_run():
    with pytest.raises(RunFailed, match="--dataloader_num_workers 1"):
        list(stream(loader(1, "killed")))


def test_processes_end_when_the_rest_is_not_wanted():
    """They ignore SIGTERM: the program would wait for them forever."""
    kept = []
    with pytest.raises(ZeroDivisionError), contextlib.closing(stream(loader(2))) as items:
        kept.append(next(items))
        1 / 0  # noqa: B018
    assert kept == [0]
    no_process_is_left()


@pytest.mark.exhaustive
@pytest.mark.parametrize(("change", "processes"), [("damaged", 0), ("another", 1), ("removed", 1)])
def test_an_image_that_changes_while_training_ends_the_run_in_one_line(
    brief_flags, data, capsys, tmp_path, change, processes
):
    """Without cached latents, images are read in every step."""
    folder = shutil.copytree(data, tmp_path / "images")
    flags = [*brief_flags, "--train_data_dir", folder, "--no-cache_latents", "--output_dir", tmp_path / "out"]
    flags += ["--dataloader_num_workers", processes]
    train = loop.train

    def with_changed_images(*args):
        for path in folder.glob("*.png"):
            if change == "damaged":
                cut(path)
            elif change == "another":
                PIL.Image.new("RGB", PIL.Image.open(path).size).save(path)
            else:
                path.unlink()
        return train(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", with_changed_images)
        assert main(*flags) == 1
    line = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    problem = r"cannot be read now \(.*No such file.*\)" if change == "removed" else "has changed since the run began"
    name = re.escape(str(folder)) + r"/\w+\.png"
    assert re.fullmatch(rf"train_sd\.py: {name} {problem}; restore it, and resume: the last checkpoint is intact", line)
