"""Format the trainer's status file as a sentence. Every value is validated, because the file may be damaged."""

import re

from reslora.methods.registry import METHODS

from .runs import Run, number

PROBLEM = re.compile(r"train_sd\.py: (?!(\S+ )?stopped )|[\w.]+(Error|Exception)\b")
"""Pattern that matches the last log line of a trainer that failed, but not the line "stopped" of a trainer that was
asked to stop."""


def activity_of(run: Run) -> str:
    """Return what the trainer of a run does now, with the time left of the complete run; empty without a trainer."""
    told = run.activity
    others = [method for method in run.methods if method != told.get("name")]
    rest = sum(run.steps_of(method) - run.steps_done(method) for method in others)
    return activity(told, rest if told.get("name") in run.methods else 0)


def activity(told: dict, rest: int = 0) -> str:
    """Return the trainer's current work as a sentence; `told` is the content of the trainer's status file.

    `rest`: steps that are left after those of the current method.

    Example: `LoRA, step 60 of 200 · 3.1 steps a second · about 45 s left`.
    """
    name, phase = str(told.get("name") or "")[:80], str(told.get("phase") or "")[:80]
    words = [METHODS[name].title if name in METHODS else name] if name else []
    done, total = number(told.get("done")), number(told.get("total"))
    words.append(phase if done is None or total is None else f"{phase} {done:.0f} of {total:.0f}")
    sentence = ", ".join(words)
    facts = [sentence if name else sentence[:1].upper() + sentence[1:]]  # do not capitalize a run's name
    rate = number(told.get("per_second")) or 0
    if 1e-6 < rate < 1e6 and done is not None:
        unit = phase.rpartition(" ")[2]
        each = "an" if unit[:1] in "aeiou" else "a"
        facts.append(f"{rate:.1f} {unit}s a second" if rate >= 1 else f"{1 / rate:.1f} s {each} {unit}")
        if total is not None and total > done:
            facts.append(f"about {duration((total - done + rest) / rate)} left")
    if (memory := number(told.get("memory_bytes")) or 0) > 0:
        facts.append(f"{memory / 1e9:.1f} GB in use at most")
    return " · ".join(facts)


def why_ended(run: Run, status: str, said: str) -> str:
    """Return `said`, the last log line, if it explains why a run failed or stopped early; else an empty string."""
    never_began = status == "failed" and not (run.config or run.unreadable)
    return said if never_began or (status == "stopped" and PROBLEM.match(said)) else ""


def duration(seconds: float) -> str:
    """Return a number of remaining seconds as text, such as `45 s`, `12 min` or `1.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds)):d} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
