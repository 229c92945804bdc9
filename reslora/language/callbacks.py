"""What happens between the steps of `AdapterTrainer`: progress, the log, AdaLoRA's ranks, checkpoints, a stop."""

from __future__ import annotations

import os
import time
from pathlib import Path

from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from ..common.adapters import RankAllocator
from ..common.log import LogWriter, read_log
from ..common.recovery import set_others_aside
from ..common.signals import StopRequest
from ..common.together import any_of, decided
from .checkpoints import checkpoints_of

TIMINGS = ("runtime", "per_second", "jit", "model_preparation")


def measured(logs: dict[str, float]) -> dict[str, float]:
    """Return the figures of an evaluation by their names, without how long it took."""
    found = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
    return {name: value for name, value in found.items() if not any(word in name for word in TIMINGS)}


class Progress(ProgressCallback):
    """Shows the training loss behind the bar, where stock prints a line each time; evaluations get their line."""

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


class AllocateRanks(TrainerCallback):
    """Calls AdaLoRA's allocator between the optimizer's step and the zeroing of the gradients it reads."""

    def __init__(self, allocator: RankAllocator, accelerator: Accelerator) -> None:
        self.allocator, self.accelerator = allocator, accelerator

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Move ranks, unless the step was skipped."""
        if not self.accelerator.optimizer_step_was_skipped:
            self.allocator.step(state.global_step + 1)


class StopWhenAsked(TrainerCallback):
    """After a request to stop, saves and ends the training; all processes of a run leave after the same step.

    A validation that is due after that step is done first, so that the log of a run that goes on has no gap.
    """

    def __init__(self, stop: StopRequest, accelerator: Accelerator) -> None:
        self.stop, self.accelerator = stop, accelerator
        self.training = self.leaving = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """From here on a stop has something to save."""
        self.training = True

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """From here on it hasn't."""
        self.training = False

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Ask for a checkpoint, and for no further step."""
        if self._asked() and state.global_step < state.max_steps:
            self.leaving = control.should_save = control.should_training_stop = True
            args.save_only_model = False  # who stops wants to go on

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """The trainer takes a stop for the end of an epoch, whose validation is not due yet."""
        if self.leaving and abs(state.epoch - round(state.epoch)) > 1e-9:
            control.should_evaluate = control.should_save = control.should_log = False

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        """End an evaluation after the training at once."""
        self.check("stopped while evaluating; go on with --resume_from_checkpoint latest")

    def check(self, message: str) -> None:
        """Raise `Stopped` outside the training; with several processes only a second signal ends them."""
        if not self.training and self.accelerator.num_processes == 1:
            self.stop.check(message)

    def ended_the_compiler(self, error: Exception) -> bool:
        """Return whether a step has failed as a signal to the whole terminal or job has ended the compiler that torch
        called.

        Not with several processes, which wait for each other within the step.
        """
        compiling = type(error).__module__.startswith(("torch._inductor.", "torch._dynamo."))
        return compiling and self.stop.signal is not None and self.accelerator.num_processes == 1

    def _asked(self) -> bool:
        return self.stop.shared(any_of(self.stop.signal is not None))


class SaveValidated(TrainerCallback):
    """Puts off a checkpoint that is due at the end of an epoch until that is validated, where epochs are.

    Who goes on from one of before would not validate that epoch any more.
    """

    due = False

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Of the last step of an epoch, or of all."""
        last = state.epoch == round(state.epoch) or state.global_step >= state.max_steps
        self.due = control.should_save and last and args.eval_strategy == IntervalStrategy.EPOCH
        control.should_save = control.should_save and not self.due

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """A checkpoint follows the validation, if both are due."""
        control.should_save = control.should_save or self.due


class GoesOnFrom(TrainerCallback):
    """Sets aside what does not descend from `checkpoint`, once that has been loaded: not if it cannot be.

    The best checkpoint is the one beside it: stock `Trainer` knows where it was, and the folder may have been moved.
    """

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = Path(checkpoint)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Model, optimizer and schedule are loaded by now."""
        best = self.checkpoint.with_name(f"checkpoint-{state.best_global_step}")
        if best.is_dir():
            state.best_model_checkpoint = str(best)
        place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        decided(lambda: set_others_aside(self.checkpoint, checkpoints_of(args.output_dir), place))


class LogCallback(TrainerCallback):
    """Writes `log.jsonl`: rows {"step", "split": "train"|"validation", "loss", "lr", "seconds", ...metrics}.

    `seconds` counts training alone, over all continuations of a run. Rows after the step that a run resumes at are
    dropped when it starts; a fresh run starts a fresh file. A loss is the mean since the row before, or since the step
    that the run resumed at: with --logging_steps above 1 the first row of a continuation is of fewer steps.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.seconds = self.started = 0.0
        self.learning_rate: float | None = None
        self.writer: LogWriter | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Goes on from the rows up to the step that the run resumes at."""
        rows = [row for row in read_log(self.path) if row["step"] <= state.global_step] if state.global_step else []
        self.seconds = rows[-1].get("seconds", 0.0) if rows else 0.0
        if state.is_world_process_zero:
            self.writer = LogWriter(self.path, state.global_step)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop the clock: evaluation and saving do not count."""
        self.seconds += time.perf_counter() - self.started

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Write a row of training or validation figures."""
        if "loss" in logs:
            self.learning_rate = logs.get("learning_rate")
            self._write(state, "train", logs["loss"], {"grad_norm": logs.get("grad_norm")})
        elif "eval_loss" in logs:
            figures = measured(logs)
            self._write(state, "validation", figures.pop("loss"), figures)

    def _write(self, state, split: str, loss: float, figures: dict) -> None:
        if self.writer is None:
            return  # another process, or an evaluation before the training
        row = {
            "step": state.global_step,
            "split": split,
            "loss": loss,
            "lr": self.learning_rate,
            "seconds": round(self.seconds, 3),
        }
        self.writer.write(row | {key: value for key, value in figures.items() if value is not None})
