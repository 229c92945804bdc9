"""Check the options of an experiment with images."""

from ...errors import InvalidArgument
from ...options.grid import Grid
from ...options.images import Options
from ...options.values import as_typed

OF_EXPERIMENTS = [name for name, option in Options.table().items() if option.group == "experiment"]
OF_RUNS = [name for name, option in Options.table().items() if option.in_experiments]  # options that experiments reject


def check_ranks(grid: Grid[Options]) -> None:
    """Raise `InvalidArgument` for several ranks together with --init_lora, because that LoRA has its own rank."""
    if "rank" in grid.varied and grid.base.adapter.init_lora:
        argument = f"--rank {as_typed(grid.varied['rank'])}"
        raise InvalidArgument(argument, "--init_lora has ranks of its own", "leave it out")
