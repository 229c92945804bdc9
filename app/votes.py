"""Store and evaluate blind votes on samples of an experiment.

Votes show which of two methods people prefer, and whether the losses agree with them."""

import contextlib
import json
import random
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reslora.experiment.record import EXPERIMENT
from reslora.experiment.statistics import LEVEL, half_width, spread_of
from reslora.formatting import pluralize
from reslora.images.experiment.gallery import chosen_samples
from reslora.json_lines import values_of

from .library import Experiment
from .runs import IN_PLACE, RunError
from .views import notice, table, table_rows, unless_damaged

FILE = "votes.jsonl"
"""Name of the file in the experiment's folder that has one vote per line."""

VALUES = {"label": 1, "equal": 0, "reference": -1}
"""Value of each vote: for the compared method, for neither, for its reference method (baseline)."""


class Pair(NamedTuple):
    """A pair of samples: compared method, reference method (baseline), training seed, and index of the prompt."""

    label: str
    reference: str
    seed: int
    prompt: int
    """Index of the prompt."""


def pairs(experiment: Experiment) -> dict[Pair, tuple[Path, Path]]:
    """Return the files of the two samples of each pair: that of the compared method, then that of its reference method.

    The samples are from the runs and steps that the experiment chose. Pairs with a missing sample are left out.
    """
    content, found = experiment.read_json(EXPERIMENT), {}
    with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):  # a damaged file
        content["arms"] = [arm for arm in content["arms"] if experiment.inside(arm["folder"])]
        prompts = [str(prompt) for prompt in content["settings"].get("validation_prompt") or ()]
        for verdict in content["verdicts"]:
            ours, theirs = (samples(experiment, content, str(verdict[end]), prompts) for end in ("label", "reference"))
            for seed, number in ours.keys() & theirs.keys():
                pair = Pair(str(verdict["label"]), str(verdict["reference"]), seed, number)
                found[pair] = ours[seed, number], theirs[seed, number]
    return dict(sorted(found.items()))


def samples(experiment: Experiment, content: dict, label: str, prompts: Sequence[str]) -> dict[tuple[int, int], Path]:
    """Return the first sample of the method `label` by (seed, prompt index), at the step nearest to its chosen step.

    `content`: the experiment's record. Files outside of the experiment's folder are left out."""
    return {
        (int(arm["seed"]), number): path
        for arm, _, place in chosen_samples(content, experiment.folder, label, prompts)
        for number in range(len(prompts))
        if (path := experiment.inside(str(place / f"{number}-0.png"))) and path.is_file()
    }


# -- votes -------------------------------------------------------------------------------------------------------------


def votes(experiment: Experiment) -> dict[Pair, list[int]]:
    """Return the values of the votes (see `VALUES`) on each pair.

    Damaged lines of the file are skipped, and votes on other samples: more seeds may have changed the chosen runs.
    """
    found: dict[Pair, list[int]] = defaultdict(list)
    shown = {pair: files_of(experiment, files) for pair, files in pairs(experiment).items()}
    for _, row in values_of(experiment.text(FILE)):
        with contextlib.suppress(LookupError, TypeError):
            pair = Pair(*(row[name] for name in Pair._fields))
            if row.get("files", shown[pair]) == shown[pair]:  # earlier versions did not store the files
                found[pair].append(VALUES[row["vote"]])
    return found


def files_of(experiment: Experiment, files: Iterable[Path]) -> list[str]:
    """Return the paths of a pair's files relative to the experiment's folder."""
    return [path.relative_to(experiment.resolved).as_posix() for path in files]


