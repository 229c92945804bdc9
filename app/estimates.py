"""Estimate the time and the memory of a run before it starts.

Time: from the newest run of the same model and batch in the folder of runs. Memory: by the trainer's `--plan`.
"""

import re

from reslora.experiment.schedule import ArmSchedule
from reslora.options.grid import Grid
from reslora.options.images import Options
from reslora.options.values import listed

from .activity import duration
from .bases import bundled
from .library import Experiment, Library
from .runs import Run, number

SAME = ("resolution", "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "base_precision")
"""Options on which the time of a step depends most, in addition to the model."""
UNKNOWN = "known after the first steps"
PEAK = re.compile(r"^the most, (\S+) (\w+)(?: of (\S+) \w+ that .+ has free)?, while (.+?);", re.MULTILINE)


def training_time(library: Library, found: Options | Grid[Options]) -> str:
    """Return the estimated training time, with the run that it is estimated from; `UNKNOWN` without such a run."""
    base = found.base if isinstance(found, Grid) else found
    minutes = base.experiment.experiment_minutes if isinstance(found, Grid) else None
    limit = f"at most {minutes:g} min" if minutes else ""
    steps = base.training.max_train_steps
    like = next(filter(None, (seconds_a_step(run, base) for run in library.everything() if library.owns(run))), None)
    if not steps or like is None:
        return limit or UNKNOWN
    name, seconds = like
    mean = sum(seconds.values()) / len(seconds)
    total = sum(steps * seconds.get(method, mean) for method in methods_of(found))
    if isinstance(found, Grid):
        total /= max(1, base.experiment.arms_at_once or 1)
    if minutes and total > 60 * minutes:
        return limit
    return f"about {duration(total)}, like the run {name}"


def number_of_runs(found: Options | Grid[Options]) -> int:
    """Return how many runs are trained; the methods of a single run count as one."""
    return len(methods_of(found)) if isinstance(found, Grid) else 1


def methods_of(found: Options | Grid[Options]) -> list[str]:
    """Return the method of each run that is trained."""
    if not isinstance(found, Grid):
        return found.adapter.method
    schedule = ArmSchedule(found)
    return [schedule.labels[arm.label].method for arm in schedule.trained_arms()]


def seconds_a_step(run: Run, options: Options) -> tuple[str, dict[str, float]] | None:
    """Return a run's name and its seconds per step by method, or None if it cannot be compared with the options."""
    config, model = run.config, options.model.pretrained_model_name_or_path or ""
    named = run.word("pretrained_model_name_or_path") or ""
    if not config or (bundled(named) or named) != (bundled(model) or model):
        return None
    if any(listed(config.get(name)) != listed(options[name]) for name in SAME):
        return None
    if isinstance(run, Experiment):
        each, steps = run.seconds_an_arm, number(config.get("max_train_steps"))
        return (run.name, {"": each / steps}) if each and steps and steps > 0 else None
    last = {method: next(reversed(run.log(method)), {}) for method in run.methods}
    known = {method: (number(row.get("seconds")), row.get("step")) for method, row in last.items()}
    seconds = {method: took / step for method, (took, step) in known.items() if took and step}
    return (run.name, seconds) if seconds else None


def peak_memory(printed: str) -> str:
    """Return the peak in the output of `--plan` as a short text, or the last line, which says what is wrong."""
    found = PEAK.search(printed)
    if not found:
        return next(reversed(printed.splitlines()), "unknown")
    size, unit, free, phase = found.groups()
    return f"{rounded(size, unit)}{f' of {rounded(free, unit)} free' if free else ''}, while {phase}"


def rounded(size: str, unit: str) -> str:
    """Return a size in MiB or GiB with three digits."""
    value = float(size) * (1024 if unit == "GiB" else 1)
    return f"{value:.0f} MiB" if value < 1000 else f"{value / 1024:.3g} GiB"
