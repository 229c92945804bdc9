"""Flags that the language scripts share: one line for what cannot work, exit status 2."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig

from .. import __version__
from ..common.checks import check_writable, is_number, is_whole, number_in_words, whole_in_words
from ..common.errors import InvalidArgument, first_line, refused_as
from ..common.flags import listed
from ..common.methods import DEFAULT_PRE_NUM, IN_WORDS, METHODS, refuse_settings, tell_unread
from ..common.parser import Parser
from ..common.patterns import FIELDS, entries
from ..common.patterns import HELP as PATTERNS
from ..common.script import shares_the_cpu
from ..config import HEADS, SHORTCUTS
from ..merges import AUTO
from ..merges import NAMES as MERGES
from ..shortcuts import PLAIN, shortcut_class


@dataclass
class MethodArguments:
    """Which method is trained and how it is merged; for `HfArgumentParser`.

    Raises `InvalidArgument` for a value that means nothing.
    """

    method: str = HfArg(default="reslora", help=f"what is trained. {IN_WORDS}", metadata={"choices": tuple(METHODS)})
    shortcut: str = HfArg(
        default="input",
        help="ResLoRA and lora_matched: what a block gets from the blocks before it",
        metadata={"choices": SHORTCUTS},
    )
    pre_num: int = HfArg(
        default=DEFAULT_PRE_NUM,
        help="ResLoRA, lora_matched and ms_placebo: how many blocks before it, -1 for all; with input any "
        "number but 0 means one",
    )
    head: str = HfArg(
        default="repeat",
        help="--shortcut input and is_placebo: what the first block of a chain adds to its input",
        metadata={"choices": HEADS},
    )
    merge: str = HfArg(
        default=AUTO, help="ResLoRA: how the shortcuts become plain LoRA weights", metadata={"choices": MERGES}
    )
    lora_r: int = HfArg(default=4, help="rank")
    lora_alpha: float = HfArg(default=None, help="scale times rank; default: twice the rank")
    lora_dropout: float = HfArg(default=0.0, help="dropout of the adapter's input (loha, lokr: of ranks)")
    rank_pattern: list[str] | None = HfArg(
        default=None, help=PATTERNS["rank_pattern"], metadata={"nargs": "+", "metavar": "NAME=VALUE"}
    )
    alpha_pattern: list[str] | None = HfArg(
        default=None, help=PATTERNS["alpha_pattern"], metadata={"nargs": "+", "metavar": "NAME=VALUE"}
    )
    target_modules: list[str] | None = HfArg(
        default=None,
        help="layers that get an adapter, by the end of their name; default: query and value",
        metadata={"nargs": "+"},
    )
    calibration_examples: int = HfArg(
        default=64,
        help="training examples that a merge of ResLoRA may read, and that lora_matched and placebos are "
        "measured on; 0 for none",
    )
    merge_and_save: bool = HfArg(default=False, help="write the model with the adapter added, for stock transformers")

    def __post_init__(self) -> None:
        check_whole("lora_r", self.lora_r, 1)
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.lora_r
        check_number("lora_alpha", self.lora_alpha, 0, exclusive=True)
        check_number("lora_dropout", self.lora_dropout, 0, below=1)
        check_whole("pre_num", self.pre_num, -1)
        check_whole("calibration_examples", self.calibration_examples, 0)
        if float(self.lora_alpha).is_integer():
            self.lora_alpha = int(self.lora_alpha)  # adapter_config.json says 8, as everybody's does
        refuse_settings([self.method], self.lora_dropout, {name: getattr(self, name) for name in FIELDS})
        self.patterns()
        if self.calibration_examples == 0 and METHODS[self.method].measured:
            raise InvalidArgument(
                f"--method {self.method}", "needs calibration examples", "give --calibration_examples 64"
            )
        if self.calibration_examples == 0 and self._merge_reads_examples():
            raise InvalidArgument(
                f"--merge {self.merge}",
                "needs calibration examples",
                "give --calibration_examples 64, or another merge",
            )

    def patterns(self) -> dict[str, Any]:
        """Ranks and alphas of single layers, as PEFT's configurations have them."""
        return {name: entries(name, getattr(self, name)) for name in FIELDS}

    def tell_unread(self) -> None:
        """Says which flags the method does not read."""
        tell_unread([self.method], vars(self), vars(MethodArguments) | {"lora_alpha": 2 * self.lora_r})

    def carries_activations(self) -> bool:
        """Whether blocks hand activations to each other."""
        return self._is_wired() and shortcut_class(self.shortcut).carries

    def _merge_reads_examples(self) -> bool:
        merge = shortcut_class(self.shortcut).merges.get(self.merge) if self._is_wired() else None
        return merge is not None and merge.needs_moments

    def _is_wired(self) -> bool:
        return METHODS[self.method].shortcuts and self.shortcut != PLAIN and self.pre_num != 0


