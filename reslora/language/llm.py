"""`train_llm.py`: a causal model learns a task of the paper, and the merges are compared by its answers."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import prepare_model_for_kbit_training
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..common.assets import ASSETS
from ..common.errors import InvalidArgument, refused_as
from ..common.methods import METHODS
from ..common.signals import StopRequest
from ..files import write_json
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
from .llm_tasks import TASKS, Example, file_form, read_examples
from .llm_trainer import Encoder, LlmTrainer, calibration_batches, encode_training, say
from .results import export, merge_table, table_text, write_results
from .trainer import attach, put_control_on, total_steps

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

CAUSAL_MODEL = "give a folder or a name on the hub of a causal model"
UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
"""What transformers raises for a model that cannot be read."""
HELD_OUT = 500  # at most, of the training examples where a task has none for validation


# -- flags -------------------------------------------------------------------------------------------------------------


@dataclass
class TaskArguments:
    """Which model is trained on what."""

    model_name_or_path: str = field(
        default=str(BUNDLED_MODEL),
        metadata={"help": "causal model, folder or name on the hub; default: the bundled one"},
    )
    task: str = field(default="svamp", metadata={"help": "gsm8k, svamp, mathqa, metamathqa or hellaswag"})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "folder with train.jsonl, validation.jsonl, test.jsonl in the columns of the hub's data set"},
    )
    revision: str | None = field(default=None, metadata={"help": "revision of the model on the hub"})
    cache_dir: str | None = field(default=None, metadata={"help": "where downloads are kept"})
    dtype: str = field(
        default="auto",
        metadata={
            "choices": ["auto", "float32", "bfloat16", "float16"],
            "help": "of the frozen model, the adapter is float32; auto: float32, or that of --bf16 and --fp16",
        },
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "quantise the frozen model to NF4 (QLoRA)"})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "train on that many examples, drawn at random (metamathqa: 40000)"}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "validate on the first examples only"})
    max_test_samples: int | None = field(default=None, metadata={"help": "test on the first examples only"})
    max_length: int = field(
        default=512, metadata={"help": "training examples of more tokens, prompt and answer, are left out"}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer generated"})
    eval_accuracy: bool = field(
        default=False, metadata={"help": "generate answers in validation too, not only in the final test"}
    )

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

    output_dir: str = field(default="runs/llm", metadata={"help": "folder of the run"})
    learning_rate: float = field(default=1e-4, metadata={"help": "highest learning rate"})


def parse(
    argv: Sequence[str] | None, description: str | None = None
) -> tuple[TaskArguments, MethodArguments, LlmTrainingArguments]:
    """Flags, with whatever can be refused before a model is loaded refused."""
    types = (TaskArguments, MethodArguments, LlmTrainingArguments)
    parser = build_parser(types, PROG, description)
    task, method, training = parse_arguments(parser, argv, BUNDLED, deepspeed_config=str(ZERO2_OFFLOAD))
    if task.load_in_4bit and method.merge_and_save:
        raise InvalidArgument(
            "--merge_and_save",
            "a 4-bit model cannot hold the sum",
            "leave it out, and merge peft/ into the whole model",
        )
    if task.load_in_4bit and not METHODS[method.method].quantised:
        raise InvalidArgument(
            f"--method {method.method}", "PEFT has it for whole weights only", "leave --load_in_4bit out"
        )
    best = str(training.metric_for_best_model or "").removeprefix("eval_")
    if best not in ("", "loss", "accuracy"):
        raise InvalidArgument(f"--metric_for_best_model {best}", "unknown", "choose loss or accuracy")
    task.eval_accuracy |= best == "accuracy"
    return task, method, training


# -- data --------------------------------------------------------------------------------------------------------------


def load_examples(arguments: TaskArguments, training: LlmTrainingArguments) -> dict[str, list[Example]]:
    """Examples for `train`, `validation` and `test`; at least one of the first and the last.

    Where a task has no validation examples and the run is to validate, a part of the training examples is held out: a
    checkpoint is never chosen by what it is tested on.
    """
    source = (arguments.data_dir, arguments.cache_dir)
    found = {split: read_examples(arguments.task, split, *source) for split in ("train", "validation", "test")}
    found["test"] = found["test"] or found["validation"]
    for split in ("train", "test"):
        if not found[split]:
            given = f"--data_dir {arguments.data_dir}" if arguments.data_dir else f"--task {arguments.task}"
            problem = f"no {split} examples" + ("" if split == "train" else " and no validation examples")
            raise InvalidArgument(given, problem, file_form(arguments.task))
    order = torch.randperm(len(found["train"]), generator=torch.Generator().manual_seed(training.seed)).tolist()
    if not found["validation"] or found["validation"] is found["test"]:
        held_out = _held_out(arguments, len(order)) if training.eval_strategy != "no" else 0
        found["validation"] = [found["train"][i] for i in sorted(order[len(order) - held_out :])]
        order = order[: len(order) - held_out]
    limit = arguments.max_train_samples
    found["train"] = [found["train"][i] for i in (sorted(order) if limit is None else order[:limit])]
    found["validation"] = found["validation"][: arguments.max_eval_samples]
    found["test"] = found["test"][: arguments.max_test_samples]
    return found


def _held_out(arguments: TaskArguments, count: int) -> int:
    """How many training examples are held out for validation: a tenth."""
    if count < 2:
        raise InvalidArgument(
            f"--eval_strategy with {count} training example", "there is none to validate on", file_form(arguments.task)
        )
    held_out = min(max(1, count // 10), HELD_OUT)
    say(f"{held_out} of {count} training examples are held out for validation: there are none for it alone")
    return held_out


# -- model -------------------------------------------------------------------------------------------------------------


def load_tokenizer(task: TaskArguments) -> Tokenizer:
    """The tokenizer; `InvalidArgument` for what is no causal model, before anything large is read."""
    name = task.model_name_or_path
    flag = f"--model_name_or_path {name}"
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InvalidArgument(flag, "no such folder", "give one in transformers' format, or a name on the hub")
    with refused_as(flag, CAUSAL_MODEL, UNREADABLE):
        config = AutoConfig.from_pretrained(name, **source(task))
        classes = config.architectures or []
        if config.is_encoder_decoder or not any(c.endswith(("ForCausalLM", "LMHeadModel")) for c in classes):
            raise ValueError(f"a {', '.join(classes) or config.model_type}, no causal language model")
        tokenizer = AutoTokenizer.from_pretrained(name, **source(task))
    if tokenizer.eos_token_id is None:
        raise InvalidArgument(flag, "its tokenizer has no end-of-sequence token", "set eos_token in its configuration")
    return tokenizer


def load_model(task: TaskArguments, training: LlmTrainingArguments) -> PreTrainedModel:
    """The model that will be frozen."""
    with refused_as(f"--model_name_or_path {task.model_name_or_path}", CAUSAL_MODEL, UNREADABLE):
        model = AutoModelForCausalLM.from_pretrained(
            task.model_name_or_path, **source(task), **precision(task, training)
        )
    if task.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def source(task: TaskArguments) -> dict:
    """Keyword arguments of every `from_pretrained`."""
    return {"revision": task.revision or "main", "cache_dir": task.cache_dir}


def precision(task: TaskArguments, training: LlmTrainingArguments) -> dict:
    """Keyword arguments of `from_pretrained` for dtype and quantisation."""
    automatic = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    dtype = getattr(torch, automatic if task.dtype == "auto" else task.dtype)
    if not task.load_in_4bit:
        return {"dtype": dtype}
    compute = dtype if dtype != torch.float32 else torch.bfloat16
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"dtype": compute, "quantization_config": quantisation, "device_map": {"": training.device}}


def check_positions(model: PreTrainedModel, encoder: Encoder, examples: list[Example], new_tokens: int) -> None:
    """Refuse to generate past the positions that the model knows."""
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    longest = max(len(encoder.prompt(example)) for example in examples)
    if longest + new_tokens > limit:
        raise InvalidArgument(
            f"--max_new_tokens {new_tokens}",
            f"the longest prompt has {longest} tokens and the model {limit} positions",
            f"give at most {limit - longest}",
        )


# -- the run -----------------------------------------------------------------------------------------------------------


def build_trainer(
    task: TaskArguments, method: MethodArguments, training: LlmTrainingArguments, stop: StopRequest | None = None
) -> tuple[LlmTrainer, list[dict[str, list[int]]]]:
    """Data, model and adapter as a trainer; and the training rows."""
    encoder = Encoder(load_tokenizer(task))
    examples = load_examples(task, training)
    model = load_model(task, training)
    rows = encode_training(encoder, examples["train"], task.max_length)
    check_positions(model, encoder, examples["test"] + examples["validation"], task.max_new_tokens)
    torch.manual_seed(training.seed)
    model = attach(model, method, total_steps(training, len(rows)))
    trainer = LlmTrainer(
        model,
        training,
        stop,
        encoder=encoder,
        examples=examples,
        max_new_tokens=task.max_new_tokens,
        eval_accuracy=task.eval_accuracy,
        train_dataset=rows,
        eval_dataset=[encoder(example) for example in examples["validation"]] or None,
        callbacks=[LogCallback(Path(training.output_dir) / "log.jsonl")],
    )
    size = training.per_device_eval_batch_size
    put_control_on(trainer, method, calibration_batches(rows, method.calibration_examples, size) or [])
    return trainer, rows


def finish(trainer: LlmTrainer, rows: list, task: TaskArguments, method: MethodArguments) -> dict:
    """The merge table, and the plain files."""
    output, size = Path(trainer.args.output_dir), trainer.args.per_device_eval_batch_size
    calibration = calibration_batches(rows, method.calibration_examples, size)
    table = merge_table(trainer.model, lambda: trainer.figures("test"), calibration)
    report = export(trainer.model, output, method, calibration, trainer.encoder.tokenizer)
    facts = {
        "task": task.task,
        "model_name_or_path": task.model_name_or_path,
        "train_examples": len(rows),
        "test_examples": len(trainer.examples["test"]),
    }
    return write_results(trainer, method, table, report, **facts)


def summary(results: dict, training: LlmTrainingArguments, method: MethodArguments, bundled: bool) -> str:
    """What came of the run, where it is, and how to go on."""
    output = training.output_dir
    lines = [
        "",
        "{task}, {method}, {steps} steps; on {test_examples} test examples:".format(**results),
        table_text(results["table"]),
        "",
        f"{output}/results.json  these figures, with the merge reports",
        f"{output}/peft/         plain LoRA: PeftModel.from_pretrained(model, folder)",
    ]
    if method.merge_and_save:
        lines.append(f"{output}/merged/       merged weights: AutoModelForCausalLM.from_pretrained(folder)")
    if bundled:
        lines += [
            "",
            "That was a tiny model on a generated task. A real one:",
            f"  accelerate launch {PROG} --model_name_or_path meta-llama/Llama-2-7b-hf --task svamp --bf16 \\",
            "      --method reslora --shortcut block --pre_num 4 --num_train_epochs 20 --output_dir runs/llama2-svamp",
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, stop: StopRequest | None = None, description: str | None = None) -> None:
    """Check, load, train, compare the merges and export."""
    task, method, training = parse(argv, description)
    flags = settings(task, method, training)
    check_resume(training.output_dir, training.resume_from_checkpoint, flags)
    trainer, rows = build_trainer(task, method, training, stop)
    flags["data"] = fingerprint(rows)
    check_data(training.output_dir, training.resume_from_checkpoint, flags["data"])
    if training.should_save:
        write_json(Path(training.output_dir) / "config.json", flags)
        trainer.model.print_trainable_parameters()
    trainer.stopping.check("stopped before training began")
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    results = finish(trainer, rows, task, method)
    say(summary(results, training, method, bundled=task.model_name_or_path == str(BUNDLED_MODEL)))
