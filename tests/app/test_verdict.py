"""app/verdict.py: a sentence about one run, and no claim in it."""

import json

import pytest
from app_runs import write_run

from app.runs import Run
from app.verdict import verdict
from app.views import numbers


@pytest.fixture
def run(tmp_path):
    """LoRA was measured at steps 0, 2 and 4, ResLoRA at 0 and 2: the latter's loss is a little lower."""
    run = Run("run", write_run(tmp_path / "run"))
    log = run.folder / "reslora" / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [row | {"loss": row["loss"] - 0.01} for row in rows if row["step"] < 4]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_the_lowest_first_at_the_last_step_that_all_have(run):
    for step in (2, 3, 4):
        assert "<b>ResLoRA 0.6567, LoRA 0.6667</b> on held-out images after 2 steps" in verdict(run, step)
    assert "no difference shown" in verdict(run, 4) and "before training" in verdict(run, 1)


def test_what_was_not_measured_is_said(run, tmp_path):
    (run.folder / "reslora" / "log.jsonl").write_text("")
    assert "ResLoRA has not been measured" in verdict(run, 4)
    (run.folder / "lora" / "log.jsonl").write_text("")
    assert "--validation_split" in verdict(run, 4)
    alone = Run("alone", write_run(tmp_path / "alone", methods=("lora",)))
    assert "nothing to compare it with" in verdict(alone, 4) and "difference" not in verdict(alone, 4)


def test_the_lowest_of_each_column_is_marked_where_all_are_at_one_step(run):
    """Losses; not the learning rate, nor times that are alike, and nothing while one method lags behind."""
    shown = numbers(run, 2)
    assert shown.count("lowest") == 2 and shown.index("ResLoRA") < shown.index("lowest")
    assert "lowest" not in numbers(run, 4)
