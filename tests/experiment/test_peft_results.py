"""What one seed of PEFT's method comparison can and cannot tell: intervals by hand, and bad input."""

import csv
import itertools
import json
import math
from pathlib import Path

import pytest
from scipy import stats

from reslora.compare import main
from reslora.experiment.peft_results import items_of, pairs_of, read_runs

ITEMS = 1319
CORRECT = {"lora": 631, "dora": 619, "lily": 694, "vera": 500, "none": 0}


def written(folder: Path, counts: dict[str, int] = CORRECT, metric: str = "test accuracy", **more: object) -> Path:
    """Write results in PEFT's layout: `<task>/results/<name>.json`."""
    (folder / "MetaMathQA" / "results").mkdir(parents=True)
    for name, count in counts.items():
        config = {"model_id": "tiny/llama", "seed": 0, "max_steps": 5000, "optimizer_kwargs": {"lr": 1e-4}}
        last = {"step": 5000, metric: count / ITEMS, "train loss": 0.6}
        content = {
            "run_info": {"experiment_name": f"{name}/default", "train_config": config | more, "peft_config": None},
            "train_info": {"status": "success", "metrics": [{"step": 250, "valid accuracy": 0.3}, last]},
            "meta_info": {},
        }
        (folder / "MetaMathQA" / "results" / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_runs_are_compared_on_new_items_and_methods_only_if_seeds_vary_little(tmp_path):
    runs, left_out = read_runs(written(tmp_path))
    assert items_of(runs) == ITEMS and not left_out
    pairs = {(pair.run.name, pair.other.name): pair for pair in pairs_of(runs)}
    assert len(pairs) == 10
    pair = next(found for names, found in pairs.items() if set(names) == {"lora/default", "dora/default"})
    one, two = ((CORRECT[pair[side].name.removesuffix("/default")] + 1) / (ITEMS + 2) for side in (0, 1))
    variance = (one * (1 - one) + two * (1 - two)) / (ITEMS + 2)
    half = stats.norm.isf(0.025) * math.sqrt(variance)
    assert pair.interval == pytest.approx((one - two - half, one - two + half))
    assert (pair.verdict, pair.seed_sd) == ("not shown", 0)
    far = next(found for names, found in pairs.items() if set(names) == {"lily/default", "vera/default"})
    assert far.verdict in ("higher", "lower")
    with_seeds = math.sqrt(2 * far.seed_sd**2 + ((far.interval[1] - far.interval[0]) / 2 / stats.norm.isf(0.025)) ** 2)
    assert abs(sum(far.interval)) / 2 / with_seeds == pytest.approx(stats.norm.isf(0.025))


def test_p_values_are_corrected_for_all_pairs(tmp_path):
    runs, _ = read_runs(written(tmp_path))
    found = sorted(pair.p for pair in pairs_of(runs))
    plain = []
    for run, other in itertools.combinations(runs, 2):
        (pair,) = pairs_of([run, other])
        assert pair.p is None  # two accuracies do not tell the number of items
        one, two = ((each.value * ITEMS + 1) / (ITEMS + 2) for each in (run, other))
        error = math.sqrt((one * (1 - one) + two * (1 - two)) / (ITEMS + 2))
        plain.append(2 * stats.norm.sf(abs(one - two) / error))
    corrected, largest = [], 0.0
    for rank, p in enumerate(sorted(plain)):
        largest = max(largest, min(1, p * (10 - rank)))
        corrected.append(largest)
    assert found == pytest.approx(corrected)


def test_the_command_prints_each_task_and_writes_all_pairs(tmp_path, capsys):
    folder = written(tmp_path / "peft")
    (folder / "broken.json").write_text("{")
    assert (
        main(["--peft_results", str(folder), "--reference", "lora/default", "--output_dir", str(tmp_path / "o")]) == 0
    )
    out = capsys.readouterr().out
    assert "MetaMathQA, tiny/llama, 5,000 steps: 5 runs with seed 0; test accuracy of 1,319 items" in out
    assert "left out: broken.json" in out and "Whether the methods differ, one seed cannot tell" in out
    (line,) = [line for line in out.splitlines() if line.startswith("dora/default")]
    assert "-0.0091" in line and "not shown" in line
    with (tmp_path / "o" / "peft_pairs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 10


def test_without_the_number_of_items_runs_are_not_compared(tmp_path, capsys):
    folder = written(tmp_path / "peft", metric="test dino_similarity")
    assert main(["--peft_results", str(folder), "--output_dir", str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out
    assert "not known" in out and "without results of single items" in out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--peft_results", "lost"], "--peft_results lost: no such folder"),
        (["--peft_results", "empty"], "--peft_results empty: no result of PEFT's method comparison"),
        (["--peft_results", "peft", "--reference", "x"], "--reference x: is no run in peft"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, monkeypatch, words, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    written(tmp_path / "peft")
    assert main(words) == 2
    assert problem in capsys.readouterr().err
