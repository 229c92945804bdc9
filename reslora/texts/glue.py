"""`train_glue.py`: fine-tune RoBERTa or BERT on a GLUE task, and compare the merges by its metrics."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    set_seed,
)
from transformers.trainer_utils import PredictionOutput
from transformers.utils import logging

from ..errors import InvalidArgument, loaded_from_hub, refused_as
from ..io import replacing
from ..options.texts import ExperimentOptions, GlueDataOptions, GlueModelOptions, GlueOptions
from ..options.values import as_typed
from ..runtime.folder_lock import check_held
from ..runtime.processes import broadcast_from_main
from ..runtime.signals import StopRequest
from . import training_arguments
from .callbacks import LogCallback
from .experiment import TextStudy
from .glue_tasks import TASKS, Columns, Task, check_rows, file_form, predicted, read_folder, scores
from .split import Parts, parts_of
from .trainer import UNREADABLE, AdapterTrainer, attach, total_steps

PROG = "train_glue.py"
FOR_METRICS = {
    "prediction_loss_only": False, "batch_eval_metrics": False, "eval_do_concat_batches": True,
    "label_names": ["labels"],
}  # fmt: skip
"""Options of `TrainingArguments`, with the value that the metrics need.

With any other value, `Trainer` does not pass all predictions and labels at once.
"""

# -- options -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arguments(training_arguments.Arguments[GlueOptions]):
    """Options of a run, and the `TrainingArguments` made from them."""

    @property
    def data(self) -> GlueDataOptions:
        """Task and location of its data."""
        return self.options.data

    @property
    def model(self) -> GlueModelOptions:
        """Model to fine-tune."""
        return self.options.model

    @property
    def task(self) -> Task:
        """Task to train on."""
        return TASKS[self.options.data.task_name or ""]


def arguments_of(options: GlueOptions) -> Arguments:
    """Return the arguments of a run with these options.

    Raises `InvalidArgument` for options that the metrics do not support.
    """
    training = training_arguments.training_arguments(options, PROG, label_names=FOR_METRICS["label_names"])
    arguments = Arguments(options, training)
    for name, value in FOR_METRICS.items():
        given = getattr(training, name)
        if given != value:
            problem = "the metrics are computed from all predictions and labels at once"
            raise InvalidArgument(f"--{name} {as_typed(given)}", problem, "leave it out")
    check_metric(arguments)
    smoothing = training.label_smoothing_factor
    if smoothing and not arguments.task.labels:
        problem = f"{options.data.task_name} has scores in place of labels"
        raise InvalidArgument(f"--label_smoothing_factor {smoothing:g}", problem, "leave it out")
    return arguments


def check_metric(arguments: Arguments) -> None:
    """Raise `InvalidArgument` for a --metric_for_best_model that the task does not have.

    The Hub's metric names are accepted too.
    """
    given, known = arguments.training.metric_for_best_model, ("loss", *arguments.task.metrics)
    name = str(given or "loss").removeprefix("eval_").replace("matthews_correlation", "matthews")
    if name not in known:
        argument = f"--metric_for_best_model {given}"
        raise InvalidArgument(argument, f"unknown for {arguments.data.task_name}", f"one of {', '.join(known)}")
    if given:
        arguments.training.metric_for_best_model = name


# -- data --------------------------------------------------------------------------------------------------------------


def read_splits(arguments: Arguments) -> dict[str, Columns]:
    """Return the texts and labels of every split by its name, after validation of every row.

    Test splits are read with --do_predict, or if --data_dir has them. MNLI has two validation and two test splits.
    """
    data, task = arguments.data, arguments.task
    wanted = arguments.training.do_predict
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_predict_samples}
    splits = {}
    for kind, limit in limits.items():
        for part in task.parts if kind != "train" else ("",):
            if kind == "test" and not (wanted or data.data_dir):
                continue  # on the Hub they are long, and their labels are not public
            where, rows = _read(arguments, kind + part)
            if rows is None and kind == "test" and not wanted:
                continue
            if rows is None:
                tests = " and ".join(f"test{part}.jsonl" for part in task.parts)
                fix = f"add {tests}, or leave --do_predict out" if kind == "test" else file_form(task)
                raise InvalidArgument(where, f"no split {kind + part}", fix)
            if not rows:
                raise InvalidArgument(where, "no rows", "give a split that has some, or another --data_dir")
            splits[kind + part] = check_rows(task, where, rows[:limit], labelled=kind != "test")
    return splits


def _read(arguments: Arguments, split: str) -> tuple[str, list[dict] | None]:
    """Return name and rows of a split, of --data_dir or of the data set on the Hub; None if it does not exist."""
    data, model = arguments.data, arguments.model
    if data.data_dir:
        return read_folder(arguments.task, data.data_dir, split)
    name = data.dataset_config_name or data.task_name
    where = f"--dataset_name {data.dataset_name}, configuration {name}"
    with loaded_from_hub(where, f"use --data_dir: {file_form(arguments.task)}"):
        sets = datasets.load_dataset(path=data.dataset_name, name=name, cache_dir=model.cache_dir, token=model.token)
    return f"{where}, {split}", sets[split].to_list() if split in sets else None


def encode(arguments: Arguments, tokenizer, columns: Columns) -> Dataset:
    """Return token ids and labels as a `datasets.Dataset`."""
    task, limit = arguments.task, min(arguments.data.max_seq_length, tokenizer.model_max_length)
    texts = [columns[name] for name in task.columns]
    padding = "max_length" if arguments.data.pad_to_max_length else False
    encoded = dict(tokenizer(*texts, truncation=True, max_length=limit, padding=padding))
    if "label" in columns:
        encoded["labels"] = [int(label) if task.labels else float(label) for label in columns["label"]]
    return Dataset.from_dict(encoded)


# -- model -------------------------------------------------------------------------------------------------------------


def load_model(arguments: Arguments):
    """Return the tokenizer, the model in float32, and the names of its classifier's modules.

    The classifier's modules are those outside of the pretrained encoder, and a pooler without pretrained weights.
    """
    given, task = arguments.model, arguments.task
    common = {"cache_dir": given.cache_dir, "revision": given.model_revision, "token": given.token}
    names = dict(enumerate(task.labels)) if task.labels else {0: "score"}
    kind = "single_label_classification" if task.labels else "regression"
    flag, fix = f"--model_name_or_path {given.model_name_or_path}", "check name and files"
    logging.set_verbosity_error()  # no warning that the classifier has no pretrained weights, which is expected
    logging.disable_progress_bar()
    try:
        with refused_as(flag, f"{fix}, or give --ignore_mismatched_sizes", UNREADABLE):
            config = AutoConfig.from_pretrained(
                given.config_name or given.model_name_or_path,
                num_labels=len(names),
                id2label=names,
                label2id={name: number for number, name in names.items()},
                problem_type=kind,
                finetuning_task=arguments.data.task_name,
                **common,
            )
            tokenizer = AutoTokenizer.from_pretrained(given.tokenizer_name or given.model_name_or_path, **common)
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                given.model_name_or_path,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=given.ignore_mismatched_sizes,
                output_loading_info=True,
                **common,
            )
    finally:
        logging.set_verbosity_warning()
        logging.enable_progress_bar()
    # These models accept any keyword argument, but average the loss over their own batch. `Trainer` would conclude that
    # they divide by its `num_items_in_batch`, and would not scale the loss for accumulation steps and processes.
    model.accepts_loss_kwargs = False
    check_fit(arguments, tokenizer, model)
    heads = [(name, head) for name, head in model.named_children() if name != model.base_model_prefix]
    classifier = [name for name, head in heads if any(True for _ in head.parameters())]
    if any("pooler" in key.split(".") for key in loaded["missing_keys"]):
        classifier.append("pooler")
    return tokenizer, model, classifier


def check_fit(arguments: Arguments, tokenizer, model) -> None:
    """Limit the tokenizer's maximum length to the model's number of positions.

    Raises `InvalidArgument` if the tokenizer has more tokens than the model, or no padding token.
    """
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if embeddings is not None:
        # RoBERTa's first token has position padding_idx + 1
        reserved = 0 if embeddings.padding_idx is None else embeddings.padding_idx + 1
        tokenizer.model_max_length = min(tokenizer.model_max_length, embeddings.num_embeddings - reserved)
    rows = model.get_input_embeddings().num_embeddings
    flag = f"--tokenizer_name {arguments.model.tokenizer_name or arguments.model.model_name_or_path}"
    if len(tokenizer) > rows:
        raise InvalidArgument(flag, f"{len(tokenizer)} tokens, and the model has {rows}", "give the model's own")
    if tokenizer.pad_token_id is None:
        raise InvalidArgument(flag, "it has no padding token", "give an encoder such as RoBERTa or BERT")


def calibration_batches(arguments: Arguments, examples: Dataset) -> list[dict] | None:
    """Return the first training examples as model inputs, in batches of one example; None without examples.

    They have no padding, because it would be included in the second moments that a merge reads.
    """
    batches = []
    for row in examples.remove_columns("labels").take(arguments.method.merge_calibration_samples):
        real = [i for i, keep in enumerate(row["attention_mask"]) if keep]
        batches.append({name: torch.tensor([[value[i] for i in real]]) for name, value in row.items()})
    return batches or None


# -- results -----------------------------------------------------------------------------------------------------------


def loss_of(task: Task, logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean loss over all examples: cross entropy, or the squared error for STS-B.

    `logits`: examples x labels; `labels`: label number, or score, of each example.
    """
    outputs, targets = torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)
    if task.labels:
        return torch.nn.functional.cross_entropy(outputs, targets).item()
    return torch.nn.functional.mse_loss(outputs.reshape(-1), targets.double()).item()


