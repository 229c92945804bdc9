"""benchmarks/gpu.py: everything runs on tiny models on a CPU."""

import json
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import measured  # noqa: E402


@pytest.mark.exhaustive
def test_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate takes one precision in a process
    gpu.main(["--miniature", "--model", "sd15"])
    AcceleratorState._reset_state(reset_partial_state=True)
    found = json.loads((tmp_path / "gpu" / "miniature.json").read_text())["results"]
    assert not {what: row["failed"] for what, row in found.items() if "failed" in row}
    shortcuts = {f"ResLoRA {shortcut}({count})" for shortcut, count in gpu.SHORTCUTS.items()}
    assert found["sd15 steps"].keys() - {"wall_seconds"} == {gpu.PEFT, *shortcuts, gpu.STOCK, *gpu.TRAINERS}
    # The allocator's, and the sum of what is planned, which has no work space of a processor's kernels.
    assert {0.5 < found[f"sd15 memory {case}"]["ratio"] < 1.3 for case in gpu.CASES} == {True}
