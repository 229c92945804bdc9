"""Fine-tune a language model with ResLoRA or a baseline on the paper's tasks, and compare the merges.

    accelerate launch train_llm.py
    accelerate launch train_llm.py --model_name_or_path meta-llama/Llama-2-7b-hf --task svamp \\
        --method reslora --shortcut block --pre_num 4

The first form trains a tiny bundled LLaMA on a small generated task, in a few minutes on two CPU cores; the second any
causal model. All flags of transformers' `TrainingArguments` are here and mean the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from reslora.arguments import (
    AdapterTrainingArguments,
    InvalidArgument,
    MethodArguments,
    check_resume,
    check_whole,
    first_line,
    parse_arguments,
    run_script,
    settings,
)
from reslora.chains import base_model
from reslora.files import write_json
from reslora.trainer import (
    AdapterTrainer,
    LogCallback,
    attach,
    export,
    merge_table,
    table_text,
    total_steps,
    write_results,
)

PROG = "train_llm.py"
ASSETS = Path(__file__).resolve().parent / "assets"
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

ANSWER = "The answer is"
IGNORED = -100  # label of the tokens that the loss leaves out


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


def parse(argv: Sequence[str] | None) -> tuple[TaskArguments, MethodArguments, LlmTrainingArguments]:
    """Flags, with whatever can be refused before a model is loaded refused."""
    types = (TaskArguments, MethodArguments, LlmTrainingArguments)
    task, method, training = parse_arguments(
        types, argv, prog=PROG, description=__doc__, bundled=BUNDLED, deepspeed_config=str(ZERO2_OFFLOAD)
    )
    if task.load_in_4bit and method.merge_and_save:
        raise InvalidArgument(
            "--merge_and_save",
            "a 4-bit model cannot hold the sum",
            "leave it out, and merge peft/ into the whole model",
        )
    if task.load_in_4bit and method.method in ("loha", "lokr"):
        raise InvalidArgument(
            f"--method {method.method}", "PEFT has it for whole weights only", "leave --load_in_4bit out"
        )
    best = str(training.metric_for_best_model or "").removeprefix("eval_")
    if best not in ("", "loss", "accuracy"):
        raise InvalidArgument(f"--metric_for_best_model {best}", "unknown", "choose loss or accuracy")
    task.eval_accuracy |= best == "accuracy"
    return task, method, training


# -- tasks: rows to prompts and answers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A prompt, and what is to be learnt: some reasoning, and an answer, which alone is compared."""

    prompt: str
    reasoning: str
    gold: str

    @property
    def answer(self) -> str:
        """The text that is trained on."""
        return f"{self.reasoning} {ANSWER} {self.gold}.".strip()


@dataclass(frozen=True)
class Task:
    """Where a task is on the hub, which columns it has, and how a row becomes an example."""

    hub: tuple[str, ...]
    columns: tuple[str, ...]
    example: Callable[[dict], Example]
    test_split: str = "test"
    tested_as: str | None = None
    """Another task, whose test rows are used (MetaMathQA is tested on GSM8K)."""


def svamp(row: dict) -> Example:
    answer = str(row["Answer"]).strip()
    _expect(to_number(answer) is not None, f"Answer {answer!r} is not a number")
    return Example(f"{row['Body'].strip()} {row['Question'].strip()}", f"{row['Equation']}.", answer)


def gsm8k(row: dict) -> Example:
    reasoning, mark, answer = re.sub(r"<<.*?>>", "", row["answer"]).rpartition("####")
    _expect(mark and to_number(answer) is not None, "answer has no number after '####'")
    return Example(row["question"].strip(), " ".join(reasoning.split()), answer.strip())


def metamathqa(row: dict) -> Example:
    reasoning, mark, answer = row["response"].rpartition(f"{ANSWER}:")
    _expect(bool(mark), f"response has no '{ANSWER}:'")
    return Example(row["query"].strip(), reasoning.strip(), answer.strip())


def mathqa(row: dict) -> Example:
    options, correct = row["options"], str(row["correct"]).strip()
    letters = re.findall(r"([a-e]) \)", options)
    _expect(correct in letters, f"correct {correct!r} is not one of the options {', '.join(letters)}")
    prompt = f"{row['Problem'].strip()}\nThere are {len(letters)} options: {options}\nPlease answer the correct option."
    reasoning = row["Rationale"].strip().strip('"').strip()
    return Example(prompt, f"{reasoning}.", correct)


