"""An experiment's arms, one after the other."""

from types import SimpleNamespace

import pytest
import torch

from reslora.common.errors import Stopped
from reslora.experiment import run


def test_a_stopped_arm_says_that_the_same_command_goes_on(monkeypatch):
    """Whatever a plain run would go on with."""
    course, told = SimpleNamespace(next_arm=lambda: "arm", running=None), []
    results = SimpleNamespace(write=lambda: told.append(course.running))
    monkeypatch.setattr(run, "Results", lambda course, subject: results)

    def stopped(_: str) -> None:
        raise Stopped("lora/lr-1 stopped after step 3; go on with --resume_from_checkpoint latest")

    with pytest.raises(Stopped, match=r"^lora/lr-1 stopped after step 3; the same command goes on$"):
        run.train_and_conclude(course, SimpleNamespace(train=stopped, device=torch.device("cpu")))
    assert told == ["arm", None]
