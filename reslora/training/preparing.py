"""Prepare a restored learner for its first step: gradient checkpointing, processes and compiler."""

import contextlib
import math
from collections.abc import Iterable, Sequence

from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from ..model import enable_gradient_checkpointing
from .sharding import cut, cuts_base
from .state import Learner
from .study import Study
from .zero import load_full_state

FEW_TOKENS = 64


def prepare(learner: Learner, study: Study) -> None:
    """Prepare the learner for training: gradient checkpointing, processes and compiler."""
    options = study.context.options
    study.before_training(learner)
    if options.training.gradient_checkpointing:
        for part in learner.trained.parts.values():
            enable_gradient_checkpointing(part)
    prepare_processes(learner, study.context.accelerator)
    if learner.awaited:
        load_full_state(learner.zero_optimizer, learner.trained.named(), learner.awaited)
        learner.awaited = None
    if options.training.compile:
        learner.trained.use_compiler()


def prepare_processes(learner: Learner, accelerator: Accelerator) -> None:
    """Wrap the learner with accelerate, so that gradients are averaged; with FSDP, shard the base as well."""
    trained = learner.trained.train()
    if not cuts_base(accelerator):
        learner.model, learner.optimizer = accelerator.prepare(trained, learner.optimizer)
        return
    # DistributedDataParallel need not broadcast the frozen base: each process loads the same.
    same = [name for name, parameter in trained.named_parameters() if not parameter.requires_grad]
    same += [name for name, _ in trained.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(trained, same)
    learner.model, learner.optimizer = accelerator.prepare(trained, learner.optimizer, device_placement=[False, True])
    cut(learner.denoiser, accelerator)


def attention_of(accelerator: Accelerator, shapes: Iterable[Sequence[int]]) -> contextlib.AbstractContextManager:
    """Return a context that uses unfused attention for small pipelines on a CPU in bf16, where fused attention is slow.

    In all other cases the context has no effect. `shapes`: shapes of the latents, with height and width last.
    """
    tokens = max(math.prod(shape[-2:]) for shape in shapes)
    small = accelerator.device.type == "cpu" and tokens <= FEW_TOKENS
    plain = small and accelerator.mixed_precision == "bf16"
    return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()
