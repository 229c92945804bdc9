"""Resolve the command line to the options of a language script.

transformers is imported only if the options are valid.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..checks import check_apart, check_writable, is_path, refuse_changed_base, require_package
from ..errors import InvalidArgument
from ..experiment.arms import check_values
from ..io import read_object
from ..methods.registry import refuse_unable
from ..options import contradictions
from ..options.grid import Grid, first_of
from ..options.optimizers import check_installed, named
from ..options.option import SAME, Given
from ..options.parser import OptionsParser
from ..options.texts import (
    GLUE_MODEL,
    GLUE_TASK,
    GLUE_TASKS,
    INSTEAD,
    LLM_TASK,
    LLM_TASKS,
    NEAREST,
    TRANSFORMERS,
    GlueOptions,
    LlmOptions,
    TextOptions,
)
from ..options.unused import refuse_unused
from ..options.values import listed
from ..options.vary import values_to_vary

T = TypeVar("T", bound=TextOptions)
FOLDERS = ("model_name_or_path", "data_dir", "init_lora")
"""Options that may name a folder to read."""
METAMATHQA_SAMPLES = 40_000  # number of training samples in the paper's Appendix C


class TextParser(OptionsParser):
    """A parser that says what to do instead of giving an option of transformers' scripts that is not supported."""

    def refuse_unknown(self, words: list[str]) -> NoReturn:
        """Exit with one line."""
        for word in words:
            name = word.partition("=")[0].lstrip("-").replace("-", "_")
            for near, others in NEAREST.items():
                if name in others.split():
                    self.error(f"--{name}: not supported; the nearest option is --{near}")
            for others, instead in INSTEAD.items():
                if name in others.split():
                    self.error(f"--{name}: not supported; {instead}")
        super().refuse_unknown(words)


def read(kind: type[T], prog: str, argv: Sequence[str] | None, description: str | None = None) -> T | Grid[T]:
    """Return the options of a run, or of an experiment if an option that can vary has several values.

    Exits with status 2 and a one-line message for invalid syntax. Raises `InvalidArgument` for invalid or empty values.
    """
    given = vars(TextParser(prog, kind, description or "").parse_args(argv))
    given |= values_to_vary(given.pop("vary", ()), kind.table(), given)
    contradictions.check_texts(given)
    contradictions.refuse_empty(given, given)
    return resolve(kind, given)


def resolve(kind: type[T], given: Given) -> T | Grid[T]:
    """Return the options of a run, or of an experiment.

    Raises `InvalidArgument` for invalid values.
    """
    bundled = "model_name_or_path" not in given
    values = {
        name: option.bundled if bundled and option.bundled is not SAME else option.default
        for name, option in kind.table().items()
    }
    # With the default strategies, a number of steps would have no effect.
    asked = {f"{what}_strategy": "steps" for what in ("eval", "save") if f"{what}_steps" in given}
    values |= {**asked, **given}
    optimizers = [TRANSFORMERS.get(name, name) for name in listed(values["optim"])]
    own = {named(optimizer).learning_rate for optimizer in optimizers}
    if "learning_rate" not in given and None not in own:
        values["learning_rate"] = own.pop()
    if all(named(optimizer).package == "schedulefree" for optimizer in optimizers):
        values |= {"lr_scheduler_type": given.get("lr_scheduler_type", "constant")}
    options, varied = first_of(kind, values | {"optim": optimizers if len(optimizers) > 1 else optimizers[0]})
    options = with_start(options, given)
    if not varied and len(options.adapter.method) == 1:
        contradictions.check_no_experiment(options)
        return checked(options)
    grid = Grid(options, varied)
    contradictions.check_experiment(grid)
    check_values(grid)
    return grid


def with_start(options: T, given: Given) -> T:
    """Return the options with rank, alpha and target modules of --init_lora.

    Raises `InvalidArgument` if the LoRA is not a plain LoRA with one rank and one alpha, if a method cannot start from
    it, or if a given option contradicts it.
    """
    if (place := options.adapter.init_lora) is None:
        return options
    flag, config = f"--init_lora {place}", read_object(Path(place) / "adapter_config.json")
    if config.get("peft_type") != "LORA" or not (Path(place) / "adapter_model.safetensors").is_file():
        raise InvalidArgument(flag, "contains no LoRA in PEFT's format", "give a folder such as RUN/peft")
    if others := [name for name in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora") if config.get(name)]:
        raise InvalidArgument(flag, f"it has {others[0]}", "give a LoRA with one rank and one alpha")
    if not config["lora_alpha"]:
        raise InvalidArgument(flag, "its alpha is 0, so it cannot be trained", "give a LoRA with another alpha")
    refuse_changed_base(config.get("init_lora_weights"), flag)
    contradictions.refuse_unable_to_start(options.adapter, flag)
    targets = sorted(listed(config["target_modules"]))
    found = {"lora_r": config["r"], "lora_alpha": config["lora_alpha"], "target_modules": targets}
    contradictions.refuse_other_than_lora(given, found)
    return options.replace(**found)


# -- validation without the model --------------------------------------------------------------------------------------


def checked(options: T) -> T:
    """Return the options of a single run with derived values filled in.

    Raises `InvalidArgument` for invalid options.
    """
    contradictions.check_method(options.adapter, "calibration_examples")
    refuse_unused(options)
    contradictions.check_averages(options, None)
    output, optimizer = options.output.output_dir, options.optimizer
    check_apart(output, {name: listed(options[name]) for name in FOLDERS if options[name]})
    check_writable(Path(output), f"--output_dir {output}")
    if (cache := options["cache_dir"]) and not Path(cache).is_dir():
        check_writable(Path(cache), f"--cache_dir {cache}")
    check_installed(optimizer.optimizer, optimizer.optimizer_args, f"--optim {optimizer.optimizer}")
    contradictions.check_schedule(optimizer, "--lr_scheduler_type")
    if optimizer.warmup_ratio and optimizer.lr_warmup_steps:
        raise InvalidArgument(f"--warmup_ratio {optimizer.warmup_ratio:g}", "and --warmup_steps", "give one of them")
    if options.training.bf16 and options.training.fp16:
        raise InvalidArgument("--fp16", "contradicts --bf16", "leave one of them out")
    if options.training.deepspeed:
        require_package("--deepspeed", "deepspeed")
    if options.training.compile:
        contradictions.check_compiled("--torch_compile", options.adapter, options.training.gradient_checkpointing)
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
    task = options.task
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
        contradictions.check_initialization(options.adapter, "--load_in_4bit")
    check_folder(task.model_name_or_path)
    limit = METAMATHQA_SAMPLES if task.task == "metamathqa" else None
    return options.replace(max_train_samples=task.max_train_samples or limit)


def _checked_glue(options: GlueOptions) -> Any:
    folder = options.model.model_name_or_path
    if options.data.task_name is None and options.data.data_dir is None and Path(folder).resolve() == GLUE_MODEL:
        options = options.replace(task_name="cola", data_dir=str(GLUE_TASK))
    if options.data.task_name is None:
        raise InvalidArgument("--task_name", "missing", f"give one of {', '.join(GLUE_TASKS)}")
    check_folder(folder)
    return options
