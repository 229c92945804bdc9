"""The flags of train_glue.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from ..common.assets import ASSETS
from ..common.errors import InvalidArgument
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
from .glue_tasks import TASKS, Task

PROG = "train_glue.py"
BUNDLED_MODEL = ASSETS / "tiny-roberta"
BUNDLED_TASK = BUNDLED_MODEL / "task"
CALIBRATION_EXAMPLES = 256
"""These texts are short: 64 of SST-2 are two tokens for each input of a layer of 384, and a merge loses by that."""
BUNDLED = {"num_train_epochs": 12, "learning_rate": 3e-3, "per_device_train_batch_size": 16}
FOR_METRICS = {
    "prediction_loss_only": False, "batch_eval_metrics": False, "eval_do_concat_batches": True,
    "label_names": ["labels"],
}  # fmt: skip
"""transformers' flags, with the only value of each that `Trainer` hands whole predictions and labels over with."""


@dataclass
class DataArguments:
    """The task and where its data are."""

    task_name: str | None = HfArg(default=None, help="task of GLUE", metadata={"choices": list(TASKS)})
    data_dir: str | None = HfArg(
        default=None,
        help="folder with train.jsonl, validation.jsonl and maybe test.jsonl (mnli: train.jsonl, and of the two others "
        "one each for _matched and _mismatched, as validation_matched.jsonl); default: the hub's GLUE",
    )
    dataset_name: str = HfArg(default="nyu-mll/glue", help="data set on the hub, or a folder")
    dataset_config_name: str | None = HfArg(
        default=None, help="configuration of that data set; default: the task's name"
    )
    max_seq_length: int = HfArg(default=128, help="longer inputs are cut to that many tokens")
    pad_to_max_length: bool = HfArg(default=False, help="pad every input to it, instead of each batch to its longest")
    max_train_samples: int | None = HfArg(default=None, help="train on the first so many examples")
    max_eval_samples: int | None = HfArg(
        default=None, help="evaluate on the first so many; experiments: choose by so many"
    )
    max_predict_samples: int | None = HfArg(
        default=None, help="predict the first so many; experiments: compare by so many"
    )

    def __post_init__(self) -> None:
        check_whole("max_seq_length", self.max_seq_length, 4)
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)


@dataclass
class ModelArguments:
    """The model that is fine-tuned."""

    model_name_or_path: str = HfArg(
        default=str(BUNDLED_MODEL), help="encoder model: folder or name on the hub; default: the bundled"
    )
    config_name: str | None = HfArg(default=None, help="configuration, if it is not the model's")
    tokenizer_name: str | None = HfArg(default=None, help="tokenizer, if it is not the model's")
    cache_dir: str | None = HfArg(default=None, help="where downloaded models and data are kept")
    model_revision: str = HfArg(default="main", help="revision of the model on the hub")
    token: str | None = HfArg(default=None, help="token for the hub")
    ignore_mismatched_sizes: bool = HfArg(
        default=False, help="replace a classification head that has another number of labels"
    )


@dataclass
class GlueTrainingArguments(AdapterTrainingArguments):
    """`AdapterTrainingArguments` with the learning rate and epochs of LoRA on RoBERTa-large (Hu et al., 2022)."""

    output_dir: str = HfArg(default="runs/glue", help="folder of the run")
    learning_rate: float = HfArg(default=4e-4, help="highest learning rate")
    num_train_epochs: float = HfArg(default=10.0, help="passes over the training examples")
    eval_strategy: str = HfArg(default="epoch", help="when to evaluate: no, steps or epoch")
    save_strategy: str = HfArg(default="epoch", help="when to write a checkpoint: no (but the last), steps or epoch")
    save_total_limit: int | None = HfArg(default=2, help="checkpoints kept")
    label_names: list[str] | None = HfArg(
        default_factory=lambda: ["labels"], help="names of the model's label arguments", metadata={"nargs": "+"}
    )


@dataclass
class Arguments:
    """All flags of a run."""

    data: DataArguments
    model: ModelArguments
    method: MethodArguments
    training: GlueTrainingArguments

    @property
    def task(self) -> Task:
        """The task that is trained on."""
        return TASKS[self.data.task_name]  # type: ignore[index] # `parse` refuses none

    @property
    def settings(self) -> dict:
        """All flags, the content of `config.json`."""
        return settings(self.data, self.model, self.method, self.training)


def read(argv: Sequence[str] | None, description: str | None = None) -> tuple[HfArgumentParser, dict[str, Any]]:
    """The parser, and the values of all flags."""
    types = (DataArguments, ModelArguments, MethodArguments, GlueTrainingArguments)
    parser = build_parser(types, PROG, description)
    parser.set_defaults(calibration_examples=CALIBRATION_EXAMPLES)
    return parser, parse_values(parser, argv, BUNDLED)


def parse(argv: Sequence[str] | None, description: str | None = None) -> Arguments:
    """The flags of a run that is no experiment, `settled`."""
    return settled(*read(argv, description))


def settled(parser: HfArgumentParser, values: Mapping[str, Any]) -> Arguments:
    """Flags with every default filled in."""
    arguments = Arguments(*parsed(parser, values))
    data, folder = arguments.data, Path(arguments.model.model_name_or_path)
    if data.task_name is None and data.data_dir is None and folder.resolve() == BUNDLED_MODEL:
        data.task_name, data.data_dir = "cola", str(BUNDLED_TASK)
    if data.task_name is None:
        raise InvalidArgument("--task_name", "missing", f"give one of {', '.join(TASKS)}")
    if not folder.is_dir() and (folder.exists() or str(folder).startswith((".", "/", "~")) or len(folder.parts) > 2):
        raise InvalidArgument(
            f"--model_name_or_path {folder}", "no such folder", "give a transformers model or a name on the hub"
        )
    for name, value in FOR_METRICS.items():
        given = getattr(arguments.training, name)
        if given != value:
            words = " ".join(given) if isinstance(given, list) else given
            problem = "the metrics are computed from all predictions and labels at once"
            raise InvalidArgument(f"--{name} {words}", problem, "leave it out")
    check_compiling(arguments.method, arguments.training)
    check_metric(arguments)
    smoothing = arguments.training.label_smoothing_factor
    if smoothing and not arguments.task.labels:
        problem = f"{data.task_name} has scores in place of labels"
        raise InvalidArgument(f"--label_smoothing_factor {smoothing:g}", problem, "leave it out")
    return arguments


def check_metric(arguments: Arguments) -> None:
    """Refuse a --metric_for_best_model that the task doesn't have; the hub's name of Matthews' counts as ours."""
    given, known = arguments.training.metric_for_best_model, ("loss", *arguments.task.metrics)
    name = str(given or "loss").removeprefix("eval_").replace("matthews_correlation", "matthews")
    if name not in known:
        raise InvalidArgument(
            f"--metric_for_best_model {given}", f"unknown for {arguments.data.task_name}", f"one of {', '.join(known)}"
        )
    if given:
        arguments.training.metric_for_best_model = name
