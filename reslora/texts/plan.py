"""Print the number of steps of a run with a language model, and its memory, without loading weights (--plan).

For an experiment, also load the model, time its first steps, and print how long the experiment takes.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import nn

from ..experiment.power import print_power
from ..experiment.schedule import ArmSchedule
from ..experiment.study import print_estimate, time_steps
from ..formatting import how_often, pluralize
from ..model import enable_gradient_checkpointing
from ..options.grid import Grid
from ..options.texts import T, TextOptions
from ..runtime.processes import is_main, say
from ..runtime.signals import StopRequest
from ..tracing import to_device
from ..training.context import Context
from ..training.preparing import prepare
from ..training.study import Identity
from .adapter import attach
from .arguments import checked
from .run import start_accelerator
from .study import Texts, TextStudy, evaluations_of, expected_times, plan_of, schedule_of

GIB = 2**30
UNKNOWN = Identity("", "", "", "")
STATES = 4 * (1 + 1 + 2)
"""Bytes for each trained parameter in float32: its weight, its gradient, and the two moments of AdamW."""


def show_plan(texts: Texts, asked: T | Grid[T], stop: StopRequest) -> None:
    """Print the steps and the memory of a run; write nothing.

    For an experiment, steps and memory are those of its run with the highest rank and the largest batch. Then the first
    steps of the experiment are timed, to print how long the experiment takes.
    """
    if isinstance(asked, Grid):
        say(ArmSchedule(asked).runs_in_words())
        most = {name: max(asked.values(name)) for name in ("rank", "train_batch_size")}
        options: TextOptions = checked(asked.run(**most))
    else:
        options = asked
    with stop.at_once():
        accelerator = start_accelerator(options)
    if isinstance(asked, Grid):
        parts = texts.parts(options, asked.base.experiment)
        texts.prepare(options, parts)
        print_power(ArmSchedule(asked), texts.model_of(options)[0], len(parts.test), "example")
    else:
        texts.read(options)
    batches = plan_of(texts, options, accelerator)
    schedule, resolved = schedule_of(batches.updates, options)
    if isinstance(asked, Grid):
        schedule, resolved = schedule_of(
            batches.updates, options.replace(**evaluations_of(options.validation, schedule.steps))
        )
    options = resolved
    with torch.device("meta"):
        base = texts.empty(options)
        example = to_device(texts.example, "meta") if texts.example else None
        model = attach(base, options.adapter, schedule.steps, example, texts.classifier or None)
    longest = sorted(texts.rows, key=lambda row: len(row["input_ids"]), reverse=True)
    batch = to_device(texts.collate(longest[: options.training.train_batch_size]), "meta")
    if options.training.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    weights = texts.frozen_bytes(options, model)
    states = STATES * sum(value.numel() for value in model.parameters() if value.requires_grad)
    activations = saved_bytes(model, batch)
    looks = math.ceil(schedule.steps / schedule.validation_steps) if schedule.validation_steps else 0
    say(
        f"{pluralize(schedule.steps, 'step')}, {pluralize(batches.updates, 'step')} in an epoch of "
        f"{pluralize(len(texts.rows), 'example')}; {pluralize(looks, 'evaluation')}, and a checkpoint "
        f"{how_often(options.output.checkpointing_steps, schedule.steps)}"
    )
    say(
        f"about {(weights + states + activations) / GIB:.2f} GiB on each device: {weights / GIB:.2f} for the frozen "
        f"weights, {states / GIB:.2f} for the trained weights, their gradients and AdamW's states, and "
        f"{activations / GIB:.2f} for the activations of a batch of the longest examples"
    )
    if isinstance(asked, Grid):
        with stop.at_once():
            start, step = time_first_steps(
                TextStudy(schedule, UNKNOWN, Context(options, texts, accelerator, stop), texts)
            )
        if is_main():
            expected = expected_times(options.training, schedule, parts, step)
            print_estimate(ArmSchedule(asked), accelerator.device, schedule.steps, step, start, *expected)


def time_first_steps(study: TextStudy) -> tuple[float, float]:
    """Train the first steps of the first method; return the seconds that loading the model and one step take."""
    began, method = time.monotonic(), study.options.adapter.method[0]
    with contextlib.redirect_stdout(io.StringIO()):
        learner = study.learner(method)
        prepare(learner, study)
        start, step = time.monotonic() - began, time_steps(learner, study)
    study.context.accelerator.free_memory()
    return start, step


def saved_bytes(model: PeftModel, batch: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes that a forward pass on the meta device keeps for the backward pass, with the logits."""
    kept: dict[int, int] = {}
    owned = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}

    def pack(value: torch.Tensor) -> torch.Tensor:
        """Record the storage of a tensor that is saved for the backward pass, and return the tensor."""
        storage = value.untyped_storage()
        if storage._cdata not in owned and not isinstance(value, nn.Parameter):
            kept[storage._cdata] = storage.nbytes()
        return value

    inputs = {name: value for name, value in batch.items() if name not in ("labels", "attention_mask")}
    if model.can_generate():  # a mask of all pairs of tokens: others are read, and without values they cannot be
        examples, tokens = inputs["input_ids"].shape
        inputs["attention_mask"] = torch.ones(examples, 1, tokens, tokens, dtype=torch.bool, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        logits = model.train()(**inputs).logits
    return sum(kept.values()) + 2 * 4 * logits.numel()  # logits and their probabilities, in float32