def hellaswag(row: dict) -> Example:
    endings, label = row["endings"], str(row["label"]).strip()
    allowed = [str(number) for number in range(len(endings))]
    _expect(label in allowed, f"label {label!r} is outside 0 to {len(endings) - 1}")
    options = "\n".join(f"{number}: {ending}" for number, ending in enumerate(endings))
    prompt = (
        f'Here is a sentence to be continued: "{row["ctx"]}"\n'
        f"There are {len(endings)} options as an ending:\n{options}\n"
        f"Please select the correct option and answer with a number between 0 and {len(endings) - 1}."
    )
    return Example(prompt, "", label)


TASKS = {
    "gsm8k": Task(("openai/gsm8k", "main"), ("question", "answer"), gsm8k),
    "svamp": Task(("ChilleD/SVAMP",), ("Body", "Question", "Equation", "Answer"), svamp),
    "mathqa": Task(("allenai/math_qa",), ("Problem", "Rationale", "options", "correct"), mathqa),
    "metamathqa": Task(("meta-math/MetaMathQA",), ("query", "response"), metamathqa, tested_as="gsm8k"),
    "hellaswag": Task(("Rowan/hellaswag",), ("ctx", "endings", "label"), hellaswag, test_split="validation"),
}


class BadRow(ValueError):
    """A row that is no example of its task."""


def _expect(condition: object, problem: str) -> None:
    if not condition:
        raise BadRow(problem)


# -- answers -----------------------------------------------------------------------------------------------------------


def extract_answer(text: str) -> str | None:
    """What follows the last "The answer is", up to the full stop that ends its sentence; None without one."""
    _, mark, rest = text.rpartition(ANSWER)
    rest = rest.lstrip(": ").splitlines()
    return re.split(r"\.(?:\s|$)", rest[0])[0].strip() if mark and rest else None


_NUMBER = re.compile(
    r"(?P<sign>-?)"
    r"(?:(?:(?P<whole>\d+) )?(?P<top>\d+)/(?P<bottom>0*[1-9]\d*)|(?P<plain>(?:\d+\.?\d*|\.\d+)(?:e-?\d\d?)?))%?"
)


