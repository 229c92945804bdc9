"""Texts are trained as stock transformers' `Trainer` trains PEFT's plain LoRA."""

import json
from pathlib import Path

import pytest
import torch
from launching import forked, told_by
from safetensors.torch import load_file

from .helpers import SCRIPT, read_log, row, write_rows

STEPS, EXAMPLES = 8, 44
LENGTHS = (
    "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3", "--max_steps", str(STEPS),
    "--learning_rate", "1e-2", "--warmup_steps", "2", "--weight_decay", "0.1", "--max_grad_norm", "0.5",
)  # fmt: skip
"""Eleven batches of each process in an epoch: three steps of three batches, and one of two."""


def stock(folder: Path) -> Path:
    """Run the script of stock transformers, which can import this checkout."""
    script, paths = folder / "script.py", [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]
    script.write_text(
        f"import sys\nsys.path[:0] = {paths}\nfrom texts import stock_trainer\nstock_trainer.main(*sys.argv[1:])\n"
    )
    return script


@pytest.mark.exhaustive
def test_losses_and_weights_are_those_of_stock_transformers(tiny, tmp_path):
    """With texts of different lengths, in float32, with accumulation, clipping, warmup and an incomplete last step."""
    rows = [
        row(n) | {"Body": "Tom has pens. " * (1 + n % 5), "Equation": "1 + " * (n % 7) + "1"} for n in range(EXAMPLES)
    ]
    data = write_rows(tmp_path / "data", train=rows, test=rows[:2])
    told = told_by("cpu_two_processes.yaml") | {"ACCELERATE_MIXED_PRECISION": "no"}
    (tmp_path / "stock").mkdir()
    forked(
        stock(tmp_path), str(tiny), str(data), str(tmp_path / "stock"), *LENGTHS,
        folder=tmp_path, environment=told, processes=2,
    )  # fmt: skip
    words = ["--model_name_or_path", str(tiny), "--data_dir", str(data), "--output_dir", str(tmp_path / "ours")]
    words += ["--method", "lora", "--save_steps", str(STEPS), "--report_to", "none", "--max_new_tokens", "2", *LENGTHS]
    forked(SCRIPT, *words, folder=tmp_path, environment=told, processes=2)
    expected = json.loads((tmp_path / "stock" / "losses.json").read_text())
    found = [line["loss"] for line in read_log(tmp_path / "ours") if line["split"] == "train"]
    assert len(expected) == STEPS and expected[0] - expected[-1] > 0.1
    assert found == pytest.approx(expected, rel=1e-6)
    weights = load_file(tmp_path / "stock" / "trained.safetensors")
    ours = load_file(tmp_path / "ours" / f"checkpoint-{STEPS}" / "adapter.safetensors")
    assert len(weights) == len(ours) == 12
    for name, value in ours.items():
        (same,) = (
            value
            for key, value in weights.items()
            if name.removesuffix(".weight").replace(".default", "") in key.replace(".default", "")
        )
        torch.testing.assert_close(value, same, rtol=0, atol=1e-6)
