"""The `Study` of a run with a language model: examples of a task, model, losses and metrics, and the run's files."""

import contextlib
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..bundled import ASSETS
from ..errors import Stopped
from ..io import replacing
from ..linking import base_model
from ..methods.adapters import load_adapter
from ..methods.links import print_links
from ..methods.registry import check_steps
from ..options.texts import ExperimentOptions, MethodOptions, TextOptions, TrainingOptions, ValidationOptions
from ..runtime.checkpoint_folders import adapter_folder
from ..runtime.folder_lock import check_held
from ..runtime.processes import all_gather, broadcast_from_main, say
from ..tracing import evaluating, to_device
from ..training.best import keep_adapter, keep_if_best, to_export
from ..training.reports import Reports
from ..training.schedule import Schedule
from ..training.state import Learner, new_learner
from ..training.study import Study
from ..training.trained import Trained
from .adapter import attach, put_start
from .batches import BatchPlan
from .results import export, merge_table, table_text, write_results
from .split import Parts

MAX_EVALUATIONS = 10  # default number of evaluations of an experiment's run
Check = Callable[[], None]
"""Function that raises `Stopped` if a stop was requested; it is called before each batch of an evaluation."""
WRITTEN = {
    "results.json": "this table, with how each block was merged",
    "log.jsonl": "losses and metrics by step; TensorBoard shows logs",
    "peft": "plain adapter: PeftModel.from_pretrained(model, folder)",
    "merged": "merged model: transformers' from_pretrained(folder)",
}
"""Files of a single run, with the use of each."""


def mine(items: Sequence) -> list:
    """Return this process's share of the items of an evaluation."""
    state = PartialState()
    return list(items[state.process_index :: state.num_processes])


def in_order(found: list) -> list:
    """Gather the results of all processes, and return them in the order of the items.

    `found`: this process's results, one for each of its items (`mine`).
    """
    everywhere = all_gather(found)
    return [own[place] for place in range(len(everywhere[0])) for own in everywhere if place < len(own)]


class Texts(ABC):
    """The task-specific part of train_llm.py and train_glue.py: examples, model and metrics."""

    prog: str
    """Name of the script."""
    real: str
    """Example options with a full-size model, printed after a run with a bundled model."""
    data_options: Sequence[str] = ("data_dir",)
    """Options to name if a resumed run has other training examples."""
    tokenizer: Any
    """The model's tokenizer."""
    rows: list[dict[str, Any]]
    """Token ids and labels of the training examples."""
    classifier: Sequence[str] = ()
    """Modules that are trained with every method, and saved whole."""
    example: dict[str, torch.Tensor] | None = None
    """Inputs to trace the model with; None for inputs made from the model's configuration."""

    @abstractmethod
    def model_of(self, options: Any) -> tuple[str, str | None]:
        """Return the model's name and its revision."""

    @abstractmethod
    def read(self, options: Any) -> None:
        """Read and encode the examples of a single run."""

    @abstractmethod
    def parts(self, options: Any, shares: ExperimentOptions) -> Parts:
        """Return all examples divided into a training, a selection and a test split."""

    @abstractmethod
    def prepare(self, options: Any, parts: Parts) -> None:
        """Store and encode the examples that all arms use."""

    @abstractmethod
    def load(self, options: Any, device: torch.device) -> PreTrainedModel:
        """Return the base model, and check that the examples fit it."""

    @abstractmethod
    def empty(self, options: Any) -> PreTrainedModel:
        """Return the base model without its weights; call it with the meta device as the default."""

    def frozen_bytes(self, options: Any, model: PeftModel) -> float:
        """Return the bytes of the frozen weights, for the model of `empty` with an adapter."""
        return sum(value.numel() * value.element_size() for value in model.parameters() if not value.requires_grad)

    @abstractmethod
    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return a batch of training examples: `input_ids` and other tensors whose first dimension is the batch."""

    @abstractmethod
    def losses(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the losses of a batch: a vector with as many entries as `count` returns."""

    @abstractmethod
    def count(self, batch: dict[str, torch.Tensor]) -> int:
        """Return the number of losses of a batch: of tokens, or of examples."""

    @abstractmethod
    def validation(self, options: Any, model: PeftModel, check: Check) -> dict[str, float]:
        """Return loss and metrics on the validation examples; every process computes its share."""

    @abstractmethod
    def figures(self, options: Any, model: PeftModel, check: Check) -> Mapping[str, float]:
        """Return the metrics that compare the merges of a single run; every process computes a share."""

    @abstractmethod
    def measured(self, options: Any, model: PeftModel, check: Check) -> tuple[list[float], dict]:
        """Return the loss of each test example, in order, and metrics over all test examples."""

    @abstractmethod
    def calibration(self, options: Any) -> list[dict] | None:
        """Return the calibration batches of a merge."""

    @abstractmethod
    def facts(self, options: Any, model: PeftModel, check: Check) -> dict[str, Any]:
        """Return the task, the model and the numbers of examples for `results.json`."""

    def files(self, options: Any) -> list[str]:
        """Return the names of the files that the options ask for, in addition to the files of every run."""
        return ["merged"] * options.adapter.merge_and_save

    def predict(self, options: Any, model: PeftModel, check: Check) -> dict[str, list[str]]:
        """Return the lines of each file of predictions."""
        return {}

    def adapted(self, options: TextOptions, device: torch.device, steps: int) -> PeftModel:
        """Return the model with a newly initialized adapter. `steps`: number of training steps."""
        torch.manual_seed(options.training.seed)
        model = self.load(options, device)
        torch.manual_seed(options.training.seed)
        return attach(model, options.adapter, steps, self.example, self.classifier or None).to(device)