@dataclass
class ExperimentArguments:
    """What several methods, rates and seeds are chosen and compared by; for `HfArgumentParser`."""

    select_split: float | None = HfArg(
        default=None,
        help="experiments: share of the training examples by which learning rates and checkpoints are chosen, "
        "where the task has no validation file beside a test file; default 0.1",
    )
    test_split: float | None = HfArg(
        default=None,
        help="experiments: share of the training examples by which methods are compared in the end, where the "
        "task has neither a test nor a validation file; default 0.1",
    )
    extend_rates: bool = HfArg(
        default=False,
        help="experiments: where the best learning rate is the lowest or highest, try the next one, up to three times",
    )
    experiment_minutes: float | None = HfArg(
        default=None,
        help="experiments: no arm is begun that would not end in so many minutes; the same command goes on",
    )
    arms_at_once: int | None = HfArg(
        default=None,
        help="experiments: how many arms are trained at once, each by a process of its own; of several GPUs each has "
        "one; default 1",
    )

    def __post_init__(self) -> None:
        for name in ("select_split", "test_split"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, below=1, exclusive=True)
        if self.experiment_minutes is not None:
            check_number("experiment_minutes", self.experiment_minutes, 0, exclusive=True)
        if self.arms_at_once is not None:
            check_number("arms_at_once", self.arms_at_once, 1)


SEVERAL = {
    "method": "method", "learning_rate": "learning_rate", "seed": "seed", "rank": "lora_r", "shortcut": "shortcut",
    "pre_num": "pre_num",
}  # fmt: skip
"""What is experimented with, and the flag of each: several values of one make a run an experiment."""


