"""Single runs and experiments with a language model.

A run of an experiment is called an arm: a method with a learning rate and a seed. Every arm trains on the training
split and has its own directory; the files on disk determine the remaining work. Learning rates and checkpoints are
chosen by the loss on the selection split. Methods are compared by the merged adapter's loss on each test example.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

from ..bundled import ASSETS
from ..errors import Diverged, InvalidArgument
from ..experiment.arms import Arm
from ..experiment.record import Facts, facts_of, read_experiment
from ..experiment.report import About
from ..experiment.runner import run_experiment
from ..experiment.schedule import ArmSchedule, reading_adapter
from ..experiment.study import COMPARING, ExperimentStudy, race
from ..experiment.worker_pool import Orders
from ..io import read_object, remove, remove_leftovers, replacing, write_json
from ..methods.adapters import load_adapter, save_adapter
from ..methods.links import print_links
from ..methods.registry import METHODS
from ..options.grid import Grid
from ..options.texts import ExperimentOptions, MethodOptions, T, TrainingOptions
from ..options.unused import report_unread_by_methods
from ..options.values import refuse_other_value
from ..runtime.checkpoint_folders import ADAPTERS, EXPORTED, EXPORTS, adapter_folder, memory_reported, numbered
from ..runtime.folder_lock import check_held, locked, share_lock, writing_into
from ..runtime.processes import broadcast_from_main, say
from ..runtime.signals import NOT_BEGUN, StopRequest
from .arguments import checked
from .callbacks import DecayShortcuts
from .checkpoints import set_unfinished_aside
from .results import as_plain, export, merge_table, table_text, write_results
from .resuming import check_data, check_resume, fingerprint, free_on_resume, is_same
from .split import Parts
from .trainer import AdapterTrainer, put_control_on, total_steps
from .training_arguments import passed_on_defaults, without_tokens

MOST_LOOKS = 10
TIMED_STEPS = 5  # steps of the first arm from which the time of the experiment is estimated
LEAST_LOSS = 1e-12  # the statistics need losses above zero, but the loss of a confident prediction can round to zero
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
        "accuracy": ("Accuracy", "share of the test examples that are answered right"),
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


WRITTEN = {
    "results.json": "this table, with how each block was merged",
    "log.jsonl": "losses and metrics by step; TensorBoard shows this folder, too",
    "peft": "plain adapter: PeftModel.from_pretrained(model, folder)",
    "merged": "merged model: transformers' from_pretrained(folder)",
}
"""Files of a single run, with the use of each."""


class TextStudy(ABC):
    """The task-specific part of train_llm.py and train_glue.py, for single runs and experiments."""

    prog: str
    """Name of the script."""
    real: str
    """Example options with a full-size model, printed after a run with a bundled model."""
    tokenizer: Any
    """The model's tokenizer; set by `adapted`."""

    @abstractmethod
    def arguments(self, options: Any) -> Any:
        """Return an object with the arguments of a single run: its attributes `settings`, `method` and `training`.

        Raises `InvalidArgument` for invalid options.
        """

    @abstractmethod
    def read(self, arguments: Any) -> Iterable:
        """Read the examples of a single run; return the training examples, which must be the same in a resumed run."""

    @abstractmethod
    def parts(self, arguments: Any, shares: ExperimentOptions) -> Parts:
        """Return all examples divided into a training, a selection and a test split."""

    @abstractmethod
    def prepare(self, arguments: Any, parts: Parts) -> int:
        """Store the examples that all arms use; return the number of training examples."""

    @abstractmethod
    def adapted(self, arguments: Any) -> PeftModel:
        """Return the model with a newly initialized adapter."""

    def example(self) -> dict | None:
        """Return inputs to trace the model with; None to use inputs made from the model's configuration."""
        return None

    def print_links(self, model: PeftModel, adapter: MethodOptions, tell: Callable[[str], object]) -> None:
        """Print the layers without shortcuts, and the chains of blocks that are too short for --pre_num."""
        print_links(model, adapter.name, adapter.reslora_config, tell, self.example())

    @abstractmethod
    def build_trainer(self, arguments: Any, model: PeftModel, stop: StopRequest) -> AdapterTrainer:
        """Return the trainer, which writes `log.jsonl`."""

    def trainer(self, arguments: Any, model: PeftModel, stop: StopRequest) -> AdapterTrainer:
        """Return the trainer; a control method (`lora_matched` or a placebo) is calibrated first."""
        trainer, adapter = self.build_trainer(arguments, model, stop), arguments.method
        put_control_on(trainer, adapter, self.calibration(arguments) or [], self.example())
        if adapter.shortcut_decay and METHODS[adapter.name].reads_shortcut_flags:
            trainer.add_callback(DecayShortcuts(adapter.shortcut_decay, trainer.model))
        return trainer

    @abstractmethod
    def calibration(self, arguments: Any) -> list[dict] | None:
        """Return the calibration batches of a merge."""

    @abstractmethod
    def measured(self, arguments: Any, model: PeftModel, check: Callable[[], None]) -> tuple[list[float], dict]:
        """Return the loss of each test example, in order, and metrics over all; call `check` before each batch."""

    @abstractmethod
    def figures(self, arguments: Any, trainer: AdapterTrainer) -> Mapping[str, float]:
        """Return the metrics that compare the merges of a single run."""

    @abstractmethod
    def facts(self, arguments: Any, trainer: AdapterTrainer) -> dict[str, Any]:
        """Return the task, the model and the numbers of examples for `results.json`."""

    def predict(self, arguments: Any, trainer: AdapterTrainer) -> list[str]:
        """Write predictions, and return the names of the files."""
        return []

    def finish(self, arguments: Any, trainer: AdapterTrainer) -> None:
        """Evaluate the adapter unmerged and merged, export it, write predictions and, last, `results.json`."""
        method, batches, output = arguments.method, self.calibration(arguments), trainer.args.folder
        table = merge_table(trainer.model, lambda: self.figures(arguments, trainer), batches)
        broadcast_from_main(check_held)
        report = export(trainer.model, output, method, batches, self.tokenizer)
        uses = WRITTEN | dict.fromkeys(self.predict(arguments, trainer), "predictions for the test split")
        facts = self.facts(arguments, trainer)
        results = write_results(trainer, method, table, report, **facts)
        kind = "test" if "test_examples" in facts else "validation"
        begin = "\n{task}, {method}, {steps} steps; on {} {} examples:"
        say(begin.format(facts[f"{kind}_examples"], kind, **results))
        say(f"{table_text(table)}\n\n{output}/")
        width = max(map(len, uses)) + 2
        say("\n".join(f"  {name:<{width}}{use}" for name, use in uses.items() if (output / name).exists()))
        if Path(facts["model_name_or_path"]).resolve().parent == ASSETS:
            say(f"\nWith a real model:\n  accelerate launch {self.prog} {self.real}")


