"""What an experiment with images cannot do, by its options."""

from __future__ import annotations

from ...common.errors import InvalidArgument
from ...common.flags import as_typed
from ...options.grid import Grid
from ...options.images import Options

OF_EXPERIMENTS = [name for name, option in Options.table().items() if option.group == "experiment"]
OF_RUNS = [name for name, option in Options.table().items() if option.in_experiments]  # which experiments cannot do


def check_ranks(grid: Grid[Options]) -> None:
    """Refuse several ranks where a LoRA to start from has its own."""
    if "rank" in grid.varied and grid.base.adapter.init_lora:
        argument = f"--rank {as_typed(grid.varied['rank'])}"
        raise InvalidArgument(argument, "--init_lora has ranks of its own", "leave it out")
