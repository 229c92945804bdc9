"""`experiment.json`: what an experiment trained and what it found. Written by the experiment, read by its report.

A loss is lower where a method is better. One that is not finite is None, which JSON has and NaN it has not.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NotRequired, Protocol, TypedDict

from .. import __version__
from ..common.errors import InvalidArgument
from ..files import has_ended, read_object, this_process

FORMAT = 1
EXPERIMENT = "experiment.json"  # what an experiment leaves, and a run does not
READINGS = "test_readings.jsonl"  # a line for each time that the test part was read; only ever appended to
UNFINISHED = "not finished: "  # how its note begins that --experiment_minutes have ended it

Status = Literal["finished", "running", "waiting", "failed"]


class Split(TypedDict):
    """How many images, or examples, are in each part."""

    train: int
    select: int
    """Of which losses are measured."""
    test: int
    duplicates: int
    """Those that are left out, or in the part of another one, because they are near-duplicates of it."""


class TestLosses(TypedDict):
    """Losses on the test images (at fixed noises and timesteps) or examples, of the chosen checkpoint."""

    images: list[str]
    """What each is known by, alike in all arms."""
    losses: list[float | None]
    """Of each image, the mean over noises and timesteps; of each example."""
    by_timestep: NotRequired[list[float | None]]
    """At each of the experiment's `timesteps`, the mean over images and noises."""
    similarities: NotRequired[dict[str, float]]
    """Of images by --metric_model; what is of texts, as accuracy, is in `figures`."""
    figures: NotRequired[dict[str, float]]


class Arm(TypedDict):
    """One training: a label with a learning rate and a seed."""

    label: str
    """What is compared: the method, and rank or shortcut where there are several, as in `reslora block(4)`."""
    method: str
    learning_rate: float
    seed: int
    rank: int
    shortcut: str | None
    """As in `block(4)`; None without shortcuts."""
    folder: str
    """Relative to the experiment's, with `/`."""
    status: Status
    reason: str
    """Why it failed or waits; else empty."""
    steps: int
    """Trained so far."""
    seconds: float
    """Of training."""
    wall_seconds: NotRequired[float | None]
    """From the arm's start to its end, or where it has gone on, since then; None where it has not ended."""
    memory_bytes: int | None
    """At the most; None where it is not measured."""
    select_by_step: dict[str, float | None]
    """The loss on the select images at each checkpoint's step."""
    test: TestLosses | None


class Choice(TypedDict):
    """A label's learning rate and checkpoint, whose loss on the select images is lowest over its seeds together."""

    learning_rate: float
    step: int
    loss: float
    """The mean over seeds."""
    at_end: Literal["low", "high"] | None
    """At which end of the rates that were tried the best one is."""
    next: float | None
    """The rate to try then."""


class Verdict(TypedDict):
    """A label beside the reference on the test images. Differences are its loss minus the reference's."""

    label: str
    reference: str
    seeds: int
    images: int
    conclusion: Literal["better", "worse", "not shown", "cannot tell"]
    sentence: str
    difference: float
    relative: float
    """In percent of the reference's loss, like all that follow."""
    interval: tuple[float, float] | None
    """At 95%, for the mean of new seeds and new images; None where one seed or image cannot tell."""
    rerun: tuple[float, float] | None
    """Where the difference of one more seed on the same images is in 19 of 20; None with one seed."""
    p: float | None
    p_holm: float | None
    """Corrected for all pairs of methods, and for how often the test part was read: significant below 0.05."""
    detectable: float | None
    """The difference that such an experiment finds in four of five cases; None where two seeds do not say it."""
    expected: float | None
    """What a significant difference leads to expect of new experiments; None of others."""
    of_gain: float | None
    """The difference in percent of what training gains, the reference's loss minus the base model's; None where that
    is not known."""


class Worse(TypedDict):
    """A label that is not among the best."""

    label: str
    reference: str
    """One of the best labels, which it is significantly worse than."""
    relative: float
    """By how much, in percent of that one's loss."""
    interval: tuple[float, float]
    """At 95%."""


