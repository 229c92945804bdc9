"""`train_glue.py`: RoBERTa or BERT learns a task of GLUE, and the merges are compared by its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    set_seed,
)
from transformers.utils import logging

from ..common.assets import ASSETS
from ..common.errors import InvalidArgument
from ..common.signals import StopRequest
from ..files import replacing, write_json
from .arguments import (
    AdapterTrainingArguments,
    MethodArguments,
    build_parser,
    check_data,
    check_resume,
    check_whole,
    fingerprint,
    parse_arguments,
    settings,
)
from .callbacks import LogCallback
from .glue_tasks import (
    TASKS,
    Columns,
    HubDataset,
    Task,
    check_rows,
    file_form,
    predicted,
    read_folder,
    read_hub,
    scores,
)
from .results import export, merge_table, table_text, write_results
from .trainer import AdapterTrainer, attach, put_control_on, total_steps

PROG = "train_glue.py"
BUNDLED_MODEL = ASSETS / "tiny-roberta"
BUNDLED_TASK = BUNDLED_MODEL / "task"
BUNDLED = {"num_train_epochs": 12, "learning_rate": 3e-3, "per_device_train_batch_size": 16}


# -- flags -------------------------------------------------------------------------------------------------------------


@dataclass
class DataArguments:
    """The task and where its data are."""

    task_name: str | None = field(default=None, metadata={"choices": list(TASKS), "help": "task of GLUE"})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "folder with train.jsonl, validation.jsonl and maybe test.jsonl; default: the hub's GLUE"},
    )
    dataset_name: str = field(default="nyu-mll/glue", metadata={"help": "data set on the hub, or a folder"})
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "configuration of that data set; default: the task's name"}
    )
    max_seq_length: int = field(default=128, metadata={"help": "longer inputs are cut to that many tokens"})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "pad every input to it, instead of each batch to its longest"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "train on the first so many examples"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate on the first so many"})
    max_predict_samples: int | None = field(default=None, metadata={"help": "predict the first so many"})

    def __post_init__(self) -> None:
        check_whole("max_seq_length", self.max_seq_length, 4)
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)


@dataclass
class ModelArguments:
    """The model that is fine-tuned."""

    model_name_or_path: str = field(
        default=str(BUNDLED_MODEL), metadata={"help": "encoder model: folder or name on the hub; default: the bundled"}
    )
    config_name: str | None = field(default=None, metadata={"help": "configuration, if it is not the model's"})
    tokenizer_name: str | None = field(default=None, metadata={"help": "tokenizer, if it is not the model's"})
    cache_dir: str | None = field(default=None, metadata={"help": "where downloaded models and data are kept"})
    model_revision: str = field(default="main", metadata={"help": "revision of the model on the hub"})
    token: str | None = field(default=None, metadata={"help": "token for the hub"})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "replace a classification head that has another number of labels"}
    )


@dataclass
class GlueTrainingArguments(AdapterTrainingArguments):
    """`AdapterTrainingArguments` with the learning rate and epochs of LoRA on RoBERTa-large (Hu et al., 2022)."""

    output_dir: str = field(default="runs/glue", metadata={"help": "folder of the run"})
    learning_rate: float = field(default=4e-4, metadata={"help": "highest learning rate"})
    num_train_epochs: float = field(default=10.0, metadata={"help": "passes over the training examples"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate: no, steps or epoch"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to write a checkpoint: no, steps or epoch"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints kept"})
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"nargs": "+", "help": "names of the model's label arguments"}
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


def parse(argv: Sequence[str] | None, description: str | None = None) -> Arguments:
    """Flags with every default filled in."""
    types = (DataArguments, ModelArguments, MethodArguments, GlueTrainingArguments)
    arguments = Arguments(*parse_arguments(build_parser(types, PROG, description), argv, BUNDLED))
    data, folder = arguments.data, Path(arguments.model.model_name_or_path)
    if data.task_name is None and data.data_dir is None and folder.resolve() == BUNDLED_MODEL:
        data.task_name, data.data_dir = "cola", str(BUNDLED_TASK)
    if data.task_name is None:
        raise InvalidArgument("--task_name", "missing", f"give one of {', '.join(TASKS)}")
    if not folder.is_dir() and (folder.exists() or str(folder).startswith((".", "/", "~")) or len(folder.parts) > 2):
        raise InvalidArgument(
            f"--model_name_or_path {folder}", "no such folder", "give a transformers model or a name on the hub"
        )
    check_metric(arguments)
    arguments.training.dataloader_pin_memory &= torch.cuda.is_available()  # torch warns in every epoch otherwise
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


# -- data --------------------------------------------------------------------------------------------------------------


def read_splits(arguments: Arguments) -> dict[str, Columns]:
    """Texts and labels by split (train, validation..., test... where there is one), every row checked."""
    data, task = arguments.data, arguments.task
    wanted = arguments.training.do_predict
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_predict_samples}
    splits = {}
    for kind, limit in limits.items():
        for part in task.parts if kind != "train" else ("",):
            if kind == "test" and not (wanted or data.data_dir):
                continue  # the hub's are long, and their labels are not public
            where, rows = _read(arguments, kind + part)
            if rows is None and kind == "test" and not wanted:
                continue
            if rows is None:
                raise InvalidArgument(where, f"no split {kind + part}", file_form(task))
            if not rows:
                raise InvalidArgument(where, "no rows", "give a split that has some, or another --data_dir")
            splits[kind + part] = check_rows(task, where, rows[:limit], labelled=kind != "test")
    return splits


def _read(arguments: Arguments, split: str) -> tuple[str, list[dict] | None]:
    data, model = arguments.data, arguments.model
    if data.data_dir:
        return read_folder(arguments.task, data.data_dir, split)
    name = data.dataset_config_name or data.task_name
    return read_hub(arguments.task, HubDataset(data.dataset_name, name, model.cache_dir, model.token), split)


def encode(arguments: Arguments, tokenizer, columns: Columns) -> Dataset:
    """Token ids and labels as a `datasets.Dataset`."""
    task, limit = arguments.task, min(arguments.data.max_seq_length, tokenizer.model_max_length)
    texts = [columns[name] for name in task.columns]
    padding = "max_length" if arguments.data.pad_to_max_length else False
    encoded = dict(tokenizer(*texts, truncation=True, max_length=limit, padding=padding))
    if "label" in columns:
        encoded["labels"] = [int(label) if task.labels else float(label) for label in columns["label"]]
    return Dataset.from_dict(encoded)


# -- model -------------------------------------------------------------------------------------------------------------


def load_model(arguments: Arguments):
    """Tokenizer, float32 model, names of its classifier: modules outside the pretrained part, or without weights."""
    given, task = arguments.model, arguments.task
    common = {"cache_dir": given.cache_dir, "revision": given.model_revision, "token": given.token}
    names = dict(enumerate(task.labels)) if task.labels else {0: "score"}
    kind = "single_label_classification" if task.labels else "regression"
    logging.set_verbosity_error()  # its report that the classifier has no weights yet is no news
    logging.disable_progress_bar()
    try:
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
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        message = " ".join(str(error).split())
        fix = "give --ignore_mismatched_sizes" if "ignore_mismatched_sizes" in message else "check name and files"
        raise InvalidArgument(
            f"--model_name_or_path {given.model_name_or_path}", f"cannot be loaded ({message[:200]})", fix
        ) from None
    finally:
        logging.set_verbosity_warning()
        logging.enable_progress_bar()
    # These models take any keyword argument and average over their own batch. Trainer would take the first for a sign
    # that they divide by the number it passes, and leave the loss scaled by accumulation steps and processes.
    model.accepts_loss_kwargs = False
    check_fit(arguments, tokenizer, model)
    missing = {part for key in loaded["missing_keys"] for part in key.split(".")}
    classifier = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    classifier = [name for name in classifier if any(True for _ in model.get_submodule(name).parameters())]
    return tokenizer, model, classifier + (["pooler"] if "pooler" in missing else [])


def check_fit(arguments: Arguments, tokenizer, model) -> None:
    """Tells the tokenizer how many positions the model has, and refuses a tokenizer of another model."""
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if embeddings is not None:
        reserved = 0 if embeddings.padding_idx is None else embeddings.padding_idx + 1  # RoBERTa counts from there
        tokenizer.model_max_length = min(tokenizer.model_max_length, embeddings.num_embeddings - reserved)
    rows = model.get_input_embeddings().num_embeddings
    flag = f"--tokenizer_name {arguments.model.tokenizer_name or arguments.model.model_name_or_path}"
    if len(tokenizer) > rows:
        raise InvalidArgument(flag, f"{len(tokenizer)} tokens, and the model has {rows}", "give the model's own")
    if tokenizer.pad_token_id is None:
        raise InvalidArgument(flag, "it has no padding token", "give an encoder such as RoBERTa or BERT")


def build_trainer(
    arguments: Arguments, tokenizer, model, sets: dict[str, Dataset], stop: StopRequest | None = None
) -> AdapterTrainer:
    """The trainer, with `log.jsonl`; while training it evaluates on the first validation split."""
    task, output = arguments.task, Path(arguments.training.output_dir)
    return AdapterTrainer(
        model,
        arguments.training,
        stop,
        train_dataset=sets["train"],
        eval_dataset=sets["validation" + task.parts[0]],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda result: scores(task, predicted(task, result.predictions), result.label_ids.reshape(-1)),
        callbacks=[LogCallback(output / "log.jsonl")],
    )


def calibration_batches(arguments: Arguments, examples, device: torch.device) -> list[dict] | None:
    """The first training examples as inputs of the model, one at a time: no padding enters the moments."""
    count = arguments.method.calibration_examples
    rows = (examples[i] for i in range(min(count, len(examples))))
    batches = []
    for row in rows:
        real = [i for i, keep in enumerate(row["attention_mask"]) if keep]
        inputs = {name: [value[i] for i in real] for name, value in row.items() if name != "labels"}
        batches.append({name: torch.tensor([value], device=device) for name, value in inputs.items()})
    return batches or None


# -- results -----------------------------------------------------------------------------------------------------------


def loss_of(task: Task, logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean loss over all examples; Trainer's own counts some twice when several processes share the last batch."""
    outputs, targets = torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)
    if task.labels:
        return torch.nn.functional.cross_entropy(outputs, targets).item()
    return torch.nn.functional.mse_loss(outputs.reshape(-1), targets.double()).item()


