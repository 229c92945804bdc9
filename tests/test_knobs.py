"""benchmarks/knobs.py: the trainers accept every command, and effects are in percent of what training gains."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

from reslora.images.settings import parse_args
from reslora.io import write_json
from reslora.options.texts import LlmOptions
from reslora.texts.arguments import read

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import knobs
import knobs_report


def test_trainers_take_every_command(tmp_path, monkeypatch):
    monkeypatch.setattr(knobs, "chosen", lambda name: 1e-3)
    (tmp_path / "svamp").mkdir()
    args = argparse.Namespace(llm="model", text=str(tmp_path))
    for value in knobs.VALUES.values():
        script, *options = value.command(args)
        found = parse_args(options, "") if script == "train_sd.py" else read(LlmOptions, script, options)
        assert len(found.flat()["seed"]) == 4


def test_effects_are_in_percent_of_what_the_reference_gains(tmp_path, monkeypatch):
    monkeypatch.setattr(knobs_report, "KEPT", tmp_path)
    base = np.linspace(0.9, 1.1, 20)
    noise = 0.001 * np.random.default_rng(0).standard_normal((3, 4, 20))
    noise -= noise.mean((1, 2), keepdims=True)
    # training gains 0.2 with the reference, 0.1 with rank 4 and 0.21 with rank 64
    for number, (name, gain) in enumerate({"reference": 0.2, "rank=4": 0.1, "rank=64": 0.21}.items()):
        tests = {str(seed): list(base - gain + noise[number, seed]) for seed in range(4)}
        record = {"data": {}, "chosen": {"learning_rate": 1e-3}, "base": list(base), "tests": tests}
        (tmp_path / "unet").mkdir(exist_ok=True)
        write_json(tmp_path / "unet" / f"{name}.json", record)
    found = knobs_report.found_on("unet")
    assert [effect.percent for effect in found.effects] == pytest.approx([-50, 5])
    assert [effect.kind for effect in found.effects] == ["hurts", "helps"]
    for effect in found.effects:
        assert effect.interval[0] < effect.percent < effect.interval[1]
    assert found.after == pytest.approx(0.8)