def to_number(text: str) -> Fraction | None:
    """The number that a text is: 1,200.50, $3, -7, 3/4, 1 1/2, 50%, 2e3; None for anything else."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.strip().lower()).replace("$", "").replace("\u2212", "-").strip()
    found = _NUMBER.fullmatch(text.removeprefix("+"))
    if not found or len(text) > 100:
        return None
    if found["top"]:
        value = int(found["whole"] or 0) + Fraction(int(found["top"]), int(found["bottom"]))
    else:
        value = Fraction(found["plain"])
    return -value if found["sign"] else value


def same_answer(given: str | None, expected: str) -> bool:
    """Whether two answers are equal: as numbers where both are numbers ("1,200" and "1200.0"), else as words."""
    if given is None:
        return False
    numbers = to_number(given), to_number(expected)
    if None not in numbers:
        return abs(numbers[0] - numbers[1]) <= max(map(abs, numbers)) / 1_000_000
    return given.lower().split() == expected.lower().split()


# -- data --------------------------------------------------------------------------------------------------------------


def load_examples(arguments: TaskArguments, seed: int) -> dict[str, list[Example]]:
    """Examples for `train`, `validation` (the test's where there is none) and `test`; at least one of each."""
    read = local_rows if arguments.data_dir else hub_rows
    task = TASKS[arguments.task]
    tested = TASKS[task.tested_as] if task.tested_as else task
    found = {
        "train": examples_of(task, *read(arguments, task, "train")),
        "validation": examples_of(tested, *read(arguments, tested, "validation")),
        "test": examples_of(tested, *read(arguments, tested, "test")),
    }
    found["test"] = found["test"] or found["validation"]
    found["validation"] = found["validation"] or found["test"]
    for split in ("train", "test"):
        if not found[split]:
            source = arguments.data_dir or task.hub[0]
            raise InvalidArgument(
                f"--data_dir {source}" if arguments.data_dir else f"--task {arguments.task}",
                f"no {split} examples" + ("" if split == "train" else " and no validation examples"),
                file_form(arguments.task),
            )
    if arguments.max_train_samples is not None:
        order = torch.randperm(len(found["train"]), generator=torch.Generator().manual_seed(seed))
        found["train"] = [found["train"][i] for i in order[: arguments.max_train_samples]]
    found["validation"] = found["validation"][: arguments.max_eval_samples]
    found["test"] = found["test"][: arguments.max_test_samples]
    return found


def file_form(name: str) -> str:
    """How a task's files look, for an error's hint."""
    task = TASKS[name]
    tested = f"; test rows: {', '.join(TASKS[task.tested_as].columns)}" if task.tested_as else ""
    columns = ", ".join(task.columns) + tested
    return f"give --data_dir DIR with train.jsonl and test.jsonl, a JSON object per line: {columns}"


def examples_of(task: Task, source: str, rows: list[dict]) -> list[Example]:
    """Rows as examples; `InvalidArgument` names the first that is none."""
    examples = []
    for number, row in enumerate(rows, 1):
        missing = [column for column in task.columns if not isinstance(row, dict) or row.get(column) is None]
        try:
            _expect(not missing, f"no column {', '.join(missing)}")
            examples.append(task.example(row))
        except (BadRow, AttributeError, TypeError) as error:
            raise InvalidArgument(
                f"{source} row {number}", first_line(error), f"its columns must be {', '.join(task.columns)}"
            ) from None
    return examples


def local_rows(arguments: TaskArguments, task: Task, split: str) -> tuple[str, list[dict]]:
    """The rows of DIR/<split>.jsonl; none where the file is not there."""
    folder = Path(arguments.data_dir)
    if not folder.is_dir():
        raise InvalidArgument(f"--data_dir {folder}", "no such folder", file_form(arguments.task))
    path, rows = folder / f"{split}.jsonl", []
    if not path.is_file():
        return str(path), []
    # Not splitlines: inside a JSON string it would break at U+2028 and its like.
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError:
            raise InvalidArgument(f"{path} line {number}", "is not JSON", file_form(arguments.task)) from None
    return str(path), rows


def hub_rows(arguments: TaskArguments, task: Task, split: str) -> tuple[str, list[dict]]:
    """The rows of the hub's data set; it has no validation split that we would use."""
    import datasets

    name = task.hub[0]
    if split == "validation":
        return name, []
    try:
        with PartialState().main_process_first():
            loaded = datasets.load_dataset(
                *task.hub, split=task.test_split if split == "test" else split, cache_dir=arguments.cache_dir
            )
    except Exception as error:  # every way in which a network or a repository can fail
        problem = f"cannot load {name} ({first_line(error)})"
        if "script" in str(error) or "trust_remote_code" in str(error):
            problem = f"{name} needs code from the hub, which is not run"
        raise InvalidArgument(f"--task {arguments.task}", problem, file_form(arguments.task)) from None
    return name, list(loaded)


class Encoder:
    """Examples as tokens: the prompt's, then the answer's and an end, which alone have labels.

    Prompt and answer are tokenised apart, so that a generated answer starts from the tokens that were trained on.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end

    def prompt(self, example: Example) -> list[int]:
        """Tokens of the prompt, as the tokenizer begins a text."""
        ids = self.tokenizer(example.prompt + "\n")["input_ids"]
        return ids[:-1] if ids[-1] == self.end else ids

    def __call__(self, example: Example) -> dict[str, list[int]]:
        """`input_ids` and `labels` of one example."""
        prompt = self.prompt(example)
        answer = [*self.tokenizer(example.answer, add_special_tokens=False)["input_ids"], self.end]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    def collate(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Batch x tokens, padded on the right. The labels say what counts: the end is a token to learn, even where it
        pads too."""
        length = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([row[name] + [filler] * (length - len(row[name])) for row in rows])

        mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": padded("input_ids", self.pad),
            "attention_mask": torch.tensor(mask),
            "labels": padded("labels", IGNORED),
        }

    def left_padded(self, prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        """Batch x tokens, padded on the left, for generation."""
        length = max(map(len, prompts))
        return {
            "input_ids": torch.tensor([[self.pad] * (length - len(prompt)) + prompt for prompt in prompts]),
            "attention_mask": torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        }


def encode_training(encoder: Encoder, examples: list[Example], max_length: int) -> list[dict[str, list[int]]]:
    """Training rows of at most `max_length` tokens."""
    rows = [encoder(example) for example in examples]
    kept = [row for row in rows if len(row["input_ids"]) <= max_length]
    if not kept:
        shortest = min(len(row["input_ids"]) for row in rows)
        raise InvalidArgument(
            f"--max_length {max_length}", "every training example is longer", f"give at least {shortest}"
        )
    if len(kept) < len(rows):
        say(f"{len(rows) - len(kept)} of {len(rows)} training examples have more than {max_length} tokens: left out")
    return kept


def calibration_batches(rows: list[dict], count: int, size: int) -> list[dict[str, torch.Tensor]] | None:
    """Batches for a merge, without padding: rows of like length together, cut to the shortest."""
    chosen = sorted((row["input_ids"] for row in rows[:count]), key=len)
    groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return [{"input_ids": torch.tensor([ids[: len(group[0])] for ids in group])} for group in groups] or None


# -- model -------------------------------------------------------------------------------------------------------------


def load_tokenizer(task: TaskArguments) -> Tokenizer:
    """The tokenizer; `InvalidArgument` for what is no causal model, before anything large is read."""
    name = task.model_name_or_path
    flag = f"--model_name_or_path {name}"
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InvalidArgument(flag, "no such folder", "give one in transformers' format, or a name on the hub")
    with refused_as(flag):
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
    with refused_as(f"--model_name_or_path {task.model_name_or_path}"):
        model = AutoModelForCausalLM.from_pretrained(
            task.model_name_or_path, **source(task), **precision(task, training)
        )
    if task.load_in_4bit:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def source(task: TaskArguments) -> dict:
    """Keyword arguments of every `from_pretrained`."""
    return {"revision": task.revision or "main", "cache_dir": task.cache_dir}


@contextlib.contextmanager
def refused_as(flag: str):
    """What goes wrong inside is the fault of the model that was named."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise InvalidArgument(
            flag, first_line(error), "give a folder or a name on the hub of a causal model"
        ) from error


def precision(task: TaskArguments, training: LlmTrainingArguments) -> dict:
    """Keyword arguments of `from_pretrained` for dtype and quantisation."""
    automatic = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    dtype = getattr(torch, automatic if task.dtype == "auto" else task.dtype)
    if not task.load_in_4bit:
        return {"dtype": dtype}
    from transformers import BitsAndBytesConfig

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


# -- training and evaluation -------------------------------------------------------------------------------------------


class LlmTrainer(AdapterTrainer):
    """Evaluates by the loss per answer token, and by the answers that the model generates."""

    def __init__(self, *args, encoder: Encoder, examples: dict[str, list[Example]], task: TaskArguments, **kwargs):
        super().__init__(*args, data_collator=encoder.collate, **kwargs)
        self.encoder, self.examples, self.task = encoder, examples, task

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Validation figures, logged: `eval_loss`, and `eval_accuracy` with --eval_accuracy."""
        figures = self.figures("validation", accuracy=self.task.eval_accuracy)
        logs = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(dict(logs))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def figures(self, split: str, accuracy: bool = True) -> dict[str, float]:
        """Loss per answer token and, if wanted, the share of right answers, over all processes."""
        training = self.model.training
        self.model.eval()
        figures = {"loss": self._loss(split)}
        if accuracy:
            figures["accuracy"] = self._accuracy(split)
        self.model.train(training)
        return figures

    @torch.no_grad()
    def _loss(self, split: str) -> float:
        rows = [self.encoder(example) for example in self._mine(split)]
        total = torch.zeros(2, dtype=torch.float64)
        for batch in self._batches(sorted(rows, key=lambda row: len(row["input_ids"])), f"{split} loss"):
            inputs = {name: value.to(self.args.device) for name, value in self.encoder.collate(batch).items()}
            labels = inputs.pop("labels")[:, 1:]
            logits = self.model(**inputs).logits[:, :-1][labels != IGNORED]
            wide = torch.promote_types(logits.dtype, torch.float32)
            losses = torch.nn.functional.cross_entropy(logits.to(wide), labels[labels != IGNORED], reduction="sum")
            total += torch.tensor([losses.item(), (labels != IGNORED).sum().item()], dtype=torch.float64)
        loss, tokens = self._summed(total)
        return loss / tokens

    def _accuracy(self, split: str) -> float:
        examples = sorted(self._mine(split), key=lambda example: len(example.prompt))
        right = 0
        for batch in self._batches(examples, f"{split} answers"):
            answers = generate(self.model, self.encoder, batch, self.task.max_new_tokens)
            right += sum(
                same_answer(extract_answer(answer), example.gold)
                for answer, example in zip(answers, batch, strict=True)
            )
        right, count = self._summed(torch.tensor([right, len(examples)], dtype=torch.float64))
        return right / count

    def _mine(self, split: str) -> list[Example]:
        return self.examples[split][self.args.process_index :: self.args.world_size]

    def _batches(self, items: list, title: str) -> Iterator[list]:
        size = self.args.per_device_eval_batch_size
        starts = range(0, len(items), size)
        quiet = self.args.disable_tqdm or self.args.process_index > 0
        for start in tqdm(starts, desc=title, leave=False, disable=quiet, dynamic_ncols=True):
            yield items[start : start + size]

    def _summed(self, values: torch.Tensor) -> list[float]:
        if self.args.world_size > 1:
            device = self.args.device
            values = values.to(device) if device.type != "mps" else values.float().to(device)
            values = self.accelerator.reduce(values, "sum")
        return values.tolist()


@torch.no_grad()
def generate(model: PreTrainedModel, encoder: Encoder, examples: list[Example], max_new_tokens: int) -> list[str]:
    """Greedy answers to the prompts of `examples`, in one left-padded batch with a KV cache.

    The model's own generation settings (a repetition penalty, say) stay out of it.
    """
    inputs = encoder.left_padded([encoder.prompt(example) for example in examples])
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=encoder.end,
        pad_token_id=encoder.pad,
    )
    base = base_model(model)
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        tokens = base.generate(**inputs, generation_config=greedy)
    finally:
        base.generation_config = own
    return encoder.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# -- the run -----------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print once, however many processes there are."""
    PartialState().print(text, flush=True)


