"""app/verdict.py: a sentence about one run that does not claim too much."""

import json

import pytest
from app_runs import write_run

from app.runs import BASE, Run, Weights
from app.verdict import merge_warning, verdict, warning_for


@pytest.fixture
def run(tmp_path):
    """LoRA was measured at steps 0, 2 and 4, ResLoRA at 0 and 2 with a slightly lower loss."""
    run = Run("run", write_run(tmp_path / "run"))
    log = run.folder / "reslora" / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [row | {"loss": row["loss"] - 0.01} for row in rows if row["step"] < 4]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_the_lowest_first_at_the_last_step_that_all_have(run):
    for step in (2, 3, 4):
        told = "<b>ResLoRA 0.6567, LoRA 0.6667</b>: loss on images that were not trained on (lower is better)"
        assert f"{told} after 2 steps" in verdict(run, step)
    assert "One seed cannot show a difference" in verdict(run, 4) and "choose a later step" in verdict(run, 1)


def test_what_was_not_measured_is_said(run, tmp_path):
    (run.folder / "reslora" / "log.jsonl").write_text("")
    assert "there is no validation loss of ResLoRA" in verdict(run, 4)
    (run.folder / "lora" / "log.jsonl").write_text("")
    assert "give a validation split" in verdict(run, 4)
    alone = Run("alone", write_run(tmp_path / "alone", methods=("lora",)))
    assert "nothing to compare with" in verdict(alone, 4) and "difference" not in verdict(alone, 4)


def report_of(*errors):
    return {"method": "input", "blocks": [{"name": str(number), "error": error} for number, error in enumerate(errors)]}


def test_a_merge_that_has_lost_much_is_warned_of(run):
    assert "its blocks differ by 30% on average" in merge_warning(report_of(0.5, 0.1, None))
    assert merge_warning(report_of(0.3, 0.1)) == merge_warning(report_of(None)) == merge_warning(None) == ""
    assert merge_warning({"blocks": [None, {"error": "x"}]}) == merge_warning([5]) == ""
    (run.folder / "reslora" / "merge.json").write_text(json.dumps(report_of(0.1)))
    own = Weights("ResLoRA: kohya.safetensors", "file", "reslora", run.folder / "reslora" / "kohya.safetensors")
    assert warning_for(run, own) == warning_for(run, BASE) == ""
    (run.folder / "reslora" / "merge.json").write_text(json.dumps(report_of(0.4)))
    assert "by 40%" in warning_for(run, own)
