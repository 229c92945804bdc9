"""Resolve the command line to the options of a language script.

transformers is imported only if the options are valid.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..checks import check_writable, is_path, require_package
from ..errors import InvalidArgument
from ..experiment.arms import check_values
from ..methods.registry import refuse_unable
from ..options import contradictions
from ..options.grid import Grid, alpha_of, first_of
from ..options.option import SAME, Given
from ..options.parser import OptionsParser
from ..options.texts import (
    GLUE_MODEL,
    GLUE_TASK,
    GLUE_TASKS,
    LLM_TASK,
    LLM_TASKS,
    PASSED_ON,
    GlueOptions,
    LlmOptions,
    TextOptions,
)
from ..options.values import listed
from ..options.vary import values_to_vary

T = TypeVar("T", bound=TextOptions)
METAMATHQA_SAMPLES = 40_000  # number of training samples in the paper's Appendix C
NOT_IN_EXPERIMENTS = {
    "load_best_model_at_end": "leave it out: checkpoints are chosen over seeds together",
    "do_predict": "leave it out, and predict with the arm that you like",
    "save_only_model": "leave it out: an arm that is stopped goes on from its last checkpoint",
}
"""Options of `TrainingArguments` that an experiment refuses, with the fix."""


def read(kind: type[T], prog: str, argv: Sequence[str] | None, description: str | None = None) -> T | Grid[T]:
    """Return the options of a run, or of an experiment if an option that can vary has several values.

    Exits with status 2 and a one-line message for invalid syntax. Raises `InvalidArgument` for invalid values. Empty
    values are invalid: they usually come from an unset shell variable, and the run would use other data or start anew.
    """
    given, passed_on = parsed_values(OptionsParser(prog, kind, description or ""), argv)
    given |= values_to_vary(given.pop("vary", ()), kind.table(), given)
    contradictions.check_texts(given | passed_on)
    for name, value in sorted((given | passed_on).items()):
        if "" in listed(value):
            raise InvalidArgument(
                f"--{name}", "is empty; maybe a variable in the command is not set", "give it a value"
            )
    return resolve(kind, given, passed_on)


def parsed_values(parser: OptionsParser, argv: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the given values of the script's own options, and those of options that are passed on to transformers."""
    values, unknown = parser.parse_known_args(argv)
    names = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in unknown if word.startswith("--")}
    if not unknown:
        return vars(values), {}
    known = {*PASSED_ON["fixed"], *PASSED_ON["free"]}
    if not names or not {name.removeprefix("no_") for name in names} <= known:
        parser.refuse_unknown(unknown)
    from .training_arguments import parse_passed_on

    return vars(values), parse_passed_on(parser.prog, unknown)


def resolve(kind: type[T], given: Given, passed_on: Given = {}) -> T | Grid[T]:  # noqa: B006 - is not changed
    """Return the options of a run, or of an experiment.

    Raises `InvalidArgument` for invalid values.
    """
    bundled = "model_name_or_path" not in given
    values = {
        name: option.bundled if bundled and option.bundled is not SAME else option.default
        for name, option in kind.table().items()
    }
    options, varied = first_of(kind, {**values, **given, **steps_asked_for(given, passed_on)})
    options = dataclasses.replace(options, passed_on=passed_on)
    if not varied and len(options.adapter.method) == 1:
        options = options.replace(lora_alpha=alpha_of(options.adapter))
        contradictions.check_no_experiment(options)
        return checked(options)
    for name, fix in NOT_IN_EXPERIMENTS.items():
        if passed_on.get(name):
            raise InvalidArgument(f"--{name}", "this is an experiment", fix)
    grid = Grid(options, varied)
    contradictions.check_experiment(grid)
    check_values(grid)
    return grid


