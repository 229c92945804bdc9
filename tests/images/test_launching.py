"""train_sd.py by the bundled configurations of accelerate, on the CPU."""

import json

import pytest
from accelerate import Accelerator
from launching import configurations, launch

from images.runs import SCRIPT, main, refused
from reslora.runtime.log import read_log

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def flags(few_flags) -> list[str]:
    return [
        *few_flags,
        *("--max_train_steps", "3", "--num_validation_images", "0"),
        *("--num_inference_steps", "1", "--merge_calibration_samples", "2"),
    ]


@pytest.fixture(scope="module")
def single_process(flags, tmp_path_factory) -> list[float]:
    """Return the losses of one process that has all samples of a step."""
    output = tmp_path_factory.mktemp("alone") / "out"
    assert main(*flags, "--train_batch_size", "4", "--output_dir", output) == 0
    return [row["loss"] for row in read_log(output / "reslora" / "log.jsonl")]


# To the script, these two are what two_nodes.yaml is: tests/test_accelerate_configs.py starts both, and
# test_two_processes.py trains by the first.
ALIKE = ("cpu_two_processes.yaml", "one_node.yaml")


@pytest.mark.parametrize("name", configurations(*ALIKE))
def test_each_configuration_trains_what_one_process_does(name, flags, single_process, tmp_path):
    """With two processes; with DeepSpeed only one, because accelerate does not connect two on a CPU."""
    processes = 1 if name.startswith("deepspeed") else 2
    words = [*flags, "--train_batch_size", str(4 // processes), "--output_dir", str(tmp_path / "out")]
    launcher = ("--mixed_precision", "no", "--num_processes", str(processes))
    launch(name, SCRIPT, *words, folder=tmp_path, launcher=launcher)
    losses = [row["loss"] for row in read_log(tmp_path / "out" / "reslora" / "log.jsonl")]
    assert losses == pytest.approx(single_process, rel=1e-4)
    record = json.loads((tmp_path / "out" / "reslora" / "exports.json").read_text())
    assert record["step"] == 3 and max(record["read_back"].values()) < 1e-6


def test_processes_that_do_not_find_each_other_are_refused(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as DeepSpeed's launcher says, where accelerate sees one process
    monkeypatch.setattr("reslora.training.accelerator.Accelerator", lambda **_: Accelerator(cpu=True))
    monkeypatch.delenv("RANK", raising=False)
    line = refused(capsys, *flags, "--output_dir", tmp_path / "out", quiet=False)
    assert "knows 1 of the 2 processes" in line