class Ranking(TypedDict):
    """Which labels cannot be told from the best one."""

    best: list[str]
    worse: list[Worse]
    sentence: str


class Best(TypedDict):
    """The arm whose files are in the experiment's folder: of the label and the seed with the lowest select loss."""

    label: str
    learning_rate: float
    seed: int
    folder: str
    """As the arm's: there are the files of its last step."""
    step: int
    """The chosen checkpoint, of which the files are."""
    options: NotRequired[dict[str, Any]]
    """The method, and the options that vary, with their values."""
    files: list[str]
    """Names, for use as they are: of strength 1, without anything that only training needs."""


class Facts(TypedDict):
    """What is known of an experiment before its first arm."""

    versions: dict[str, str]
    split: Split
    timesteps: NotRequired[list[float]]
    """At which losses are measured, 1 being pure noise."""
    identity: NotRequired[dict[str, Any]]
    """What it is trained from and by: more methods, rates and seeds may be added, and nothing else changes."""


class Parts(Protocol):
    """What images or examples are divided into."""

    @property
    def trained(self) -> int: ...
    @property
    def select(self) -> Sequence: ...
    @property
    def test(self) -> Sequence: ...
    @property
    def duplicates(self) -> int: ...
    @property
    def enough(self) -> float: ...


def facts_of(parts: Parts, libraries: Sequence[str]) -> Facts:
    """Return the versions of these libraries and of this one, and how many are in each part."""
    split = Split(train=parts.trained, select=len(parts.select), test=len(parts.test), duplicates=parts.duplicates)
    return {"versions": {"reslora-sd": __version__} | {name: version(name) for name in libraries}, "split": split}


class Experiment(Facts):
    """The content of `experiment.json`."""

    format: int
    settings: dict[str, Any]
    """Options and their values."""
    arms: list[Arm]
    chosen: dict[str, Choice]
    """By label."""
    verdicts: list[Verdict]
    ranking: NotRequired[Ranking | None]
    base: NotRequired[TestLosses | None]
    """Losses of the base model; None until the test part is read."""
    base_select: NotRequired[float | None]
    """The base model's loss on the select images; None where it is not measured."""
    choosing: NotRequired[list[int]]
    """The seeds that choose learning rates; the others are trained at the chosen ones."""
    best: NotRequired[Best | None]
    """None until something is chosen."""
    notes: list[str]
    """Lines that a reader should know, as they were printed."""
    beforehand: NotRequired[int]
    """How many of them, the first, are known before the first arm: those are of the last start."""
    readings: NotRequired[int]
    """How often losses on the test images were measured."""
    read: NotRequired[list[list]]
    """Of which arms they were measured last, each with its step."""
    as_of: NotRequired[int]
    """Of how many arms an earlier start has concluded what stands here, until it is concluded anew."""
    process: NotRequired[str]
    """What has written this: an arm is running only as long as that is (`as_of_now`)."""


def read_experiment(folder: Path) -> dict:
    """Return the content of a folder's `experiment.json`, which is empty where there is none.

    Raise `InvalidArgument` for a damaged one: it says what the experiment was trained from and how often it was tested.
    """
    found = read_object(folder / EXPERIMENT)
    if not found and (folder / EXPERIMENT).exists():
        fix = f"restore it from a copy, or remove it: trained arms stay, and {READINGS} counts the test readings"
        raise InvalidArgument(f"--output_dir {folder}", f"{EXPERIMENT} is damaged", fix)
    return found


def as_of_now(experiment: Experiment) -> Experiment:
    """For whoever reads the file: what is said to be running waits, if the process that said so was killed."""
    if not has_ended(experiment.get("process", this_process())):
        return experiment
    experiment = copy.deepcopy(experiment)
    for arm in experiment["arms"]:
        if arm["status"] == "running":
            arm["status"], arm["reason"] = "waiting", "its process was ended; the same command goes on"
    return experiment
