"""What a method needs once it is restored and before its first step: attention, checkpointing, processes, compiler."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import get_grad_scaler

from ...model import enable_gradient_checkpointing
from ..context import Context
from .state import Trainee
from .zero import load_full_state


def renew_scaler(accelerator: Accelerator) -> None:
    """Forgets the scale of losses in fp16 that the method before has found: each starts alike."""
    if accelerator.scaler is not None:
        accelerator.scaler = get_grad_scaler(accelerator.distributed_type)


def prepare(trainee: Trainee, context: Context) -> None:
    """Makes the trainee ready for its steps: attention, checkpointing, processes, compiler."""
    flags, denoiser = context.flags, trainee.denoiser
    if flags.enable_xformers_memory_efficient_attention:
        denoiser.enable_xformers_memory_efficient_attention()
    if flags.gradient_checkpointing:
        enable_gradient_checkpointing(denoiser)
    trainee.model, trainee.optimizer = context.accelerator.prepare(trainee.trained.train(), trainee.optimizer)
    if trainee.awaited:
        load_full_state(trainee.optimizer.optimizer, denoiser.named_parameters(), trainee.awaited)
        trainee.awaited = None
    if flags.compile:
        trainee.trained.use_compiler()
