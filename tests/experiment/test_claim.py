"""A claim stated in advance: its answer by hand, the additional seeds, its file, and its changes."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from images.runs import refused

from experiment.test_run import go
from reslora.experiment.arms import labels_of
from reslora.experiment.claim import MOST_SEEDS, answer, changes, decide, more_seeds, stated_again
from reslora.experiment.statistics import half_width, judge, level_of, spread_of
from reslora.images.settings import parse_args

SEEDS, IMAGES = 6, 12


def stated(margin: float = 1.0, **others) -> dict:
    claim = {"label": "reslora", "reference": "lora", "margin": margin, "sha256": "", "ended": 0, "readings": 0}
    return claim | others


def arms(lower: float, seeds: int = SEEDS, noise: float = 0.002) -> tuple[list[dict], dict]:
    """Return arms of LoRA and of a method whose loss is lower by this percentage plus noise, and the choices."""
    found = []
    for label, size in (("lora", 1.0), ("reslora", 1 - lower / 100)):
        for seed in range(seeds):
            random = np.random.default_rng([seed, label == "lora"])
            losses = size * np.linspace(0.8, 1.2, IMAGES) + noise * random.standard_normal(IMAGES) + noise * seed / 9
            test = {"images": [str(image) for image in range(IMAGES)], "losses": losses.tolist()}
            arm = {"label": label, "method": label, "learning_rate": 1e-4, "seed": seed, "rank": 4, "test": test}
            found.append(arm)
    return found, {label: {"learning_rate": 1e-4} for label in ("lora", "reslora")}


@pytest.mark.parametrize(
    ("improvement", "margin", "expected"),
    [(2.0, 1.0, "confirmed"), (2.0, 1.6, "open"), (2.0, 2.4, "open"), (2.0, 2.6, "refuted"), (-1.0, 0.0, "refuted")],
)
def test_the_whole_interval_is_above_or_below_the_margin(improvement, margin, expected):
    assert decide(improvement, 0.5, margin) == expected


def test_the_interval_is_that_of_the_verdict_by_hand():
    losses, chosen = arms(3.0)
    ours, theirs = (np.array([arm["test"]["losses"] for arm in losses if arm["label"] == label])
                    for label in ("reslora", "lora"))  # fmt: skip
    half = float(half_width(spread_of(ours - theirs), level_of(1)))
    low = 100 * (theirs.mean() - ours.mean() - half) / theirs.mean()
    for margin, conclusion in ((low - 1e-6, "confirmed"), (low + 1e-6, "not enough data")):
        assert answer(stated(margin), losses, chosen)["conclusion"] == conclusion
    found = answer(stated(1.0), losses, chosen)
    assert found["sentence"].startswith("confirmed: reslora is better than lora by more than 1% (improvement ")
    assert found["more_seeds"] is None and f"%, 97% interval {low:.1f} to " in found["sentence"]
    assert answer(stated(5.0), losses, chosen)["conclusion"] == "refuted"
    later = answer(stated(low - 1e-6), losses, chosen, reading=5)  # a stricter level
    assert later["conclusion"] == "not enough data"


def test_with_too_little_there_is_no_answer():
    assert "add 1 seed or more" in answer(stated(), *arms(3.0, seeds=1))["sentence"]
    losses, chosen = arms(3.0)
    assert "not both are trained" in answer(stated(), losses[:SEEDS], chosen)["sentence"]
    for arm in losses:
        arm["test"] = {name: values[:1] for name, values in arm["test"].items()}
    found = answer(stated(), losses, chosen, unit="example")
    assert found["sentence"] == "not enough data: add 1 test example or more; an interval needs two"
    assert found["more_seeds"] is None


def test_an_answer_does_not_outlast_the_choice_of_its_methods(tmp_path):
    words = ["--claim", "lora_x2", "--learning_rate", "1e-4"]
    grid = ("--method", "lora", "lora_x2", *words)
    assert go(tmp_path / "out", grid=grid)[0]["answer"]["conclusion"] == "refuted"
    fails = [(label, 2) for label in ("lora", "lora_x2")]
    found, _ = go(tmp_path / "out", "--seed", "0", "1", "2", grid=grid, diverging=fails)
    assert (found["chosen"], found["verdicts"], found["answer"]) == ({}, [], None)


def test_a_claimed_variant_has_the_reference_with_its_values(tmp_path):
    words = "--method lora reslora --vary lora_dropout=0,0.1 --vary shortcut_scale=sum,mean --learning_rate 1e-4"
    claimed = "reslora lora_dropout=0.1 shortcut_scale=mean"
    found, _ = go(tmp_path / "out", "--claim", claimed, grid=words.split())
    assert found["claims"][0]["reference"] == "lora lora_dropout=0.1"
    references = {each["label"]: each["reference"] for each in found["verdicts"]}
    assert references[claimed] == "lora lora_dropout=0.1"


def test_the_advised_seeds_decide_where_the_difference_stays():
    """With as much noise as before, the seeds are enough in most experiments; too large a number is not advised."""
    few, chosen = arms(1.3, seeds=3, noise=0.01)
    found = answer(stated(1.0), few, chosen)
    assert found["conclusion"] == "not enough data" and 0 < found["more_seeds"] <= MOST_SEEDS
    assert f"about {found['more_seeds']} more seed" in found["sentence"]
    nearer = answer(stated(1.1), few, chosen)["more_seeds"]
    assert nearer is None or nearer > found["more_seeds"]
    images = np.linspace(-1, 1, IMAGES)[None] + 0.01 * np.random.default_rng(0).standard_normal((3, IMAGES))
    ((_, test),) = judge({"lora": 9 + 0 * images, "reslora": 9.2 + images}, [("reslora", "lora")])
    assert more_seeds(0.1, test, 1) is None  # the images cause the variance


def test_another_claim_is_appended_and_its_change_is_named():
    first, again = stated(sha256="a"), stated(sha256="a", ended=4, readings=1)
    assert stated_again([], first) == [first] == stated_again([first], again)
    edited, other = stated(sha256="b", ended=4, readings=1), stated(2.0, sha256="c", ended=5, readings=2)
    claims = stated_again(stated_again([first], edited), other)
    assert claims == [first, edited, other]
    lines = changes(claims, 6)
    assert lines[0].startswith("the file was changed, but not what it claims; 4 of 6 runs had ended")
    assert "and the test split was evaluated 1 time (" in lines[0] and "evaluated 2 times (" in lines[1]
    assert lines[1].startswith("the claim was changed: it was reslora better than lora by more than 1%; 5 of 6 runs")
    assert "SHA-256 before: b" in lines[1]


def test_a_file_states_the_claim_and_its_answer_is_printed_and_reported(tmp_path, capsys):
    file = tmp_path / "claim.toml"
    text = 'method = ["lora", "lora_x2"]\nlearning_rate = [1e-4, 2e-4]\nclaim = "lora_x2"\nclaim_margin = 1.5\n'
    file.write_text(text)
    words = ("--config", str(file))
    found, _ = go(tmp_path / "out", *words, grid=())
    printed = capsys.readouterr().out
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    assert found["claims"] == [
        {"label": "lora_x2", "reference": "lora", "margin": 1.5, "sha256": sha256, "ended": 0, "readings": 0}
    ]
    assert found["answer"]["conclusion"] == "refuted" and f"claim {found['answer']['sentence']}" in printed
    report = (tmp_path / "out" / "report.html").read_text()
    assert sha256 in report and "refuted: lora_x2 is better than lora by more than 1.5%" in report
    again, _ = go(tmp_path / "out", *words, "--seed", "0", "1", "2", grid=())
    assert again["claims"] == found["claims"] and not any("was changed" in note for note in again["notes"])
    file.write_text(text.replace("1.5", "0.5"))
    changed, _ = go(tmp_path / "out", *words, "--seed", "0", "1", "2", grid=())
    assert [claim["margin"] for claim in changed["claims"]] == [1.5, 0.5]
    note = "the claim was changed: it was lora_x2 better than lora by more than 1.5%; "
    assert any(line.startswith(note) for line in changed["notes"])
    assert note in (tmp_path / "out" / "report.html").read_text()


def test_the_documented_claim_is_read(tmp_path):
    docs = Path(__file__).parents[2] / "docs" / "experiments.md"
    (tmp_path / "claim.toml").write_text(re.search("```toml\n(.*?)```", docs.read_text(), re.DOTALL)[1])
    grid = parse_args(["--config", str(tmp_path / "claim.toml")])
    experiment = grid.base.experiment
    assert (experiment.claim, experiment.reference, experiment.claim_margin) == ("reslora", "lora", 1)
    assert grid.claim_sha256 and [label.name for label in labels_of(grid)] == ["lora", "reslora"]


def test_what_a_claim_cannot_be_is_refused(capsys, tmp_path):
    several = ("--method", "lora", "reslora", "--seed", "0", "1")
    assert "--claim lora: is not compared with a reference" in refused(capsys, *several, "--claim", "lora")
    assert "give one of reslora" in refused(capsys, *several, "--claim", "relora")
    assert "--claim_margin 1" in refused(capsys, *several, "--claim_margin", "1")
    assert "--claim" in refused(capsys, "--claim", "reslora")
    (tmp_path / "claim.toml").write_text('claim = "reslora"\nlearning_rate = [1e-4, 2e-4]\n')
    line = refused(capsys, "--config", str(tmp_path / "claim.toml"), "--learning_rate", "1e-3", "2e-3")
    assert "--learning_rate 0.001 0.002" in line and "states a claim" in line
