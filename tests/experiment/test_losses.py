"""Losses of any trainer: the example of the documents, CSV files, and bad input."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from reslora.errors import InvalidArgument
from reslora.experiment import compare_losses

DOCS = Path(__file__).resolve().parents[2] / "docs" / "statistics.md"


def losses_of(shift: float, seeds: int = 5, items: int = 12) -> np.ndarray:
    noise = np.random.default_rng(round(100 * shift) + 100).standard_normal((seeds, items))
    return np.linspace(1, 2, items) + shift + 0.02 * noise


def written(path: Path, losses: dict[str, np.ndarray], groups: tuple = (), left_out: int | None = None) -> Path:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["method", "seed", "item", "loss", *["group"] * bool(groups)])
        every = [
            [label, f"s{seed}", f"i{item}", float(value), *groups[item : item + 1]]
            for label, array in losses.items()
            for (seed, item), value in np.ndenumerate(array)
        ]
        rows.writerows(row for number, row in enumerate(every) if number != left_out)
    return path


def test_arrays_and_files_give_the_same_verdicts(tmp_path):
    losses = {"adam": losses_of(0), "muon": losses_of(-0.1), "sgd": losses_of(0.2)}
    found = compare_losses(losses)
    assert [(each["label"], each["conclusion"]) for each in found.verdicts] == [("muon", "better"), ("sgd", "worse")]
    assert found.ranking and found.ranking["best"] == ["muon"] and found.verdicts[0]["detectable"] > 0
    again = compare_losses(written(tmp_path / "losses.csv", losses))
    assert again == found
    (alone,) = compare_losses({name: losses[name] for name in ("sgd", "muon")}, reference="muon").verdicts
    assert alone["label"] == "sgd" and alone["relative"] > 0
    some = compare_losses(losses, against="reference")
    assert some.ranking is None
    later = compare_losses(losses, evaluations=2)
    assert later.verdicts[0]["p_holm"] == pytest.approx(4 * found.verdicts[0]["p_holm"])


def test_groups_take_the_place_of_items(tmp_path):
    losses = {"a": losses_of(0), "b": losses_of(-0.1)}
    groups = [f"day {item // 2}" for item in range(12)]
    (found,) = compare_losses(losses, groups=groups).verdicts
    means = {name: array.reshape(5, 6, 2).mean(2) for name, array in losses.items()}
    (by_hand,) = compare_losses(means).verdicts
    assert found["images"] == 6 and found["interval"] == pytest.approx(by_hand["interval"])
    assert compare_losses(written(tmp_path / "x.csv", losses, tuple(groups))).verdicts == [found]
    (few,) = compare_losses(losses, groups=["x", "y", "z"] * 4).verdicts
    assert few["conclusion"] == "cannot tell" and few["sentence"].startswith("3 test item groups cannot tell b from a")


def test_one_run_of_each_method_is_compared_by_a_paired_t_test_over_items():
    half = np.array([0.01, 0.02, 0.04, 0.07])
    differences = -0.05 + np.concatenate([half, -half])  # symmetric, so that the intervals need no correction
    base = np.linspace(1, 2, 8)
    losses = {"a": base[None], "b": (base + differences)[None]}
    (alone,) = compare_losses(losses).verdicts
    assert alone["conclusion"] == "cannot tell"
    (found,) = compare_losses(losses, fixed_runs=True).verdicts
    p = stats.ttest_rel(losses["b"][0], losses["a"][0]).pvalue
    assert found["p"] == pytest.approx(p) and (found["conclusion"], found["seeds"]) == ("better", 1)
    assert found["rerun"] is None and found["detectable"] > 0
    several = {label: np.stack([array[0] + shift for shift in (-0.1, 0, 0.1)]) for label, array in losses.items()}
    several["b"][0] += 0.3
    several["b"][1] -= 0.3  # the seeds disagree, but these very runs do not
    assert compare_losses(several, fixed_runs=True).verdicts[0]["p"] == pytest.approx(p)
    assert compare_losses(several).verdicts[0]["conclusion"] == "not shown"


def test_the_example_of_the_documents(tmp_path, monkeypatch):
    text = DOCS.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import numpy.*?compare_losses.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code, found)
    assert found["result"].ranking["best"] == ["mine"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda losses: losses["b"].__setitem__((1, 2), np.nan), "method b, seed 1, item 2: the loss is nan"),
        (lambda losses: losses["b"].__setitem__((1, 2), -1), "method b, seed 1, item 2: the loss is -1"),
        (lambda losses: losses.update(b=losses["b"][:2]), r"method b: has losses of shape \(2, 12\)"),
        (lambda losses: losses.update(b=[["x"]]), "losses: could not convert string to float"),
        (lambda losses: losses.pop("b"), "losses: 1 method; give at least two"),
    ],
)
def test_arrays_that_cannot_be_compared(change, words):
    losses = {"a": losses_of(0), "b": losses_of(0.1)}
    change(losses)
    with pytest.raises(InvalidArgument, match=words) as error:
        compare_losses(losses)
    assert "\n" not in str(error.value)


def test_arguments_that_do_not_fit():
    losses = {"a": losses_of(0), "b": losses_of(0.1)}
    for words, arguments in (
        ("reference c: is not a method", {"reference": "c"}),
        ("against some: is not known", {"against": "some"}),
        ("groups: 2 groups of 12 items", {"groups": ["x", "y"]}),
    ):
        with pytest.raises(InvalidArgument, match=words):
            compare_losses(losses, **arguments)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("loss", "error", "has no column loss"),
        ("a,s0,i1,", "a,s0,i1,x", "line 3: could not convert"),
        ("a,s0,i1,", "a,s0,i0,", "line 3: the same method, seed and item again"),
    ],
)
def test_files_that_cannot_be_compared(tmp_path, old, new, words):
    path = written(tmp_path / "losses.csv", {"a": losses_of(0), "b": losses_of(0.1)})
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InvalidArgument, match=words):
        compare_losses(path)


def test_a_missing_cell_is_named(tmp_path):
    path = written(tmp_path / "losses.csv", {"a": losses_of(0), "b": losses_of(0.1)}, left_out=13)
    with pytest.raises(InvalidArgument, match="1 losses are missing, such as that of a s1 i1"):
        compare_losses(path)
    path = written(tmp_path / "losses.csv", {"a": losses_of(0), "b": losses_of(0.1)}, ("x", "", *"z" * 10))
    with pytest.raises(InvalidArgument, match="item i1 has no group"):
        compare_losses(path)