def evaluate(trainer: AdapterTrainer, task: Task, sets: dict, kind: str = "validation") -> dict[str, float]:
    """Loss and metrics on every labelled split of a kind; those of MNLI's second one end in `_mm`."""
    figures: dict[str, float] = {}
    for part, end in zip(task.parts, ("", "_mm"), strict=False):
        if kind + part in sets and "labels" in sets[kind + part].column_names:
            result = trainer.predict(sets[kind + part])
            labels = result.label_ids.reshape(-1)
            found = {"loss": loss_of(task, result.predictions, labels)}
            found |= scores(task, predicted(task, result.predictions), labels)
            figures |= {name + end: value for name, value in found.items()}
    return figures


def write_predictions(arguments: Arguments, trainer: AdapterTrainer, sets: dict) -> list[str]:
    """`predict_results_<task>.txt` for each test split, as run_glue.py writes them; returns the file names."""
    task, files = arguments.task, []
    for name, examples in sets.items():
        if not name.startswith("test"):
            continue
        inputs = examples.remove_columns([column for column in ("labels",) if column in examples.column_names])
        predictions = predicted(task, trainer.predict(inputs).predictions)
        lines = ["index\tprediction"]
        lines += [f"{i}\t{task.labels[p] if task.labels else f'{p:.3f}'}" for i, p in enumerate(predictions)]
        files.append(f"predict_results_{arguments.data.task_name}{name.removeprefix('test')}.txt")
        if trainer.is_world_process_zero():
            with replacing(Path(arguments.training.output_dir) / files[-1]) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def show_results(arguments: Arguments, results: dict, files: list[str]) -> None:
    """The merge table, what was written, and how to go on."""
    output = arguments.training.output_dir
    print("\n{task}, {method}, {steps} steps; on {validation_examples} validation examples:".format(**results))
    print(table_text(results["table"]))
    uses = {
        "results.json": "this table, with how each block was merged",
        "log.jsonl": "losses and metrics by step; TensorBoard: tensorboard --logdir " + output,
        "peft": "plain adapter: PeftModel.from_pretrained(model, folder)",
        "merged": "merged model: AutoModelForSequenceClassification.from_pretrained(folder)",
        **{name: "predictions for the test split" for name in files},
    }
    print(f"\n{output}/")
    for name, use in uses.items():
        if (Path(output) / name).exists():
            print(f"  {name:<26}{use}")
    if Path(arguments.model.model_name_or_path).resolve() == BUNDLED_MODEL:
        print(
            "\nWith a real model and task:\n"
            "  accelerate launch train_glue.py --model_name_or_path FacebookAI/roberta-large --task_name rte \\\n"
            "      --method reslora --shortcut middle --pre_num 4 --output_dir runs/rte"
        )


