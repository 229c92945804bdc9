"""Print a run's estimated memory by phase; reject a run that does not fit, and name options that make it fit."""

import contextlib
import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import InvalidArgument, first_line
from ...experiment.executors import arms_a_device
from ...methods.registry import ZERO_B
from ...options.contradictions import carries_activations
from ...runtime.peak_memory import free_memory
from ...training.sharding import cuts_base
from ..context import ImageContext
from ..data.buckets import named_buckets
from ..data.dataset import ImageDataset
from ..model.quantising import try_format
from ..prompts import prompts_of, resolved
from .components import empty_denoiser, empty_part
from .inference import drawing_class_images, exporting, sampling
from .phases import ROWS, Phase, Rehearsal

GIBI = 2**30
SURELY = 0.5  # no estimate is made if the upper bound is below this fraction of the free memory
FEW = 3  # layers whose inputs and outputs a model without gradients holds in memory at a time, at most
LEFT_OUT = (
    "left out: unused memory that allocators retain, workspaces of kernels and threads, and the memory of libraries"
)
Change = Mapping[str, object]


@dataclass(frozen=True)
class Plan:
    """The estimated memory of a run, by phase."""

    phases: tuple[Phase, ...]
    free: int | None
    """Bytes of the device that are free before the run; None if unknown."""
    where: str
    """Name of the device, for messages."""
    unknown: tuple[str, ...] = ()
    """Lines about components whose memory is unknown."""

    @property
    def peak(self) -> Phase:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether the device has enough memory; True if its free memory is unknown."""
        return self.free is None or self.peak.total <= self.free

    def __str__(self) -> str:
        """Return a table with phases as columns, and a line about the peak."""
        unit, name = (GIBI, "GiB") if self.peak.total >= GIBI else (2**20, "MiB")
        rows = [row for row in ROWS if any(row in phase.held for phase in self.phases)]
        lines = [f"{f'planned memory in {name}':<24}" + "".join(f"{phase.name:>20}" for phase in self.phases)]
        for row in rows:
            cells = [shown(phase.held[row], unit) if row in phase.held else "" for phase in self.phases]
            lines.append(f"{row:<24}" + "".join(f"{cell:>20}" for cell in cells))
        lines.append(f"{'together':<24}" + "".join(f"{shown(phase.total, unit):>20}" for phase in self.phases))
        free = "" if self.free is None else f" of {self.free / unit:.2f} {name} that {self.where} has free"
        most = f"the most, {shown(self.peak.total, unit)} {name}{free}, while {self.peak.name}"
        return "\n".join([*lines, *self.unknown, LEFT_OUT, f"{most}; latents and text states are on disk"])


def shown(size: int | None, unit: int) -> str:
    """Format a number of bytes for the table."""
    return "unknown" if size is None else f"{size / unit:.2f}"


def where(context: ImageContext) -> str:
    """Return the name of the device, or `each of 2 runs on a cpu` if several runs of an experiment share it."""
    device = context.accelerator.device
    arms = arms_a_device(context.options.experiment, device)
    return device.type if arms == 1 else f"each of {arms} runs on a {device.type}"


def plan_of(kinds: Sequence[ImageDataset], context: ImageContext, free: int | None) -> Plan:
    """Return the memory estimate of the method with the highest peak."""
    rehearsal = Rehearsal(kinds, context)
    first = drawing_class_images(rehearsal), rehearsal.encoding_images(), rehearsal.encoding_captions()
    before = [phase for phase in first if phase]
    plans = []
    for method in context.options.adapter.method:
        step = rehearsal.training(method)
        after = [phase for phase in (sampling(rehearsal, step), exporting(rehearsal, method, step, free or 0)) if phase]
        phases, unknown = (*before, step, *after), tuple(dict.fromkeys(rehearsal.unknown))
        plans.append(Plan(phases, free, where(context), unknown))
    return max(plans, key=lambda plan: plan.peak.total)


def check_memory(kinds: Sequence[ImageDataset], context: ImageContext) -> None:
    """Print the memory estimate, and raise `InvalidArgument` if the run does not fit.

    --no-plan disables the check. Without --plan, nothing is printed if an upper bound shows that the run fits.
    """
    asked, free = context.options.output.plan, free_memory(context.accelerator.device)
    free = free and free // arms_a_device(context.options.experiment, context.accelerator.device)
    if cuts_base(context.accelerator):
        return  # the estimate assumes an unsharded base
    if asked is False or (not asked and free and guess(context) <= SURELY * free):
        return
    try:
        plan = plan_of(kinds, context, free)
    except InvalidArgument:
        raise
    except Exception as error:  # a model that fails on fake tensors can still be trained
        reason = f"this model cannot be run without weights ({first_line(error)})"
        if asked:
            raise InvalidArgument("--plan", reason, "leave it out") from None
        context.print_once(f"the memory is not estimated: {reason}")
        return
    context.print_once(str(plan))
    refuse(plan, kinds, context)


def refuse(plan: Plan, kinds: Sequence[ImageDataset], context: ImageContext) -> None:
    """Raise `InvalidArgument` if the device has too little memory; the message names options that make the run fit."""
    if plan.fits or plan.free is None:
        return
    options = context.options
    taken, free = f"{plan.peak.total / GIBI:.2f} GiB", f"{plan.free / GIBI:.2f} GiB"
    problem = f"{plan.peak.name} takes {taken}, {plan.where} has {free} free"
    arms = arms_a_device(options.experiment, context.accelerator.device)
    if plan.peak.total <= arms * plan.free:
        raise InvalidArgument(f"--arms_at_once {options.experiment.arms_at_once}", problem, "give a smaller number")
    sides = " ".join(map(str, options.data.resolution))
    argument = f"--train_batch_size {options.training.train_batch_size}, --resolution {sides}"
    raise InvalidArgument(argument, problem, advice(kinds, context, plan))


# -- options that make a run fit ---------------------------------------------------------------------------------------


def advice(kinds: Sequence[ImageDataset], context: ImageContext, plan: Plan) -> str:
    """Return the first option that makes the run fit, or else the first options that together make it fit."""

    def plan_with(change: Change) -> Plan | None:
        """Return the memory estimate with changed options; None if the pipeline does not accept the
        changed options.
        """
        options = context.options.replace(**change)
        try:
            return plan_of(kinds, dataclasses.replace(context, options=options), plan.free)
        except (ValueError, RuntimeError):  # the pipeline does not accept the option
            return None

    helpful: list[Change] = []
    for change in changes(context):
        found = plan_with(change)
        if found and found.fits:
            return in_words(change, found)
        if found and found.peak.total < 0.99 * plan.peak.total:
            helpful.append(change)
    together: dict[str, object] = {}
    for change in helpful:
        together |= change
        if len(together) > len(change) and (found := plan_with(together)) and found.fits:
            return in_words(together, found)
    return "choose a smaller model, or a device with more memory; --no-plan starts the run anyway"


def in_words(change: Change, plan: Plan) -> str:
    """Format options as on the command line, with the memory that the run needs with them."""
    words = [f"--{name}" if value is True else f"--{name} {value}" for name, value in change.items()]
    return f"with {' '.join(words)} it takes {plan.peak.total / GIBI:.2f} GiB"


def changes(context: ImageContext) -> Iterator[Change]:
    """Yield options that save memory; those that change the training least come first."""
    options, device = context.options, context.accelerator.device
    if not options.training.gradient_checkpointing and not (
        options.training.compile and carries_activations(options.adapter)
    ):
        yield {"gradient_checkpointing": True}
    if options.training.train_batch_size > 1:
        steps = options.training.gradient_accumulation_steps * options.training.train_batch_size
        yield {"train_batch_size": 1, "gradient_accumulation_steps": steps}
    if options.model.mixed_precision == "no":
        yield {"mixed_precision": "bf16"}
    if options.optimizer.optimizer == "adamw" and importlib.util.find_spec("bitsandbytes"):
        yield {"optimizer": "adamw8bit"}
    free = options.adapter.init_lora_weights in ZERO_B
    for precision in ("fp8", "nf4") if options.model.base_precision == "no" and free else ():
        with contextlib.suppress(Exception):  # back ends raise errors of many types
            try_format(precision, torch.float32, device)
            yield {"base_precision": precision}
    sides = options.data.resolution
    if len(sides) == 1 and sides[0] >= 128 and not options.data.aspect_ratio_buckets:
        yield {"resolution": sides[0] // 2}


# -- an upper bound without fake tensors -------------------------------------------------------------------------------


def guess(context: ImageContext) -> float:
    """Return an upper bound of the memory of all phases in bytes, from the shapes of weights and images only.

    The bound is the sum of two parts:

    - four float32 copies of all weights;
    - the activations of the model with the largest activations: 16 bytes for each value that enters or leaves a layer,
      as if all layers had the resolution of the model's input. The activations also cover intermediate results between
      layers.

    All layers of the denoiser count, because it keeps their activations for the backward pass. Of any other model, only
    a few layers count.
    """
    options, model = context.options, context.model
    names = [name for name in ("vae", *model.family.text_parts) if model.index.get(name, [None])[0]]
    parts = {name: empty_part(model, name, torch.float32) for name in names}
    denoiser = empty_denoiser(model, torch.float32)
    weights = sum(value.nbytes for part in (denoiser, *filter(None, parts.values())) for value in part.parameters())
    assistant = context.assistant.layers.values() if context.assistant else ()
    weights += sum(4 * (down.numel() + up.numel()) for down, up, _ in assistant)
    pixels, side = most_pixels(context), math.isqrt(most_pixels(context))
    pixels += options.data.references_per_image * math.prod(model.family.reference_size(side, side))
    texts = 64 * (options.training.max_sequence_length or 77)
    images = max(options.training.train_batch_size, 8)  # at most 8 crops and flips are encoded together
    passes = 2 if options.training.preserved_prompts else 1  # whose activations are in memory at the same time
    # No supported autoencoder has more latents per pixel.
    at_work = 16.0 * passes * images * pixels / 16 * sum(widths(denoiser))
    for name, part in parts.items():
        count = images * pixels if name == "vae" else texts
        own = widths(part) if part else []
        at_work = max(at_work, 16.0 * count * min(sum(own), FEW * max(own, default=0)))
    return 4.0 * weights + at_work


def widths(module: nn.Module) -> list[int]:
    """Return, for each linear and convolutional layer, the number of its inputs plus outputs per position."""
    layers = nn.Linear | nn.Conv2d | nn.Conv3d
    return [sum(layer.weight.shape[:2]) for layer in module.modules() if isinstance(layer, layers)]


def most_pixels(context: ImageContext) -> int:
    """Return the number of pixels of the largest training image or sample."""
    options = context.options
    trained = [side * side for side in options.data.resolution]
    trained += [size.height * size.width for size in named_buckets(options.data.aspect_ratio_buckets or "")]
    drawn = [
        resolved(prompt, options.data, options.validation, context.model.family)
        for prompt in prompts_of(options.validation)
    ]
    return max([*trained, *((prompt.height or 0) * (prompt.width or 0) for prompt in drawn)])