def run(study: TextStudy, asked: T | Grid[T], stop: StopRequest) -> None:
    """Start a single run or an experiment."""
    if isinstance(asked, Grid):
        run_experiment(functools.partial(opened, study), asked, stop)
        return
    with stop.at_once():
        arguments = study.arguments(asked)
    report_unread_by_methods(asked)
    training, flags = arguments.training, arguments.settings
    with contextlib.ExitStack() as stack:
        broadcast_from_main(lambda: stack.enter_context(locked(training.folder)))
        check_resume(training.folder, training.resume_from_checkpoint, flags, free_on_resume(type(asked)))
        flags["data"] = fingerprint(study.read(arguments))
        check_data(training.folder, training.resume_from_checkpoint, flags["data"])
        trainer = study.trainer(arguments, study.adapted(arguments), stop)
        study.print_links(trainer.model, arguments.method, say)
        if training.should_save:
            trainer.model.print_trainable_parameters()
            write_json(training.folder / "config.json", flags)
        trainer.stopping.check(NOT_BEGUN)
        with memory_reported(training.folder):
            trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
            study.finish(arguments, trainer)


@contextlib.contextmanager
def opened(
    study: TextStudy, grid: Grid[T], stop: StopRequest, orders: Orders | None = None
) -> Iterator[TextExperiment]:
    """Lock the directory, validate the options, encode the examples, and yield the experiment.

    With `orders`, this process is a worker of --arms_at_once; the main process has locked and validated the directory.
    """
    report_unread_by_methods(grid)
    schedule = ArmSchedule(grid)
    with stop.at_once():
        plain, *_ = [study.arguments(options_of(arm, schedule)) for arm in schedule.arms()]
    with contextlib.ExitStack() as stack:
        broadcast_from_main(lambda: stack.enter_context((share_lock if orders else locked)(schedule.folder)))
        parts = study.parts(plain, grid.base.experiment)
        parts = dataclasses.replace(parts, trained=study.prepare(plain, parts))
        schedule.grid = grid.replace(**looks(grid.base.training, total_steps(plain.training, parts.trained)))
        schedule.estimated = bool(orders and orders.number)  # one process prints the estimate
        experiment = TextExperiment(schedule, study, parts, stop, plain.training.device)
        if not orders:
            broadcast_from_main(lambda: take_folder(experiment))
            tell = functools.cache(say)  # several labels may print the same line
            for label in schedule.labels:
                experiment.check_label(label, tell)
            every = schedule.grid.base.training.eval_steps
            measured = f", measured every {every:g} steps" if every else ""
            say(f"{schedule.runs_in_words()}{measured}; {parts}")
        yield experiment


