"""Compile the denoiser, and compare its first gradients with those of the uncompiled model.

PyTorch 2.13's CPU compiler loses track of buffers that are written in place when it fuses loops
(`SchedulerNode.recompute_size_and_body`). Reordering operations to save memory then moves the use of an upsampling's
gradient before the computation of this gradient: on a small U-Net, no gradient arrived below an upsampling without
attention. Without this reordering, all gradients equal those of the uncompiled model.
"""

import contextlib
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import get_total_norm

from ..errors import InvalidArgument
from ..runtime.processes import any_of
from ..wiring import connection_of
from .context import Context
from .state import Learner
from .zero import uses_deepspeed

# Relative to the norm of all gradients. Rounding errors are 2e-5 in float32 and mostly 0.01 to 0.03 in bf16. In bf16,
# one batch in fifty of the bundled pipeline has an error of 0.2 or more, even without a compiler. Therefore the check
# fails only if ATTEMPTS batches exceed the tolerance.
TOLERANCE, HALF_TOLERANCE = 0.05, 0.2
ATTEMPTS = 5
SCALE = 1024  # factor of the loss: prevents underflow in fp16, and as a power of two adds no rounding


def checked(batches: Iterator, learner: Learner, context: Context) -> Iterator:
    """Yield `batches`; with --compile, first compare the compiled and uncompiled gradients of one batch.

    If they differ, up to `ATTEMPTS` batches are compared. Raises `InvalidArgument` if all of them differ. Nothing is
    compared in three cases:

    - with dropout, because compiled masks differ;
    - with DeepSpeed, which takes its optimizer step in the backward pass;
    - if the uncompiled step does not fit into the memory of a single GPU.
    """
    options, accelerator = context.options, context.accelerator
    if not options.training.compile:
        return batches
    if options.adapter.lora_dropout or uses_deepspeed(accelerator):
        why = "because dropout or DeepSpeed changes them"
        accelerator.print(f"--compile: gradients are not compared with those of the uncompiled model, {why}")
        return batches
    tolerance = TOLERANCE if accelerator.mixed_precision == "no" else HALF_TOLERANCE
    seen, error, differs = [], 0.0, False
    with learner.timed(), contextlib.ExitStack() as stack:
        for part in learner.trained.parts.values():
            stack.enter_context(_unrecorded(part))
        for batch in islice(batches, ATTEMPTS):
            seen.append(batch)
            error = _error(learner, batch, accelerator)
            differs = any_of(error > tolerance)
            if not differs:
                break
    if differs:
        problem = f"gradients of the compiled denoiser differ by {error:.0%} from those of the uncompiled one"
        raise InvalidArgument("--compile", problem, "leave it out")
    return chain(seen, batches)


def _error(learner: Learner, batch: object, accelerator: Accelerator) -> float:
    """Return the relative error of a batch's compiled gradients; 0 if it cannot be measured."""
    try:
        with learner.trained.without_compiler():
            expected = _gradients(learner, batch)
    except torch.OutOfMemoryError:
        if accelerator.num_processes > 1:  # the other processes would wait for this one
            raise
        accelerator.print("--compile is not checked: a step without it does not fit into this GPU's memory")
        return 0.0
    found = _gradients(learner, batch)
    size, error = get_total_norm(expected), get_total_norm([a - b for a, b in zip(found, expected, strict=True)])
    if error == 0 or not size.isfinite():  # training itself reports non-finite values
        return 0.0
    return (error / size).nan_to_num(torch.inf, torch.inf).item()


def _gradients(learner: Learner, batch: object) -> list[torch.Tensor]:
    """Return the gradients of a batch's loss, and clear those that the parameters hold."""
    parameters = [p for p in learner.trained.parameters() if p.requires_grad]
    try:
        (SCALE * learner.model(batch).mean()).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    finally:
        for parameter in parameters:
            parameter.grad = None


@contextmanager
def _unrecorded(model: nn.Module) -> Iterator[None]:
    """When this context ends, restore the norms that a model with shortcuts had recorded before it."""
    connection = connection_of(model)
    if connection is None:
        yield
        return
    norms = connection.wires.norms
    kept = copy.deepcopy((norms.values, norms.pushed))
    yield
    norms.values, norms.pushed = kept