def finish(arguments: Arguments, trainer: AdapterTrainer, tokenizer, sets: dict) -> None:
    """Evaluates unmerged and merged, exports, predicts, and writes `results.json` last."""
    task, method, output = arguments.task, arguments.method, Path(arguments.training.output_dir)
    model = trainer.model
    batches = calibration_batches(arguments, sets["train"], trainer.args.device)
    table = merge_table(model, lambda: evaluate(trainer, task, sets), batches)
    report = export(model, output, method, batches, tokenizer)
    files = write_predictions(arguments, trainer, sets)
    facts = {
        "task": arguments.data.task_name,
        "model_name_or_path": arguments.model.model_name_or_path,
        "train_examples": len(sets["train"]),
        "validation_examples": sum(len(rows) for name, rows in sets.items() if name.startswith("validation")),
        "test": evaluate(trainer, task, sets, "test") or None,
    }
    results = write_results(trainer, method, table, report, **facts)
    if trainer.is_world_process_zero():
        show_results(arguments, results, files)


def main(argv: Sequence[str] | None = None, stop: StopRequest | None = None, description: str | None = None) -> None:
    """Read, check, attach, train, and show what each merge keeps."""
    arguments = parse(argv, description)
    training, flags = arguments.training, arguments.settings
    check_resume(training.output_dir, training.resume_from_checkpoint, flags)
    set_seed(training.seed)
    splits = read_splits(arguments)
    tokenizer, model, classifier = load_model(arguments)
    sets = {name: encode(arguments, tokenizer, columns) for name, columns in splits.items()}
    flags["data"] = fingerprint(zip(*splits["train"].values(), strict=True))
    check_data(training.output_dir, training.resume_from_checkpoint, flags["data"])
    steps = total_steps(training, len(sets["train"]))
    example = {"input_ids": torch.tensor([sets["train"][0]["input_ids"]])}
    adapted = attach(model, arguments.method, steps, example, modules_to_save=classifier)
    trainer = build_trainer(arguments, tokenizer, adapted, sets, stop)
    batches = calibration_batches(arguments, sets["train"], training.device)
    put_control_on(trainer, arguments.method, batches or [], example)
    if trainer.is_world_process_zero():
        write_json(Path(training.output_dir) / "config.json", flags)
    trainer.stopping.check("stopped before training began")
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    finish(arguments, trainer, tokenizer, sets)
