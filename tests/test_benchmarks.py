"""The speed measurements of benchmarks/: what they compare, and that results are stored with their machine."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import experiment_statistics  # noqa: E402
import measured  # noqa: E402
import paper_report  # noqa: E402
import speed  # noqa: E402
import speed_merge  # noqa: E402
import speed_steps  # noqa: E402
import trainer  # noqa: E402


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(measured, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def kept(results: Path, name: str) -> dict:
    found = json.loads((results / f"{name}.json").read_text())
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["threads"] == torch.get_num_threads()
    return found


def tiny(device: str):
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    ids = torch.randint(0, 8, (1, 4), device=device)
    return LlamaForCausalLM(config).to(device), {"input_ids": ids, "labels": ids}, ["q_proj"]


ROWS = {"no adapter", "input(1)", "block(4)", "middle(4)"}


def test_step_ratios_are_kept(results, monkeypatch):
    monkeypatch.setitem(speed_steps.MODELS, "llama", tiny)
    monkeypatch.setattr(sys, "argv", ["speed.py", "steps", "--model", "llama", "--rounds", "3", "--rank", "2"])
    speed.main()
    found = kept(results, "speed/steps-llama-cpu-float32")
    assert (found["rank"], found["rounds"]) == (2, 3) and set(found["shortcuts"]) == ROWS
    for figures in found["shortcuts"].values():
        assert len(figures["ratio_quartiles"]) == 3 and figures["peft_seconds"] > 0
    assert found["shortcuts"]["no adapter"]["memory_ratio"] < 1 < found["shortcuts"]["block(4)"]["memory_ratio"]
    assert [name for name, _ in paper_report.speed_rows(found)] == list(found["shortcuts"])


def test_merging_at_scale_is_kept_and_drawn(results, monkeypatch):
    batch = {"input_ids": torch.zeros(1, 64, dtype=torch.long)}
    monkeypatch.setattr(speed_merge, "MODELS", {"tiny": lambda: (tiny("meta")[0], ["q_proj", "v_proj"], batch)})
    monkeypatch.setattr(measured.Others, "__call__", lambda self: {"quiet": True})
    args = argparse.Namespace(rank=2, samples=3, device="cpu")
    speed_merge.at_scale(args)
    found = kept(results, "speed/merge-scale")
    assert found["quiet"] and found["samples"] == 3 and found["merging"]["tiny"]["blocks"] == 4
    assert all(found["merging"]["tiny"][method]["bytes"] > 0 for method in ("lstsq", "weights", "exact"))
    rows = paper_report.speed_rows(found)
    methods = ("lstsq", "weights", "exact")
    assert [name for name, _ in rows] == [f"tiny (4 blocks) merged by `{method}`" for method in methods]
    assert "one pass over 3 samples" in rows[0][1] and rows[0][1].endswith(" s")
    monkeypatch.setattr(measured.Others, "__call__", lambda self: {"quiet": False})
    speed_merge.at_scale(args)
    loud = kept(results, "speed/merge-scale")
    assert not loud["quiet"] and not any(figures.endswith(" s") for _, figures in paper_report.speed_rows(loud))


@pytest.mark.exhaustive
def test_growth_with_the_data_is_measured(results, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trainer.py", "--images", "3", "--captions", "--steps", "7"])
    trainer.main()
    found = kept(results, "trainer/scale")
    assert [(row["data"], row["run"]) for row in found["scale"]] == [
        ("3 images", run) for run in ("first", "second", "uncached")
    ]
    (first, *_) = paper_report.speed_rows(found)
    assert first[0] == "3 images, first run" and "s to the first step" in first[1]


def simulated(results, monkeypatch, name: str, **settings) -> dict:
    few = {"SEEDS": (2, 3), "IMAGES": (10,), "VARIANCES": ((1, 0, 0.1),), "FEW_VARIANCES": ((1, 0, 0.1),)}
    for constant, value in (few | {"ESTIMATED": 3} | settings).items():
        monkeypatch.setattr(experiment_statistics, constant, value)
    monkeypatch.setattr(sys, "argv", ["experiment_statistics.py", name, "--experiments", "60"])
    experiment_statistics.main()
    found = kept(results, f"experiment/statistics_{name}")
    assert found["command"] == f"python benchmarks/experiment_statistics.py {name} --experiments 60"
    return found


def test_the_experiments_statistics_are_simulated_beside_other_ways(results, monkeypatch):
    found = simulated(results, monkeypatch, "claims")
    ways = {"ours", "satterthwaite", "t over seeds", "bootstrap"}
    for draw in ("normal", "skewed"):
        for rows in (found[draw][comparisons] for comparisons in ("1", "4")):
            assert [row["seeds"] for row in rows] == [2, 3] and all(set(row["claims"]) == ways for row in rows)
    low, high = found["range_of_claims"]["normal, 1 compared, 3 to 8 seeds"]["bootstrap"]
    assert low == high == found["normal"]["1"][1]["claims"]["bootstrap"] > 0.1  # which knows nothing of few seeds


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["spread", "readings", "choosing"])
def test_each_rule_of_the_statistics_is_simulated_beside_its_absence(results, monkeypatch, name):
    found = simulated(results, monkeypatch, name, LABELS=(2, 3))
    if name == "spread":
        assert found["most_claims"]["one spreads 10 times as much"]["pooled"] > 0.1
        alike = [row["half_width_over_pooled"] for row in found["rows"] if (row["seeds"], row["times"]) == (2, 1)]
        assert all(row["own"] > 2 * row["moderated"] for row in alike)
    elif name == "readings":
        assert found["most_claims"]["ours"] < found["most_claims"]["no correction"]
    else:
        assert all(set(row["claims"]) >= {"all", "ours"} for row in found["rows"])
        assert found["most_claims"]["ours"] < 0.2


@pytest.mark.exhaustive
def test_sizes_are_simulated(results, monkeypatch):
    rows = simulated(results, monkeypatch, "power", LABELS=(2,))["rows"]
    assert [row["seeds"] for row in rows] == [2, 3] and all(row["stated_high_over_low"] > 1 for row in rows)
    rows = simulated(results, monkeypatch, "expected", LABELS=(2,))["rows"]
    assert all(row["expected_over_true"] < 1.01 * row["claimed_over_true"] for row in rows)
