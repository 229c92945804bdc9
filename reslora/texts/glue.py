"""`train_glue.py`: fine-tune RoBERTa or BERT on a GLUE task, and compare the merges by its metrics."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..errors import InvalidArgument, loaded_from_hub, refused_as
from ..formatting import is_or_are
from ..options.texts import ExperimentOptions, GlueModelOptions, GlueOptions
from ..runtime.processes import say
from ..tracing import to_device
from .adapter import UNREADABLE
from .glue_tasks import TASKS, Row, Task, check_rows, file_form, predicted, read_folder, scores
from .split import Parts, parts_of
from .study import Check, Texts, in_order, mine

PROG = "train_glue.py"

# -- data --------------------------------------------------------------------------------------------------------------


def read_splits(options: GlueOptions) -> dict[str, list[Row]]:
    """Return the rows of every split by its name, after validation of every row.

    Test splits are read with --do_predict, or if --data_dir has test splits. MNLI has two validation and two test
    splits.
    """
    data, task = options.data, task_of(options)
    wanted = data.do_predict
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_predict_samples}
    splits = {}
    for kind, limit in limits.items():
        for part in task.parts if kind != "train" else ("",):
            if kind == "test" and not (wanted or data.data_dir):
                continue  # on the Hub they are long, and their labels are not public
            where, rows = _read(options, kind + part)
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


def _read(options: GlueOptions, split: str) -> tuple[str, list[dict] | None]:
    """Return name and rows of a split, of --data_dir or of the data set on the Hub; None if it does not exist."""
    data, model = options.data, options.model
    if data.data_dir:
        return read_folder(task_of(options), data.data_dir, split)
    name = data.dataset_config_name or data.task_name
    where = f"--dataset_name {data.dataset_name}, configuration {name}"
    with loaded_from_hub(where, f"use --data_dir: {file_form(task_of(options))}"):
        sets = datasets.load_dataset(path=data.dataset_name, name=name, cache_dir=model.cache_dir)
    return f"{where}, {split}", sets[split].to_list() if split in sets else None


def encode(options: GlueOptions, tokenizer, rows: Sequence[Row], split: str = "data") -> list[dict[str, Any]]:
    """Return token ids and labels of each example, and print how many of the split are too long and truncated."""
    task, limit = task_of(options), min(options.data.max_seq_length, tokenizer.model_max_length)
    *texts, labels = map(list, zip(*rows, strict=True))
    tokens = tokenizer(*texts, truncation=True, max_length=limit)
    if long := sum(bool(each.overflowing) for each in tokens.encodings or ()):  # None of tokenizers without Rust code
        say(f"{split}: {long} of {len(rows)} examples {is_or_are(long)} longer than {limit} tokens and truncated")
    encoded = dict(tokens)
    if labels[0] is not None:
        encoded["labels"] = list(map(int if task.labels else float, labels))
    return [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]


# -- model -------------------------------------------------------------------------------------------------------------


def source(given: GlueModelOptions) -> dict[str, Any]:
    """Return the keyword arguments common to all `from_pretrained` calls."""
    return {"cache_dir": given.cache_dir, "revision": given.model_revision}


def reading(given: GlueModelOptions) -> AbstractContextManager[None]:
    """Return a context that turns errors of reading a model into an `InvalidArgument`."""
    fix = "check name and files, or give --ignore_mismatched_sizes"
    return refused_as(f"--model_name_or_path {given.model_name_or_path}", fix, UNREADABLE)


def load_tokenizer(options: GlueOptions) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Return the model's configuration, and the tokenizer.

    A model that was trained with the task's labels in another order keeps its order, as in run_glue.py.
    """
    given, task = options.model, task_of(options)
    names = task.labels or ("score",)
    with reading(given):
        config = AutoConfig.from_pretrained(
            given.model_name_or_path,
            problem_type="single_label_classification" if task.labels else "regression",
            finetuning_task=options.data.task_name,
            **source(given),
        )
        own = {str(name).lower(): number for number, name in config.id2label.items()}
        config.label2id = own if {*own} == {*names} else {name: number for number, name in enumerate(names)}
        config.id2label = {number: name for name, number in config.label2id.items()}
        tokenizer = AutoTokenizer.from_pretrained(given.model_name_or_path, **source(given))
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    check_fit(options, tokenizer, model)
    return config, tokenizer


def load_model(options: GlueOptions, config: PreTrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    """Return the model in float32, and the names of its classifier's modules.

    The classifier's modules are the modules outside of the pretrained encoder, and a pooler without pretrained weights.
    """
    given = options.model
    logging.set_verbosity_error()  # no warning that the classifier has no pretrained weights, which is expected
    logging.disable_progress_bar()
    try:
        with reading(given):
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                given.model_name_or_path,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=given.ignore_mismatched_sizes,
                output_loading_info=True,
                **source(given),
            )
    finally:
        logging.set_verbosity_warning()
        logging.enable_progress_bar()
    classifier = heads_of(model)
    if any("pooler" in key.split(".") for key in loaded["missing_keys"]):
        classifier.append("pooler")
    return model, classifier


