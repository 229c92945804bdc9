"""What an experiment with images cannot do, by its options."""

from __future__ import annotations

from ...common.errors import InvalidArgument
from ...common.flags import as_typed
from ...experiment.arms import check_values
from ...options.grid import Grid
from ...options.images import Options

OF_EXPERIMENTS = [name for name, option in Options.table().items() if option.group == "experiment"]
OF_RUNS = [name for name, option in Options.table().items() if option.in_experiments]  # which experiments cannot do


def check_no_experiment(options: Options) -> None:
    """Refuse options of experiments where no option has several values."""
    for name in OF_EXPERIMENTS:
        if options[name]:
            several = ", --".join(name for name, option in Options.table().items() if option.varies)
            fix = f"give several values of --{several}, or leave it out"
            raise InvalidArgument(f"--{name}", "this is no experiment, nothing reads it", fix)


def check_experiment(grid: Grid[Options]) -> None:
    """Refuse what an experiment cannot do."""
    options = grid.base
    for name in OF_RUNS:
        if options[name]:
            raise InvalidArgument(f"--{name}", "this is an experiment", Options.table()[name].in_experiments)
    check_values(grid)
    if "rank" in grid.varied and options.adapter.init_lora:
        argument = f"--rank {as_typed(grid.varied['rank'])}"
        raise InvalidArgument(argument, "--init_lora has ranks of its own", "leave it out")
    select, test = options.experiment.select_split, options.experiment.test_split
    if (select or 0) + (test or 0) >= 1:
        problem = f"with --test_split {test:g} nothing is left to train on"
        raise InvalidArgument(f"--select_split {select:g}", problem, "give smaller shares")
    if options.output.resume_from_checkpoint not in (None, "latest"):
        argument = f"--resume_from_checkpoint {options.output.resume_from_checkpoint}"
        raise InvalidArgument(argument, "an experiment goes on as a whole", "give latest")
