"""Write `config.json`, and start accelerate's trackers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..errors import refused_as
from ..io import write_json
from ..options.grid import Grid
from ..options.prompts import clean
from ..options.shared import TrainOptions
from ..options.values import as_typed
from ..runtime.processes import broadcast_from_main, on_all
from .context import Context

TENSORBOARD_SECONDS = 10  # seconds between two flushes to disk


def start_trackers(context: Context, project: str, **options: Any) -> None:
    """Start the trackers; raises `InvalidArgument` if one cannot start."""
    often = {"tensorboard": {"flush_secs": TENSORBOARD_SECONDS}}

    def start() -> None:
        """Start the trackers on this process."""
        with refused_as(
            f"--report_to {as_typed(context.options['report_to'])}", "log in there, or give --report_to none"
        ):
            context.accelerator.init_trackers(project, init_kwargs=often | options)

    on_all(start)


def note_settings(
    asked: TrainOptions | Grid, steps: Mapping[str, int], accelerator: Accelerator, write: bool = True
) -> None:
    """Write the values of all options, except secret ones, to the trackers and, if `write`, to `config.json`.

    `steps`: values that follow from the number of steps.
    """
    values, table = {**asked.flat(), **steps}, (asked.base if isinstance(asked, Grid) else asked).table()
    public = {name: value for name, value in values.items() if not table[name].secret}
    for name, value in public.items():
        if value and table[name].path == "absolute":
            public[name] = list(map(absolute, value)) if isinstance(value, list) else absolute(value)
    if write:
        broadcast_from_main(lambda: write_json(Path(values["output_dir"]) / "config.json", public))
    plain = {k: v if isinstance(v, (int, float, bool)) else clean(str(v)) for k, v in public.items()}
    for tracker in accelerator.trackers:
        tracker.store_init_configuration(plain)


def absolute(place: str) -> str:
    """Return the absolute path of an existing file or folder; return any other name unchanged."""
    return str(Path(place).resolve()) if Path(place).exists() else place
