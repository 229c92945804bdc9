"""Single runs and experiments with a language model.

A run of an experiment is called an arm: a method with a learning rate and a seed. Every arm trains on the training
split and has its own directory; the files on disk determine the remaining work. Learning rates and checkpoints are
chosen by the loss on the selection split. Methods are compared by the merged adapter's loss on each test example.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import PeftModel

from ..errors import InvalidArgument
from ..experiment.arms import Arm, check_evaluations
from ..experiment.executors import Worker
from ..experiment.record import Facts, facts_of, methods_of, read_experiment
from ..experiment.report import About
from ..experiment.runner import run_experiment
from ..experiment.schedule import ArmSchedule, reading_adapter
from ..experiment.study import (
    COMPARING,
    TIMED_STEPS,
    ArmStudy,
    ExperimentStudy,
    numbers,
    print_estimate,
    race,
    train_arm,
)
from ..formatting import how_often, pluralize
from ..io import read_object, remove, remove_leftovers, replacing, write_json
from ..methods.adapters import load_adapter
from ..options.grid import Grid
from ..options.texts import T, TextOptions
from ..options.unused import is_read, report_unread_by_methods, report_unused
from ..options.values import refuse_other_value
from ..runtime.checkpoint_folders import ADAPTERS, EXPORTED, EXPORTS, adapter_folder, checkpoints_of
from ..runtime.folder_lock import check_held, locked, make_folder, sharing_lock
from ..runtime.processes import broadcast_from_main, say
from ..runtime.signals import StopRequest
from ..runtime.status import Status
from ..seeds import derive
from ..training.checkpoints import check_past, past_of
from ..training.context import Context
from ..training.schedule import Schedule
from ..training.study import Identity
from ..training.trackers import note_settings, start_trackers
from .arguments import checked
from .plan import show_plan
from .results import as_plain, export
from .run import begin, identity_of, run
from .split import Parts
from .study import Texts, TextStudy, evaluations_of, expected_times, plan_of, schedule_of

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets")
CHANGING = ("method", "learning_rate", "seed")  # options to which an experiment can add values
FIXED = (
    "merge", "calibration_examples", "max_steps", "num_train_epochs", "eval_strategy", "eval_steps", "max_new_tokens",
    "per_device_eval_batch_size", "max_eval_samples", "max_test_samples", "max_predict_samples",
)  # fmt: skip
"""Options that a resumed single run may change, but a resumed experiment may not."""
TEXTS = About(
    "example",
    {
        "accuracy": ("Accuracy", "fraction of the test examples with a correct answer"),
        "f1": ("F1", "of the test examples"),
        "matthews": ("Matthews", "Matthews' correlation of labels on the test examples"),
        "pearson": ("Pearson", "correlation of scores on the test examples"),
        "spearmanr": ("Spearman", "correlation of the order of scores on the test examples"),
    },
    {
        "peft": "PEFT: PeftModel.from_pretrained(MODEL, '{folder}/peft'), with the base model",
        "merged": "transformers: from_pretrained('{folder}/merged'), the whole model",
    },
)


def start_texts(texts: Texts, asked: T | Grid[T], stop: StopRequest) -> None:
    """Start a single run or an experiment, or print its plan."""
    if asked.flat()["plan"]:
        show_plan(texts, asked, stop)
    elif isinstance(asked, Grid):
        run_experiment(functools.partial(opened, texts), asked, stop)
    else:
        run(texts, asked, stop)


@contextlib.contextmanager
def opened(texts: Texts, grid: Grid[T], stop: StopRequest, worker: Worker | None = None) -> Iterator[TextExperiment]:
    """Lock the directory, validate the options, encode the examples, and yield the experiment.

    With `worker`, this process does jobs for the main process, which has locked and validated the directory.
    """
    report_unread_by_methods(grid)
    report_unused(grid)
    schedule = ArmSchedule(grid)
    plain, *_ = [options_of(arm, schedule) for arm in schedule.arms()]
    with contextlib.ExitStack() as stack:
        whole = plain.replace(output_dir=str(schedule.folder))
        lock = functools.partial(sharing_lock, owner=worker.owner) if worker else locked
        context = begin(whole, stop, stack, lambda: None, lock)
        accelerator = context.accelerator
        parts = texts.parts(plain, grid.base.experiment)
        texts.prepare(plain, parts)
        parts = dataclasses.replace(parts, trained=len(texts.rows))
        updates = plan_of(texts, plain, accelerator).updates
        steps, _ = schedule_of(updates, plain)
        schedule.grid = grid.replace(**evaluations_of(grid.base.validation, steps.steps))
        planned = steps_of(schedule, texts, accelerator)
        for each in planned:
            check_evaluations(grid, each.steps, each.validation_steps, "--eval_steps")
        experiment = TextExperiment(schedule, texts, parts, context)
        if worker:
            experiment = dataclasses.replace(experiment, context=dataclasses.replace(context, status=Status()))
        else:
            broadcast_from_main(lambda: prepare_folder(experiment))
            tell = functools.cache(say)  # several labels may print the same line
            for label in schedule.grids:
                experiment.check_label(label, tell)
            note_settings(schedule.grid, {}, accelerator)
            length = planned[0].steps
            measured = f"{pluralize(length, 'step')}, measured {how_often(planned[0].validation_steps, length)}"
            say(f"{schedule.runs_in_words()}; {measured}; {parts}")
        if worker or grid.base.experiment.in_this_process:
            start_trackers(context, "reslora", wandb={"name": plain.output.run_name})
        yield experiment
        accelerator.end_training()


def options_of(arm: Arm, schedule: ArmSchedule) -> Any:
    """Return an arm's options, as those of a single run in the arm's directory, which continues if it has begun.

    The run retains one checkpoint unless --save_total_limit is given.
    """
    options, folder = schedule.options_of(arm), schedule.folder_of(arm)
    limit = options.output.checkpoints_total_limit or 1
    own = {"output_dir": str(folder), "save_total_limit": limit, "resume_from_checkpoint": "latest"}
    return checked(options.replace(**own))


def steps_of(schedule: ArmSchedule, texts: Texts, accelerator: Accelerator) -> list[Schedule]:
    """Return the steps of the arms of each label; with another batch size, an epoch has another number of steps."""
    arms = {arm.label: arm for arm in schedule.trained_arms()}
    every = (options_of(arm, schedule) for arm in arms.values())
    return [schedule_of(plan_of(texts, options, accelerator).updates, options)[0] for options in every]


def prepare_folder(experiment: TextExperiment) -> None:
    """Raise `InvalidArgument` if the directory has another experiment or a single run.

    Otherwise remove temporary files.
    """
    schedule, folder = experiment.schedule, experiment.schedule.folder
    earlier = read_experiment(folder)
    there, methods = earlier.get("identity"), methods_of(earlier)
    schedule.check_racing()
    if there is None and (checkpoints_of(folder) or (folder / "results.json").exists()):
        raise InvalidArgument(
            f"--output_dir {folder}", "contains a single run, which is not an experiment", "choose another"
        )
    if there is not None:
        identity = json.loads(json.dumps(experiment.identity))
        check_past(schedule.grid, folder, there, experiment.content, methods)
        for name in (*FIXED, "select", "test"):
            value, before = identity.get(name), there.get(name)
            if value != before and name in ("select", "test"):
                problem = f"was begun with other {name} examples"
                raise InvalidArgument(f"--output_dir {folder}", problem, "restore them, or choose another")
            if value != before and is_read(schedule.grid.base.option(name), methods):
                refuse_other_value(
                    f"--{name}", value, f"{folder} was begun with", before, "choose another --output_dir"
                )
    for place in map(schedule.folder_of, schedule.arms()):
        remove_leftovers(place)
        remove_leftovers(place / ADAPTERS)


@dataclass(frozen=True)
class TextArmStudy(ArmStudy, TextStudy):
    """The study of an arm of an experiment with a language model."""


@dataclass(frozen=True)
class TextExperiment(ExperimentStudy):
    """Trains, evaluates and exports the arms of an experiment with a language model."""

    schedule: ArmSchedule
    texts: Texts
    parts: Parts
    context: Context
    about: About = TEXTS

    @property
    def prog(self) -> str:  # type: ignore[override]
        """Name of the script."""
        return self.texts.prog

    @functools.cached_property
    def content(self) -> Identity:
        """Content hashes of the model and the training examples."""
        return identity_of(self.texts, self.schedule.grid.base)

    @functools.cached_property
    def identity(self) -> dict:
        """Settings, and content hashes of the examples, that must not change when an experiment is resumed."""
        grid, values = self.schedule.grid, self.schedule.grid.flat()
        past = past_of(grid, self.content)
        settings = {name: value for name, value in past["settings"].items() if name not in CHANGING}
        parts = {part: f"{derive(*map(repr, getattr(self.parts, part))):016x}" for part in ("select", "test")}
        return past | {"settings": settings} | {name: values.get(name) for name in FIXED} | parts

    def check_label(self, label: str, tell: Callable[[str], object]) -> None:
        """Raise `InvalidArgument` if a method's adapter cannot be attached, and print the layers without shortcuts.

        Does nothing if an arm of the method has ended.
        """
        arms = [arm for arm in self.schedule.arms() if arm.label == label]
        if not broadcast_from_main(lambda: any(self.schedule.ended(arm) for arm in arms)):
            self.study_of(arms[0]).adapted(tell)

    @property
    def test_ids(self) -> list[str]:
        """Content hash of each test example."""
        return self.parts.test_ids

    def study_of(self, arm: Arm) -> TextArmStudy:
        """Return the study of one arm, as for a single run."""
        options = options_of(arm, self.schedule)
        schedule, options = schedule_of(plan_of(self.texts, options, self.context.accelerator).updates, options)
        arms = self.schedule.arms()
        context = dataclasses.replace(
            self.context, options=options, model=self.texts, place=self.schedule.place_of(arm),
            before=arms.index(arm) if arm in arms else 0,
        )  # fmt: skip
        timed = functools.partial(self.timed, schedule, options, time.monotonic())
        stop_race = functools.partial(race, arm, self.schedule)
        return TextArmStudy(schedule, self.content, context, self.texts, stop_race, timed, self.schedule.measured)

    def facts(self) -> Facts:
        """Return versions, split sizes and the identity of the experiment."""
        return {**facts_of(self.parts, LIBRARIES), "identity": self.identity | {"racing": self.schedule.racing}}

    def train(self, arm: Arm) -> None:
        """Train an arm, from its latest checkpoint if it has one, or average the checkpoints of another arm.

        Raises `Diverged` if a loss is not finite.
        """
        train_arm(self.study_of(arm), self.schedule.average_of(arm))

    def timed(self, schedule: Schedule, options: TextOptions, began: float, step: float) -> None:
        """Print the time that the experiment takes, from the median time of an arm's first steps.

        `began`: when the arm was started, in seconds of `time.monotonic`.
        """
        start = max(0.0, time.monotonic() - began - (1 + TIMED_STEPS) * step)
        times = expected_times(options.training, schedule, self.parts, step)
        print_estimate(self.schedule, self.device, schedule.steps, step, start, *times)

    def restored(self, arm: Arm, step: int, into: Path | None = None) -> PeftModel:
        """Return the model with the adapter that an arm has saved at a step, merged as for an export.

        `into`: directory for `chains.json` and `merge.json`; None: do not write them.
        """
        study, folder = self.study_of(arm), self.schedule.folder_of(arm)
        model = study.adapted()
        with reading_adapter(folder):
            load_adapter(model, adapter_folder(folder, step))
        as_plain(model, study.method, self.texts.calibration(study.options), into)
        return model.eval()

    def test_and_export(self, arm: Arm, step: int, keep: Callable[[dict], None] | None, to_export: bool) -> None:
        """Merge the adapter that an arm has saved at a step, test it, and export it into the arm's directory.

        `keep`: function that stores the test losses; None to test nothing. `to_export`: whether to export.
        """
        study, folder = self.study_of(arm), self.schedule.folder_of(arm)
        make_folder(folder)
        model = self.restored(arm, step, folder if to_export else None)
        if keep:
            keep(self.losses_of(model, study))
        if to_export:
            check_held()
            # merged/ is written only for the best arm
            export(model, folder, dataclasses.replace(study.method, merge_and_save=False))
            write_json(folder / EXPORTS, read_object(folder / EXPORTS) | {EXPORTED: step})

    def base_losses(self) -> dict:
        """Return the base model's losses and metrics on the test split."""
        study = self.study_of(self.schedule.arms()[0])
        return self.losses_of(study.adapted(), study)  # a newly initialized adapter does not change the output

    def losses_of(self, model: PeftModel, study: TextArmStudy) -> dict:
        """Return the loss of each test example (None if the loss is not finite), and metrics over all test examples."""
        with study.evaluating(model):
            losses, figures = self.texts.measured(study.options, model, lambda: self.context.stop.check(COMPARING))
        return {"losses": numbers(losses), "figures": figures}

    def export(self, arm: Arm, step: int) -> list[str]:
        """Export an arm's checkpoint to `peft/`, and with --merge_and_save also to `merged/`; return these names.

        Without --merge_and_save, a `merged/` of an earlier export is removed.
        """
        folder, method = self.schedule.folder, self.study_of(arm).method
        if not method.merge_and_save and self.is_exported(arm, step):
            remove(folder / "merged")
            with replacing(folder / "peft") as temporary:
                shutil.copytree(self.schedule.folder_of(arm) / "peft", temporary)
            return ["peft"]
        model = self.restored(arm, step)
        check_held()
        export(model, self.schedule.folder, method, tokenizer=self.texts.tokenizer)
        return ["peft", *["merged"] * method.merge_and_save]