def heads_of(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules with parameters outside of the pretrained encoder."""
    heads = [(name, head) for name, head in model.named_children() if name != model.base_model_prefix]
    return [name for name, head in heads if any(True for _ in head.parameters())]


def check_fit(options: GlueOptions, tokenizer, model) -> None:
    """Limit the tokenizer's maximum length to the model's number of positions.

    Raises `InvalidArgument` if the tokenizer has more tokens than the model, or no padding token.
    """
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if embeddings is not None:
        # RoBERTa's first token has position padding_idx + 1
        reserved = 0 if embeddings.padding_idx is None else embeddings.padding_idx + 1
        tokenizer.model_max_length = min(tokenizer.model_max_length, embeddings.num_embeddings - reserved)
    rows = model.get_input_embeddings().num_embeddings
    flag = f"--model_name_or_path {options.model.model_name_or_path}"
    if len(tokenizer) > rows:
        problem = f"its tokenizer has {len(tokenizer)} tokens, the model only {rows}"
        raise InvalidArgument(flag, problem, "give a folder with the model's own tokenizer")
    if tokenizer.pad_token_id is None:
        raise InvalidArgument(flag, "its tokenizer has no padding token", "give an encoder such as RoBERTa or BERT")


def calibration_batches(rows: list[dict[str, Any]]) -> list[dict] | None:
    """Return training examples as model inputs, in batches of one example; None without examples.

    The batches have no padding, because it would be included in the second moments that a merge reads.
    """
    return [{name: torch.tensor([row[name]]) for name in row if name != "labels"} for row in rows] or None


# -- results -----------------------------------------------------------------------------------------------------------


def losses_of(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of each example: cross entropy, or the squared error for STS-B.

    `logits`: examples x labels; `labels`: label number, or score, of each example.
    """
    if task.labels:
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return torch.nn.functional.mse_loss(logits.reshape(-1), labels.to(logits.dtype), reduction="none")


def task_of(options: GlueOptions) -> Task:
    """Return the task to train on."""
    return TASKS[options.data.task_name or ""]


class GlueTexts(Texts):
    """Training and evaluation on a GLUE task; experiments with MNLI use its matched examples."""

    prog = PROG
    real = "--model FacebookAI/roberta-large --task_name rte --shortcut middle --pre_num 4 --output runs/rte"
    task: Task
    config: PreTrainedConfig
    sets: dict[str, list[dict[str, Any]]]
    """Encoded examples by split."""

    def model_of(self, options: GlueOptions) -> tuple[str, str | None]:
        """Return the model's name and its revision."""
        return options.model.model_name_or_path, options.model.model_revision

    def read(self, options: GlueOptions) -> None:
        """Read and encode the examples of a single run."""
        self.take(options, read_splits(options))

    def take(self, options: GlueOptions, splits: Mapping[str, Sequence[Row]]) -> None:
        """Encode and store the examples of each split."""
        self.task, (self.config, self.tokenizer) = task_of(options), load_tokenizer(options)
        self.sets = {name: encode(options, self.tokenizer, rows, name) for name, rows in splits.items()}
        self.rows = self.sets["train"]
        self.example = {"input_ids": torch.tensor([self.rows[0]["input_ids"]])}

    def parts(self, options: GlueOptions, shares: ExperimentOptions) -> Parts:
        """Return all examples divided into a training, a selection and a test split.

        Test examples without labels, such as those on the Hub, are left out.
        """
        data, splits, part = options.data, read_splits(options), task_of(options).parts[0]
        test = [row for row in splits.get(f"test{part}", ()) if row[-1] is not None]
        if not test and data.max_eval_samples != data.max_predict_samples:
            # Without labeled test examples, methods are compared on the validation examples.
            splits = read_splits(options.replace(max_eval_samples=data.max_predict_samples))
        validation = splits[f"validation{part}"]
        files = {"train": splits["train"], "select": validation if test else [], "test": test or validation}
        parts = parts_of(files, lambda example: "\n".join(example[:-1]), shares)
        return parts.limited(data.max_eval_samples, data.max_predict_samples)

    def prepare(self, options: GlueOptions, parts: Parts) -> None:
        """Store and encode the examples that all arms use."""
        validation = "validation" + task_of(options).parts[0]
        self.take(options, {"train": parts.train, validation: parts.select, "test": parts.test})

    def load(self, options: GlueOptions, device: torch.device) -> PreTrainedModel:
        """Return the model with a new classifier."""
        model, self.classifier = load_model(options, self.config)
        return model

    def empty(self, options: GlueOptions) -> PreTrainedModel:
        """Return the model without its weights."""
        model = AutoModelForSequenceClassification.from_config(self.config)
        self.classifier = heads_of(model)
        return model

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return a batch, padded to its longest example: tokens and mask (batch x tokens), and labels (batch)."""
        return dict(DataCollatorWithPadding(self.tokenizer)(rows))

    def scored(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the logits of a batch (batch x labels), with the labels in the task's order."""
        logits, labels = model(**inputs).logits, self.config.label2id
        numbers = [labels[name] for name in self.task.labels]
        return logits if numbers == sorted(numbers) else logits[:, numbers]

    def losses(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of each example, of shape (batch,)."""
        inputs = to_device(batch, model.device)
        labels = inputs.pop("labels")
        return losses_of(self.task, self.scored(model, inputs).float(), labels)

    def count(self, batch: dict[str, torch.Tensor]) -> int:
        """Return the number of examples."""
        return len(batch["labels"])

    def calibration(self, options: GlueOptions) -> list[dict] | None:
        """Return the first training examples as calibration batches of one example."""
        return calibration_batches(self.rows[: options.adapter.merge_calibration_samples])

    def logits(self, options: GlueOptions, model: PeftModel, rows: list[dict], check: Check) -> torch.Tensor:
        """Return the logits of examples on the CPU in float64, of shape examples x labels."""
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        found: list[torch.Tensor] = []
        for batch in DataLoader(inputs, options.training.eval_batch_size, collate_fn=self.collate):  # type: ignore[arg-type]
            check()
            found += self.scored(model, to_device(batch, model.device)).double().cpu()
        return torch.stack(found) if found else torch.empty(0, len(self.task.labels) or 1)

    def all_logits(self, options: GlueOptions, model: PeftModel, rows: list[dict], check: Check) -> torch.Tensor:
        """Return the logits of all examples (examples x labels) as `logits` does; every process computes its share."""
        return torch.stack(in_order(list(self.logits(options, model, mine(rows), check))))

    def compared(self, logits: torch.Tensor, rows: list[dict]) -> tuple[list[float], dict[str, float]]:
        """Return the loss of each example, and the task's metrics, given logits (examples x labels)."""
        labels = torch.tensor([row["labels"] for row in rows])
        metrics = scores(self.task, predicted(self.task, logits.numpy()), labels.numpy())
        return losses_of(self.task, logits, labels).tolist(), metrics

    def evaluated(self, options: GlueOptions, model: PeftModel, rows: list[dict], check: Check) -> dict[str, float]:
        """Return the mean loss and the task's metrics; every process computes its share."""
        losses, metrics = self.compared(self.all_logits(options, model, rows, check), rows)
        return {"loss": math.fsum(losses) / len(losses), **metrics}

    def validation(self, options: GlueOptions, model: PeftModel, check: Check) -> dict[str, float]:
        """Return loss and metrics on the first validation split."""
        return self.evaluated(options, model, self.sets["validation" + self.task.parts[0]], check)

    def figures(
        self, options: GlueOptions, model: PeftModel, check: Check, kind: str = "validation"
    ) -> dict[str, float]:
        """Return loss and metrics on every labeled split of a kind, `validation` or `test`.

        The names of metrics on MNLI's second (mismatched) split end in `_mm`.
        """
        figures: dict[str, float] = {}
        for part, end in zip(self.task.parts, ("", "_mm"), strict=False):
            rows = self.sets.get(kind + part, [])
            if rows and "labels" in rows[0]:
                found = self.evaluated(options, model, rows, check)
                figures |= {name + end: value for name, value in found.items()}
        return figures

    def measured(self, options: GlueOptions, model: PeftModel, check: Check) -> tuple[list[float], dict]:
        """Return the loss of each test example, and the task's metrics; only this process computes both."""
        rows = self.sets["test"]
        return self.compared(self.logits(options, model, rows, check), rows)

    def predict(self, options: GlueOptions, model: PeftModel, check: Check) -> dict[str, list[str]]:
        """Return the lines of `predict_results_<task>.txt` for each test split, as run_glue.py writes them."""
        task, files = self.task, {}
        for file, rows in self.predictions(options).items():
            logits = self.all_logits(options, model, rows, check)
            lines = [
                f"{i}\t{task.labels[p] if task.labels else f'{p:.3f}'}"
                for i, p in enumerate(predicted(task, logits.numpy()))
            ]
            files[file] = ["index\tprediction", *lines]
        return files

    def predictions(self, options: GlueOptions) -> dict[str, list[dict]]:
        """Return the encoded examples of each test split by the name of its file of predictions."""
        begin = f"predict_results_{options.data.task_name}"
        tests = {name: rows for name, rows in self.sets.items() if name.startswith("test")}
        return {f"{begin}{name.removeprefix('test')}.txt": rows for name, rows in tests.items()}

    def files(self, options: GlueOptions) -> list[str]:
        """Return the names of the files that the options ask for, in addition to the files of every run."""
        return [*super().files(options), *self.predictions(options)]

    def facts(self, options: GlueOptions, model: PeftModel, check: Check) -> dict[str, Any]:
        """Return task, model, numbers of examples and the metrics on labeled test examples."""
        return {
            "task": options.data.task_name,
            "model_name_or_path": options.model.model_name_or_path,
            "train_examples": len(self.rows),
            "validation_examples": sum(len(self.sets[name]) for name in self.sets if name.startswith("validation")),
            "test": self.figures(options, model, check, "test") or None,
        }
