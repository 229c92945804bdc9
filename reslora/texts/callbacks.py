"""Callbacks of `AdapterTrainer`: progress, log, AdaLoRA's ranks, checkpoints and stop requests."""

import time
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from ..methods.adapters import RankAllocator
from ..methods.decay import factor_at, set_factor
from ..runtime.checkpoint_folders import numbered, set_others_aside
from ..runtime.log import LogWriter
from ..runtime.processes import broadcast_from_main, stop_requested
from ..runtime.signals import StopRequest

TIMINGS = ("runtime", "per_second", "jit", "model_preparation")


def measured(logs: dict[str, float]) -> dict[str, float]:
    """Return the metrics of an evaluation by name, without timings."""
    found = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
    return {name: value for name, value in found.items() if not any(word in name for word in TIMINGS)}


class Progress(ProgressCallback):
    """A callback that shows the training loss on the progress bar, and prints a line for each evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Show the loss on the progress bar."""
        if self.training_bar is None or not state.is_world_process_zero:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
        elif "eval_loss" in logs:
            found = measured(logs).items()
            words = ", ".join(f"{name} {value:.4f}" for name, value in found if isinstance(value, float))
            self.training_bar.write(f"step {state.global_step}: validation {words}")


@dataclass(eq=False)
class AllocateRanks(TrainerCallback):
    """A callback that updates AdaLoRA's ranks before `zero_grad`, because the update reads the gradients."""

    allocator: RankAllocator
    accelerator: Accelerator

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Reallocate ranks, unless the optimizer's step was skipped."""
        if not self.accelerator.optimizer_step_was_skipped:
            self.allocator.step(state.global_step + 1)


class DecayShortcuts(TrainerCallback):
    """A callback that sets the factor of the shortcut terms (--shortcut_decay) before each step.

    Evaluations, checkpoints and exports after a step have the factor of the next step, which is 0 after the last one.
    """

    def __init__(self, part: float, model: nn.Module) -> None:
        self.part, self.model = part, model

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Set the factor of the first step; a checkpoint to resume from is loaded by now."""
        set_factor(self.model, factor_at(state.global_step, state.max_steps, self.part))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Set the factor of the next step."""
        self.on_train_begin(args, state, control)


@dataclass(eq=False)
class StopWhenAsked(TrainerCallback):
    """A callback that saves a checkpoint and ends training after a stop request, in all processes after the same step.

    If an evaluation is due after that step, it precedes the checkpoint, so that the log of a resumed run has no gap.
    """

    stop: StopRequest
    trainer: Trainer
    leaving: bool = False

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Request a checkpoint and the end of training if a stop was requested."""
        if stop_requested(self.stop) and state.global_step < state.max_steps:
            self.leaving = control.should_save = control.should_training_stop = True
            args.save_only_model = False  # resuming needs the complete state

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """Cancel evaluation, saving and logging if a stop ended training within the epoch.

        `Trainer` treats every stop as the end of an epoch.
        """
        if self.leaving and abs(state.epoch - round(state.epoch)) > 1e-9:
            control.should_evaluate = control.should_save = control.should_log = False

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        """Raise `Stopped` if a stop was requested, during an evaluation after training."""
        self.check("stopped while evaluating; resume with --resume_from_checkpoint latest")

    def check(self, message: str) -> None:
        """Raise `Stopped` if a stop was requested, outside of training and in a run with one process.

        Outside of training, several processes are ended only by a second signal.
        """
        if not self.trainer.is_in_train and self.trainer.args.world_size == 1:
            self.stop.check(message)

    def ended_the_compiler(self, error: Exception) -> bool:
        """Return whether a step failed because a signal to the whole terminal or job killed torch's compiler process.

        Always False with several processes, because they wait for each other within the step.
        """
        compiling = type(error).__module__.startswith(("torch._inductor.", "torch._dynamo."))
        return compiling and self.stop.signal is not None and self.trainer.args.world_size == 1


class SaveValidated(TrainerCallback):
    """A callback that delays a checkpoint at the end of an epoch until after the epoch's validation.

    A run resumed from a checkpoint that was saved before the validation would skip the validation.
    """

    due = False

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Delay a checkpoint at the last step of an epoch or of training."""
        last = state.epoch == round(state.epoch) or state.global_step >= state.max_steps
        self.due = control.should_save and last and args.eval_strategy == IntervalStrategy.EPOCH
        control.should_save = control.should_save and not self.due

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """Save the delayed checkpoint after validation."""
        control.should_save = control.should_save or self.due


@dataclass(eq=False)
class GoesOnFrom(TrainerCallback):
    """A callback that renames the checkpoints that are not in the training history of a run resumed from `checkpoint`.

    Those are the later checkpoints; if `checkpoint` is not one of the run's own, all of them are renamed. The callback
    runs after `checkpoint` was loaded, so that a failure to load renames nothing.

    It also looks for the best checkpoint in the directory that contains `checkpoint`, because `Trainer` stores an
    absolute path, and the directory may have moved.
    """

    checkpoint: Path

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Rename checkpoints, and update the best one's path; model, optimizer and scheduler are loaded by now."""
        best = self.checkpoint.with_name(f"checkpoint-{state.best_global_step}")
        if best.is_dir():
            state.best_model_checkpoint = str(best)
        place = args.folder / f"checkpoint-{state.global_step}"
        broadcast_from_main(lambda: set_others_aside(self.checkpoint, numbered(args.folder), place))


@dataclass(eq=False)
class LogCallback(TrainerCallback):
    """A callback that writes `log.jsonl`.

    Its rows are {"step", "split": "train"|"validation", "loss", "lr", "seconds", ...metrics}. `seconds` is training
    time without evaluation, summed over resumed runs. On resume, rows after the resumed step are removed; a new run
    starts a new file. A training loss is the mean over the steps since the previous row, or since the resumed step. So
    with --logging_steps above 1, the first row after a resume averages fewer steps.
    """

    path: Path
    seconds: float = 0.0
    started: float = 0.0
    learning_rate: float | None = None
    writer: LogWriter | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Open the log with the rows up to the resumed step."""
        if state.is_world_process_zero:
            self.writer = LogWriter(self.path, state.global_step)
            self.seconds = self.writer.kept[-1].get("seconds", 0.0) if self.writer.kept else 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Start the timer."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop the timer, so that `seconds` does not include evaluation and saving."""
        self.seconds += time.perf_counter() - self.started

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Write a row of training or validation metrics."""
        if "loss" in logs:
            self.learning_rate = logs.get("learning_rate")
            self._write(state, "train", logs["loss"], {"grad_norm": logs.get("grad_norm")})
        elif "eval_loss" in logs:
            figures = measured(logs)
            self._write(state, "validation", figures.pop("loss"), figures)

    def _write(self, state, split: str, loss: float, figures: dict) -> None:
        if self.writer is None:
            return  # another process, or an evaluation before training
        row = {
            "step": state.global_step,
            "split": split,
            "loss": loss,
            "lr": self.learning_rate,
            "seconds": round(self.seconds, 3),
        }
        self.writer.write(row | {key: value for key, value in figures.items() if value is not None})