def schedule_of(updates: int, options: TextOptions) -> tuple[Schedule, TextOptions]:
    """Return the schedule, and the options with numbers of steps in place of fractions.

    `updates`: the number of steps in an epoch.
    """
    training, optimizer, validation, output = options.training, options.optimizer, options.validation, options.output
    steps = training.max_train_steps or math.ceil(training.num_train_epochs * updates)
    check_steps(options.adapter.method, steps, f"--method {options.adapter.name} with {steps} steps")

    def in_steps(number: float) -> int:
        """Return a number of steps; a `number` below 1 is a fraction of all steps."""
        return math.ceil(number * steps) if number < 1 else int(number)

    looks = {"no": 0, "epoch": updates, "steps": in_steps(validation.eval_steps or output.logging_steps)}
    saves = {"no": steps, "epoch": updates, "steps": in_steps(output.checkpointing_steps)}
    warmup = in_steps(optimizer.warmup_ratio or optimizer.lr_warmup_steps or 0)
    options = options.replace(
        checkpointing_steps=saves[output.save_strategy], logging_steps=in_steps(output.logging_steps)
    )
    by_epochs = not training.max_train_steps
    return Schedule(steps, looks[validation.eval_strategy], warmup, by_epochs), options


def evaluations_of(validation: ValidationOptions, steps: int) -> dict[str, Any]:
    """Return an experiment's options to evaluate every --eval_steps, or MAX_EVALUATIONS times.

    Empty unless --eval_strategy is `no`. `steps`: number of training steps.
    """
    every = validation.eval_steps or math.ceil(steps / MAX_EVALUATIONS)
    return {"eval_strategy": "steps", "eval_steps": every} if validation.eval_strategy == "no" else {}


def expected_times(training: TrainingOptions, schedule: Schedule, parts: Parts, step: float) -> tuple[float, float]:
    """Return the expected seconds of all evaluations of an arm, and of its test, from the time of a training step."""
    # A backward pass takes as long as two forward passes.
    an_example = step / (3 * training.train_batch_size * training.gradient_accumulation_steps)
    evaluations = math.ceil(schedule.steps / schedule.validation_steps)
    return an_example * len(parts.select) * evaluations, an_example * len(parts.test)


