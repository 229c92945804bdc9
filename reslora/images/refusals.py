"""Validation that needs no model: options that contradict each other, and invalid paths.

`huggingface_hub` is imported only for `--push_to_hub`, so that `--help` appears at once.
"""

import itertools
import re
from pathlib import Path

from ..checks import check_apart, check_writable, is_path, require_package
from ..errors import InvalidArgument, refused_as, speaks
from ..formatting import pluralize
from ..methods.patterns import LEARNING_RATES, entries
from ..methods.registry import check_steps, refuse_unable
from ..options.contradictions import (
    check_averages,
    check_compiled,
    check_initialization,
    check_method,
    check_schedule,
    check_texts,
    refuse_unable_to_start,
)
from ..options.images import (
    DataOptions,
    MethodOptions,
    ModelOptions,
    OptimizerOptions,
    Options,
    OutputOptions,
    TrainingOptions,
    ValidationOptions,
)
from ..options.optimizers import check_installed, named
from ..options.unused import refuse_unused
from ..options.values import as_typed, listed
from .cache_folder import cache_folder
from .model.kinds import read_index, refuse_others, refuse_parts, refuse_quantized

PRODIGY = named("prodigy").path


def check_options(options: Options) -> None:
    """Raise `InvalidArgument` for combinations of options that cannot work."""
    check_texts(options.flat())
    check_folders(options.data)
    refuse_unused(options)
    check_text_encoder(options.adapter, options.optimizer)
    check_new_tokens(options.adapter, options.validation)
    check_prompts(options.validation, options.data.references_per_image)
    check_averages(options, options.training.max_train_steps)
    check_method(options.adapter, "merge_calibration_samples")
    precision, blocks = options.model.base_precision, options.model.blocks_to_swap
    stored = f"--base_precision {precision}" if precision != "no" else ""
    check_initialization(options.adapter, stored, f"--blocks_to_swap {blocks}" if blocks else "")
    check_start(options.adapter)
    check_steps(
        options.adapter.method,
        options.training.max_train_steps,
        f"--max_train_steps {options.training.max_train_steps}",
    )
    check_optimizer(options.optimizer)
    check_schedule(options.optimizer, "--lr_scheduler")
    check_hub(options.output)
    if options.training.compile:
        check_compile(options.model, options.adapter, options.training)
    if options.model.enable_xformers_memory_efficient_attention:
        require_package("--enable_xformers_memory_efficient_attention", "xformers")


def check_folders(data: DataOptions) -> None:
    """Raise `InvalidArgument` for missing or repeated image directories, and options that contradict them."""
    folders, dataset = data.train_data_dir, data.dataset_name
    if not dataset and not folders:
        fix = "name a folder of images with captions, or a dataset with --dataset_name"
        raise InvalidArgument("--train_data_dir", "missing", fix)
    places = [Path(folder).resolve() for folder in folders]
    twice = next((folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1), None)
    if twice:
        argument = f"--train_data_dir {as_typed(folders)}"
        raise InvalidArgument(argument, f"{twice} is given twice", "give it once, with --train_data_repeats")
    if dataset and len(folders) > 1:
        problem = f"reads one folder of it, --train_data_dir names {len(folders)}"
        raise InvalidArgument(f"--dataset_name {dataset}", problem, "give only folders, or only the dataset")
    if dataset and folders:
        check_part(dataset, folders[0])
    for name in ("train_data_repeats", "train_data_weight"):
        values = getattr(data, name)
        if len(values) not in (1, max(1, len(folders))):
            problem = f"{pluralize(len(values), 'value')} for {pluralize(max(1, len(folders)), 'folder')}"
            raise InvalidArgument(f"--{name} {as_typed(values)}", problem, "give one, or one for each")
    if (data.class_data_dir is None) != (data.class_prompt is None):
        missing = "--class_prompt" if data.class_prompt is None else "--class_data_dir"
        raise InvalidArgument(missing, "missing", "give --class_data_dir and --class_prompt together, or neither")
    check_references(data)
    if data.aspect_ratio_buckets and len(data.resolution) > 1:
        argument = f"--resolution {as_typed(data.resolution)}"
        raise InvalidArgument(argument, "the buckets of --aspect_ratio_buckets determine all sizes", "give one side")


def check_references(data: DataOptions) -> None:
    """Raise `InvalidArgument` if the options for reference images do not fit the other data options.

    Only one option may name reference images. --conditioning_data_dir needs the same number of folders for each folder
    of --train_data_dir. Class images cannot have reference images.
    """
    partners, folders, argument = data.conditioning_data_dir, data.train_data_dir, data.reference_flag
    if partners and (data.conditioning_image_column or data.dataset_name):
        other = "--dataset_name" if data.dataset_name else "--conditioning_image_column"
        fix = "name a column with --conditioning_image_column" if data.dataset_name else "give one of the two"
        raise InvalidArgument(argument, f"cannot be used with {other}", fix)
    if len(partners) % len(folders or [""]):
        problem = f"{pluralize(len(partners), 'folder')} for {len(folders)} of --train_data_dir"
        raise InvalidArgument(argument, problem, "give one for each, or several for each")
    if argument and data.class_data_dir:
        raise InvalidArgument("--class_data_dir", "class images have no reference images", "leave it out")


