"""The content of `experiment.json`: what an experiment trained and its results.

The experiment writes it and the report reads it. A lower loss is better. A non-finite loss is None, because JSON has no
NaN.
"""

import copy
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NotRequired, Protocol, TypedDict

from .. import __version__
from ..errors import InvalidArgument
from ..io import has_ended, read_object, this_process

FORMAT = 1
EXPERIMENT = "experiment.json"  # written by an experiment, but not by a single run
READINGS = "test_readings.jsonl"  # one line for each evaluation on the test split; append-only
UNFINISHED = "not finished: "  # prefix of the note if --experiment_minutes ended the experiment
ONE_RATE = "only one learning rate"  # prefix of the note if no method has several

Status = Literal["finished", "running", "waiting", "failed", "stopped"]
ENDED_AS = ("finished", "failed", "stopped")
"""Statuses of an arm that has ended; `stopped` means that racing has stopped the arm before its last step."""


class Split(TypedDict):
    """Number of images or examples in each part."""

    train: int
    """Training split."""
    select: int
    """Selection split."""
    test: int
    """Test split."""
    duplicates: int
    """Near-duplicates, which are left out or moved to the part of their duplicate."""


class TestLosses(TypedDict):
    """Losses of the chosen checkpoint on the test images (at fixed noises and timesteps) or on the test examples."""

    images: list[str]
    """Identifier of each image or example, the same in all arms."""
    losses: list[float | None]
    """Loss of each image (mean over noises and timesteps) or example."""
    by_timestep: NotRequired[list[float | None]]
    """Mean loss over images and noises at each of the experiment's `timesteps`."""
    groups: NotRequired[list[str]]
    """Group of each image, if images come in groups that resemble each other."""
    order: NotRequired[list[int]]
    """Places of the images in the order in which they were taken, if they have no groups."""
    similarities: NotRequired[dict[str, float]]
    """Similarities of images by --metric_model."""
    figures: NotRequired[dict[str, float]]
    """Metrics of texts, such as accuracy."""


class Arm(TypedDict):
    """One training run of the experiment: a method with a learning rate and a seed."""

    label: str
    """Name of the compared setting: the method, with its rank or shortcut if these vary, such as `reslora block(4)`."""
    method: str
    """One of --method."""
    learning_rate: float
    """Learning rate."""
    seed: int
    """Seed of initialization, order and noise."""
    rank: int
    """Rank of the adapter."""
    values: NotRequired[dict[str, Any]]
    """Values of the other options that vary."""
    average_of: NotRequired[str]
    """Label whose checkpoints the arm averages; such an arm is not trained, and `seconds` is 0."""
    shortcut: str | None
    """Shortcut and number of blocks, such as `block(4)`; None without shortcuts."""
    folder: str
    """Path relative to the experiment's directory, with `/` as separator."""
    status: Status
    """State of its training; `stopped`: racing has stopped it before its last step."""
    reason: str
    """Why the arm failed, waits or was stopped early; otherwise empty."""
    steps: int
    """Number of trained steps."""
    seconds: float
    """Training time."""
    wall_seconds: NotRequired[float | None]
    """Time from the arm's last start or resume to its end; None if it has not ended."""
    measuring_seconds: NotRequired[float | None]
    """Time of the measurements on the selection split, and of samples, since the arm's last start or resume."""
    memory_bytes: int | None
    """Peak memory; None if it is not measured."""
    file_bytes: NotRequired[int | None]
    """Size of the exported LoRA, `peft/`; None if it is not exported."""
    seconds_by_step: NotRequired[dict[str, float]]
    """Training time until each step in `select_by_step`."""
    select_by_step: dict[str, float | None]
    """Loss on the selection split at each checkpoint's step."""
    test: TestLosses | None
    """Test losses; None unless it is compared."""


class Choice(TypedDict):
    """The learning rate and checkpoint of a method.

    The chosen learning rate and checkpoint have the lowest mean loss on the selection split over all choosing seeds.
    """

    learning_rate: float
    """Chosen learning rate."""
    step: int
    """Step of the chosen checkpoint."""
    loss: float
    """Mean loss over the choosing seeds."""
    at_end: Literal["low", "high"] | None
    """Whether the best learning rate is the lowest or highest one."""
    next: float | None
    """Learning rate to try next if `at_end` is not None."""


