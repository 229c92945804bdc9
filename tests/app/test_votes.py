"""Blind votes: pairs of an experiment's samples, the stored votes, and the preference next to the losses."""

import json
import math
import shutil
from collections import Counter

import gradio as gr
import numpy as np
import pytest
from app_runs import with_one_wrong
from experiment import examples
from scipy import stats

from app import lists, votes
from app.jobs import Jobs
from app.library import Library
from app.runs import RunError
from app.studio import Studio
from app.tabs.base import Parts
from app.tabs.votes import VotesTab


@pytest.fixture
def experiment(tmp_path):
    """A finished experiment of four methods, whose chosen runs have samples of three seeds and two prompts."""
    folder = tmp_path / "runs" / "which"
    folder.mkdir(parents=True)
    content = examples.experiment(folder)
    for arm in content["arms"]:
        first = folder / arm["folder"].replace(f"seed-{arm['seed']}", "seed-0") / "samples"
        if arm["seed"] and first.is_dir():
            shutil.copytree(first, folder / arm["folder"] / "samples")
    (folder / "experiment.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"learning_rate": [1e-4, 2e-4]}))
    return Library(tmp_path / "runs").find_experiment("which")


def test_pairs_have_one_prompt_and_seed_of_the_chosen_runs(experiment):
    found = votes.pairs(experiment)
    assert {pair.reference for pair in found} == {"lora"} and {pair.prompt for pair in found} == {0, 1}
    assert Counter(pair.label for pair in found)["lora_x2"] == 6  # three seeds, two prompts
    for pair, (ours, theirs) in found.items():
        content = experiment.read_json("experiment.json")
        for label, path in ((pair.label, ours), (pair.reference, theirs)):
            rate = content["chosen"][label]["learning_rate"]
            assert f"lr-{rate:g}/seed-{pair.seed}/samples" in str(path) and path.name == f"{pair.prompt}-0.png"
    assert "newest sample of which" in lists.picture(experiment)  # under Runs


def test_a_vote_is_a_line_and_the_next_pair_has_the_fewest(experiment):
    known = list(votes.pairs(experiment))
    for pair in known[1:]:
        votes.add(experiment, pair, "equal")
    assert votes.next_pair(known, votes.votes(experiment)) == known[0]
    assert votes.next_pair(known, votes.votes(experiment), known[0]) != known[0]
    rows = (experiment.folder / "votes.jsonl").read_text().splitlines()
    assert json.loads(rows[0]).items() >= {**known[1]._asdict(), "vote": "equal"}.items()
    assert len(rows) == len(known) - 1
    with (experiment.folder / "votes.jsonl").open("a") as file:
        file.write(
            '{"label": "lora_x2"}\nnonsense\n[]\n{"label": [], "reference": 1, "seed": 0, "prompt": 0, "vote": 1}\n'
        )
    assert sum(map(len, votes.votes(experiment).values())) == len(known) - 1


def test_votes_on_samples_of_runs_that_are_no_longer_chosen_do_not_count(experiment):
    """A further seed may change the chosen learning rate or step."""
    old, *_ = known = votes.pairs(experiment)
    for pair in known:
        votes.add(experiment, pair, "label")
    path, content = experiment.folder / "experiment.json", experiment.read_json("experiment.json")
    content["chosen"][old.label]["step"] = 100
    path.write_text(json.dumps(content))
    given, now = votes.votes(experiment), votes.pairs(experiment)
    assert not given.get(old) and {pair for pair in known if given.get(pair)} == {
        pair for pair in known if now[pair] == known[pair]
    }
    assert any(given.values())
    rows = [json.loads(line) for line in (experiment.folder / "votes.jsonl").read_text().splitlines()]
    del rows[0]["files"]  # as earlier versions wrote it
    (experiment.folder / "votes.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert votes.votes(experiment) == {old: [1]}


def test_the_preference_is_the_mean_and_its_interval_crosses_seeds_and_prompts():
    """By hand: Banerjee's interval of a two-way layout, as for the losses; without all pairs there is no interval."""
    known = [votes.Pair("b", "a", seed, prompt) for seed in range(3) for prompt in range(4)]
    table = np.array([[1, 0, 1, 1], [1, -1, 1, 0], [1, 1, 0, 1.0]])
    given = {pair: [int(table[pair.seed, pair.prompt])] for pair in known}
    mean, half = votes.preference(known, given)
    rows, columns = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    rest = table - rows - columns + table.mean()
    squares = (
        4 * ((rows - table.mean()) ** 2).sum() / 2,
        3 * ((columns - table.mean()) ** 2).sum() / 3,
        (rest**2).sum() / 6,
    )
    first, second, third = (square * stats.t.ppf(0.975, df) ** 2 for square, df in zip(squares, (2, 3, 6), strict=True))
    assert mean == pytest.approx(table.mean())
    assert half == pytest.approx(math.sqrt(max(first + second - third, first, second) / 12))
    assert votes.preference(known, given | {known[0]: [1, -1, 0]})[0] == pytest.approx(table.mean() - 1 / 12)
    del given[known[0]]
    assert votes.preference(known, given)[1] is None
    assert votes.preference(known, {pair: [1] for pair in known}) == (1, None)
    assert votes.preference(known, {}) == (None, None)


@pytest.mark.parametrize(
    ("mean", "half", "conclusion", "told"),
    [
        (0.5, 0.2, "better", "both prefer b"),
        (-0.5, 0.2, "better", "They disagree: people prefer a, and the loss of b is lower"),
        (0.5, 0.2, "not shown", "People prefer b; the losses show no difference"),
        (0.1, 0.2, "worse", "The loss of a is lower; the votes show no preference"),
        (0.9, None, "cannot tell", "Neither"),
    ],
)
def test_people_and_losses_agree_or_not(mean, half, conclusion, told):
    assert told in votes.agreement("b", "a", mean, half, conclusion)


def test_the_side_of_a_method_is_random_and_the_page_does_not_tell_it(experiment):
    library = Library(experiment.folder.parent)
    with gr.Blocks():
        tab = VotesTab(Parts(library, Jobs(library), Studio()))
    sides = set()
    for number in range(20):
        shown, asked, line = tab.next("which")
        _, pair, swapped = asked
        sides.add(swapped)
        assert shown.count("<img") == 2 and pair.label not in shown + line and "seed" not in shown + line
        tab.vote("left" if not swapped else "right", "which", asked)
        assert votes.votes(experiment)[pair][-1] == 1, number  # for the method, whichever side it was on
    assert sides == {False, True}
    assert "no interval: all votes are the same" in tab.outcome("which") and "100%" in tab.outcome("which")
    (experiment.folder / "experiment.json").write_text("{}")
    with pytest.raises(RunError, match="no samples of two"):
        tab.next("which")
    assert "No votes to show" in tab.outcome("which")


def test_a_damaged_record_has_no_pairs_and_leads_nowhere(experiment):
    content = examples.experiment(None)
    parts = {"arms": content["arms"][:1], "verdicts": content["verdicts"][:1], "settings": {}}
    for wrong in with_one_wrong(parts):
        (experiment.folder / "experiment.json").write_text(json.dumps(wrong))
        assert votes.pairs(experiment) == {} and "<td" not in votes.result(experiment)
    (outside := experiment.folder.parent / "outside" / "samples" / "step-000100").mkdir(parents=True)
    (outside / "0-0.png").write_bytes(b"")
    for arm in content["arms"]:
        arm["folder"] = "../outside"
    (experiment.folder / "experiment.json").write_text(json.dumps(content))
    assert votes.pairs(experiment) == {}


@pytest.mark.parametrize("linked", ["samples", "samples/{step}", "samples/{step}/0-0.png"])
def test_a_link_to_outside_of_the_experiment_is_no_sample(experiment, linked):
    (_, path), *_ = votes.pairs(experiment).values()
    link = path.parents[2] / linked.format(step=path.parent.name)
    link.rename(outside := experiment.folder.parent / "outside")
    link.symlink_to(outside)
    found = [path for pair in votes.pairs(experiment).values() for path in pair]
    assert found and path not in found and not any(path.is_relative_to(outside) for path in found)