def check_part(dataset: str, folder: str) -> None:
    """Raise `InvalidArgument` if --train_data_dir is a directory outside the data set of --dataset_name.

    Together with --dataset_name, --train_data_dir must name a directory inside that data set.
    """
    part = (Path(dataset) / folder).resolve()  # an absolute `folder` replaces `dataset`
    inside = part.is_dir() and part.is_relative_to(Path(dataset).resolve())
    if Path(folder).is_dir() and not inside:
        problem = "with --dataset_name, it must be a folder in that dataset, but this folder is outside"
        raise InvalidArgument(f"--train_data_dir {folder}", problem, "give one of the two")


def check_text_encoder(adapter: MethodOptions, optimizer: OptimizerOptions) -> None:
    """Raise `InvalidArgument` if the optimizer or a method does not support the options of text encoders."""
    rate = optimizer.text_encoder_lr
    if rate not in (None, optimizer.learning_rate) and named(optimizer.optimizer).path == PRODIGY:
        problem = f"--optimizer {optimizer.optimizer} has one learning rate for all parts, and --learning_rate differs"
        raise InvalidArgument(f"--text_encoder_lr {rate:g}", problem, "leave it out")
    if adapter.train_text_encoder:
        refuse_unable(adapter.method, "parts")


def check_new_tokens(adapter: MethodOptions, validation: ValidationOptions) -> None:
    """Raise `InvalidArgument` for new tokens that cannot be trained or saved, and for options that exclude new tokens.

    The name of a token's file consists of the token's letters, digits, underscores and hyphens.
    """
    given, stems = adapter.new_tokens, set[str]()
    for text in given:
        token, _, words = text.partition("=")
        stem = re.sub(r"[^\w-]", "", token).lower()
        problem = ""
        if not stem or any(map(str.isspace, token)):
            problem = "a token is one word with letters"
        elif stem in stems:
            problem = "another token has the same letters"
        elif any(other.partition("=")[0] in words for other in given):
            problem = "it starts from a new token"
        if problem:
            raise InvalidArgument(f"--new_tokens {text}", problem, "give each token like '<sks>=dog'")
        stems.add(stem)
    for name in ("train_text_encoder", "average_checkpoints"):
        if given and (getattr(adapter, name, None) or getattr(validation, name, None)):
            raise InvalidArgument(f"--{name}", "cannot be combined with --new_tokens", "leave one of them out")


def check_prompts(validation: ValidationOptions, references: int) -> None:
    """Raise `InvalidArgument` if --validation_prompt_options or --validation_image do not fit the number of prompts.

    `references`: number of reference images per image.
    """
    options, prompts = validation.validation_prompt_options, validation.validation_prompt
    if options and len(options) != len(prompts):
        problem = f"{len(options)} for {pluralize(len(prompts), 'prompt')}"
        raise InvalidArgument("--validation_prompt_options", problem, "give one for each, '{}' where there are none")
    images = validation.validation_image
    each = max(1, references)
    if len(images) not in {0, each, each * len(prompts)}:
        problem = f"{pluralize(len(images), 'image')} for {pluralize(len(prompts), 'prompt')}"
        fix = "give one, or one for each prompt" if each == 1 else f"give {each}, or {each} for each prompt"
        raise InvalidArgument(f"--validation_image {as_typed(images)}", problem, fix)


def check_start(adapter: MethodOptions) -> None:
    """Raise `InvalidArgument` unless each method can start from the base model plus the LoRA of --init_lora."""
    if adapter.init_lora is None:
        return
    flag = f"--init_lora {adapter.init_lora}"
    if not Path(adapter.init_lora).exists():
        raise InvalidArgument(flag, "no such file or folder", "give a LoRA file, or a folder with one")
    refuse_unable_to_start(adapter, flag)


def check_optimizer(options: OptimizerOptions) -> None:
    """Raise `InvalidArgument` for optimizers that are not installed, and for arguments that other options set."""
    if options.use_8bit_adam and options.optimizer != "adamw8bit":
        raise InvalidArgument(
            "--use_8bit_adam", f"--optimizer {options.optimizer} is given too", "leave one of them out"
        )
    flag = "--use_8bit_adam" if options.use_8bit_adam else f"--optimizer {options.optimizer}"
    check_installed(options.optimizer, options.optimizer_args, flag)
    entries(LEARNING_RATES, options.lr_pattern)
    if options.has_factors and named(options.optimizer).path == PRODIGY:
        patterns = f"--lr_pattern {as_typed(options.lr_pattern)}"
        argument = patterns if options.lr_pattern else f"--loraplus_lr_ratio {options.loraplus_lr_ratio:g}"
        problem = f"--optimizer {options.optimizer} estimates one learning rate for all layers"
        raise InvalidArgument(argument, problem, "leave it out, or give another optimizer")