@dataclass
class AdapterTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments`, with TensorBoard and a row of the log per step, and every number checked."""

    output_dir: str = HfArg(default="runs/adapter", help="folder of the run")
    report_to: list[str] | None = HfArg(
        default_factory=lambda: ["tensorboard"], help="trackers to report to, or none", metadata={"nargs": "+"}
    )
    logging_steps: float = HfArg(default=1, help="steps between rows of log.jsonl")
    resume_from_checkpoint: str | None = HfArg(
        default=None, help="go on from a checkpoint folder, or from the latest usable one: latest"
    )

    def __post_init__(self) -> None:
        self._check_numbers()
        check_trackers(self.report_to)
        for name, package in (("deepspeed", "deepspeed"), ("use_liger_kernel", "liger_kernel")):
            if getattr(self, name) and importlib.util.find_spec(package) is None:
                fix = f"pip install {package.replace('_', '-')}, or leave it out"
                raise InvalidArgument(f"--{name}", f"{package} is not installed", fix)
        for name in self._VALID_DICT_FIELDS:
            check_json(name, getattr(self, name))
        for precision in ("bf16", "fp16"):
            if getattr(self, f"{precision}_full_eval"):
                problem = "what is evaluated is exported, and must not be rounded"
                raise InvalidArgument(f"--{precision}_full_eval", problem, f"leave it out, or train with --{precision}")
        if self.push_to_hub:
            raise InvalidArgument(
                "--push_to_hub", "is not supported", "upload the run's peft/ with `hf upload` instead"
            )
        self._settle_device()
        check_writable(Path(self.output_dir).expanduser(), f"--output_dir {self.output_dir}")
        if self.deepspeed:
            _say_that_there_is_one_process()
        super().__post_init__()

    def _check_numbers(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check_whole(name, getattr(self, name), 1)
        for name in ("learning_rate", "num_train_epochs", "logging_steps", "save_steps", "adam_epsilon"):
            check_number(name, getattr(self, name), 0, exclusive=True)
        for name in ("weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"):
            check_number(name, getattr(self, name), 0)
        if self.neftune_noise_alpha is not None:
            check_number("neftune_noise_alpha", self.neftune_noise_alpha, 0)
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            check_number(name, getattr(self, name), 0, below=1)
        if self.eval_steps is not None:
            check_number("eval_steps", self.eval_steps, 0, exclusive=True)
        for name in ("save_total_limit", "eval_accumulation_steps"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        check_whole("dataloader_num_workers", self.dataloader_num_workers, 0)
        if self.max_steps != -1:
            check_whole("max_steps", self.max_steps, 1)
        for name in ("seed", "data_seed") if self.data_seed is not None else ("seed",):
            check_whole(name, getattr(self, name), 0, 2**32 - 1)

    def _settle_device(self) -> None:
        # `accelerate launch --cpu` says so in the environment only.
        self.use_cpu = self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")  # type: ignore[has-type]
        gpu = torch.cuda.is_available() and not self.use_cpu
        if self.fp16 and not gpu:
            raise InvalidArgument("--fp16", "needs a GPU", "leave it out, or take --bf16 --use_cpu")
        if self.bf16 and not gpu and not self.use_cpu:
            raise InvalidArgument("--bf16", "there is no GPU", "add --use_cpu, or leave it out")
        self.use_cpu = self.use_cpu or (shares_the_cpu() and not self.deepspeed)


def _say_that_there_is_one_process() -> None:
    """What torch's launcher tells its children, where it isn't there: DeepSpeed would look for MPI otherwise."""
    if not {"RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"} & os.environ.keys():
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        for name, value in alone.items():
            os.environ.setdefault(name, value)


def check_whole(name: str, value: int, least: int, most: float = math.inf) -> None:
    """Raises `InvalidArgument` unless a flag's value is a whole number of at least `least` and at most `most`."""
    if not is_whole(value, least, most):
        raise InvalidArgument(f"--{name} {value}", "out of range", f"give {whole_in_words(least, most)}")


def check_texts(given: Collection[str], values: Mapping[str, object]) -> None:
    """Raises `InvalidArgument` for flags whose value is empty, or no text.

    Nothing can write the latter; without a value a run would have other data, or begin where it should go on.
    """
    for name in sorted({*given} & values.keys()):
        for text in listed(values[name]):
            if text == "":
                raise InvalidArgument(f"--{name}", "is empty, as a variable is that is not set", "give it a value")
            if isinstance(text, str) and text.encode("utf-8", "replace").decode() != text:
                raise InvalidArgument(f"--{name} {text}", "is not UTF-8", "rename it, or give another")


def check_trackers(names: str | Sequence[str] | None) -> None:
    """Raises `InvalidArgument` for a --report_to that transformers doesn't know, or that is not installed."""
    named = [name for name in ([names] if isinstance(names, str) else names or ()) if name not in ("all", "none")]
    for name in named:
        known = sorted(INTEGRATION_TO_CALLBACK)
        if name not in known:
            raise InvalidArgument(f"--report_to {name}", "unknown", f"choose from none, all, {', '.join(known)}")
        if name not in get_available_reporting_integrations():
            raise InvalidArgument(f"--report_to {name}", f"{name} is not installed", "install it, or leave it out")


def check_json(name: str, value: object) -> None:
    """Raises `InvalidArgument` for a flag's text that begins as JSON and is none, or has a key that is unknown."""
    if isinstance(value, str) and value.startswith("{"):  # anything else is a file's name
        with refused_as(f"--{name} {value}", "give a JSON object with keys that it knows", (ValueError, TypeError)):
            content = json.loads(value)
            if name == "accelerator_config":
                AcceleratorConfig(**content)


def check_compiling(method: MethodArguments, training: TrainingArguments) -> None:
    """Raises `InvalidArgument` where --torch_compile would meet checkpointing that keeps a shortcut's activations."""
    if training.torch_compile and training.activation_checkpointing and method.carries_activations():
        problem = f"with --gradient_checkpointing cannot keep --shortcut {method.shortcut}"
        raise InvalidArgument("--torch_compile", problem, "leave one of them out, or use --shortcut block")


def check_number(name: str, value: float, least: float, below: float = math.inf, exclusive: bool = False) -> None:
    """Raises `InvalidArgument` unless a flag's value is a finite number in [least, below), or above `least`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not is_number(number, least, below, exclusive):
        problem, fix = "out of range", f"give {number_in_words(least, below, exclusive)}"
        raise InvalidArgument(f"--{name} {value}", problem, fix)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the lines of the description, and name each default once."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        named = action.default is None or action.default is False or "default: " in (action.help or "")
        return action.help if named else super()._get_help_string(action)


class FieldsParser(HfArgumentParser, Parser):
    """Take the options that are the fields of dataclasses, as strictly as the other scripts take theirs."""


def build_parser(types: Sequence[type], prog: str, description: str | None = None) -> HfArgumentParser:
    """A parser of the flags that are the fields of the dataclasses `types`."""
    usage = argparse.SUPPRESS  # of 150 options it would be a screen before the description
    options = {"prog": prog, "usage": usage, "description": description, "formatter_class": HelpFormatter}
    parser = FieldsParser(dataclass_types=[*types, ExperimentArguments], **options)
    for action in parser._actions:
        action.nargs = "+" if action.dest in SEVERAL.values() else action.nargs
    parser.add_argument("--version", action="version", version=f"reslora-sd {__version__}")
    return parser


def parse_values(
    parser: HfArgumentParser,
    argv: Sequence[str] | None = None,
    bundled: Mapping[str, object] | None = None,
    deepspeed_config: str | None = None,
) -> dict[str, Any]:
    """Parses flags into their values by name: lists for those in SEVERAL that several were given of.

    What argparse or transformers refuse ends the program with one line and status 2; what our own classes refuse is
    `InvalidArgument`.

    `bundled`: defaults that hold while no `--model_name_or_path` is given. `deepspeed_config`: what `--deepspeed` means
    without a value.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    if bundled and "model_name_or_path" not in given:
        parser.set_defaults(**bundled)
    if deepspeed_config:
        action = next(action for action in parser._actions if action.dest == "deepspeed")
        action.nargs, action.const = "?", deepspeed_config
    namespace = parser.parse_args(argv)
    check_texts(given, vars(namespace))
    values = vars(namespace) | {"output_dir": os.path.expanduser(namespace.output_dir)}  # noqa: PTH111 - as Trainer does
    for name in SEVERAL.values():
        if isinstance(values.get(name), list) and len(values[name]) == 1:
            (values[name],) = values[name]
    return values | steps_asked_for(given, values)


def steps_asked_for(given: Collection[str], values: Mapping[str, object]) -> dict[str, object]:
    """The strategies that a number of steps alone asks for: by the defaults, nothing would read it."""
    found = dict[str, object]()
    for what, other in (("eval", "save"), ("save", "eval")):
        if f"{what}_steps" in given and f"{what}_strategy" not in given:
            found[f"{what}_strategy"] = "steps"
            if values["load_best_model_at_end"] and not {f"{other}_steps", f"{other}_strategy"} & set(given):
                # The best can only be among what is saved and measured.
                found |= {f"{other}_strategy": "steps", f"{other}_steps": values[f"{what}_steps"]}
    return found


def is_experiment(values: Mapping[str, object]) -> bool:
    """Whether several values of anything in SEVERAL are given."""
    return any(isinstance(values[name], list) for name in SEVERAL.values())


def parsed(parser: HfArgumentParser, values: Mapping[str, Any]) -> tuple:
    """The values of a run that is no experiment as instances of the parser's dataclasses.

    Raises `InvalidArgument` for what cannot work.
    """
    try:
        *found, experiment = parser.parse_dict(dict(values), allow_extra_keys=True)
        for name, value in dataclasses.asdict(experiment).items():
            if value:
                fix = f"give several values of --{', --'.join(SEVERAL.values())}, or leave it out"
                raise InvalidArgument(f"--{name}", "this is no experiment, nothing reads it", fix)
        return tuple(found)
    except InvalidArgument:
        raise
    except (ValueError, ImportError, OSError, RuntimeError) as error:  # what transformers' own classes refuse
        return parser.error(first_line(error))


def settings(*arguments: Any) -> dict:
    """The flags of several dataclasses as one JSON-able dict, the content of a run's `config.json`; no tokens."""
    merged: dict = {}
    for instance in arguments:
        values = instance.to_dict() if hasattr(instance, "to_dict") else dataclasses.asdict(instance)
        merged |= {name: value for name, value in values.items() if name != "token" and not name.endswith("_token")}
    return json.loads(json.dumps(merged, default=str))
