"""Validation shared by all scripts: options of a method or an experiment that contradict each other."""

import math
from collections.abc import Iterable

from ..checks import is_subtracted
from ..config import PLAIN
from ..errors import InvalidArgument
from ..formatting import pluralize
from ..methods import own
from ..methods.patterns import FIELDS, entries
from ..methods.registry import METHODS, ZERO_B, refuse_settings
from .averages import averages_of
from .grid import Grid
from .optimizers import named
from .option import Given
from .prompts import clean
from .shared import RunOptions, SharedMethodOptions, SharedOptimizerOptions, TrainOptions
from .values import as_typed, listed

NO_DECAY = ("constant", "constant_with_warmup")
POLYNOMIAL_END = 1e-7  # final learning rate of diffusers' polynomial schedule


def check_texts(values: Given) -> None:
    """Raise `InvalidArgument` for values that are not valid UTF-8.

    safetensors, tokenizers and TensorBoard reject texts that are not.
    """
    for name, value in values.items():
        for text in listed(value):
            if isinstance(text, str) and clean(text) != text:
                raise InvalidArgument(f"--{name} {text}", "is not UTF-8", "rename it, or give another")


def refuse_empty(given: Given, names: Iterable[str]) -> None:
    """Raise `InvalidArgument` if an option of `names` has an empty value.

    An empty value usually comes from an unset shell variable, and the run would use other data or another folder.
    """
    for name in sorted(given.keys() & set(names)):
        if "" in listed(given[name]):
            raise InvalidArgument(
                f"--{name}", "is empty; maybe a variable in the command is not set", "give it a value"
            )


def check_method(options: SharedMethodOptions, calibration: str) -> None:
    """Raise `InvalidArgument` for a method that is not found, options that it does not support, or missing samples.

    Some merges, and the control method `lora_matched`, need calibration samples. `calibration`: the name of the
    script's option for the number of calibration samples.
    """
    for name in options.method:
        if METHODS[name].own:
            own.find(name)
    patterns = {name: getattr(options, name) for name in FIELDS}
    refuse_settings(options.method, options.lora_dropout, patterns)
    for name, texts in patterns.items():
        entries(name, texts)
    check_initialization(options)
    if options.merge_calibration_samples:
        return
    reads = [f"--method {name}" for name in options.method if METHODS[name].measured]
    if options.merge == "lstsq" and carries_activations(options):
        reads.append(f"--merge {options.merge}")
    for argument in reads:
        other = f"another {argument.split()[0]}"
        raise InvalidArgument(argument, "needs calibration samples", f"give --{calibration} 64, or {other}")


def check_initialization(options: SharedMethodOptions, base: str = "", changed: str = "") -> None:
    """Raise `InvalidArgument` for an initialization that the rank or the base weights do not permit.

    `base`: an option that stores the base weights in another form; `changed`: one with which they must not change.
    """
    init, flag = options.init_lora_weights, f"--init_lora_weights {options.init_lora_weights}"
    if init in ZERO_B or not any(METHODS[name].reads_initialization for name in options.method):
        return
    if init == "orthogonal" and options.rank and options.rank % 2:
        raise InvalidArgument(flag, f"the rank {options.rank} is odd", "give an even rank")
    if unfit := base or (changed if is_subtracted(init) else ""):
        problem = f"it reads or changes the base weights, which {unfit} does not permit"
        raise InvalidArgument(flag, problem, "leave one of the two out")


def is_wired(options: SharedMethodOptions) -> bool:
    """Return whether any method of the options has shortcuts that --shortcut and --pre_num do not turn off."""
    return options.reslora_config.wired and any(METHODS[name].shortcuts for name in options.method)


def carries_activations(options: SharedMethodOptions) -> bool:
    """Return whether the shortcuts of any method pass activations from block to block."""
    return is_wired(options) and options.reslora_config.carries


def check_compiled(flag: str, options: SharedMethodOptions, checkpointing: bool) -> None:
    """Raise `InvalidArgument` if gradient checkpointing would lose the shortcuts of a compiled model."""
    if checkpointing and carries_activations(options):
        problem = f"with --gradient_checkpointing would lose the activations of --shortcut {options.shortcut}"
        raise InvalidArgument(flag, problem, f"leave out {flag} or --gradient_checkpointing, or use --shortcut block")


def check_averages(options: TrainOptions, steps: int | None) -> None:
    """Raise `InvalidArgument` if fewer checkpoints will be retained than --average_checkpoints averages.

    `steps`: number of training steps; None while this number, or the number of
    steps between checkpoints, is unknown.
    """
    if options.validation.average_checkpoints is None:
        return
    limit, every = options.output.checkpoints_total_limit, options.output.checkpointing_steps
    limit_flag, every_flag = (options.option(name).flag for name in ("checkpoints_total_limit", "checkpointing_steps"))
    least = max(average.least for average in averages_of(options.validation.average_checkpoints))
    flag = f"--average_checkpoints {options.validation.average_checkpoints}"
    averaged = f"averages {least} or more checkpoints"
    if limit and limit < least:
        raise InvalidArgument(flag, f"{averaged}, and {limit_flag} {limit} retains fewer", f"give {limit_flag} {least}")
    if steps and (count := math.ceil(steps / every)) < least:
        saved = f"{every_flag} {every} saves {count} in {pluralize(steps, 'step')}"
        fix = f"give {every_flag} {steps // least}" if steps >= least else "train for more steps"
        raise InvalidArgument(flag, f"{averaged}, and {saved}", fix)


