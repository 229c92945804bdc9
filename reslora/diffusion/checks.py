"""What can be refused once the model is known, before anything is encoded."""

from __future__ import annotations

import re

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn

from ..errors import InvalidArgument, first_line
from .arguments import Flags
from .families.base import Family
from .loading import Model
from .trainee import add_adapter, targets_of


def check_pipeline(flags: Flags, pipeline: DiffusionPipeline, family: Family) -> None:
    """Refuse a resolution or a number of denoising steps that the pipeline cannot take."""
    known = pipeline.scheduler.config.num_train_timesteps
    if flags.num_inference_steps > known:
        argument = f"--num_inference_steps {flags.num_inference_steps}"
        raise InvalidArgument(argument, f"the model knows {known} timesteps", "give fewer")
    multiple = family.pixel_multiple(pipeline)
    if flags.resolution % multiple:
        argument, problem = f"--resolution {flags.resolution}", f"the pipeline takes multiples of {multiple}"
        raise InvalidArgument(argument, problem, f"give {max(1, flags.resolution // multiple) * multiple}")


def check_methods(flags: Flags, model: Model, accelerator: Accelerator) -> None:
    """Try every method on a denoiser without weights: targets, ranks and shortcuts are refused here."""
    for method in flags.method:
        denoiser = model.empty_denoiser()
        if method == flags.method[0]:
            check_targets(denoiser, flags, accelerator)
        try:
            add_adapter(denoiser, method, flags, total_steps=1000)
        except (ValueError, RuntimeError) as error:
            raise InvalidArgument(f"--method {method}", first_line(error), "change the flag it names") from None


def check_targets(denoiser: nn.Module, flags: Flags, accelerator: Accelerator) -> None:
    """Refuse targets none of which is there, and tell of those that are not."""
    names = [name for name, _ in denoiser.named_modules()]
    if isinstance(targets := targets_of(flags.target_modules), str):
        counts = {targets: sum(matches(targets, name) for name in names)}
    else:
        counts = {target: sum(f".{name}".endswith(f".{target}") for name in names) for target in targets}
    if not any(counts.values()):
        argument = f"--target_modules {' '.join(flags.target_modules)}"
        fix = f"try {' '.join(model_targets(denoiser))}"
        raise InvalidArgument(argument, "no layer of the denoiser ends in any of these", fix)
    for target, count in counts.items():
        if not count:
            accelerator.print(f"--target_modules: 0 layers of the denoiser end in {target}")


def matches(expression: str, name: str) -> bool:
    """Whether a regular expression fits a whole name."""
    try:
        return re.fullmatch(expression, name) is not None
    except re.error as error:
        problem = f"not a regular expression ({first_line(error)})"
        raise InvalidArgument(f"--target_modules {expression}", problem, "give the ends of names, or mend it") from None


def model_targets(denoiser: nn.Module) -> list[str]:
    """The last parts of the names of the denoiser's linear layers that occur most often."""
    ends = [name.rpartition(".")[2] for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    return sorted((end for end in set(ends) if not end.isdigit()), key=ends.count, reverse=True)[:4]