class TextReports(Reports):
    """The log and the trackers of a method; a row of training losses is the mean over --logging_steps.

    The last row is the mean over the steps without a row of their own. After a resume, means that began before the
    resume are left out.
    """

    def __init__(self, every: float, steps: int, *args: Any) -> None:
        super().__init__(*args)
        self.every, self.steps, self.losses = every, steps, list[torch.Tensor]()

    def note(self, split: str, loss: torch.Tensor | float, **figures: Any) -> None:
        """Store a row; rows of the training loss only every --logging_steps steps, and after the last step."""
        if split == "train" and self.every > 1:
            self.losses.append(torch.as_tensor(loss))
            count = self.learner.step % self.every
            if count and self.learner.step < self.steps:
                return
            losses, self.losses = self.losses, []
            if len(losses) < (count or self.every):
                return
            loss = torch.stack(losses).mean()
        super().note(split, loss, **figures)


@dataclass(frozen=True)
class TextStudy(Study):
    """Model and examples of a run with a language model."""

    texts: Texts

    @property
    def options(self) -> Any:
        """Options of the run."""
        return self.context.options

    @property
    def method(self) -> MethodOptions:
        """Options of the adapter and its merge."""
        return self.options.adapter

    @functools.cached_property
    def plan(self) -> BatchPlan:
        """The batches of this process."""
        return plan_of(self.texts, self.options, self.context.accelerator)

    def learner(self, method: str) -> Learner:
        """Return the model with a new adapter, initialized from the seed."""
        model = self.adapted(self.context.print_once)
        trained = Trained({"model": model}, self.texts.losses)
        trained.config = base_model(model).config  # accelerate reads it to fill in DeepSpeed's "auto"
        return new_learner(method, trained, self.schedule, self.context)

    def adapted(self, tell: Callable[[str], object] = lambda _: None) -> PeftModel:
        """Return the model with a newly initialized adapter; pass lines about layers without shortcuts to `tell`."""
        model = self.texts.adapted(self.options, self.context.accelerator.device, self.schedule.steps)
        if self.method.init_lora:
            put_start(model, self.method)
        print_links(model, self.method.name, self.method.reslora_config, tell, self.texts.example)
        return model

    def batches(self, steps: range) -> Generator[dict[str, torch.Tensor]]:
        """Yield this process's batches of these steps; the first dimension of each tensor is the batch."""
        yield from self.plan.loader(steps, pin=self.context.accelerator.device.type == "cuda")

    def passes(self, step: int) -> int:
        """Return the number of batches of a step; the last one of an epoch may have fewer."""
        return len(self.plan.of_step(step))

    def count(self, batch: dict[str, torch.Tensor]) -> int:
        """Return the number of losses that the model returns for a batch."""
        return self.texts.count(batch)

    def calibration(self) -> list[dict]:
        """Return the training batches on which a control method is calibrated."""
        return self.texts.calibration(self.options) or []

    @property
    def example_inputs(self) -> dict | None:
        """Inputs to trace the model with."""
        return self.texts.example

    def calibrate(self, learner: Learner, batch: dict) -> None:
        """Run a forward pass of a calibration batch."""
        base_model(learner.denoiser)(**to_device(batch, self.context.accelerator.device))

    @contextlib.contextmanager
    def reports(self, learner: Learner) -> Iterator[TextReports]:
        """Yield the log and the trackers."""
        folder, every = self.context.folder_of(learner.method), self.options.output.logging_steps
        with contextlib.closing(
            TextReports(every, self.schedule.steps, folder, learner, self.schedule, self.context.accelerator)
        ) as reports:
            yield reports

    def check(self) -> None:
        """Raise `Stopped` if a stop was requested and no other process waits for this one."""
        if self.context.accelerator.num_processes == 1:
            self.context.stop.check("stopped while evaluating; resume with --resume_from_checkpoint latest")

    @contextlib.contextmanager
    def evaluating(self, model: PeftModel) -> Iterator[None]:
        """Evaluate a model inside this context, in the precision of training."""
        with evaluating(model), torch.no_grad(), self.context.accelerator.autocast():
            yield

    def validate(self, learner: Learner, reports: TextReports, parts: Sequence[str] | None = None) -> None:
        """Measure loss and metrics on the validation examples, and set `learner.over`.

        If a stop request interrupts the evaluation, the resumed run evaluates again.
        """
        with contextlib.suppress(Stopped), learner.averaged():
            with self.evaluating(learner.denoiser):
                figures = self.texts.validation(self.options, learner.denoiser, self.check)
            broadcast_from_main(lambda: self.keep(learner, figures["loss"]))
            if self.context.accelerator.is_main_process:
                words = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
                tqdm.write(f"{learner.name}: step {learner.step}: validation {words}")
            reports.note("validation", **figures)
            reports.flush()
        learner.over = broadcast_from_main(lambda: reports.is_over(self.options.validation.early_stopping_patience))

    def keep(self, learner: Learner, loss: float) -> None:
        """Save the adapter if --save_best or an experiment asks for it. Only the main process calls this."""
        folder = self.context.folder_of(learner.method)
        if self.options.validation.save_best:
            keep_if_best(learner, folder, loss)
        if self.context.place and math.isfinite(loss):  # an experiment chooses among these adapters
            keep_adapter(learner, adapter_folder(folder, learner.step))

    def validation_loss(self, learner: Learner) -> float | None:
        """Return the mean loss on the validation examples; None if a stop request interrupts it."""
        with contextlib.suppress(Stopped), self.evaluating(learner.denoiser):
            return self.texts.validation(self.options, learner.denoiser, self.check)["loss"]
        return None

    def export(self, learner: Learner, schedule: Schedule) -> dict[str, float]:
        """Evaluate the adapter unmerged and merged, export it, write predictions and, last, `results.json`."""
        options, texts, model, folder = self.options, self.texts, learner.denoiser, self.context.folder
        best = options.validation.save_best and broadcast_from_main(lambda: to_export(folder, schedule.steps))
        if best:
            load_adapter(model, best.path)
        trained = sum(value.numel() for value in learner.parameters)
        self.context.status.say("merging", learner.name)

        def evaluate(model: PeftModel) -> Mapping[str, float]:
            """Return the task's metrics on the validation split."""
            with self.evaluating(model):
                return texts.figures(options, model, self.check)

        batches = texts.calibration(options)
        table = merge_table(model, evaluate, batches)
        broadcast_from_main(check_held)
        report = export(model, folder, self.method, batches, texts.tokenizer)
        with self.evaluating(model):
            predictions = texts.predict(options, model, self.check)
            facts = texts.facts(options, model, self.check)
        broadcast_from_main(lambda: write_lines(folder, predictions))
        facts |= {"trainable_parameters": trained, "seed": options.training.seed, "steps": schedule.steps}
        if best:
            average = {"average": best.average, "checkpoints": best.checkpoints}
            facts |= average if best.average else {"best_step": best.step}
        results = write_results(folder, self.method, table, report, **facts, train_seconds=round(learner.seconds, 3))
        self.summarize(results, [*predictions])
        return {}

    def summarize(self, results: dict[str, Any], predictions: list[str]) -> None:
        """Print the table and the files of a run."""
        folder, uses = self.context.folder, WRITTEN | dict.fromkeys(predictions, "predictions for the test split")
        kind = "test" if "test_examples" in results else "validation"
        begin = "\n{task}, {method}, {steps} steps; on {} {} examples:"
        say(begin.format(results[f"{kind}_examples"], kind, **results))
        say(f"{table_text(results['table'])}\n\n{folder}/")
        width = max(map(len, uses)) + 2
        say("\n".join(f"  {name:<{width}}{use}" for name, use in uses.items() if (folder / name).exists()))
        if Path(results["model_name_or_path"]).resolve().parent == ASSETS:
            say(f"\nWith a real model:\n  accelerate launch {self.texts.prog} {self.texts.real}")


def plan_of(texts: Texts, options: TextOptions, accelerator: Accelerator) -> BatchPlan:
    """Return the batches of this process."""
    return BatchPlan(texts.rows, texts.collate, options.training, accelerator.num_processes, accelerator.process_index)


def write_lines(folder: Path, files: Mapping[str, list[str]]) -> None:
    """Write text files by name."""
    for name, lines in files.items():
        with replacing(folder / name) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
