"""The flags of train_llm.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from ..common.assets import ASSETS
from ..common.errors import InvalidArgument
from ..common.methods import refuse_unable
from .arguments import (
    AdapterTrainingArguments,
    MethodArguments,
    build_parser,
    check_compiling,
    check_whole,
    parse_values,
    parsed,
    settings,
)
from .llm_tasks import TASKS

PROG = "train_llm.py"
BUNDLED_MODEL, BUNDLED_TASK = ASSETS / "tiny-llama", ASSETS / "tiny-llama" / "task"
ZERO2_OFFLOAD = ASSETS / "deepspeed" / "zero2_offload.json"

# What the flags are while no model is named.
BUNDLED = {
    "data_dir": str(BUNDLED_TASK),
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "num_train_epochs": 5,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "max_new_tokens": 24,
}


@dataclass
class TaskArguments:
    """Which model is trained on what."""

    model_name_or_path: str = HfArg(
        default=str(BUNDLED_MODEL), help="causal model, folder or name on the hub; default: the bundled one"
    )
    task: str = HfArg(default="svamp", help="gsm8k, svamp, mathqa, metamathqa or hellaswag")
    data_dir: str | None = HfArg(
        default=None, help="folder with train.jsonl, validation.jsonl, test.jsonl in the columns of the hub's data set"
    )
    revision: str | None = HfArg(default=None, help="revision of the model on the hub")
    cache_dir: str | None = HfArg(default=None, help="where downloads are kept")
    dtype: str = HfArg(
        default="auto",
        help="of the frozen model, the adapter is float32; auto: float32, or that of --bf16 and --fp16",
        metadata={"choices": ["auto", "float32", "bfloat16", "float16"]},
    )
    load_in_4bit: bool = HfArg(default=False, help="quantise the frozen model to NF4 (QLoRA)")
    max_train_samples: int | None = HfArg(
        default=None, help="train on that many examples, drawn at random (metamathqa: 40000)"
    )
    max_eval_samples: int | None = HfArg(
        default=None, help="validate on the first examples only; experiments: choose by so many"
    )
    max_test_samples: int | None = HfArg(
        default=None, help="test on the first examples only; experiments: compare by so many"
    )
    max_length: int = HfArg(default=512, help="training examples of more tokens, prompt and answer, are left out")
    max_new_tokens: int = HfArg(default=256, help="longest answer generated")
    eval_accuracy: bool = HfArg(default=False, help="generate answers in validation too, not only in the final test")

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InvalidArgument(f"--task {self.task}", "unknown", f"choose from {', '.join(TASKS)}")
        for name in ("max_train_samples", "max_eval_samples", "max_test_samples"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        check_whole("max_length", self.max_length, 2)
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        if self.task == "metamathqa" and self.max_train_samples is None:
            self.max_train_samples = 40_000  # Appendix C
        if self.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            raise InvalidArgument(
                "--load_in_4bit", "bitsandbytes is not installed", "pip install bitsandbytes, or leave it out"
            )


@dataclass
class LlmTrainingArguments(AdapterTrainingArguments):
    """transformers' arguments, with the learning rate and the folder of this script."""

    output_dir: str = HfArg(default="runs/llm", help="folder of the run")
    learning_rate: float = HfArg(default=1e-4, help="highest learning rate")


class Arguments(NamedTuple):
    """All flags of a run."""

    task: TaskArguments
    method: MethodArguments
    training: LlmTrainingArguments

    @property
    def settings(self) -> dict:
        """All flags, the content of `config.json`."""
        return settings(*self)


def read(argv: Sequence[str] | None, description: str | None = None) -> tuple[HfArgumentParser, dict[str, Any]]:
    """The parser, and the values of all flags."""
    parser = build_parser((TaskArguments, MethodArguments, LlmTrainingArguments), PROG, description)
    return parser, parse_values(parser, argv, BUNDLED, deepspeed_config=str(ZERO2_OFFLOAD))


def parse(argv: Sequence[str] | None, description: str | None = None) -> Arguments:
    """The flags of a run that is no experiment, `settled`."""
    return settled(*read(argv, description))


def settled(parser: HfArgumentParser, values: Mapping[str, Any]) -> Arguments:
    """Flags, with whatever can be refused before a model is loaded refused."""
    task, method, training = parsed(parser, values)
    if task.task != "svamp" and task.data_dir == str(BUNDLED_TASK):
        fix = "give --data_dir DIR, or --model_name_or_path MODEL"
        raise InvalidArgument(f"--task {task.task}", "the bundled examples are svamp's", fix)
    if task.load_in_4bit and method.merge_and_save:
        raise InvalidArgument(
            "--merge_and_save",
            "a 4-bit model cannot hold the sum",
            "leave it out, and merge peft/ into the whole model",
        )
    if task.load_in_4bit:
        refuse_unable([method.method], "quantised")
    check_compiling(method, training)
    best = str(training.metric_for_best_model or "").removeprefix("eval_")
    if best not in ("", "loss", "accuracy"):
        raise InvalidArgument(f"--metric_for_best_model {best}", "unknown", "choose loss or accuracy")
    task.eval_accuracy |= best == "accuracy"
    return Arguments(task, method, training)
