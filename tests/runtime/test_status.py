"""reslora/runtime/status.py: the phase of a run in its file, and how often it is written."""

import json
import os
from pathlib import Path

import pytest
import torch

from reslora.runtime import status
from reslora.runtime.status import FILE, Status


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    return now


def read(folder: Path) -> dict:
    return json.loads((folder / FILE).read_text())


def test_a_phase_is_told_at_once_and_how_far_it_is_once_a_second(tmp_path, clock):
    told = Status(tmp_path, torch.device("cpu"))
    told.say("merging", "lora")
    first = read(tmp_path)
    assert first.pop("memory_bytes") > 2**20
    assert first == {"process": os.getpid(), "phase": "merging", "name": "lora"}
    told.count("step", 1, 9, "lora")
    assert read(tmp_path)["phase"] == "merging"
    for step, seconds in ((2, 0.5), (3, 0.4), (4, 0.2), (5, 0.9)):
        clock[0] += seconds
        told.count("step", step, 9, "lora")
    found = read(tmp_path)
    assert (found["phase"], found["done"], found["total"]) == ("step", 4, 9)
    told.say("sampling at step 4", "lora")
    assert "done" not in read(tmp_path)


def test_the_rate_is_of_the_phase_without_its_first_and_without_other_phases(tmp_path, clock):
    told = Status(tmp_path)
    for step in range(1, 4):
        clock[0] += 0.5
        told.count("step", step, 9)
    assert read(tmp_path)["per_second"] == 2.0
    told.say("sampling at step 3")
    clock[0] += 60
    told.count("step", 4, 9)
    assert read(tmp_path)["per_second"] is None
    clock[0] += 4
    told.count("step", 5, 9)
    assert read(tmp_path)["per_second"] == 0.25
