"""app/activity.py: status files become sentences, whatever they contain."""

import json
import os

import pytest
from app_runs import run_by_hand

from app import views
from app.activity import activity
from reslora.io import this_process

TOLD = {"process": 7, "phase": "step", "name": "lora", "memory_bytes": 1.24e9}
COUNTED = {"done": 60, "total": 200, "per_second": 3.11}


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (TOLD | COUNTED, "LoRA, step 60 of 200 · 3.1 steps a second · about 45 s left · 1.2 GB in use at most"),
        (
            TOLD | COUNTED | {"per_second": 0.25},
            "LoRA, step 60 of 200 · 4.0 s a step · about 9 min left · 1.2 GB in use at most",
        ),
        (TOLD | {"phase": "merging", "name": "reslora"}, "ResLoRA, merging · 1.2 GB in use at most"),
        ({"phase": "preparing", "name": "", "memory_bytes": None}, "Preparing"),
        (
            {"phase": "encoding image", "name": "", "done": 2, "total": 4, "per_second": 0.5},
            "Encoding image 2 of 4 · 2.0 s an image · about 4 s left",
        ),
        ({}, ""),
    ],
)
def test_sentences(told, sentence):
    assert activity(told) == sentence


def test_only_a_trainer_that_is_at_work_is_believed(tmp_path):
    """The status file of a killed trainer is ignored, also if another process trains there now."""
    run = run_by_hand(tmp_path)
    (run.folder / ".status.json").write_text(json.dumps(TOLD | {"process": os.getpid(), "phase": "<b>merging"}))
    assert run.activity == {}
    (run.folder / ".lock").write_text(f"{os.getpid()}\n{this_process()}")
    assert activity(run.activity).startswith("LoRA, <b>merging") and "LoRA, &lt;b&gt;merging" in views.summary(run, "")
    (run.folder / ".status.json").write_text(json.dumps(TOLD))
    assert run.activity == {}
    for wrong in ("", "[1]", "{"):
        (run.folder / ".status.json").write_text(wrong)
        assert run.activity == {}


def test_the_time_left_is_that_of_the_complete_run(tmp_path):
    """Of two methods of 200 steps, LoRA has done 60 of 200: 340 steps are left."""
    assert "about 20 s left" in activity(TOLD | COUNTED | {"per_second": 17.0}, 200)
