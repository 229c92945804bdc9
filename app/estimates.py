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
LEAST_STEPS = 30
"""Number of steps below which a run says nothing about the time of a step: its first ones are slow."""
PEAK = re.compile(r"^the most, (\S+) (\w+)(?: of (\S+) \w+ that .+ has free)?, while (.+?);", re.MULTILINE)


def training_time(library: Library, found: Options | Grid[Options]) -> str:
    """Return the estimated training time, with the run that it is estimated from; `UNKNOWN` without such a run."""
    base = found.base if isinstance(found, Grid) else found
    minutes = base.experiment.experiment_minutes if isinstance(found, Grid) else None
    limit = f"at most {minutes:g} min" if minutes else ""
    steps = base.training.max_train_steps
    known = ((run, seconds_a_step(run, base)) for run in library.everything() if library.owns(run))
    # An experiment's log also shows how long everything besides the training takes.
    wanted = sorted(
        (one for one in known if one[1]), key=lambda one: isinstance(one[0], Experiment) != isinstance(found, Grid)
    )
    if not steps or not wanted:
        return limit or UNKNOWN
    like, seconds = wanted[0]
    mean = sum(seconds.values()) / len(seconds)
    total = sum(steps * seconds.get(method, mean) for method in methods_of(found))
    if isinstance(found, Grid):
        total /= max(1, base.experiment.arms_at_once or 1)
    if minutes and total > 60 * minutes:
        return limit
    if isinstance(found, Grid) and not isinstance(like, Experiment):
        return f"more than {duration(total)}: its steps alone, like {like.name}"
    return f"about {duration(total)}, like {like.name}"


def methods_of(found: Options | Grid[Options]) -> list[str]:
    """Return the method of each run that is trained."""
    if not isinstance(found, Grid):
        return found.adapter.method
    schedule = ArmSchedule(found)
    return [schedule.labels[arm.label].method for arm in schedule.trained_arms()]


def seconds_a_step(run: Run, options: Options) -> dict[str, float]:
    """Return a run's seconds per step by method; empty if it cannot be compared with the options.

    The seconds of an experiment include its measurements, tests and exports."""
    config, model = run.config, options.model.pretrained_model_name_or_path or ""
    named = run.word("pretrained_model_name_or_path") or ""
    if not config or (bundled(named) or named) != (bundled(model) or model):
        return {}
    if any(listed(config.get(name)) != listed(options[name]) for name in SAME):
        return {}
    if isinstance(run, Experiment):
        each, steps = run.seconds_in_all, number(config.get("max_train_steps"))
        return {"": each / steps} if each and steps and steps >= LEAST_STEPS else {}
    last = {method: next(reversed(run.log(method)), {}) for method in run.methods}
    known = {method: (number(row.get("seconds")), row.get("step")) for method, row in last.items()}
    return {method: took / step for method, (took, step) in known.items() if took and step >= LEAST_STEPS}


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