def build_trainer(
    task: TaskArguments, method: MethodArguments, training: LlmTrainingArguments
) -> tuple[LlmTrainer, list[dict[str, list[int]]]]:
    """Data, model and adapter as a trainer; and the training rows."""
    encoder = Encoder(load_tokenizer(task))
    examples = load_examples(task, training.seed)
    model = load_model(task, training)
    rows = encode_training(encoder, examples["train"], task.max_length)
    check_positions(model, encoder, examples["test"] + examples["validation"], task.max_new_tokens)
    torch.manual_seed(training.seed)
    model = attach(model, method, total_steps(training, len(rows)), task_type="CAUSAL_LM")
    trainer = LlmTrainer(
        model,
        training,
        encoder=encoder,
        examples=examples,
        task=task,
        train_dataset=rows,
        eval_dataset=[encoder(example) for example in examples["validation"]],
        callbacks=[LogCallback(Path(training.output_dir) / "log.jsonl")],
    )
    return trainer, rows


def finish(trainer: LlmTrainer, rows: list, task: TaskArguments, method: MethodArguments) -> dict:
    """The merge table, and the plain files."""
    output, size = Path(trainer.args.output_dir), trainer.args.per_device_eval_batch_size
    calibration = calibration_batches(rows, method.calibration_examples, size)
    table = merge_table(trainer.model, lambda: trainer.figures("test"), calibration)
    report = export(
        trainer.model,
        output,
        merge=method.merge,
        calibration=calibration,
        merged=method.merge_and_save,
        tokenizer=trainer.encoder.tokenizer,
    )
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


def main(argv: Sequence[str] | None = None) -> None:
    """Check, load, train, compare the merges and export."""
    task, method, training = parse(argv)
    flags = settings(task, method, training)
    check_resume(training.output_dir, training.resume_from_checkpoint, flags)
    trainer, rows = build_trainer(task, method, training)
    if training.should_save:
        write_json(Path(training.output_dir) / "config.json", flags)
        trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    results = finish(trainer, rows, task, method)
    say(summary(results, training, method, bundled=task.model_name_or_path == str(BUNDLED_MODEL)))


if __name__ == "__main__":
    sys.exit(run_script(PROG, main))
