"""Train a method from its latest checkpoint to its exports; `Study` is all that it knows of texts and images."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import torch
from accelerate.utils import get_grad_scaler
from tqdm.auto import tqdm

from ..errors import Diverged, EndedElsewhere
from ..formatting import pluralize
from ..methods.control_scales import gauged
from ..methods.controls import Settings, put_on
from ..methods.registry import METHODS
from ..runtime.checkpoint_folders import memory_reported
from ..runtime.folder_lock import check_held, make_folder
from ..runtime.processes import broadcast_from_main, say, stop_requested
from ..seeds import derive
from .averaging import offer_averages
from .best import best_of, go_on_from
from .checkpoints import Resume, restore, save_checkpoint, write_exports
from .preparing import prepare
from .reports import Reports
from .state import Learner
from .stopping import PAUSE, Asked, Requests, stopped_at
from .study import Study


def train_method(method: str, resume: Resume, study: Study) -> None:
    """Train a method from its latest checkpoint, or from zero if there is none, and export it."""
    context, name, candidates = study.context, study.context.name_of(method), resume.checkpoints[method]
    options, say, folder = context.options, context.accelerator.print, context.folder_of(method)
    context.accelerator.free_memory()  # reference cycles would keep the model of the method before
    with memory_reported(folder):
        broadcast_from_main(lambda: make_folder(folder))
        context.status.say("loading the model", name)
        if context.accelerator.scaler is not None:  # every method starts with the same loss scale of fp16
            context.accelerator.scaler = get_grad_scaler(context.accelerator.distributed_type)
        learner = study.learner(method)
        if METHODS[method].measured and not candidates:
            put_control_on(learner, study)
        if method in resume.merge_anew:
            say(f"{name} is trained: merging and exporting it anew with --merge {options.adapter.merge}")
        elif options.output.resume_from_checkpoint and not candidates and not context.place:
            say(f"--resume_from_checkpoint latest: no checkpoint in {folder}, {name} starts afresh")
        restore(learner, candidates, study.schedule.steps, context)
        if options.validation.save_best:
            broadcast_from_main(lambda: go_on_from(folder, learner.step))
        prepare(learner, study)
        train_and_export(learner, study)


def put_control_on(learner: Learner, study: Study) -> None:
    """Calibrate a control method on a few training batches before the first step, and apply the resulting settings.

    Checkpoints contain the settings of the control, so that a resumed run does not calibrate again.
    """
    options, parts = study.context.options, learner.trained.parts

    def measure() -> list[Settings]:
        """Return the settings of the control in each part, measured on the calibration batches."""
        with contextlib.ExitStack() as stack, study.context.accelerator.autocast():
            gauges = [
                stack.enter_context(gauged(part, options.adapter.reslora_config, study.example_inputs))
                for part in parts.values()
            ]
            for batch in study.calibration():
                study.calibrate(learner, batch)
            return [gauge.settings() for gauge in gauges]

    for part, settings in zip(parts.values(), broadcast_from_main(measure), strict=True):
        put_on(part, settings)


def train_and_export(learner: Learner, study: Study) -> None:
    """Train the remaining steps of a method, and export it.

    If training diverges and --save_best has saved an adapter, this adapter is exported before the error is raised.
    """
    context = study.context
    options, accelerator, folder = context.options, context.accelerator, context.folder_of(learner.method)
    broadcast_from_main(check_held)
    try:
        with study.reports(learner) as reports:
            train(learner, study, reports)
    except (Diverged, EndedElsewhere) as error:
        best = options.validation.save_best and error.diverged and broadcast_from_main(lambda: best_of(folder))
        if not best:
            raise
        accelerator.free_memory()
        accelerator.print(f"{learner.name}: training has diverged; exporting the best adapter, of step {best.step}")
        study.export(learner, dataclasses.replace(study.schedule, steps=learner.step))
        raise  # without `exports.json`, as the method is not finished
    schedule = dataclasses.replace(study.schedule, steps=learner.step, is_over=learner.over)
    if options.validation.average_checkpoints:
        offer_averages(learner, study)
    with learner.averaged():
        differences = study.export(learner, schedule)
        broadcast_from_main(lambda: write_exports(folder, options, study.identity, schedule, differences))


def train(learner: Learner, study: Study, reports: Reports) -> None:
    """Train the remaining steps, with checkpoints and validation when due.

    If a stop is requested, saves the current step if it is not saved yet, and raises `Stopped`.
    """
    context, schedule = study.context, study.schedule
    accelerator = context.accelerator
    if parts := broadcast_from_main(lambda: reports.overdue(schedule)):
        context.status.say(f"sampling at step {learner.step}", learner.name)
        study.validate(learner, reports, parts)
        # Nothing has to be saved here. After another step, a resumed run would not repeat an interrupted validation.
        if stop_requested(context.stop):
            raise stopped_at(learner)
    learner.over = broadcast_from_main(lambda: reports.is_over(context.options.validation.early_stopping_patience))
    steps = range(learner.step, learner.step if learner.over else schedule.steps)
    stopped = not steps and stop_requested(context.stop)  # without steps, `after_step` does not check it
    silent, requests = not accelerator.is_main_process, Requests(context)
    bar = tqdm(desc=learner.name, total=schedule.steps, initial=learner.step, disable=silent, dynamic_ncols=True)
    with contextlib.closing(study.batches(steps)) as batches, bar:
        for _ in steps:
            with learner.timed():
                value = take_step(learner, batches, study)
                known = reports.flush()  # reads the previous loss while the device computes
            reports.note("train", value)
            if known is not None:
                bar.set_postfix(loss=f"{known:.4f}", refresh=False)
            bar.update()
            context.status.count("step", learner.step, schedule.steps, learner.name)
            stopped = after_step(learner, study, reports, requests)
            if stopped or learner.over:
                break
    accelerator.free_memory()
    if stopped:  # also after the last step: its validation may be missing, and an export would delay the exit
        raise stopped_at(learner)
    if learner.over:
        patience = f"--early_stopping_patience {context.options.validation.early_stopping_patience}"
        trained = f"trained for {pluralize(learner.step, 'step')}"
        accelerator.print(f"{learner.name}: the validation loss no longer decreases, {trained}; {patience}")


def after_step(learner: Learner, study: Study, reports: Reports, requests: Requests) -> bool:
    """Save and validate if due or requested, and wait while paused; return whether to stop.

    All processes return the same.
    """
    asked, due = requests.after_step(), study.schedule.is_due(learner.step)
    save = asked.pause or learner.step == study.schedule.steps or learner.step % requests.every == 0
    stopped = handle(asked, due, save, learner, study, reports, requests)
    if asked.pause and not stopped:
        say(f"{learner.name}: paused after step {learner.step}; remove {requests.folder / PAUSE} to continue")
    while asked.pause and not stopped:
        requests.wait(learner)
        asked = requests.after_step()
        stopped = handle(asked, False, False, learner, study, reports, requests)
    return stopped


def handle(
    asked: Asked, due: bool, save: bool, learner: Learner, study: Study, reports: Reports, requests: Requests
) -> bool:
    """Save and validate if `due` or asked for; return whether to stop. `save`: whether a checkpoint is due."""
    save, stopped = save or asked.save or asked.stop, asked.stop
    if not (save or due or asked.samples is not None):
        return False
    broadcast_from_main(check_held)
    with learner.timed():
        reports.flush()  # raises for a non-finite loss, which must not be saved
    if save:
        save_checkpoint(learner, study)
        requests.saved()
    if (due or asked.samples is not None) and not stopped:
        requests.status.say(f"sampling at step {learner.step}", learner.name)
        if due or not asked.samples:
            study.validate(learner, reports, None if due else ["samples"])
        if asked.samples:
            study.sample(learner, reports, asked.samples)
        stopped = stop_requested(requests.stop)
        if (stopped or learner.over) and not save:
            save_checkpoint(learner, study)
    return stopped


def take_step(learner: Learner, batches: Iterator, study: Study) -> torch.Tensor:
    """Update the adapter with the batches of a step, and return the mean loss over all processes.

    The loss is a scalar tensor on the device and not synchronized.
    """
    options, accelerator, total = study.context.options, study.context.accelerator, 0.0
    learner.step += 1
    learner.used_rate = learner.learning_rate
    taken = list(itertools.islice(batches, study.passes(learner.step)))
    scale = scale_of(taken, study)
    passes = options.training.gradient_accumulation_steps
    accelerator.gradient_accumulation_steps = passes  # runs of an experiment may differ in it
    accelerator.step = passes - len(taken)  # so that accelerate synchronizes gradients in the last pass
    for forward, batch in enumerate(taken):
        # Only dropout masks use this generator; seeding it here makes them depend on the step alone.
        torch.manual_seed(derive(options.training.seed, "dropout", learner.step, forward, accelerator.process_index))
        with accelerator.accumulate(learner.model):
            losses = learner.model(batch)
            mean = losses.mean() if scale is None else losses.sum() * scale
            total += mean.detach()
            accelerator.backward(mean)
            if learner.allocator:
                learner.allocator.add_gradient(accelerator)
            if accelerator.sync_gradients and options.optimizer.max_grad_norm:
                accelerator.clip_grad_norm_(learner.parameters, options.optimizer.max_grad_norm)
            learner.optimizer.step()
            skipped = accelerator.optimizer_step_was_skipped  # because gradients are not finite
            if learner.allocator and accelerator.sync_gradients and not skipped:
                learner.allocator.step(learner.step)
            learner.optimizer.zero_grad()
    if not accelerator.optimizer_step_was_skipped:
        learner.lr_scheduler.step()
    return accelerator.reduce(total / passes, "mean")


def scale_of(batches: list, study: Study) -> torch.Tensor | None:
    """Return the factor, a scalar, of a step's summed losses; None if the loss is a mean of the batches' means.

    accelerate divides by the passes of a step, and averages over processes. The factor replaces both divisors by the
    number of losses of the step in all processes, so that each loss has the same weight.
    """
    counts, accelerator = [study.count(batch) for batch in batches], study.context.accelerator
    if None in counts:
        return None
    total = accelerator.reduce(torch.tensor(float(sum(counts)), device=accelerator.device))  # type: ignore[arg-type]
    return accelerator.num_processes * study.context.options.training.gradient_accumulation_steps / total