def figures_of(task: Task, result: EvalPrediction | PredictionOutput) -> dict[str, float]:
    """Return loss and metrics of the predictions, each example counted once."""
    logits, labels = result.predictions, result.label_ids.reshape(-1)
    return {"loss": loss_of(task, logits, labels), **scores(task, predicted(task, logits), labels)}


def evaluate(trainer: AdapterTrainer, task: Task, sets: dict, kind: str = "validation") -> dict[str, float]:
    """Return loss and metrics on every labeled split of a kind, `validation` or `test`.

    The names of metrics on MNLI's second (mismatched) split end in `_mm`.
    """
    figures: dict[str, float] = {}
    for part, end in zip(task.parts, ("", "_mm"), strict=False):
        if kind + part in sets and "labels" in sets[kind + part].column_names:
            found = figures_of(task, trainer.predict(sets[kind + part]))
            figures |= {name + end: value for name, value in found.items()}
    return figures


def write_predictions(arguments: Arguments, trainer: AdapterTrainer, sets: dict) -> list[str]:
    """Write `predict_results_<task>.txt` for each test split, as run_glue.py does; return the file names."""
    task, files = arguments.task, []
    for name, examples in sets.items():
        if not name.startswith("test"):
            continue
        inputs = examples.remove_columns([column for column in ("labels",) if column in examples.column_names])
        predictions = predicted(task, trainer.predict(inputs).predictions)
        lines = ["index\tprediction"]
        lines += [f"{i}\t{task.labels[p] if task.labels else f'{p:.3f}'}" for i, p in enumerate(predictions)]
        files.append(f"predict_results_{arguments.data.task_name}{name.removeprefix('test')}.txt")
        broadcast_from_main(check_held)
        if trainer.is_world_process_zero():
            with replacing(arguments.training.folder / files[-1]) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


