"""Trackers that cannot start: without a login, or without disk space."""

import pytest
from accelerate.tracking import TensorBoardTracker

from images.runs import refused
from reslora.images import run


def test_a_tracker_that_cannot_start_is_refused_before_anything_is_encoded(brief_flags, capsys, tmp_path, monkeypatch):
    """Such as wandb without a login, if the user cannot be asked."""

    def start(tracker: TensorBoardTracker) -> None:
        raise RuntimeError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])\nmore")

    monkeypatch.setattr(TensorBoardTracker, "start", start)
    monkeypatch.setattr(run, "load_training_data", lambda *_: pytest.fail("images are encoded"))
    line = refused(capsys, *brief_flags, "--report_to", "tensorboard", "--output_dir", tmp_path / "out", quiet=False)
    assert "--report_to tensorboard: api_key not configured" in line and "none" in line
    assert not (tmp_path / "out" / "config.json").exists()
