"""What a trainer says that it is doing now, as a sentence. Its file may hold anything, so all of it is doubted."""

from __future__ import annotations

import re

from reslora.methods.registry import METHODS

from .runs import Run, number

PROBLEM = re.compile(r"train_sd\.py: (?!(\S+ )?stopped )|[\w.]+(Error|Exception)\b")
"""How the line begins by which a trainer says why it cannot go on; asked to stop, it says that it has stopped."""


def activity(told: dict) -> str:
    """What a trainer is doing now, in a sentence: LoRA, step 60 of 200 · 3.1 steps a second · about 45 s left."""
    name, phase = str(told.get("name") or "")[:80], str(told.get("phase") or "")[:80]
    words = [METHODS[name].title if name in METHODS else name] if name else []
    done, total = number(told.get("done")), number(told.get("total"))
    words.append(phase if done is None or total is None else f"{phase} {done:.0f} of {total:.0f}")
    sentence = ", ".join(words)
    facts = [sentence if name else sentence[:1].upper() + sentence[1:]]  # a name is written as it is
    if (rate := number(told.get("per_second"))) is not None and 1e-6 < rate < 1e6 and done is not None:
        unit = phase.rpartition(" ")[2]
        each = "an" if unit[:1] in "aeiou" else "a"
        facts.append(f"{rate:.1f} {unit}s a second" if rate >= 1 else f"{1 / rate:.1f} s {each} {unit}")
        if total is not None and total > done:
            facts.append(f"about {duration((total - done) / rate)} left")
    if (memory := number(told.get("memory_bytes"))) is not None and memory > 0:
        facts.append(f"{memory / 1e9:.1f} GB")
    return " · ".join(facts)


def why_ended(run: Run, status: str, said: str) -> str:
    """What a run's trainer has `said` last, where that is why it never began, or has ended too early."""
    never_began = status == "failed" and not (run.config or run.unreadable)
    return said if never_began or (status == "stopped" and PROBLEM.match(said)) else ""


def duration(seconds: float) -> str:
    """A time that is left, no more exact than it can be known."""
    if seconds < 90:
        return f"{max(1, round(seconds)):d} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