class GlueStudy(TextStudy):
    """Training and evaluation on a GLUE task; experiments with MNLI use its matched examples."""

    prog = PROG
    real = "--model FacebookAI/roberta-large --task_name rte --shortcut middle --pre_num 4 --output runs/rte"
    columns: list[str]
    splits: dict[str, Columns]

    def __init__(self) -> None:
        self.sets: dict[str, Dataset] = {}

    arguments = staticmethod(arguments_of)

    def read(self, arguments: Arguments) -> Iterable:
        """Read the examples of a single run; return the rows of the training examples."""
        self.splits = read_splits(arguments)
        return zip(*self.splits["train"].values(), strict=True)

    def parts(self, arguments: Arguments, shares: ExperimentOptions) -> Parts:
        """Return all examples divided into a training, a selection and a test split.

        Test examples without labels, such as those on the Hub, are left out.
        """
        task, data, splits = arguments.task, arguments.data, read_splits(arguments)
        part = task.parts[0]
        if "label" not in splits.get(f"test{part}", ()) and data.max_eval_samples != data.max_predict_samples:
            # Without labeled test examples, methods are compared on the validation examples.
            limited = arguments.options.replace(max_eval_samples=data.max_predict_samples)
            splits = read_splits(replace(arguments, options=limited))
        self.columns = [*task.columns, "label"]
        train, validation, test = (
            list(zip(*map(splits[name].get, self.columns), strict=True)) if "label" in splits.get(name, ()) else []
            for name in ("train", f"validation{part}", f"test{part}")
        )
        files = {"train": train, "select": validation if test else [], "test": test or validation}
        parts = parts_of(files, lambda example: "\n".join(example[:-1]), shares)
        return parts.limited(data.max_eval_samples, data.max_predict_samples)

    def prepare(self, arguments: Arguments, parts: Parts) -> int:
        """Store the examples that all arms use; return the number of training examples."""
        split = {"train": parts.train, "validation" + arguments.task.parts[0]: parts.select, "test": parts.test}
        self.splits = {
            name: dict(zip(self.columns, map(list, zip(*rows, strict=True)), strict=True))
            for name, rows in split.items()
        }
        return len(parts.train)

    def adapted(self, arguments: Arguments) -> PeftModel:
        """Return the model with a new adapter and classifier; the first call also encodes the examples."""
        set_seed(arguments.training.seed)
        self.tokenizer, model, classifier = load_model(arguments)
        # The first arm encodes the examples for all arms.
        self.sets = self.sets or {name: encode(arguments, self.tokenizer, self.splits[name]) for name in self.splits}
        steps = total_steps(arguments.training, len(self.sets["train"]))
        return attach(model, arguments.method, steps, self.example(), modules_to_save=classifier)

    def example(self) -> dict[str, torch.Tensor]:
        """Return the first training example, `input_ids` of shape (1, tokens), to trace the model with."""
        return {"input_ids": torch.tensor([self.sets["train"][0]["input_ids"]])}

    def build_trainer(self, arguments: Arguments, model: PeftModel, stop: StopRequest) -> AdapterTrainer:
        """Return the trainer, which writes `log.jsonl` and evaluates on the first validation split while training."""
        task = arguments.task
        return AdapterTrainer(
            model,
            arguments.training,
            stop,
            train_dataset=self.sets["train"],
            eval_dataset=self.sets["validation" + task.parts[0]],
            processing_class=self.tokenizer,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            # Its loss replaces Trainer's own, which counts some examples twice if processes share the last batch.
            compute_metrics=lambda result: figures_of(task, result),
            # Encoder-decoders return hidden states too.
            preprocess_logits_for_metrics=lambda found, labels: found[0] if isinstance(found, tuple) else found,
            callbacks=[LogCallback(arguments.training.folder / "log.jsonl")],
        )

    def calibration(self, arguments: Arguments) -> list[dict] | None:
        """Return the first training examples as calibration batches of one example."""
        return calibration_batches(arguments, self.sets["train"])

    @torch.no_grad()
    def measured(self, arguments: Arguments, model: PeftModel, check: Callable[[], None]) -> tuple[list[float], dict]:
        """Return the loss of each test example, and the task's metrics."""
        task, test, found = arguments.task, self.sets["test"], []
        size, collate = arguments.training.per_device_eval_batch_size, DataCollatorWithPadding(self.tokenizer)
        for batch in DataLoader(test, size, collate_fn=collate):
            check()
            del batch["labels"]
            found.append(model(**batch.to(arguments.training.device)).logits.float().cpu().numpy())
        logits, labels = np.concatenate(found), np.array(test["labels"])
        losses = [loss_of(task, logits[[number]], labels[[number]]) for number in range(len(test))]
        return losses, scores(task, predicted(task, logits), labels)

    def figures(self, arguments: Arguments, trainer: AdapterTrainer) -> dict[str, float]:
        """Return loss and metrics on the validation examples."""
        return evaluate(trainer, arguments.task, self.sets)

    def predict(self, arguments: Arguments, trainer: AdapterTrainer) -> list[str]:
        """Write the predictions for each test split, and return the names of the files."""
        return write_predictions(arguments, trainer, self.sets)

    def facts(self, arguments: Arguments, trainer: AdapterTrainer) -> dict[str, Any]:
        """Return task, model, numbers of examples and the metrics on labeled test examples."""
        return {
            "task": arguments.data.task_name,
            "model_name_or_path": arguments.model.model_name_or_path,
            "train_examples": len(self.sets["train"]),
            "validation_examples": sum(len(self.sets[name]) for name in self.sets if name.startswith("validation")),
            "test": evaluate(trainer, arguments.task, self.sets, "test") or None,
        }
