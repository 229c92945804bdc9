"""Compare an estimated step with a real one, by the bytes that PyTorch's profiler records for the CPU allocator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from reslora.images.accelerator import start_accelerator
from reslora.images.context import ImageContext
from reslora.images.data.batch import Batch
from reslora.images.data.dataset import ImageDataset
from reslora.images.data.folders import load_folders
from reslora.images.denoising import DenoisingLoss
from reslora.images.initial_lora import add_adapters
from reslora.images.memory.meta_tensors import tensors_of
from reslora.images.memory.phases import Rehearsal
from reslora.images.model.objective import objective_of
from reslora.images.run import resolve_context
from reslora.images.settings import parse_args
from reslora.model import enable_gradient_checkpointing
from reslora.runtime.signals import StopRequest
from reslora.training.state import new_optimizer
from reslora.training.trained import Trained


def resolved(model: Path, data: Path, output: Path, *flags: str) -> tuple[list[ImageDataset], ImageContext]:
    """Return images and context of a run; by default 64 x 64 images, batch size 4, and LoRA of rank 4."""
    given = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--output_dir", str(output)]
    given += ["--resolution", "64", "--train_batch_size", "4", "--rank", "4", "--method", "lora", "--report_to", "none"]
    parsed = parse_args([*given, "--num_inference_steps", "2", *flags])
    return load_folders(parsed.model, parsed.data, parsed.training, parsed.output), resolve_context(
        parsed,
        start_accelerator(parsed),
        StopRequest(),
    )


def real(batch: Batch) -> Batch:
    """Return a batch of the same shapes with real values."""

    def filled(value: torch.Tensor) -> torch.Tensor:
        like = torch.empty(value.shape, dtype=value.dtype)
        return like.normal_() if value.is_floating_point() else like.fill_(1)

    return batch._with(filled)


@dataclass(frozen=True)
class Taken:
    """Bytes that a real step allocates."""

    base: int
    adapter: int
    optimizer: int
    at_work: int
    """At the most, beside these: gradients and what is computed with."""


def consume_request(rehearsal: Rehearsal, context: ImageContext) -> Taken:
    """Run a real step of the rehearsed run."""
    trained = real_parts(context, rehearsal)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = new_optimizer(parameters, context.options.training, context.options.optimizer, context.accelerator)

    def step() -> None:
        optimizer.zero_grad()
        with rehearsal.autocast():
            losses = trained(real(rehearsal.batch(context.options.training.train_batch_size)))
        losses.mean().backward()

    step()
    optimizer.step()
    optimizer.zero_grad()
    state = [value for value in tree_leaves(optimizer.state_dict()["state"]) if isinstance(value, torch.Tensor)]
    frozen = [tensor for tensor in tensors_of(trained) if not tensor.requires_grad]
    base, adapter, kept = (sum(value.nbytes for value in values) for values in (frozen, parameters, state))
    return Taken(base, adapter, kept, most_allocated(step))


def real_parts(context: ImageContext, rehearsal: Rehearsal) -> Trained:
    """Return the trained modules with weights."""
    model, flags, device = context.model, context.options, torch.device("cpu")
    pipeline = model.load_pipeline(context.dtype, device, encoders=bool(context.encoders))
    denoiser = model.load_denoiser(context.dtype, device, flags.model.base_precision)
    parts = {model.family.denoiser: denoiser} | model.load_encoders(context.encoders, pipeline)
    objective = objective_of(flags.model, flags.training, model.family, pipeline)
    text = None
    if flags.training.preserved_prompts:
        text = {name: torch.ones(value.shape[1:], dtype=value.dtype) for name, value in rehearsal.text(1).items()}
    trained = Trained(parts, DenoisingLoss(context, objective, pipeline, denoiser.config, text))
    add_adapters(trained, flags.adapter.method[0], 1000, context)
    for part in parts.values() if flags.training.gradient_checkpointing else ():
        enable_gradient_checkpointing(part)
    return trained.train()


def most_allocated(work: Callable[[], object]) -> int:
    """Return the most bytes that `work` has allocated from the CPU allocator at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    return highest([e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"])


def highest(events: Sequence) -> int:
    """Return the maximum of the running sum of allocated and freed bytes."""
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
