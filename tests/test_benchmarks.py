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


def simulated(results, monkeypatch, name: str) -> dict:
    few = {"SEEDS": (2, 3), "LABELS": (2, 3), "IMAGES": 10, "VARIANCES": ((1, 0.1, 0.1), (0.3, 0.3, 1)), "ESTIMATED": 3}
    for constant, value in few.items():
        monkeypatch.setattr(experiment_statistics, constant, value)
    monkeypatch.setattr(sys, "argv", ["experiment_statistics.py", name, "--experiments", "60"])
    experiment_statistics.main()
    found = kept(results, f"experiment/statistics_{name}")
    assert found["command"] == f"python benchmarks/experiment_statistics.py {name} --experiments 60"
    return found


@pytest.mark.parametrize("name", ["noisy", "rerun"])
def test_each_rule_of_the_statistics_is_simulated_next_to_another_one(results, monkeypatch, name):
    found = simulated(results, monkeypatch, name)
    for column in ("any", "another"):
        values = [row[column] for row in found["rows"] if column in row]
        assert found["ranges"][column] == [min(values), max(values)]
    assert found["ranges"]["another"][1] > found["ranges"]["any"][1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in experiment_statistics.TABLE if name not in ("noisy", "rerun")])
def test_every_setting_is_simulated(results, monkeypatch, name):
    ranges = simulated(results, monkeypatch, name)["ranges"]
    assert ranges["any"][1] > 0.1 if name == "unseen" else ranges["any"][1] < 0.12  # of 60 experiments


@pytest.mark.exhaustive
def test_sizes_and_coverage_are_simulated(results, monkeypatch):
    rows = simulated(results, monkeypatch, "power")["rows"]
    assert {row["seeds"] for row in rows} == {3} and all(0.5 < row["power"] <= 1 for row in rows)
    rows = simulated(results, monkeypatch, "expected")["rows"]
    assert all(row["expected_over_true"] < 1.01 * row["claimed_over_true"] for row in rows)
    assert simulated(results, monkeypatch, "coverage")["ranges"]["covered"][0] > 0.85


def test_the_stored_rates_are_those_of_the_documents_and_at_most_5_percent(monkeypatch):
    stored = BENCHMARKS / "results"
    monkeypatch.setattr(experiment_statistics, "RESULTS", stored)
    assert experiment_statistics.table() in (BENCHMARKS.parent / "docs" / "statistics.md").read_text(encoding="utf-8")
    found = {name: json.loads((stored / f"experiment/statistics_{name}.json").read_text())["ranges"] for name in
             experiment_statistics.SIMULATIONS}  # fmt: skip
    for name in experiment_statistics.TABLE:
        assert (found[name]["any"][1] <= 0.05) == (name != "unseen"), name
    assert (
        found["coverage"]["covered"][0] >= 0.95
        and 0.75 <= found["power"]["power"][0] < found["power"]["power"][1] <= 0.9
    )
