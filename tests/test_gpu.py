"""benchmarks/gpu.py: everything runs on tiny models on a CPU, failures are stored, large models are estimated."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import measured  # noqa: E402

WHOLE = argparse.Namespace(miniature=False)


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(measured, "RESULTS", tmp_path / "results")
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate takes one precision in a process
    yield tmp_path / "results" / "gpu" / "miniature.json"
    AcceleratorState._reset_state(reset_partial_state=True)


def run(results: Path, *flags: str) -> dict:
    gpu.main(["--miniature", *flags])
    return json.loads(results.read_text())["results"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", gpu.SIZES)
def test_miniature_steps_and_memory(results, name):
    found = run(results, "--model", name, "--part", "steps", "memory")
    steps = found.pop(f"{name} steps")
    shortcuts = {f"ResLoRA {shortcut}({count})" for shortcut, count in gpu.SHORTCUTS.items()}
    assert steps.keys() - {"wall_seconds"} == {gpu.PEFT, *shortcuts, gpu.STOCK, *gpu.TRAINERS}
    for row in gpu.TRAINERS:
        assert steps[row]["over"] == gpu.STOCK and steps[row]["seconds"] > 0
    assert len(found) == 5
    # The allocator's, and the sum of what is planned, which has no work space of a processor's kernels.
    for case, figures in found.items():
        assert 0.5 < figures["ratio"] < 1.3, (case, figures)
    bases = {case.split(" ", 2)[2]: figures["planned"]["base"] for case, figures in found.items()}
    assert bases["nf4"] < bases["fp8"] < bases["bf16"] == bases["checkpointing"]
    assert bases["half swapped"] == pytest.approx(bases["bf16"], rel=0.05)  # here, both memories are one


@pytest.mark.exhaustive
def test_miniature_export_and_processes(results, capsys):
    found = run(results, "--model", "sd15", "--part", "export", "processes")
    assert max(found["export"]["difference_of_255"].values()) <= 2
    assert {"kohya.safetensors", "peft", "unet"} <= found["export"]["difference_of_255"].keys()
    assert set(found["processes"]["samples_per_second"]) == {"1", "2"}
    assert "samples per second" in capsys.readouterr().out


def test_a_failure_and_the_end_of_the_time_are_stored(results, monkeypatch, capsys):
    def fails(*_: object) -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    monkeypatch.setattr(gpu, "export", fails)
    assert run(results, "--part", "export")["export"]["failed"] == "OutOfMemoryError: CUDA out of memory"
    assert "CUDA out of memory" in capsys.readouterr().out
    assert run(results, "--part", "export", "--minutes", "0")["export"]["skipped"] == "0 minutes are over"


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "millions"), [("sd15", 860), ("sdxl", 2567), ("flux", 11901)])
def test_large_models_are_planned_without_weights(tmp_path, name, millions):
    """Forward and backward pass run on fake tensors, so the batch fits the model. Base weights take 2 bytes each."""
    _, rehearsal = gpu.Setting(name, WHOLE, tmp_path).context("--gradient_checkpointing")
    held = rehearsal.training("reslora").held
    assert held["base"] == pytest.approx(2e6 * millions, rel=0.01) and held["activations"] and not rehearsal.unknown
    states = rehearsal.batch(1).text["states"]
    assert states.shape[1:] == {"sd15": (77, 768), "sdxl": (77, 2048), "flux": (512, 4096)}[name]
