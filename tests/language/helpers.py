"""A tiny adapted model, its trainer, and its log, for the tests of this folder."""

import json
from pathlib import Path

import torch
from conftest import tiny_llama

from reslora.language.arguments import AdapterTrainingArguments, MethodArguments
from reslora.language.callbacks import LogCallback
from reslora.language.trainer import AdapterTrainer, attach

METHODS = [("reslora", "input"), ("reslora", "middle"), ("reslora", "block"), ("lora", "none"), ("adalora", "none")]
METHODS += [("loha", "none"), ("lokr", "none"), ("lora_x2", "none")]
STEPS = 6


def rows(count: int = 16, length: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 64, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def build(method: str = "reslora", shortcut: str = "input", base=None, **flags):
    torch.manual_seed(0)
    base = tiny_llama(layers=3).float() if base is None else base
    arguments = MethodArguments(method=method, shortcut=shortcut, **flags)
    return attach(base, arguments, STEPS, task_type="CAUSAL_LM"), arguments


def trainer_for(model, folder, callbacks=True, stop=None, **flags) -> AdapterTrainer:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = AdapterTrainingArguments(**{**defaults, **flags})
    log = [LogCallback(Path(folder) / "log.jsonl")] if callbacks else None
    return AdapterTrainer(model, args, stop, train_dataset=rows(), eval_dataset=rows(8), callbacks=log)


def read_log(folder) -> list[dict]:
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def trained(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def trained_parameters(model):
    return (value for value in model.parameters() if value.requires_grad)