def refuse_unable_to_start(options: SharedMethodOptions, flag: str) -> None:
    """Raise `InvalidArgument` for a method that cannot start from the base model plus the LoRA that `flag` names."""
    for method in (METHODS[name] for name in options.method):
        if method.measured or not method.trains_lora:
            measured, without = "can only start from zero", "has no plain LoRA weights that could start from it"
            problem = f"--method {method.name} {measured if method.trains_lora else without}"
            raise InvalidArgument(flag, problem, "give --method lora or lora_x2")
        if method.reads_initialization and options.init_lora_weights not in ZERO_B:
            argument = f"--init_lora_weights {options.init_lora_weights}"
            raise InvalidArgument(argument, f"{flag} already sets A and B", f"leave out that or {flag}")
        if method.shortcuts and options.shortcut != PLAIN and options.pre_num != 0:
            problem = (
                f"with --shortcut {options.shortcut} its blocks would also enter their neighbors, and the first step "
                "would not start from the base model plus that LoRA"
            )
            raise InvalidArgument(flag, problem, "give --method lora, or --shortcut none")


def refuse_other_than_lora(given: Given, found: Given) -> None:
    """Raise `InvalidArgument` for a given option that contradicts the LoRA of --init_lora.

    `found`: rank, alpha and target modules of the LoRA, by option. Rank and alpha patterns contradict the LoRA, because
    the LoRA sets rank and alpha of each layer.
    """
    for name, value in {**found, **dict.fromkeys(FIELDS)}.items():
        asked = given.get(name)
        if asked is not None and {*listed(asked)} != {*listed(value)}:
            what = "its layers are others" if isinstance(value, list) else f"--init_lora has {value or 'its own'}"
            raise InvalidArgument(f"--{name} {as_typed(asked)}", what, "leave it out")


def check_schedule(options: SharedOptimizerOptions, flag: str) -> None:
    """Raise `InvalidArgument` for an optimizer, a learning rate or step rules that the schedule does not support.

    `flag` is the script's option for the schedule.
    """
    if options.lr_scheduler == "polynomial" and options.learning_rate <= POLYNOMIAL_END:
        problem, fix = f"{flag} polynomial ends at {POLYNOMIAL_END:g}", "give a larger one, or another schedule"
        raise InvalidArgument(f"--learning_rate {options.learning_rate:g}", problem, fix)
    if named(options.optimizer).package == "schedulefree" and options.lr_scheduler not in NO_DECAY:
        problem = f"--optimizer {options.optimizer} replaces a schedule, so the learning rate must not fall"
        raise InvalidArgument(f"{flag} {options.lr_scheduler}", problem, f"give {' or '.join(NO_DECAY)}")
    rules = options.lr_step_rules or ""
    if options.lr_scheduler == "piecewise_constant" and not is_step_rules(rules):
        problem = f"{flag} piecewise_constant needs factor:step pairs and a last factor"
        raise InvalidArgument(f"--lr_step_rules {rules}".strip(), problem, "give rules such as 1:100,0.1:200,0.01")


def is_step_rules(text: str) -> bool:
    """Return whether diffusers can parse the rules: `factor:step` pairs followed by a last factor."""
    *pairs, last = text.split(",")
    try:
        rules = [pair.split(":") for pair in pairs]
        factors, steps = [float(last), *(float(factor) for factor, _ in rules)], [int(step) for _, step in rules]
    except ValueError:
        return False
    return all(0 <= factor < math.inf for factor in factors) and all(step > 0 for step in steps)


def check_no_experiment(options: RunOptions) -> None:
    """Raise `InvalidArgument` for options of experiments if no option has several values."""
    for name, option in options.table().items():
        if option.group == "experiment" and options[name] and options[name] != option.default:
            several = ", --".join(name for name, option in options.table().items() if option.varies)
            fix = f"give several values of --{several}, or leave it out"
            raise InvalidArgument(f"--{name}", "it has no effect, because this is not an experiment", fix)


def check_experiment(grid: Grid) -> None:
    """Raise `InvalidArgument` for options that an experiment does not support."""
    options = grid.base
    for name, option in options.table().items():
        if option.in_experiments and options[name]:
            raise InvalidArgument(f"--{name}", "this is an experiment", option.in_experiments)
    select, test = options.experiment.select_split or 0, options.experiment.test_split or 0
    if select + test >= 1:
        problem = f"with --test_split {test:g} nothing is left to train on"
        raise InvalidArgument(f"--select_split {select:g}", problem, "give smaller fractions")
    if (place := options["resume_from_checkpoint"]) not in (None, "latest"):
        argument = f"--resume_from_checkpoint {place}"
        raise InvalidArgument(argument, "an experiment resumes all of its runs", "give latest")
