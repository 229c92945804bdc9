"""Resolve the command line to the options of a run or an experiment: read files, add defaults, and validate."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundled import ASSETS
from ..experiment.arms import check_evaluations, check_values
from ..options.contradictions import check_experiment, check_no_experiment, refuse_empty
from ..options.files import read_file
from ..options.grid import Grid, first_of
from ..options.images import NOISES, Options
from ..options.optimizers import named
from ..options.option import SAME, Given
from ..options.parser import OptionsParser
from ..options.prompts import clean
from ..options.unused import report_unread_by_methods, report_unused
from ..options.values import listed
from ..options.vary import values_to_vary
from .config_file import of_this_run
from .experiment.requirements import check_batches, check_ranks
from .prompts import from_file
from .refusals import check_options, check_places, report_doubtful

PROG = "train_sd.py"
BUNDLED_MODEL, BUNDLED_IMAGES, BUNDLED_STEPS = ASSETS / "pipeline", ASSETS / "twemoji", 200
DEFAULT_SPLIT = 0.1  # fraction of an experiment's images in the selection split; the test split has the same


def parse_args(argv: Sequence[str] | None = None, description: str = "") -> Options | Grid[Options]:
    """Return the options of a run or an experiment; defaults that depend on the model's family are not resolved yet.

    Exits with status 2 and prints one line for invalid syntax. Raises `InvalidArgument` for invalid values.
    """
    asked = resolve(parsed_values(build_parser(description), argv))
    options = asked.base if isinstance(asked, Grid) else asked
    check_places(options)
    report_unread_by_methods(asked)
    report_unused(asked)
    report_doubtful(options)
    return asked


def build_parser(description: str = "") -> OptionsParser:
    """Return the parser of train_sd.py."""
    return OptionsParser(PROG, Options, description, {"layers": _layers_page})


def _layers_page() -> str:
    """Return the help of --layers; it imports the families, which takes seconds."""
    from .layers import page

    return page()


def parsed_values(parser: OptionsParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """Return the values of the command line and of the file in --config; the command line takes precedence."""
    given = vars(parser.parse_args(argv))
    given |= values_to_vary(given.pop("vary", ()), parser.table, given)
    if "config" not in given:
        return given
    path = Path(given.pop("config"))
    values = read_file(path, Options.table(), given, PROG)
    return (of_this_run(values, given, path) if path.suffix == ".json" else values) | given


def resolve(given: Given) -> Options | Grid[Options]:
    """Return the options of a run, or those of an experiment if any option that can vary has several values.

    Raises `InvalidArgument` for options that cannot work with any model.
    """
    refuse_empty(given, (name for name, option in Options.table().items() if option.path))
    values = dict(given)
    options, varied = first_of(Options, with_defaults(values))
    if not varied:
        check_options(options)
        check_no_experiment(options)
        return options
    grid = Grid(options, varied)
    for one in grid.runs(*(name for name in grid.varied if name != "seed")):
        check_options(one)
    check_experiment(grid)
    check_values(grid)
    check_ranks(grid)
    check_batches(grid)
    if (steps := options.training.max_train_steps) and (every := options.validation.validation_steps):
        check_evaluations(grid, steps, every, "--validation_steps")
    return grid


def with_defaults(given: Given) -> dict[str, Any]:
    """Return the values of all options: the `given` ones, and defaults for the others.

    Without a given model, the model is a bundled pipeline; bundled pipelines have their own defaults. An option that
    varies over the runs of an experiment has a list of values. Defaults that depend on the model's family are still
    None.
    """
    table, values = Options.table(), dict(given)
    values["pretrained_model_name_or_path"] = given.get("pretrained_model_name_or_path") or str(BUNDLED_MODEL)
    bundled = is_bundled(values["pretrained_model_name_or_path"])
    of_shortcuts = any(table[name].implies for name in given)
    if "method" not in given and of_shortcuts and not bundled:
        values["method"] = ["reslora"]
    elif "method" not in given and "init_lora" in given and not of_shortcuts:
        values["method"] = ["lora"]  # the bundled pipeline's other default method cannot start from a LoRA
    if bundled and not given.get("dataset_name") and not given.get("train_data_dir"):
        values["train_data_dir"] = [str(BUNDLED_IMAGES)]
    if bundled and not {"max_train_steps", "num_train_epochs"} & given.keys():
        values["max_train_steps"] = BUNDLED_STEPS
    if given.get("use_8bit_adam"):
        values.setdefault("optimizer", "adamw8bit")
    own = {named(optimizer).learning_rate for optimizer in listed(values.get("optimizer", "adamw"))}
    if None not in own:  # with several optimizers each has its own: `arms.rates_of`
        values.setdefault("learning_rate", own.pop())
    if "validation_epochs" in given:
        values.setdefault("validation_steps", None)
    flow = Path(values["pretrained_model_name_or_path"]).name == "pipeline-flow"
    for name, option in table.items():
        own = option.bundled_flow if flow and option.bundled_flow is not SAME else option.bundled
        values.setdefault(name, own if bundled and own is not SAME else option.default)
    values["local_rank"] = int(os.environ.get("LOCAL_RANK", values["local_rank"]))
    for name in ("resolution", "method"):
        values[name] = list(dict.fromkeys(listed(values[name])))
    if any(len(table[name].several(value) or ()) > 1 for name, value in values.items()):
        values |= {name: DEFAULT_SPLIT for name in ("select_split", "test_split") if values[name] is None}
        values["validation_split"] = given.get("validation_split", 0.0)
    if (found := from_file(values["validation_prompt"])) is not None:
        values["validation_prompt"], values["validation_prompt_options"] = found
    values["validation_prompt"] = [clean(prompt).strip() for prompt in values["validation_prompt"]]
    if values["save_best"] or values["early_stopping_patience"]:
        values["validation_noises"] = values["validation_noises"] or NOISES
    if values["metric_model"] and Path(values["metric_model"]).exists():
        values["metric_model"] = str(Path(values["metric_model"]).resolve())
    return values


def is_bundled(model: str) -> bool:
    """Return whether a model is one of the bundled pipelines."""
    return Path(clean(model)).resolve().parent == ASSETS


def with_family(options: Options, defaults: Mapping[str, object]) -> Options:
    """Return the options with missing values filled in by the family's defaults."""
    values = options.flat()
    return options.replace(**{name: value for name, value in defaults.items() if values[name] is None})
