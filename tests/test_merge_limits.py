"""Errors of merged blocks beyond those that the merge itself reports."""

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import reslora

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import merge_limits  # noqa: E402


class Tower(torch.nn.Module):
    """Layers of one shape, each with a nonlinear function before the next."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_what_blocks_miss_is_what_the_merge_reports_of_its_own_batches(shortcut):
    torch.manual_seed(0)
    model = get_peft_model(Tower().double(), LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1", "2"]))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter)
    batches = [{"x": torch.randn(5, 6, dtype=torch.float64)} for _ in range(4)]
    reslora.connect(model, reslora.ResLoraConfig(shortcut=shortcut, pre_num=4), example_inputs=batches[0])
    blocks = merge_limits.seen(model, batches)
    report = reslora.merge(model, "lstsq", batches)
    missed = merge_limits.missed(model, blocks)
    errors = {f"base_model.model.{block.name}": block.error for block in report.blocks}
    assert sum(error > 0.1 for error in errors.values()) == 2  # of the head, `input` doubles its own, to the last digit
    for name, (_, added, handed) in blocks.items():
        found = missed[name] * float(handed / added.square().sum())
        assert found == pytest.approx(errors[name] ** 2, rel=1e-5, abs=1e-20)