def options_of(arm: Arm, schedule: ArmSchedule) -> Any:
    """Return an arm's options, as those of a single run in the arm's directory.

    The run retains one checkpoint unless --save_total_limit is given.
    """
    options = schedule.options_of(arm)
    limit = options.training.save_total_limit or 1
    own = {"output_dir": str(schedule.folder_of(arm)), "save_total_limit": limit, "resume_from_checkpoint": None}
    return checked(options.replace(**own))


def looks(training: TrainingOptions, steps: int) -> dict[str, Any]:
    """Return options that evaluate every --eval_steps, or MOST_LOOKS times; empty if --eval_strategy is not `no`."""
    every = training.eval_steps or math.ceil(steps / MOST_LOOKS)
    return {"eval_strategy": "steps", "eval_steps": every} if training.eval_strategy == "no" else {}


def take_folder(experiment: TextExperiment) -> None:
    """Raise `InvalidArgument` if the directory has another experiment or a single run.

    Otherwise remove temporary files, rename incomplete checkpoints, and write `config.json`.
    """
    schedule, folder = experiment.schedule, experiment.schedule.folder
    there = read_experiment(folder).get("identity") or {}
    schedule.check_racing()
    if not there and (numbered(folder) or (folder / "results.json").exists()):
        raise InvalidArgument(
            f"--output_dir {folder}", "contains a single run, which is not an experiment", "choose another"
        )
    # The evaluation steps follow from other settings, which the message should name first.
    mine = sorted(experiment.identity.items(), key=lambda item: item[0].startswith("eval_"))
    for name, value in mine if there else ():
        earlier = there.get(name)
        if not is_same(name, earlier, value):
            if name in ("train", "select", "test"):
                problem = f"was begun with other {name} examples"
                raise InvalidArgument(f"--output_dir {folder}", problem, "restore them, or choose another")
            refuse_other_value(f"--{name}", value, f"{folder} was begun with", earlier, "choose another --output_dir")
    for place in map(schedule.folder_of, schedule.arms()):
        remove_leftovers(place)
        remove_leftovers(place / ADAPTERS)
        set_unfinished_aside(place)
    write_json(folder / "config.json", without_tokens(experiment.recorded))


@dataclass(eq=False)
class KeepAdapters(TrainerCallback):
    """A callback that saves the adapter at every evaluation on the selection split, but not before the first step.

    Then it calls `race`, which raises `StoppedEarly` if another learning rate is better.
    """

    folder: Path
    race: Callable[[], None]
    took: Callable[[float], None]
    """Function that receives the time of an evaluation, in seconds."""

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs) -> None:
        """Save the adapter atomically.

        Raises `Diverged` for a non-finite loss.
        """
        self.took(metrics.get("eval_runtime", 0.0))
        if not math.isfinite(loss := metrics["eval_loss"]):
            raise Diverged(f"loss {loss} on the selection split at step {state.global_step}")
        if state.global_step == 0:  # by --eval_on_start
            return

        def keep() -> None:
            with replacing(adapter_folder(self.folder, state.global_step)) as temporary:
                temporary.mkdir()
                save_adapter(model, temporary)

        broadcast_from_main(keep)
        self.race()


