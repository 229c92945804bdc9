"""Create transformers' `TrainingArguments` from a run's options."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch
from accelerate.utils import parse_flag_from_env
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig

from ..checks import require_package
from ..errors import InvalidArgument, first_line, refused_as
from ..options.argument_parser import Parser
from ..options.option import number, whole
from ..options.texts import MethodOptions, T
from ..runtime.script import shares_the_cpu

BOUNDS = {
    "eval_delay": number(0), "label_smoothing_factor": number(0, below=1), "neftune_noise_alpha": number(0),
    "eval_accumulation_steps": whole(1), "data_seed": whole(0, 2**32 - 1),
}  # fmt: skip
"""Parsers that limit the values of options passed on to transformers, which accepts any number for them."""


@dataclass
class AdapterTrainingArguments(TrainingArguments):
    """`TrainingArguments` with a log row for each step, and with validation of more values."""

    logging_steps: float = 1

    @property
    def folder(self) -> Path:
        """Directory of the run."""
        return Path(self.output_dir)

    def __post_init__(self) -> None:
        check_trackers(self.report_to)
        if self.use_liger_kernel:
            require_package("--use_liger_kernel", "liger-kernel", "liger_kernel")
        for name in self._VALID_DICT_FIELDS:
            check_json(name, getattr(self, name))
        for precision in ("bf16", "fp16"):
            if getattr(self, f"{precision}_full_eval"):
                problem = "what is evaluated is exported, and must not be rounded"
                raise InvalidArgument(f"--{precision}_full_eval", problem, f"leave it out, or train with --{precision}")
        self._settle_device()
        if self.deepspeed and not {"RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"} & os.environ.keys():
            # A single process, as torch's launcher describes it: DeepSpeed would look for MPI otherwise.
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            for name, value in alone.items():
                os.environ.setdefault(name, value)
        super().__post_init__()

    def _settle_device(self) -> None:
        # `accelerate launch --cpu` only sets the environment.
        self.use_cpu = self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")  # type: ignore[has-type]
        gpu = torch.cuda.is_available() and not self.use_cpu
        if self.fp16 and not gpu:
            raise InvalidArgument("--fp16", "needs a GPU", "leave it out, or take --bf16 --use_cpu")
        if self.bf16 and not gpu and not self.use_cpu:
            raise InvalidArgument("--bf16", "there is no GPU", "add --use_cpu, or leave it out")
        self.use_cpu = self.use_cpu or (shares_the_cpu() and not self.deepspeed)


class PassedOnParser(HfArgumentParser, Parser):
    """Parses the options of `TrainingArguments`; the result contains only the options that are given."""


def parse_passed_on(prog: str, words: Sequence[str]) -> dict[str, Any]:
    """Parse options of `TrainingArguments` that the scripts do not define themselves.

    Exits with status 2 and a one-line message for invalid values.
    """
    parser = PassedOnParser(dataclass_types=[AdapterTrainingArguments], prog=prog)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.type = BOUNDS.get(action.dest, action.type)
    return vars(parser.parse_args(list(words)))


def passed_on_defaults() -> dict[str, Any]:
    """Return the defaults of all options of `TrainingArguments`."""
    return vars(PassedOnParser(dataclass_types=[AdapterTrainingArguments]).parse_args([]))


@dataclass(frozen=True)
class Arguments(Generic[T]):
    """Options of a run, and the `TrainingArguments` made from them."""

    options: T
    training: AdapterTrainingArguments

    @property
    def method(self) -> MethodOptions:
        """Options of the adapter and its merge."""
        return self.options.adapter

    @property
    def settings(self) -> dict[str, Any]:
        """All options by name, as a run's `config.json` stores them: without options of experiments and Hub tokens."""
        table = self.options.table()
        own = {name: value for name, value in self.options.flat().items() if table[name].group != "experiment"}
        return without_tokens(own | self.training.to_dict())


def without_tokens(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as JSON data, without tokens for the Hub."""
    public = {name: value for name, value in values.items() if not name.endswith("token")}
    return json.loads(json.dumps(public, default=str))


def training_arguments(options: T, prog: str, **defaults: Any) -> AdapterTrainingArguments:
    """Return the `TrainingArguments` of a run.

    `defaults` are default values of options that the scripts do not define themselves. Exits with status 2 and a
    one-line message for values that transformers rejects. Raises `InvalidArgument` for values that cannot work on this
    machine.
    """
    table = options.table().values()
    values = {option.name: options[option.name] for option in table if option.group == "training"}
    try:
        return AdapterTrainingArguments(**{**values, **defaults, **options.passed_on})
    except InvalidArgument:
        raise
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        return Parser(prog=prog).error(first_line(error))


def check_trackers(names: str | Sequence[str] | None) -> None:
    """Raise `InvalidArgument` for a --report_to that transformers does not support, or that is not installed."""
    named = [name for name in ([names] if isinstance(names, str) else names or ()) if name not in ("all", "none")]
    for name in named:
        known = sorted(INTEGRATION_TO_CALLBACK)
        if name not in known:
            raise InvalidArgument(f"--report_to {name}", "unknown", f"choose from none, all, {', '.join(known)}")
        if name not in get_available_reporting_integrations():
            raise InvalidArgument(f"--report_to {name}", f"{name} is not installed", "install it, or leave it out")


def check_json(name: str, value: object) -> None:
    """Raise `InvalidArgument` for an option's value that begins like JSON but is invalid, or has an unknown key."""
    if isinstance(value, str) and value.startswith("{"):  # any other text is a file name
        with refused_as(f"--{name} {value}", "give a JSON object with keys that it knows", (ValueError, TypeError)):
            content = json.loads(value)
            if name == "accelerator_config":
                AcceleratorConfig(**content)