def add(experiment: Experiment, pair: Pair, vote: str) -> None:
    """Append a vote (a key of `VALUES`) to the experiment's file. Raises `RunError` if it cannot be written."""
    files = files_of(experiment, pairs(experiment).get(pair, ()))
    row = {**pair._asdict(), "vote": vote, "files": files, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
    try:
        with IN_PLACE, (experiment.folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RunError(f"The vote cannot be stored ({error.strerror}).") from None


def next_pair(known: Collection[Pair], given: Mapping[Pair, list[int]], before: Pair | None = None) -> Pair:
    """Return a random pair among those with the fewest votes.

    `known`: all pairs. `given`: votes by pair. `before`: the previous pair, returned only if there is no other pair."""
    counts = {pair: len(given.get(pair, ())) for pair in known if pair != before or len(known) == 1}
    return random.choice([pair for pair, count in counts.items() if count == min(counts.values())])


# -- the result --------------------------------------------------------------------------------------------------------


def preference(known: Sequence[Pair], given: Mapping[Pair, list[int]]) -> tuple[float | None, float | None]:
    """Return the mean vote on a method's pairs, from -1 to 1, and half the width of its 95% confidence interval.

    Seeds and prompts are crossed random effects, as seeds and images are in the test of the losses. The half width is
    None if there are fewer than two seeds or prompts, if a combination of seed and prompt has no vote, or if all votes
    are the same. Both are None without votes. `given`: votes by pair.
    """
    values = {pair: sum(given[pair]) / len(given[pair]) for pair in known if given.get(pair)}
    if not values:
        return None, None
    mean = sum(values.values()) / len(values)
    seeds, prompts = (sorted({getattr(pair, name) for pair in known}) for name in ("seed", "prompt"))
    by_place = {(pair.seed, pair.prompt): value for pair, value in values.items()}
    if min(len(seeds), len(prompts)) < 2 or len(by_place) < len(seeds) * len(prompts):
        return mean, None
    half = float(half_width(spread_of(np.array([[by_place[s, p] for p in prompts] for s in seeds])), LEVEL))
    return mean, half or None


@unless_damaged
def result(experiment: Experiment) -> str:
    """Return a table (HTML) of each method's preference with interval, its loss verdict, and whether the two agree."""
    known, given, rows = pairs(experiment), votes(experiment), []
    verdicts = experiment.read_json(EXPERIMENT).get("verdicts") or ()
    for verdict in verdicts if known else ():
        label, reference = str(verdict["label"]), str(verdict["reference"])
        own = [pair for pair in known if (pair.label, pair.reference) == (label, reference)]
        mean, half = preference(own, given)
        count = sum(len(given.get(pair, ())) for pair in own)
        open_pairs = sum(not given.get(pair) for pair in own)
        rows.append((
            f"{label} or {reference}", pluralize(count, "vote"), in_percent(mean, half, open_pairs),
            str(verdict["sentence"]), agreement(label, reference, mean, half, str(verdict["conclusion"])),
        ))  # fmt: skip
    if not rows:
        return notice(
            "No votes to show: this experiment has no verdict yet, or fewer than two of its methods have sample images "
            "(--num_validation_images)."
        )
    names = ("methods", "votes", "preference", "loss", "together")
    return table("made votes", "Votes and losses", table_rows(names, rows))


def in_percent(mean: float | None, half: float | None, open_pairs: int) -> str:
    """Return the percentage of votes for a method, with its 95% confidence interval, as text.

    An `equal` vote counts as half a vote. `mean`, `half`: the results of `preference`. `open_pairs`: number of pairs
    without a vote."""
    if mean is None:
        return "no votes"
    told = f"{50 + 50 * mean:.0f}%"
    if half is not None:
        low, high = (50 + 50 * max(-1.0, min(1.0, mean + by)) for by in (-half, half))
        return f"{told} (95% interval {low:.0f} to {high:.0f}%)"
    if open_pairs:
        return f"{told}; no interval yet: {pluralize(open_pairs, 'pair')} without a vote"
    return f"{told}; no interval: all votes are the same, or there are too few seeds or prompts"


def agreement(label: str, reference: str, mean: float | None, half: float | None, conclusion: str) -> str:
    """Return a sentence on whether votes and losses prefer the same method.

    Votes show a preference if the interval excludes 50%. `mean`, `half`: the results of `preference`. `conclusion`: the
    loss verdict: `better`, `worse`, or another word for no difference."""
    liked = 0 if mean is None or half is None or abs(mean) <= half else 1 if mean > 0 else -1
    lower = {"better": 1, "worse": -1}.get(conclusion, 0)
    preferred = {1: label, -1: reference}
    if liked and lower:
        if liked == lower:
            return f"People and losses both prefer {preferred[liked]}."
        return f"They disagree: people prefer {preferred[liked]}, and the loss of {preferred[lower]} is lower."
    if liked:
        return f"People prefer {preferred[liked]}; the losses show no difference."
    if lower:
        return f"The loss of {preferred[lower]} is lower; the votes show no preference."
    return "Neither shows a difference."