def steps_asked_for(given: Given, passed_on: Given) -> dict[str, object]:
    """Return the values of --eval_strategy and --save_strategy that --eval_steps and --save_steps imply.

    With the default strategies, a number of steps would have no effect.
    """
    found = dict[str, object]()
    for what, other in (("eval", "save"), ("save", "eval")):
        if f"{what}_steps" in given and f"{what}_strategy" not in given:
            found[f"{what}_strategy"] = "steps"
            if passed_on.get("load_best_model_at_end") and not {f"{other}_steps", f"{other}_strategy"} & given.keys():
                # The best checkpoint must be both saved and evaluated.
                found |= {f"{other}_strategy": "steps", f"{other}_steps": given[f"{what}_steps"]}
    return found


# -- validation without the model --------------------------------------------------------------------------------------


def checked(options: T) -> T:
    """Return the options of a single run with derived values filled in.

    Raises `InvalidArgument` for invalid options.
    """
    contradictions.check_method(options.adapter, "calibration_examples")
    output = options.training.output_dir
    check_writable(Path(output), f"--output_dir {output}")
    if options.training.push_to_hub:
        raise InvalidArgument("--push_to_hub", "is not supported", "upload the run's peft/ with `hf upload` instead")
    if options.training.deepspeed:
        require_package("--deepspeed", "deepspeed")
    checkpoints = options.training.gradient_checkpointing or options.passed_on.get("activation_checkpointing")
    if options.training.torch_compile:
        contradictions.check_decay_compiled("--torch_compile", options.adapter)
    if options.training.torch_compile and checkpoints:
        contradictions.check_compiled("--torch_compile", options.adapter)
    if isinstance(options, LlmOptions):
        return _checked_llm(options)
    return _checked_glue(options) if isinstance(options, GlueOptions) else options


def check_folder(name: str) -> None:
    """Raise `InvalidArgument` for a model's name that must be a path but is not a directory."""
    path = Path(name)
    if not path.is_dir() and (path.exists() or is_path(name)):
        raise InvalidArgument(
            f"--model_name_or_path {name}", "no such folder", "give one in transformers' format, or a name on the hub"
        )


def _checked_llm(options: LlmOptions) -> Any:
    task, best = options.task, str(options.passed_on.get("metric_for_best_model") or "").removeprefix("eval_")
    if task.task not in LLM_TASKS:
        raise InvalidArgument(f"--task {task.task}", "unknown", f"choose from {', '.join(LLM_TASKS)}")
    if task.load_in_4bit:
        require_package("--load_in_4bit", "bitsandbytes")
    if task.task != "svamp" and task.data_dir == str(LLM_TASK):
        fix = "give --data_dir DIR, or --model_name_or_path MODEL"
        raise InvalidArgument(f"--task {task.task}", "the bundled examples are svamp's", fix)
    if task.load_in_4bit:
        if options.adapter.merge_and_save:
            fix = "leave it out, and merge peft/ into the whole model"
            raise InvalidArgument("--merge_and_save", "merged weights cannot be stored in 4 bits", fix)
        refuse_unable([options.adapter.name], "quantised")
    if best not in ("", "loss", "accuracy"):
        raise InvalidArgument(f"--metric_for_best_model {best}", "unknown", "choose loss or accuracy")
    check_folder(task.model_name_or_path)
    limit = METAMATHQA_SAMPLES if task.task == "metamathqa" else None
    samples = task.max_train_samples or limit
    return options.replace(max_train_samples=samples, eval_accuracy=task.eval_accuracy or best == "accuracy")


def _checked_glue(options: GlueOptions) -> Any:
    folder = options.model.model_name_or_path
    if options.data.task_name is None and options.data.data_dir is None and Path(folder).resolve() == GLUE_MODEL:
        options = options.replace(task_name="cola", data_dir=str(GLUE_TASK))
    if options.data.task_name is None:
        raise InvalidArgument("--task_name", "missing", f"give one of {', '.join(GLUE_TASKS)}")
    check_folder(folder)
    return options