class Verdict(TypedDict):
    """Comparison of a method with the reference on the test split.

    A difference is the method's loss minus the reference's loss.
    """

    label: str
    """The label that is compared, or the value of an option, such as `rank=8`."""
    reference: str
    """What it is compared with."""
    seeds: int
    """Number of seeds that both have."""
    images: int
    """Number of test images, or of their groups."""
    conclusion: Literal["better", "worse", "not shown", "cannot tell"]
    """Whether `label` is better or worse than `reference`; `cannot tell` with one seed or image."""
    sentence: str
    """The verdict as a sentence."""
    difference: float
    """Mean difference."""
    relative: float
    """Difference in percent of the reference's loss.

    `interval`, `rerun`, `detectable` and `expected` are in percent of the reference's loss, too.
    """
    interval: tuple[float, float] | None
    """Confidence interval for the mean over new seeds and new images, at `level`; None with one seed or image."""
    level: NotRequired[float | None]
    """Significance level of `interval`: 0.0304 at the first evaluation on the test split, which is 97% coverage."""
    rerun: tuple[float, float] | None
    """95% prediction interval for the difference of one more seed on the same images; None with one seed."""
    p: float | None
    """p value of this comparison alone."""
    p_holm: float | None
    """p value corrected for all pairs of methods and all evaluations on the test split; significant below 0.05."""
    detectable: float | None
    """Minimum detectable effect with 80% power; None with fewer than three seeds, which do not determine the effect."""
    detectable_interval: NotRequired[tuple[float, float] | None]
    """80% interval of `detectable`, which a few seeds determine only roughly."""
    expected: float | None
    """Expected difference in new experiments after a significant result; None otherwise."""
    of_gain: float | None
    """Difference in percent of the improvement by training; None if unknown.

    The improvement is the loss before training minus the reference's.
    """


class Worse(TypedDict):
    """A method that is significantly worse than one of the best."""

    label: str
    """Label of the method."""
    reference: str
    """The best method compared with which this method is significantly worse."""
    relative: float
    """Difference in percent of the reference's loss."""
    interval: tuple[float, float]
    """Confidence interval, at the level of the verdicts."""


class Ranking(TypedDict):
    """The methods that do not differ significantly from the best one."""

    best: list[str]
    """Their labels."""
    worse: list[Worse]
    """The other methods, in order of the difference."""
    sentence: str
    """The ranking as a sentence."""


class Best(TypedDict):
    """The arm from which the files in the experiment's directory were exported.

    Of the arms of the best method, it has the lowest loss on the selection split.
    """

    label: str
    """Label of the arm."""
    learning_rate: float
    """Learning rate of the arm."""
    seed: int
    """Seed of the arm."""
    folder: str
    """Directory of the arm, which contains the files of the arm's last step."""
    step: int
    """Step of the chosen checkpoint, from which `files` were made."""
    options: NotRequired[dict[str, Any]]
    """The method and the values of the options that vary."""
    average: NotRequired[str]
    """The average of checkpoints that was exported, such as `ema:0.99`; empty if a single checkpoint was exported."""
    files: list[str]
    """Names of files to use directly, with strength 1 and without training state."""


class Facts(TypedDict):
    """Properties of an experiment that are known before its first arm is trained."""

    versions: dict[str, str]
    """Versions of libraries, by name."""
    split: Split
    """Number of items in each part of the data."""
    timesteps: NotRequired[list[float]]
    """Timesteps of the measured losses; 1 is pure noise."""
    identity: NotRequired[dict[str, Any]]
    """Model, data and options that stay fixed; only methods, learning rates and seeds can be added."""


class Parts(Protocol):
    """Division of images or examples into parts."""

    @property
    def trained(self) -> int:
        """Number of items in the training part."""

    @property
    def select(self) -> Sequence:
        """Items of the selection part."""

    @property
    def test(self) -> Sequence:
        """Items of the test part."""

    @property
    def groups(self) -> Sequence[str]:
        """Group of each item of the test part; empty without groups."""

    @property
    def duplicates(self) -> int:
        """Number of near-duplicates, which are left out or moved to the part of their duplicate."""

    @property
    def enough(self) -> float:
        """The fraction --test_split with which the test part has enough items; 1 if there are not enough."""


