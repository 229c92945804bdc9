"""Time and memory before a run starts: from a run of the same model and batch, and from `--plan`."""

import json

import pytest
from app_runs import write_run

from app import estimates, experiments
from app.estimates import UNKNOWN
from app.jobs import Jobs
from app.library import Library

LIKE = {
    "pretrained_model_name_or_path": "/elsewhere/assets/pipeline",
    "resolution": 64, "train_batch_size": 16, "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
    "base_precision": "no",
}  # fmt: skip
"""Defaults of the bundled model, on which the time of a step depends."""


@pytest.fixture
def jobs(tmp_path):
    """Jobs in a folder with a run of one second per step."""
    write_long_run(tmp_path / "before")
    return Jobs(Library(tmp_path))


def write_long_run(folder, step=40) -> None:
    write_run(folder, **LIKE)
    row = {"step": step, "split": "train", "loss": 1.0, "lr": 1e-3, "seconds": step}
    for method in ("lora", "reslora"):
        (folder / method / "log.jsonl").write_text(json.dumps(row) + "\n")


def planned(jobs: Jobs, **settings) -> tuple:
    return experiments.plan(jobs, "new", {"method": ["lora"], **settings})[1:]


@pytest.mark.parametrize(
    ("settings", "time"),
    [
        ({"max_train_steps": "30"}, "about 30 s, like before"),
        ({"max_train_steps": "30", "method": ["lora", "dora"]}, "about 60 s, like before"),
        (
            {"max_train_steps": "30", "seed": "0 1"},
            "more than 60 s: its steps alone, like before",
        ),
        (
            {"max_train_steps": "30", "seed": "0 1", "arms_at_once": "2"},
            "more than 30 s: its steps alone, like before",
        ),
        ({"max_train_steps": "900", "seed": "0 1", "experiment_minutes": "5"}, "at most 5 min"),
        ({"train_batch_size": "4"}, UNKNOWN),
    ],
)
def test_the_time_is_that_of_a_run_of_the_same_model_and_batch(jobs, settings, time):
    _, found = planned(jobs, **settings)
    assert estimates.training_time(jobs.library, found) == time


def test_a_run_of_ten_steps_says_nothing_about_the_time(tmp_path):
    """Its first steps are slow."""
    write_long_run(tmp_path / "short", step=10)
    jobs = Jobs(Library(tmp_path))
    assert estimates.training_time(jobs.library, planned(jobs, max_train_steps="30")[1]) == UNKNOWN


def test_the_time_of_an_experiment_is_that_of_one_with_its_measurements_tests_and_exports(jobs):
    folder = jobs.library.folder / "study"
    folder.mkdir()
    arms = [{"status": "finished", "seconds": 60, "wall_seconds": 90}, {"status": "finished", "seconds": 60}]
    (folder / "experiment.json").write_text(json.dumps({"arms": arms, "test_seconds": 30}))
    (folder / "config.json").write_text(json.dumps(LIKE | {"max_train_steps": 60, "seed": [0, 1]}))
    _, found = planned(jobs, max_train_steps="60", seed="0 1")
    assert estimates.training_time(jobs.library, found) == "about 3 min, like study"  # 2 x (75 + 15) s
    assert estimates.training_time(jobs.library, planned(jobs, max_train_steps="60")[1]) == "about 60 s, like before"


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("x\nthe most, 129.38 MiB of 21856.98 MiB that cpu has free, while exporting; latents",
         "129 MiB of 21.3 GiB free, while exporting"),
        ("the most, 9.38 GiB of 7.00 GiB that each of 2 runs on a cuda has free, while training; latents",
         "9.38 GiB of 7 GiB free, while training"),
        ("a\n--train_batch_size 16: training takes 9 GiB", "--train_batch_size 16: training takes 9 GiB"),
    ],
)  # fmt: skip
def test_the_plan_is_told_in_a_few_words(printed, told):
    assert estimates.peak_memory(printed) == told