def check_compile(model: ModelOptions, adapter: MethodOptions, training: TrainingOptions) -> None:
    """Raise `InvalidArgument` if --compile would drop the shortcuts or undo a memory saving."""
    check_compiled("--compile", adapter, training.gradient_checkpointing)
    if not training.gradient_checkpointing and (model.blocks_to_swap or model.base_precision != "no"):
        saves = "--blocks_to_swap" if model.blocks_to_swap else f"--base_precision {model.base_precision}"
        problem = f"stores the complete weights for the backward pass, which {saves} avoids"
        raise InvalidArgument("--compile", problem, "add --gradient_checkpointing, or leave one of them out")


def check_hub(options: OutputOptions) -> None:
    """Raise `InvalidArgument` for a token that a tracker would publish, and for an invalid repository name."""
    if options.hub_token and options.report_to not in ("tensorboard", "none"):
        problem = f"--report_to {options.report_to} would publish it"
        raise InvalidArgument("--hub_token", problem, "log in with `hf auth login` instead")
    if options.push_to_hub:
        from huggingface_hub.utils import validate_repo_id

        given = (
            f"--hub_model_id {options.hub_model_id}" if options.hub_model_id else f"--output_dir {options.output_dir}"
        )
        with refused_as(given, "give --hub_model_id you/my-style"):
            validate_repo_id(repository_of(options))


def repository_of(options: OutputOptions) -> str:
    """Return the name of the repository on the Hub, with or without its owner."""
    return options.hub_model_id or Path(options.output_dir).resolve().name


# -- paths -------------------------------------------------------------------------------------------------------------


def check_places(options: Options) -> None:
    """Raise `InvalidArgument` for invalid paths."""
    model, data = options.model, options.data
    check_model_name(model.pretrained_model_name_or_path)
    vae = model.pretrained_vae_model_name_or_path
    if vae and (Path(vae).exists() or is_path(vae)) and not (Path(vae) / "config.json").is_file():
        fix = "give an autoencoder's folder in diffusers format, or its name on the hub"
        raise InvalidArgument(f"--pretrained_vae_model_name_or_path {vae}", "no folder with a config.json", fix)
    if file := model.pretrained_transformer_file:
        refuse_others(Path(file), f"--pretrained_transformer_file {file}")
    if model.assistant_lora and not Path(model.assistant_lora).exists():
        fix = "give a LoRA file, or a folder with one"
        raise InvalidArgument(f"--assistant_lora {model.assistant_lora}", "no such file or folder", fix)
    for folder in () if data.dataset_name else data.train_data_dir:
        if not Path(folder).is_dir():
            raise InvalidArgument(f"--train_data_dir {folder}", "no such folder", "give one with images and captions")
    for folder in data.conditioning_data_dir:
        if not Path(folder).is_dir():
            raise InvalidArgument(
                f"--conditioning_data_dir {folder}", "no such folder", "give a folder of reference images"
            )
    read = [name for name, option in options.table().items() if option.path and option.resume == "content"]
    check_apart(options.output.output_dir, {name: listed(options[name]) for name in read if options[name]})
    check_writable(Path(options.output.output_dir), f"--output_dir {options.output.output_dir}")
    cache = cache_folder(model, options.output)
    if model.cache_dir and not cache.is_dir():  # an existing cache may be read-only, because it may be complete
        check_writable(cache, f"--cache_dir {model.cache_dir}")


def report_doubtful(options: Options) -> None:
    """Print warnings about values that are valid but probably unintended."""
    if not speaks():
        return
    data, split = options.data, options.validation.validation_split
    if data.dataset_name and data.train_data_dir:
        where = f"the folder of that name in --dataset_name {data.dataset_name}"
        print(f"warning: --train_data_dir {as_typed(data.train_data_dir)}: {where}", flush=True)
    for outer, inner in itertools.permutations(data.train_data_dir, 2):
        if Path(inner).resolve().is_relative_to(Path(outer).resolve()):
            print(
                f"warning: --train_data_dir {as_typed([outer, inner])}: the second folder is inside the first",
                flush=True,
            )
    if split > 0.5:
        print(f"warning: --validation_split {split:g} holds out more images than it trains on")


def check_model_name(name: str) -> None:
    """Raise `InvalidArgument` for a local path that is neither a pipeline of a known family nor a safetensors file."""
    path, flag = Path(name), f"--pretrained_model_name_or_path {name}"
    if path.is_file():
        refuse_quantized(path, flag)
        if path.suffix != ".safetensors":
            raise InvalidArgument(flag, "not a .safetensors file", "give a folder in diffusers format, or such a file")
        refuse_parts(path, flag)
    elif path.is_dir():
        if not (path / "model_index.json").exists():
            refuse_parts(path, flag)
        read_index(path, flag)
    elif is_path(name):
        raise InvalidArgument(flag, "no such folder", "give one in diffusers format or a name on the hub")