def facts_of(parts: Parts, libraries: Sequence[str]) -> Facts:
    """Return the versions of `libraries` and of reslora-sd, and the number of items in each part of the data split."""
    split = Split(train=parts.trained, select=len(parts.select), test=len(parts.test), duplicates=parts.duplicates)
    return {"versions": {"reslora-sd": __version__} | {name: version(name) for name in libraries}, "split": split}


class Experiment(Facts):
    """The content of `experiment.json`."""

    format: int
    """Version of this file's structure."""
    settings: dict[str, Any]
    """Options and their values."""
    arms: list[Arm]
    """All runs, also those that have not started."""
    chosen: dict[str, Choice]
    """The choice of each method."""
    verdicts: list[Verdict]
    """A verdict on each label other than the references."""
    ranking: NotRequired[Ranking | None]
    """The best methods; None unless all pairs are compared."""
    base: NotRequired[TestLosses | None]
    """Losses before training; None until the test split is evaluated."""
    base_select: NotRequired[float | None]
    """Loss before training on the selection split; None if it is not measured."""
    references: NotRequired[list[str]]
    """Labels with which others are compared."""
    choosing: NotRequired[list[int]]
    """The seeds that choose learning rates; the others are trained at the chosen ones."""
    best: NotRequired[Best | None]
    """The exported arm; None until an arm is exported."""
    notes: list[str]
    """The notes for the reader that the experiment has printed."""
    beforehand: NotRequired[int]
    """How many of `notes`, counted from the first one, the experiment's latest start knew before it trained an arm."""
    readings: NotRequired[int]
    """Number of evaluations on the test split."""
    read: NotRequired[list[list]]
    """Arms of the latest evaluation on the test split, each as [label, learning rate, seed, step]."""
    family: NotRequired[dict[str, list]]
    """All pairs of labels that were ever compared, in `methods` and `averages`: p values are corrected for all."""
    test_seconds: NotRequired[float]
    """Time of all tests and exports, in seconds; with several processes, the sum over all processes."""
    as_of: NotRequired[int]
    """Number of arms that had ended when an earlier start drew the conclusions stored here.

    This entry is missing if the conclusions are those of the latest start.
    """
    process: NotRequired[str]
    """Process that has written this file; an arm's status `running` is valid only while this process exists."""


def read_experiment(folder: Path) -> dict:
    """Return the content of a directory's `experiment.json`; empty if it does not exist.

    Raises `InvalidArgument` for a damaged file. A damaged file is not replaced, because it identifies the experiment's
    data and model, and counts the evaluations on the test split.
    """
    found = read_object(folder / EXPERIMENT)
    if not found and (folder / EXPERIMENT).exists():
        fix = f"restore it from a copy, or remove it: trained runs stay, and {READINGS} counts the test evaluations"
        raise InvalidArgument(f"--output_dir {folder}", f"{EXPERIMENT} is damaged", fix)
    return found


def methods_of(experiment: Mapping[str, Any]) -> set[str]:
    """Return the methods of an experiment's runs, including those that have not started."""
    return {arm["method"] for arm in experiment.get("arms", ())}


def between_methods(experiment: Experiment) -> list[Verdict]:
    """Return the verdicts that compare two methods, without those about effects of options."""
    labels = {arm["label"] for arm in experiment["arms"]}
    return [each for each in experiment["verdicts"] if {each["label"], each["reference"]} <= labels]


def as_of_now(experiment: Experiment) -> Experiment:
    """Return the experiment with running arms shown as waiting if the process that runs them was killed."""
    if not has_ended(experiment.get("process", this_process())):
        return experiment
    experiment = copy.deepcopy(experiment)
    for arm in experiment["arms"]:
        if arm["status"] == "running":
            arm["status"], arm["reason"] = "waiting", "its process was ended; run the same command to resume"
    return experiment
