"""Validation that needs the model, before anything is encoded."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import nn

from ..errors import InvalidArgument, first_line, refused_as
from ..formatting import pluralize
from ..methods.adapters import check_rank, narrowest_layer, rank_allocator
from ..methods.control_scales import gauged
from ..methods.links import print_links
from ..methods.registry import METHODS
from ..methods.targets import check_layers, targeted
from ..options.images import (
    DEFAULT_RANK,
    HELD_OUT,
    DataOptions,
    MethodOptions,
    ModelOptions,
    Options,
    TrainingOptions,
    ValidationOptions,
)
from ..tracing import meta_copy
from ..training.learning_rates import factors_of_layers
from .context import ImageContext
from .data.buckets import named_buckets
from .data.captions import build_caption_transform
from .data.dataset import ImageDataset, data_flag
from .data.images import image_size, open_image
from .initial_lora import add_adapter, config_of, targets_of
from .layers import layers_of, lora_parameters
from .model.families import FAMILIES, load_family
from .model.families.base import Family, Part
from .model.loading import Model
from .model.quantising import blocks, try_format
from .prompts import Prompt, prompts_of

STEERING = [name for name, option in Options.table().items() if HELD_OUT in option.needs]
"""Options that depend on a validation loss."""


def check_held_out(kinds: Sequence[ImageDataset], context: ImageContext) -> None:
    """Raise `InvalidArgument` for options that need a validation loss if there are too few images to hold one out.

    Without such an option, print only a warning.
    """
    options, most = context.options, max(len(images) for images in kinds if not images.of_class)
    split = options.validation.validation_split
    if not split or most > 1:
        return
    problem = "no image can be held out, since no folder has more than one"
    for name in STEERING:
        if options[name]:
            raise InvalidArgument(f"--{name}", problem, "leave it out, or give more images")
    context.print_once(f"warning: --validation_split {split:g}: {problem}; there is no validation loss")


def check_base_precision(options: ModelOptions, dtype: torch.dtype, accelerator: Accelerator) -> None:
    """Try --base_precision on the device; raise `InvalidArgument` if it is not supported."""
    if options.base_precision == "no":
        return
    argument = f"--base_precision {options.base_precision}"
    try:
        try_format(options.base_precision, dtype, accelerator.device)
    except Exception as error:  # every device back end raises its own types
        problem = f"does not work on {accelerator.device.type} here ({first_line(error)})"
        raise InvalidArgument(argument, problem, "give another precision, or leave it out") from None


def check_blocks_to_swap(options: ModelOptions, model: Model, context: ImageContext) -> None:
    """Raise `InvalidArgument` for more --blocks_to_swap than the denoiser has.

    On a CPU, print that the option has no effect.
    """
    if not options.blocks_to_swap:
        return
    argument, known = f"--blocks_to_swap {options.blocks_to_swap}", len(blocks(model.empty_denoiser()))
    if options.blocks_to_swap > known:
        problem = f"the {model.family.denoiser} of {model.family.name} has {known} blocks"
        raise InvalidArgument(argument, problem, f"give {known} or fewer")
    if context.accelerator.device.type == "cpu":
        context.print_once(f"{argument}: saves no memory, because there is no GPU")


def check_pipeline(
    data: DataOptions, validation: ValidationOptions, pipeline: DiffusionPipeline, family: Family
) -> None:
    """Raise `InvalidArgument` for image sizes or a number of denoising steps that the pipeline does not support."""
    known, multiple = pipeline.scheduler.config.num_train_timesteps, family.pixel_multiple(pipeline)
    if validation.num_inference_steps > known:
        argument = f"--num_inference_steps {validation.num_inference_steps}"
        raise InvalidArgument(argument, f"the model has {known} timesteps", "give fewer")
    check_prompts(prompts_of(validation), "--validation_prompt", pipeline, family)
    for size in named_buckets(data.aspect_ratio_buckets or ""):
        if any(side % multiple or not side for side in (size.height, size.width)):
            argument = f"--aspect_ratio_buckets {size.height},{size.width}"
            raise InvalidArgument(argument, f"height and width must be multiples of {multiple}", "give such sides")
    sides = [("resolution", pixels) for pixels in data.resolution]
    sides += [(name, getattr(validation, name) or 0) for name in ("validation_height", "validation_width")]
    for name, pixels in sides:
        if pixels % multiple:
            argument, problem = f"--{name} {pixels}", f"height and width must be multiples of {multiple}"
            raise InvalidArgument(argument, problem, f"give {max(1, pixels // multiple) * multiple}")


def check_prompts(prompts: Sequence[Prompt], flag: str, pipeline: DiffusionPipeline, family: Family) -> None:
    """Raise `InvalidArgument` for options of a prompt that the pipeline does not support; `flag` names the prompts."""
    known, multiple = pipeline.scheduler.config.num_train_timesteps, family.pixel_multiple(pipeline)
    told = family.takes_guidance or bool(pipeline.config.get("is_distilled"))
    for prompt in prompts:
        reason = f"{family.name} takes the guidance scale as an input" if told else ""
        check_prompt(prompt, f"{flag} {prompt.prompt!r}", known, multiple, reason)


def check_prompt(prompt: Prompt, where: str, timesteps: int, multiple: int, told: str) -> None:
    """Raise `InvalidArgument` for options of a prompt that the pipeline does not support.

    `told`: the reason why the pipeline does not support negative prompts; empty if it does.
    """
    if (prompt.num_inference_steps or 0) > timesteps:
        problem = f"{prompt.num_inference_steps} steps, and the model has {timesteps} timesteps"
        raise InvalidArgument(where, problem, "give fewer")
    for side in (prompt.width or multiple, prompt.height or multiple):
        if side % multiple:
            problem = f"{side} pixels; height and width must be multiples of {multiple}"
            raise InvalidArgument(where, problem, f"give {max(1, side // multiple) * multiple}")
    if told and (prompt.negative_prompt or prompt.cfg_scale not in (None, 1)):
        what = "a negative prompt (--n)" if prompt.negative_prompt else "guidance by one (--l, cfg_scale)"
        raise InvalidArgument(where, f"{what}, but {told}", "leave it out, and give --g or guidance_scale")


def with_rank(options: Options, model: Model, accelerator: Accelerator) -> Options:
    """Return the options with a rank; the default rank is at most the width of the narrowest target layer."""
    if options.adapter.rank is not None:
        return options
    if isinstance(targets := targets_of(options.adapter.target_modules), str):
        matches(targets, "")
    wanted, denoiser = options.replace(rank=DEFAULT_RANK, lora_alpha=1), model.empty_denoiser()
    found = [
        narrowest_layer(denoiser, config_of(method, wanted.adapter, total_steps=1000, model=denoiser))
        for method in options.adapter.method
    ]
    name, least = min(found, key=lambda layer: layer[1])
    rank = int(min(DEFAULT_RANK, least))
    if rank < DEFAULT_RANK:
        accelerator.print(f"--rank {rank} instead of the default {DEFAULT_RANK}, because {name} is only {rank} wide")
    return options.replace(rank=rank, lora_alpha=options.adapter.lora_alpha or 2 * rank)


def check_methods(adapter: MethodOptions, training: TrainingOptions, context: ImageContext) -> None:
    """Add every method's adapter to a denoiser without weights, to validate targets, ranks and shortcuts.

    An experiment calls this for each combination of rank, shortcut and number of blocks. Raises `InvalidArgument` for
    the first method that fails.
    """
    model = context.model
    for method in adapter.method:
        denoiser = model.empty_denoiser()
        if method == adapter.method[0]:
            check_targets(denoiser, adapter, context.print_once)
        config = config_of(method, adapter, total_steps=1000, start=context.start, model=denoiser)
        try:
            check_rank(denoiser, config)
        except ValueError as error:
            raise InvalidArgument(f"--rank {adapter.rank}", *first_line(error).split(": ", 1)) from None
        argument = f"--method {method}, --target_modules {' '.join(adapter.target_modules)}"
        with refused_as(argument, "change the option that the error names", (ValueError, RuntimeError)):
            try_method(denoiser, method, adapter, training, config)
        if rank_allocator(denoiser) and (unread := model.family.unused_weights(denoiser)):
            problem = f"the outputs of {' and '.join(unread)} in the last block are unused, so AdaLoRA cannot rank them"
            raise InvalidArgument(argument, problem, "give targets without them, or another method")
        print_links(denoiser, method, adapter.reslora_config, context.print_once)


def try_method(
    model: nn.Module,
    method: str,
    adapter: MethodOptions,
    training: TrainingOptions,
    config: PeftConfig,
    part: Part | None = None,
) -> None:
    """Add the method's adapter to a model without weights, and begin its calibration if the method has one.

    `part`: the name of the text encoder; None for the denoiser.
    """
    add_adapter(model, method, adapter, training, config, part)
    if METHODS[method].measured:
        with gauged(model, adapter.reslora_config):
            pass


def check_family(adapter: MethodOptions, training: TrainingOptions, model: Model) -> None:
    """Raise `InvalidArgument` for options that the model's family does not support or use.

    The checked options are --train_text_encoder, --new_tokens, --max_sequence_length and --guidance_scale_train.
    """
    family, longest, guidance = model.family, training.max_sequence_length, training.guidance_scale_train
    if adapter.train_text_encoder and not family.trainable:
        names = ", ".join(other.name for other in map(load_family, FAMILIES) if other.trainable)
        problem = f"the text encoder of {family.name} is not trained"
        raise InvalidArgument("--train_text_encoder", problem, f"leave it out, or give a model of {names}")
    if adapter.new_tokens and (not family.trainable or family.frozen_text_parts):
        problem = f"new tokens of {family.name} are not trained"
        raise InvalidArgument("--new_tokens", problem, "leave it out, or give Stable Diffusion 1 or 2, or SDXL")
    if longest is not None and "max_sequence_length" not in family.defaults:
        problem = f"{family.name} always reads as many tokens as its text encoder can"
        raise InvalidArgument(f"--max_sequence_length {longest}", problem, "leave it out")
    if longest is not None and family.most_tokens is not None and longest > family.most_tokens:
        problem = f"{family.name} reads at most {family.most_tokens} tokens"
        raise InvalidArgument(f"--max_sequence_length {longest}", problem, f"give {family.most_tokens} or fewer")
    default = Options.table()["guidance_scale_train"].default
    if guidance != default and not (family.takes_guidance and model.denoiser_config().get("guidance_embeds")):
        problem = f"the denoiser of this {family.name} does not take guidance as an input"
        raise InvalidArgument(f"--guidance_scale_train {guidance}", problem, f"leave it at {default}")


def check_reads_references(
    data: DataOptions, training: TrainingOptions, validation: ValidationOptions, model: Model
) -> None:
    """Raise `InvalidArgument` for an edit model without reference images, or reference images without an edit model.

    Also raise it if a file of --validation_image is not an image. If the text encoder reads reference images, raise it
    for options that need captions or flipped images that were not encoded before training.
    """
    family, argument = model.family, data.reference_flag
    if family.edits and not argument:
        problem = f"{family.name} edits reference images, and none are named"
        fix = "give --conditioning_data_dir FOLDER with files of the same names, or --conditioning_image_column NAME"
        raise InvalidArgument(data_flag(data), problem, fix)
    if not family.edits and (argument or validation.validation_image):
        argument = argument or f"--validation_image {' '.join(validation.validation_image)}"
        if family.editing:
            fix = "give --conditioning_data_dir or --conditioning_image_column, too, or leave it out"
            raise InvalidArgument(argument, f"{family.name} edits images only if the data are pairs of images", fix)
        names = ", ".join(other.name for other in map(load_family, FAMILIES) if other.edits or other.editing)
        raise InvalidArgument(argument, f"{family.name} edits no images", f"leave it out, or give a model of {names}")
    most = family.most_references
    if family.edits and most and data.references_per_image > most:
        raise InvalidArgument(argument, f"{family.name} reads one reference image per image", "give one")
    if family.reads_references:
        problem = f"the text encoder of {family.name} reads each caption once, with its unchanged reference images"
        unable = ("random_flip", "enable_wildcard", "shuffle_caption", "caption_tag_dropout_rate")
        given = [f"--{name}" for name in unable if getattr(data, name)]
        given += [] if data.cache_text_embeddings else ["--no-cache_text_embeddings"]
        given += ["--output_preservation_weight"] if training.preserved_prompts else []
        if given:
            raise InvalidArgument(given[0], problem, "leave it out")
    for file in validation.validation_image:
        if isinstance(found := image_size(file), str):
            raise InvalidArgument(f"--validation_image {file}", found, "give an image")
        with refused_as(f"--validation_image {file}", "give an image"):
            open_image(file)


def check_new_tokens(kinds: Sequence[ImageDataset], context: ImageContext) -> None:
    """Raise `InvalidArgument` for a new token that no caption contains; otherwise print where tokens are trained."""
    plain, tokens = build_caption_transform(context.options.data).plain, context.options.adapter.words_of_tokens
    captions = {plain(text) for images in kinds if not images.of_class for texts in images.captions for text in texts}
    for token in tokens:
        if not any(token in caption for caption in captions):
            fix = f"write it into captions, or add --caption_prefix '{token} '"
            raise InvalidArgument(f"--new_tokens {token}", "no caption contains it", fix)
    if tokens:
        where = " and ".join(part.name for part in context.live_encoders)
        context.print_once(f"--new_tokens {' '.join(tokens)}: trained in {where}; each step encodes its captions")


def check_encoders(pipeline: DiffusionPipeline, context: ImageContext) -> None:
    """Validate every method by adding its adapter to copies of the trained text encoders without weights.

    Prints the names of the trained and of the untrained text encoders.
    """
    options, family = context.options, context.model.family
    for part, method in itertools.product(context.encoders, options.adapter.method):
        encoder = meta_copy(getattr(pipeline, part.name))
        config = config_of(method, options.adapter, 1000, part.targets_in(encoder), model=encoder)
        fix = "change the option that the error names, or leave --train_text_encoder out"
        with refused_as(f"--method {method}, {part.name}", fix, (ValueError, RuntimeError)):
            try_method(encoder, method, options.adapter, options.training, config, part)
    if context.encoders:
        stays = [name for name in family.frozen_text_parts if name.startswith("text_encoder")]
        trains = " and ".join(part.name for part in context.encoders)
        left = f"; {', '.join(stays)} is not trained" if stays else ""
        context.print_once(f"--train_text_encoder: {trains} in addition to the {family.denoiser}{left}")


def check_learning_rates(pipeline: DiffusionPipeline, context: ImageContext) -> None:
    """Raise `InvalidArgument` if a pattern of --lr_pattern matches no adapted layer of any trained model."""
    options, (method, *_) = context.options, context.options.adapter.method
    if not options.optimizer.lr_pattern:
        return
    denoiser = context.model.empty_denoiser()
    config = config_of(method, options.adapter, total_steps=1000, start=context.start, model=denoiser)
    layers = [name for name, _ in targeted(denoiser, config)]
    for part in context.encoders:
        encoder = getattr(pipeline, part.name)
        config = config_of(method, options.adapter, 1000, part.targets_in(encoder), model=encoder)
        layers += [f"{part.name}.{name}" for name, _ in targeted(encoder, config)]
    factors_of_layers(options.optimizer, layers)


def check_targets(denoiser: nn.Module, options: MethodOptions, tell: Callable[[str], object]) -> None:
    """Raise `InvalidArgument` if no target matches, or if a target matches a module that cannot have an adapter.

    Prints the targets that do not match.
    """
    names = [name for name, _ in denoiser.named_modules()]
    if isinstance(targets := targets_of(options.target_modules), str):
        counts = {targets: sum(matches(targets, name) for name in names)}
    else:
        counts = {target: sum(f".{name}".endswith(f".{target}") for name in names) for target in targets}
    if not any(counts.values()):
        argument = f"--target_modules {' '.join(options.target_modules)}"
        fix = f"try {' '.join(model_targets(denoiser))}"
        raise InvalidArgument(argument, "no layer of the denoiser has a name that ends in one of these", fix)
    for target, count in counts.items():
        if not count:
            tell(f"--target_modules: 0 layers of the denoiser end in {target}")
    check_layers(denoiser, targets)
    if options.layers:
        layers = layers_of(denoiser, options.target_modules[0])
        size = f"{lora_parameters(layers, options.rank):,} parameters in a LoRA of rank {options.rank}"
        tell(f"--layers {options.layers}: {pluralize(len(layers), 'layer')}, {size}")


def matches(expression: str, name: str) -> bool:
    """Return whether a regular expression matches a complete name.

    Raises `InvalidArgument` for an invalid expression.
    """
    try:
        return re.fullmatch(expression, name) is not None
    except re.error as error:
        problem = f"not a regular expression ({first_line(error)})"
        raise InvalidArgument(
            f"--target_modules {expression}", problem, "give the ends of names, or correct it"
        ) from None


def model_targets(denoiser: nn.Module) -> list[str]:
    """Return the four most frequent last components of the names of the denoiser's linear layers."""
    layers = (name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear))
    ends = Counter(name.rpartition(".")[2] for name in layers)
    return [end for end, _ in ends.most_common() if not end.isdigit()][:4]