class TimeSteps(TrainerCallback):
    """A callback that calls `timed` with the mean time in seconds of a few steps after the first one."""

    def __init__(self, timed: Callable[[float], None]) -> None:
        self.timed, self.number, self.seconds, self.began = timed, 0, 0.0, 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Start the timer."""
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop the timer; evaluations are not included."""
        self.number += 1
        if 1 < self.number <= 1 + TIMED_STEPS:
            self.seconds += time.monotonic() - self.began
        if self.number == 1 + TIMED_STEPS and state.is_world_process_zero:
            self.timed(self.seconds / TIMED_STEPS)


@dataclass(frozen=True)
class TextExperiment(ExperimentStudy):
    """Trains, evaluates and exports the arms of an experiment with a language model."""

    schedule: ArmSchedule
    study: TextStudy
    parts: Parts
    stop: StopRequest
    device: torch.device
    about: About = TEXTS

    @property
    def prog(self) -> str:  # type: ignore[override]
        """Name of the script."""
        return self.study.prog

    @property
    def recorded(self) -> dict[str, Any]:
        """All options by name; an option that varies has a list of all its values."""
        return {**passed_on_defaults(), **self.schedule.grid.flat(), **self.schedule.grid.base.passed_on}

    @functools.cached_property
    def identity(self) -> dict:
        """Settings, and content hashes of the examples, that must not change when an experiment is resumed."""
        arguments = self.arguments_of(self.schedule.arms()[0])
        settings = arguments.settings | {"num_processes": arguments.training.world_size}
        grid = self.schedule.grid
        table, flat = grid.base.table(), grid.flat()
        free = free_on_resume(type(grid.base))
        found = {name: value for name, value in settings.items() if name not in free or name in FIXED}
        varying = (name for name, option in table.items() if option.varies or option.attribute in grid.varied)
        found |= {name: flat[name] for name in (*varying, "method")}
        if "rank" in grid.varied:
            found["lora_alpha"] = flat["lora_alpha"]  # None: twice each rank
        found |= {part: fingerprint(map(repr, getattr(self.parts, part))) for part in ("train", "select", "test")}
        return json.loads(json.dumps({name: value for name, value in found.items() if name not in CHANGING}))

    def check_label(self, label: str, tell: Callable[[str], object]) -> None:
        """Raise `InvalidArgument` if a label's adapter cannot be attached, and print the layers without shortcuts.

        Does nothing if an arm of the label has ended.
        """
        arms = [arm for arm in self.schedule.arms() if arm.label == label]
        if not broadcast_from_main(lambda: any(self.schedule.ended(arm) for arm in arms)):
            arguments = self.arguments_of(arms[0])
            self.study.print_links(self.study.adapted(arguments), arguments.method, tell)

    @property
    def test_ids(self) -> list[str]:
        """Content hash of each test example."""
        return self.parts.test_ids

    def arguments_of(self, arm: Arm) -> Any:
        """Return the arguments of a single run of the arm."""
        return self.study.arguments(options_of(arm, self.schedule))

    def facts(self) -> Facts:
        """Return versions, split sizes and the identity of the experiment."""
        identity = self.identity | {"racing": self.schedule.racing}
        return {**facts_of(self.parts, LIBRARIES), "identity": identity}

    def train(self, arm: Arm) -> None:
        """Train an arm, from its latest checkpoint if it has one.

        Raises `Diverged` if a loss is not finite.
        """
        arguments, folder = self.arguments_of(arm), self.schedule.folder_of(arm)
        began = time.monotonic()
        if arguments.training.torch_compile:
            torch.compiler.reset()  # torch stops compiling after a limited number of models
        trainer = self.study.trainer(arguments, self.study.adapted(arguments), self.stop)
        trainer.add_callback(KeepAdapters(folder, functools.partial(race, arm, self.schedule), self.schedule.measured))
        trainer.add_callback(TimeSteps(functools.partial(self.timed, arguments.training, time.monotonic() - began)))
        trainer.stopping.check("stopped between two arms; run the same command to resume")
        try:
            with memory_reported(folder), contextlib.ExitStack() as stack:
                broadcast_from_main(lambda: stack.enter_context(writing_into(folder)))
                self._train(trainer, arm, arguments)
        except Diverged as error:
            raise Diverged(f"{self.schedule.name_of(arm)}: {error.problem}") from error
        finally:
            trainer.accelerator.free_memory()
            gc.collect()  # a trainer, its callbacks and the model refer to each other

    def timed(self, training: Any, start: float, step: float) -> None:
        """Print the time that the experiment takes, from the mean time of an arm's first steps.

        `start`: seconds before the first step.
        """
        steps = total_steps(training, self.parts.trained)
        # A backward pass takes as long as two forward passes.
        an_example = step / (3 * training.per_device_train_batch_size * training.gradient_accumulation_steps)
        every = training.eval_steps if training.eval_strategy == "steps" else steps / training.num_train_epochs
        measurement, test = (an_example * len(part) for part in (self.parts.select, self.parts.test))
        self.estimate(steps, step, start, measurement * math.ceil(steps / every), test)

    def _train(self, trainer: Any, arm: Arm, arguments: Any) -> None:
        folder = self.schedule.folder_of(arm)
        if arguments.training.should_save:
            print(f"{self.schedule.name_of(arm)}: training", flush=True)  # the next lines do not name the arm
            write_json(folder / "config.json", arguments.settings)
        trainer.train(resume_from_checkpoint="latest" if broadcast_from_main(lambda: bool(numbered(folder))) else None)
        step = trainer.state.global_step
        adapter = adapter_folder(folder, step)
        # A step can be chosen once its loss and then its adapter were written.
        if broadcast_from_main(lambda: not adapter.is_dir() or step not in self.schedule.select_losses(arm)):
            trainer.evaluate()

    def restored(self, arm: Arm, step: int, into: Path | None = None) -> PeftModel:
        """Return the model with the adapter that an arm has saved at a step, merged as for an export.

        `into`: directory for `chains.json` and `merge.json`; None: do not write them.
        """
        arguments = self.arguments_of(arm)
        model = self.study.adapted(arguments).to(arguments.training.device)
        folder = self.schedule.folder_of(arm)
        with reading_adapter(folder):
            load_adapter(model, adapter_folder(folder, step))
        as_plain(model, arguments.method, self.study.calibration(arguments), into)
        return model.eval()

    def is_exported(self, arm: Arm, step: int) -> bool:
        """Return whether the arm's directory has the adapter of its checkpoint at this step."""
        folder = self.schedule.folder_of(arm)
        return read_object(folder / EXPORTS).get(EXPORTED) == step and (folder / "peft").is_dir()

    def test_and_export(self, arm: Arm, step: int, keep: Callable[[dict], None] | None, to_export: bool) -> None:
        """Merge the adapter that an arm has saved at a step, test it, and export it into the arm's directory."""
        arguments, folder = self.arguments_of(arm), self.schedule.folder_of(arm)
        with writing_into(folder):
            model = self.restored(arm, step, folder if to_export else None)
            if keep:
                keep(self.losses_of(model, arguments))
            if to_export:
                check_held()
                # merged/ is written only for the best arm
                export(model, folder, dataclasses.replace(arguments.method, merge_and_save=False))
                write_json(folder / EXPORTS, {EXPORTED: step})

    def base_losses(self) -> dict:
        """Return the base model's losses and metrics on the test split."""
        arguments = self.arguments_of(self.schedule.arms()[0])
        # a newly initialized adapter does not change the base model's output
        model = self.study.adapted(arguments).to(arguments.training.device)
        return self.losses_of(model.eval(), arguments)

    def losses_of(self, model: PeftModel, arguments: Any) -> dict:
        """Return the loss of each test example (None if it is not finite), and metrics over all of them."""
        losses, figures = self.study.measured(arguments, model, lambda: self.stop.check(COMPARING))
        numbers = [max(loss, LEAST_LOSS) if math.isfinite(loss) else None for loss in losses]
        return {"losses": numbers, "figures": figures}

    def export(self, arm: Arm, step: int) -> list[str]:
        """Export an arm's checkpoint to `peft/`, and with --merge_and_save also to `merged/`; return these names.

        Without --merge_and_save, a `merged/` of an earlier export is removed.
        """
        folder, method = self.schedule.folder, self.arguments_of(arm).method
        if not method.merge_and_save and self.is_exported(arm, step):
            remove(folder / "merged")
            with replacing(folder / "peft") as temporary:
                shutil.copytree(self.schedule.folder_of(arm) / "peft", temporary)
            return ["peft"]
        model = self.restored(arm, step)
        check_held()
        if not method.merge_and_save:
            remove(self.schedule.folder / "merged")
        export(model, self.schedule.folder, method, tokenizer=self.study.tokenizer)
        return ["peft", *["merged"] * method.merge_and_save]
