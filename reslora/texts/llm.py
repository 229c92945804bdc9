"""`train_llm.py`: fine-tune a causal model on a task of the paper, and compare the merges by its answers."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.pytorch_utils import Conv1D

from ..errors import InvalidArgument, refused_as
from ..formatting import is_or_are
from ..options.texts import ExperimentOptions, LlmOptions, LlmTaskOptions, TrainingOptions
from ..runtime.processes import all_gather, say
from ..seeds import derive
from .adapter import UNREADABLE
from .llm_tasks import Example, file_form, read_examples
from .llm_tokens import (
    IGNORED,
    Encoder,
    calibration_batches,
    count_right,
    encode_training,
    example_losses,
    generate,
    token_losses,
)
from .split import Parts, parts_of
from .study import Check, Texts, mine

CAUSAL_MODEL = "give a folder or a name on the hub of a causal model"
PROG = "train_llm.py"
NF4_BYTES = 0.516  # bytes of a weight in NF4 with its share of the scales, which are quantized too
HELD_OUT = 500  # maximum number of validation examples held out of the training examples


# -- data --------------------------------------------------------------------------------------------------------------


def load_examples(arguments: LlmTaskOptions, seed: int, validates: bool) -> dict[str, list[Example]]:
    """Return the examples of a single run by split; `train` and `test` have at least one example.

    A task without test examples is tested on its validation examples. If no validation examples remain, and the run
    `validates` during training, a tenth of the training examples is held out for validation. So a checkpoint is never
    chosen on the test examples.
    """
    found = all_examples(arguments)
    found["test"] = found["test"] or found["validation"]
    if not found["test"]:
        raise _lacks(arguments, "no test examples and no validation examples")
    order = torch.randperm(len(found["train"]), generator=torch.Generator().manual_seed(seed)).tolist()
    if not found["validation"] or found["validation"] is found["test"]:
        held_out = _validation_count(len(order)) if validates else 0
        found["validation"] = [found["train"][i] for i in sorted(order[len(order) - held_out :])]
        order = order[: len(order) - held_out]
    limit = arguments.max_train_samples
    found["train"] = [found["train"][i] for i in (sorted(order) if limit is None else order[:limit])]
    found["validation"] = found["validation"][: arguments.max_eval_samples]
    found["test"] = found["test"][: arguments.max_test_samples]
    return found


def all_examples(arguments: LlmTaskOptions) -> dict[str, list[Example]]:
    """Return all examples of `train` (at least one), `validation` and `test`."""
    source = (arguments.data_dir, arguments.cache_dir)
    found = {split: read_examples(arguments.task, split, *source) for split in ("train", "validation", "test")}
    if not found["train"]:
        raise _lacks(arguments, "no train examples")
    return found


def _lacks(arguments: LlmTaskOptions, problem: str) -> InvalidArgument:
    given = f"--data_dir {arguments.data_dir}" if arguments.data_dir else f"--task {arguments.task}"
    return InvalidArgument(given, problem, file_form(arguments.task))


def _validation_count(count: int) -> int:
    """Return the number of training examples to hold out for validation: a tenth, but at most HELD_OUT.

    Raises `InvalidArgument` for fewer than two training examples.
    """
    if count < 2:
        fix = "add validation.jsonl, or more examples to train.jsonl; or give --eval_strategy no"
        raise InvalidArgument(f"--eval_strategy with {count} training example", "there is none to validate on", fix)
    held_out = min(max(1, count // 10), HELD_OUT)
    say(f"{held_out} of {count} training examples {is_or_are(held_out)} held out, because there is no validation file")
    return held_out


# -- model -------------------------------------------------------------------------------------------------------------


def load_tokenizer(task: LlmTaskOptions) -> Tokenizer:
    """Return the tokenizer.

    Raises `InvalidArgument` if the model is not a causal language model, before large files are read.
    """
    name = task.model_name_or_path
    flag = f"--model_name_or_path {name}"
    with refused_as(flag, CAUSAL_MODEL, UNREADABLE):
        config = AutoConfig.from_pretrained(name, **source(task))
        classes = config.architectures or []
        if config.is_encoder_decoder or not any(c.endswith(("ForCausalLM", "LMHeadModel")) for c in classes):
            raise ValueError(f"a {', '.join(classes) or config.model_type}, which is not a causal language model")
        tokenizer = AutoTokenizer.from_pretrained(name, **source(task))
    if tokenizer.eos_token_id is None:
        raise InvalidArgument(flag, "its tokenizer has no end-of-sequence token", "set eos_token in its configuration")
    return tokenizer


def load_model(task: LlmTaskOptions, training: TrainingOptions, device: torch.device) -> PreTrainedModel:
    """Return the base model, which will be frozen."""
    with refused_as(f"--model_name_or_path {task.model_name_or_path}", CAUSAL_MODEL, UNREADABLE):
        model = AutoModelForCausalLM.from_pretrained(
            task.model_name_or_path, **source(task), **precision(task, training, device)
        )
    if task.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def source(task: LlmTaskOptions) -> dict:
    """Return the keyword arguments common to all `from_pretrained` calls."""
    return {"revision": task.revision or "main", "cache_dir": task.cache_dir}


def dtype_of(task: LlmTaskOptions, training: TrainingOptions) -> torch.dtype:
    """Return the data type of the frozen weights."""
    automatic = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    return getattr(torch, automatic if task.dtype == "auto" else task.dtype)


def precision(task: LlmTaskOptions, training: TrainingOptions, device: torch.device) -> dict:
    """Return the keyword arguments of `from_pretrained` for dtype and quantization."""
    dtype = dtype_of(task, training)
    if not task.load_in_4bit:
        return {"dtype": dtype}
    compute = torch.bfloat16 if task.dtype == "auto" and dtype == torch.float32 else dtype
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"dtype": compute, "quantization_config": quantisation, "device_map": {"": device}}


# -- the run -----------------------------------------------------------------------------------------------------------


class LlmTexts(Texts):
    """Training and evaluation on a task of the paper."""

    prog = PROG
    real = (
        "--model meta-llama/Llama-2-7b-hf --task svamp --bf16 --shortcut block --pre_num 4 --num_train_epochs 20 "
        "--output runs/llama2-svamp"
    )
    data_options = ("data_dir", "eval_strategy")  # examples may be held out for validation
    encoder: Encoder
    examples: dict[str, list[Example]]
    """Examples by split."""
    rows: list[dict[str, list[int]]]
    """Token ids and labels of the training examples."""

    def model_of(self, options: LlmOptions) -> tuple[str, str | None]:
        """Return the model's name and its revision."""
        return options.task.model_name_or_path, options.task.revision

    def read(self, options: LlmOptions) -> None:
        """Read and encode the examples of a single run."""
        task, validates = options.task, options.validation.eval_strategy != "no"
        self.tokenizer = load_tokenizer(task)
        self._encode(task, load_examples(task, options.training.seed, validates))

    def _encode(self, task: LlmTaskOptions, examples: dict[str, list[Example]]) -> None:
        self.encoder, self.examples = Encoder(self.tokenizer), examples
        self.rows = encode_training(self.encoder, examples["train"], task.max_length)

    def parts(self, options: LlmOptions, shares: ExperimentOptions) -> Parts:
        """Return all examples divided into a training, a selection and a test split.

        Near-duplicates are found by their prompts.
        """
        task = options.task
        found = all_examples(task)
        select, test = (found["validation"], found["test"]) if found["test"] else ([], found["validation"])
        select, test = select[: task.max_eval_samples], test[: task.max_test_samples]
        files = {"train": found["train"], "select": select, "test": test}
        parts = parts_of(files, lambda example: example.prompt, shares)
        return parts.limited(task.max_eval_samples, task.max_test_samples)

    def prepare(self, options: LlmOptions, parts: Parts) -> None:
        """Store and encode the examples that all arms use."""
        task, examples = options.task, list(parts.train)
        if task.max_train_samples is not None:  # independent of the seed: all arms train on the same examples
            examples = sorted(examples, key=lambda example: derive("sample", example))[: task.max_train_samples]
        found = {"train": examples, "validation": list(parts.select), "test": list(parts.test)}
        self.tokenizer = load_tokenizer(task)
        self._encode(task, found)

    def load(self, options: LlmOptions, device: torch.device) -> PreTrainedModel:
        """Return the base model, and remove validation examples that are too long for the model."""
        model = load_model(options.task, options.training, device)
        self._check_positions(model, options.task)
        return model

    def empty(self, options: LlmOptions) -> PreTrainedModel:
        """Return the base model without its weights."""
        task = options.task
        config = AutoConfig.from_pretrained(task.model_name_or_path, **source(task))
        return AutoModelForCausalLM.from_config(config, dtype=dtype_of(task, options.training))

    def frozen_bytes(self, options: LlmOptions, model: PeftModel) -> float:
        """Return the bytes of the frozen weights; --load_in_4bit stores all but the linear layers in float32."""
        if not options.task.load_in_4bit:
            return super().frozen_bytes(options, model)
        head = model.get_output_embeddings()
        kept = getattr(head, "base_layer", head)  # the output layer is not quantized
        linear = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, Conv1D)) and layer is not kept]
        quantized = {layer.weight for layer in linear}
        frozen = [value for value in model.parameters() if not value.requires_grad]
        return sum(value.numel() * (NF4_BYTES if value in quantized else 4) for value in frozen)

    def _check_positions(self, model: PreTrainedModel, task: LlmTaskOptions) -> None:
        """Remove validation examples with more tokens than the model has positions; print their number and the first.

        Raises `InvalidArgument` if all validation examples, a training or test example, or a prompt with its generated
        answer would have too many tokens. Test examples are never removed, so that metrics stay comparable.
        """
        limit = getattr(model.config, "max_position_embeddings", None) or math.inf
        encoder, validation = self.encoder, self.examples["validation"]
        long = [example for example in validation if len(encoder(example)["input_ids"]) > limit]
        if long:
            if len(long) == len(validation):
                problem = f"every validation example has more tokens than the model has positions ({limit})"
                raise InvalidArgument(f"--task {task.task}", problem, "give shorter ones")
            count = f"{len(long)} of {len(validation)} validation examples {is_or_are(len(long))}"
            say(f"{count} longer than the model's {limit} positions: left out (for example {long[0].place})")
            self.examples["validation"] = [example for example in validation if example not in long]
        measured, new = self.examples["test"] + self.examples["validation"], task.max_new_tokens
        answered = measured if task.eval_accuracy else self.examples["test"]
        prompt = max(len(encoder.prompt(example)) for example in answered)
        trained = max(len(row["input_ids"]) for row in self.rows)
        whole, place = max((len(encoder(each)["input_ids"]), each.place) for each in measured)
        for needed, argument, what, fix in (
            (trained, f"--max_length {task.max_length}", f"a training example has {trained}", f"give at most {limit}"),
            (whole, place or f"--task {task.task}", f"this example has {whole}", "leave it out, or cut it"),
            (
                prompt + new,
                f"--max_new_tokens {new}",
                f"the longest prompt has {prompt}",
                f"give at most {limit - prompt}",
            ),
        ):
            if needed > limit:
                raise InvalidArgument(argument, f"{what} tokens, and the model has only {limit} positions", fix)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return tokens, mask and labels of a batch, each batch x tokens, padded on the right."""
        return self.encoder.collate(rows)

    def losses(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of each answer token in the batch, of shape (answer tokens,)."""
        return token_losses(model, batch)

    def count(self, batch: dict[str, torch.Tensor]) -> int:
        """Return the number of answer tokens."""
        return int((batch["labels"] != IGNORED).sum())

    def calibration(self, options: LlmOptions) -> list[dict] | None:
        """Return training examples as calibration batches."""
        return calibration_batches(
            self.rows, options.adapter.merge_calibration_samples, options.training.eval_batch_size
        )

    def validation(self, options: LlmOptions, model: PeftModel, check: Check) -> dict[str, float]:
        """Return the loss per answer token, and with --eval_accuracy the accuracy."""
        return self._figures("validation", options, model, check, options.task.eval_accuracy)

    def figures(self, options: LlmOptions, model: PeftModel, check: Check) -> Mapping[str, float]:
        """Return the loss per answer token and the accuracy on the test examples."""
        return self._figures("test", options, model, check, accuracy=True)

    def _figures(
        self, split: str, options: LlmOptions, model: PeftModel, check: Check, accuracy: bool
    ) -> dict[str, float]:
        losses, right = self._evaluated(mine(self.examples[split]), options, model, check, accuracy)
        sums = zip(*all_gather((sum(map(sum, losses)), sum(map(len, losses)), right, len(losses))), strict=True)
        loss, tokens, right, examples = map(sum, sums)
        return {"loss": loss / tokens} | ({"accuracy": right / examples} if accuracy else {})

    def measured(self, options: LlmOptions, model: PeftModel, check: Check) -> tuple[list[float], dict]:
        """Return the mean loss of each test example's answer tokens, and the accuracy."""
        losses, right = self._evaluated(self.examples["test"], options, model, check, accuracy=True)
        return [math.fsum(own) / len(own) for own in losses], {"accuracy": right / len(losses)}

    def _evaluated(
        self, examples: list[Example], options: LlmOptions, model: PeftModel, check: Check, accuracy: bool
    ) -> tuple[list[list[float]], int]:
        """Return the losses of each example's answer tokens, and the number of correct answers."""
        size, losses, right = options.training.eval_batch_size, [[0.0]] * len(examples), 0
        rows = [self.encoder(example) for example in examples]
        order = sorted(range(len(examples)), key=lambda number: len(rows[number]["input_ids"]))
        for start in range(0, len(order), size):
            check()
            numbers = order[start : start + size]
            found = example_losses(model, self.encoder, [rows[number] for number in numbers])
            for number, own in zip(numbers, found, strict=True):
                losses[number] = own.tolist()
            if accuracy:
                batch = [examples[number] for number in numbers]
                right += count_right(generate(model, self.encoder, batch, options.task.max_new_tokens), batch)
        return losses, right

    def facts(self, options: LlmOptions, model: PeftModel, check: Check) -> dict[str, Any]:
        """Return the task, the model and the numbers of examples."""
        return {
            "task": options.task.task,
            "model_name_or_path": options.task.model_name_or_path,
            "train_examples": len(self.rows),
            "test_examples": len(self.examples["test"]),
        }
