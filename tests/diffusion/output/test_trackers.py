"""Trackers, which may not start: without a login, or without room."""

import contextlib
import threading

import pytest
from accelerate.tracking import TensorBoardTracker
from tensorboard.summary.writer.event_file_writer import _AsyncWriter

from diffusion.runs import refused
from reslora.diffusion import run
from reslora.diffusion.output.trackers import told_by_the_next_write


def test_a_tracker_that_cannot_start_is_refused_before_anything_is_encoded(brief_flags, capsys, tmp_path, monkeypatch):
    """As wandb without a login, where nobody can be asked for one."""

    def start(tracker: TensorBoardTracker) -> None:
        raise RuntimeError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])\nmore")

    monkeypatch.setattr(TensorBoardTracker, "start", start)
    monkeypatch.setattr(run, "material_of", lambda *_: pytest.fail("images are encoded"))
    line = refused(capsys, *brief_flags, "--report_to", "tensorboard", "--output_dir", tmp_path / "out", quiet=False)
    assert "--report_to tensorboard: api_key not configured" in line and "none" in line
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_full_disk_that_tensorboards_thread_meets_is_told_by_the_run_alone(capsys, monkeypatch):
    """Other threads' errors are shown as ever."""

    class Full:
        def write(self, _: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", told_by_the_next_write)
    writer = _AsyncWriter(Full())
    with contextlib.suppress(OSError):  # the thread may be as fast
        writer.write(b"row")
    writer._worker.join()
    with pytest.raises(OSError, match='No space left on device: "TensorBoard\'s log"'):
        writer.write(b"row")
    assert capsys.readouterr().err == ""
    other = threading.Thread(target=Full().write, args=(b"row",))
    other.start()
    other.join()
    assert "No space left" in capsys.readouterr().err
