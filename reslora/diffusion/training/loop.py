"""Training one method, from where it stands to the last step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from ...common.errors import Stopped
from ...common.folder import check_held
from ...common.together import decided
from ...words import counted
from ..context import Context
from ..data.batch import Batch
from ..data.loaders import stream
from ..data.samples import Material, training_loader
from ..seeds import derive
from .compiling import checked
from .schedule import Schedule
from .state import Learner
from .stopping import Requests, stop_requested

if TYPE_CHECKING:
    from ..output.reports import Reports


@dataclass(frozen=True)
class Watch:
    """What is told, measured and kept while a method trains."""

    reports: Reports
    validation: Callable[..., None]
    """Called with the learner and the reports, and with the parts that are wanted where these are not all."""
    save: Callable[[], None]


def train(learner: Learner, material: Material, schedule: Schedule, watch: Watch, context: Context) -> None:
    """Takes the steps that are left, saving and validating when it is due; raises `Stopped` once a stop is saved."""
    accelerator, reports = context.accelerator, watch.reports
    if parts := decided(lambda: reports.overdue(schedule)):
        context.status.say(f"sampling at step {learner.step}", learner.name)
        watch.validation(learner, reports, parts)
        if stop_requested(context.stop):  # nothing is to be saved, and a later step would leave these samples behind
            raise stopped_at(learner)
    learner.over = decided(lambda: reports.is_over(context.options.validation.early_stopping_patience))
    steps = range(learner.step, learner.step if learner.over else schedule.steps)
    stopped = not steps and stop_requested(context.stop)  # no step is there to ask after
    pin = accelerator.device.type == "cuda"
    loader = training_loader(material, steps, accelerator.num_processes, accelerator.process_index, pin)
    silent, requests = not accelerator.is_main_process, Requests(context)
    bar = tqdm(desc=learner.name, total=schedule.steps, initial=learner.step, disable=silent, dynamic_ncols=True)
    with contextlib.closing(stream(loader)) as loaded, bar:
        batches = checked(loaded, learner, context)
        for _ in steps:
            with learner.timed():
                value = take_step(learner, batches, context)
                known = reports.flush()  # the loss of the step before: the device is busy with this one meanwhile
            reports.note("train", value)
            if known is not None:
                bar.set_postfix(loss=f"{known:.4f}", refresh=False)
            bar.update()
            context.status.count("step", learner.step, schedule.steps, learner.name)
            stopped = after_step(learner, schedule, watch, requests)
            if stopped or learner.over:
                break
    accelerator.free_memory()
    if stopped:  # after the last step as well: its validation may be missing, and an export would end the run
        raise stopped_at(learner)
    if learner.over:
        patience = f"--early_stopping_patience {context.options.validation.early_stopping_patience}"
        trained = f"trained for {counted(learner.step, 'step')}"
        accelerator.print(f"{learner.name}: the validation loss gets no lower, {trained}; {patience}")


def stopped_at(learner: Learner) -> Stopped:
    """What a run that was asked to stop ends with."""
    return Stopped(f"{learner.name} stopped after step {learner.step}; go on with --resume_from_checkpoint latest")


def after_step(learner: Learner, schedule: Schedule, watch: Watch, requests: Requests) -> bool:
    """Saves and validates where it is due or asked for; returns whether a stop was. All processes go the same way."""
    stopped, asked, draw_now = requests.after_step()
    due, last = schedule.is_due(learner.step), learner.step == schedule.steps
    save_now = asked or stopped or last or learner.step % requests.every == 0
    if not (save_now or due or draw_now):
        return False
    decided(check_held)
    with learner.timed():
        watch.reports.flush()  # a loss that is not finite is not saved
    if save_now:
        watch.save()
        requests.saved()
    if (due or draw_now) and not stopped:
        requests.status.say(f"sampling at step {learner.step}", learner.name)
        watch.validation(learner, watch.reports, *([] if due else [["samples"]]))
        stopped = stop_requested(requests.stop)
        if (stopped or learner.over) and not save_now:
            watch.save()
    return stopped


def take_step(learner: Learner, batches: Iterator[Batch], context: Context) -> torch.Tensor:
    """One update of the adapter, from --gradient_accumulation_steps batches; returns their mean loss everywhere.

    It is on the device still, which may not have come to it yet.
    """
    options, accelerator, total = context.options, context.accelerator, 0.0
    learner.step += 1
    for forward in range(options.training.gradient_accumulation_steps):
        batch = next(batches)
        # Dropout masks, the only random numbers left: seeding them here makes them a function of the step.
        torch.manual_seed(derive(options.training.seed, "dropout", learner.step, forward, accelerator.process_index))
        with accelerator.accumulate(learner.model):
            mean = learner.model(batch).mean()
            total += mean.detach()
            accelerator.backward(mean)
            if learner.allocator:
                learner.allocator.add_gradient(accelerator)
            if accelerator.sync_gradients and options.optimizer.max_grad_norm:
                accelerator.clip_grad_norm_(learner.parameters, options.optimizer.max_grad_norm)
            learner.optimizer.step()
            skipped = accelerator.optimizer_step_was_skipped  # its gradients are not finite
            if learner.allocator and accelerator.sync_gradients and not skipped:
                learner.allocator.step(learner.step)
            learner.optimizer.zero_grad()
    if not accelerator.optimizer_step_was_skipped:
        learner.lr_scheduler.step()
    return accelerator.reduce(total / options.training.gradient_accumulation_steps, "mean")
