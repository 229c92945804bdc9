"""From the command line to settled flags: configuration files, defaults, and what can be refused without a model."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ..common.assets import ASSETS
from ..common.checks import check_writable
from ..common.errors import InvalidArgument, refused_as, speaks
from ..common.methods import METHODS, SHORTCUT_FLAGS, check_steps, refuse_settings, refuse_unable, tell_unread
from ..common.patterns import FIELDS, entries
from ..experiment.arms import alpha_of
from ..merges import MERGES
from ..shortcuts import PLAIN, shortcut_class
from ..words import counted
from .arguments import (
    BUNDLED_DEFAULTS,
    DEFAULTS,
    NOISES,
    ONE_OR_SEVERAL,
    SEVERAL,
    Flags,
    build_parser,
    is_experiment,
    is_path,
    listed,
)
from .config_file import config_defaults
from .experiment.checks import STEERING, check_experiment, plain_variants
from .folder import cache_folder
from .model.families import FAMILIES
from .model.kinds import refuse_parts
from .optimizers import ADAMS, check_installed, named, options_of
from .prompts import clean, from_file

BUNDLED_MODEL, BUNDLED_IMAGES, BUNDLED_STEPS = ASSETS / "pipeline", ASSETS / "openmoji", 200
DEFAULT_SPLIT = 0.1  # of an experiment's images, to choose by and again to compare by
OF_SHORTCUTS = {*SHORTCUT_FLAGS, "merge_calibration_samples"}  # who gives one means ResLoRA
PRODIGY = named("prodigy").path
POLYNOMIAL_END = 1e-7  # diffusers' learning rate at the end of that schedule


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> Flags:
    """Flags with their defaults filled in, but for those that the model knows (`with_family`, `checks.with_rank`).

    Exits with status 2 and one line for what argparse refuses; raises `InvalidArgument` for what cannot work.
    """
    flags = settled(build_parser(description), argv)
    check_places(flags)
    alpha = alpha_of(flags.replace(lora_alpha=None), flags.rank)
    tell_unread(flags.method, vars(flags), vars(untouched()) | {"lora_alpha": alpha})
    tell_idle(flags)
    return flags


def settled(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> Flags:
    """The same for a parser of `build_parser`, whatever the folders are: they may not be there yet."""
    args, given = parser.parse_args(argv), given_flags(argv)
    if args.config:
        of_file = config_defaults(parser, args, given)
        parser.set_defaults(**of_file)
        args, given = parser.parse_args(argv), given | of_file.keys()
    if args.method is None and given & OF_SHORTCUTS and not takes_bundled(args):
        args.method = ["reslora"]
    elif args.method is None and args.init_lora and not given & OF_SHORTCUTS:
        args.method = ["lora"]  # of the bundled model's two, the one that can start from a LoRA
    flags = fill_defaults(args)
    for plain in plain_variants(flags):
        check_flags(plain)
    check_experiment(flags)
    return flags


def fill_defaults(args: argparse.Namespace) -> Flags:
    """The flags with DEFAULTS filled in: those of a bundled pipeline where none other is named."""
    values = dict(vars(args))
    values["local_rank"] = int(os.environ.get("LOCAL_RANK", args.local_rank))
    bundled = takes_bundled(args)
    values["pretrained_model_name_or_path"] = args.pretrained_model_name_or_path or str(BUNDLED_MODEL)
    if bundled and not args.dataset_name and not args.train_data_dir:
        values["train_data_dir"] = str(BUNDLED_IMAGES)
    if bundled and args.max_train_steps is None and args.num_train_epochs is None:
        values["max_train_steps"] = BUNDLED_STEPS
    values["num_train_epochs"] = args.num_train_epochs or 100
    values["optimizer"] = args.optimizer or ("adamw8bit" if args.use_8bit_adam else "adamw")
    own: dict[str, object] = dict(BUNDLED_DEFAULTS.get(Path(values["pretrained_model_name_or_path"]).name, {}))
    if args.validation_epochs:
        own["validation_steps"] = None
    values["validation_epochs"] = args.validation_epochs or 1
    if (rate := named(values["optimizer"]).learning_rate) is not None and args.learning_rate is None:
        values["learning_rate"] = rate
    for name, (with_bundled, with_named) in DEFAULTS.items():
        if values[name] is None:
            values[name] = own.get(name, with_bundled) if bundled else with_named
    values["resolution"] = list(dict.fromkeys(listed(values["resolution"]))) or None
    for name in (*ONE_OR_SEVERAL, *SEVERAL):
        if len(listed(values[name])) == 1:
            (values[name],) = listed(values[name])
    rank, splits = values["rank"], ("select_split", "test_split")
    values["lora_alpha"] = alpha_of(args, rank)
    if is_experiment(values):
        values |= {name: DEFAULT_SPLIT for name in splits if values[name] is None}
        values["validation_split"] = args.validation_split or 0.0
    if (found := from_file(values["validation_prompt"])) is not None:
        values["validation_prompt"], values["validation_prompt_options"] = found
    values["validation_prompt"] = [clean(prompt).strip() for prompt in values["validation_prompt"]]
    values["method"] = list(dict.fromkeys(values["method"]))
    if values["save_best"] or values["early_stopping_patience"]:
        values["validation_noises"] = values["validation_noises"] or NOISES
    if values["metric_model"] and Path(values["metric_model"]).exists():
        values["metric_model"] = str(Path(values["metric_model"]).resolve())
    return Flags(**values)


def takes_bundled(args: argparse.Namespace) -> bool:
    """Whether a bundled pipeline is trained: one that is named, or the one that is taken where none is."""
    return args.pretrained_model_name_or_path is None or is_bundled(args.pretrained_model_name_or_path)


def is_bundled(model: str) -> bool:
    """Whether a model is one of the pipelines in assets/."""
    return Path(model).resolve().parent == ASSETS


def with_family(flags: Flags, defaults: Mapping[str, object]) -> Flags:
    """The flags with what was still open filled in by the family's defaults."""
    return flags.replace(**{name: value for name, value in defaults.items() if getattr(flags, name) is None})


@functools.cache
def untouched() -> argparse.Namespace:
    """The parser's own defaults."""
    return build_parser().parse_args([])


def given_flags(argv: Sequence[str] | None) -> set[str]:
    """Names of the flags that are on the command line."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


# -- what can be refused at once ---------------------------------------------------------------------------------------


def check_places(flags: Flags) -> None:
    """Refuse paths that cannot work."""
    check_model_name(flags.pretrained_model_name_or_path)
    vae = flags.pretrained_vae_model_name_or_path
    if vae and (Path(vae).exists() or is_path(vae)) and not (Path(vae) / "config.json").is_file():
        fix = "give an autoencoder's folder in diffusers format, or its name on the hub"
        raise InvalidArgument(f"--pretrained_vae_model_name_or_path {vae}", "no folder with a config.json", fix)
    for folder in () if flags.dataset_name else listed(flags.train_data_dir):
        if not Path(folder).is_dir():
            raise InvalidArgument(f"--train_data_dir {folder}", "no such folder", "give one with images and captions")
    check_writable(Path(flags.output_dir), f"--output_dir {flags.output_dir}")
    if flags.cache_dir and not cache_folder(flags).is_dir():  # one that is may have all, whoever may write there
        check_writable(cache_folder(flags), f"--cache_dir {flags.cache_dir}")


def check_flags(flags: Flags) -> None:
    """Refuse combinations that cannot work."""
    check_encoding(flags)
    check_folders(flags)
    if (flags.class_data_dir is None) != (flags.class_prompt is None):
        missing = "--class_prompt" if flags.class_prompt is None else "--class_data_dir"
        raise InvalidArgument(missing, "missing", "give --class_data_dir and --class_prompt together, or neither")
    check_loss(flags)
    check_unread(flags)
    if flags.aspect_ratio_buckets and len(listed(flags.resolution)) > 1:
        sides = " ".join(map(str, flags.resolution))
        raise InvalidArgument(f"--resolution {sides}", "--aspect_ratio_buckets names all sizes", "give one side")
    check_text_encoder(flags)
    check_validation(flags)
    patterns = {name: getattr(flags, name) for name in FIELDS}
    refuse_settings(flags.method, flags.lora_dropout, patterns)
    for name, texts in patterns.items():
        entries(name, texts)
    check_packages(flags)
    if flags.use_8bit_adam and flags.optimizer != "adamw8bit":
        raise InvalidArgument("--use_8bit_adam", f"--optimizer {flags.optimizer} is given too", "leave one of them out")
    optimizer = "--use_8bit_adam" if flags.use_8bit_adam else f"--optimizer {flags.optimizer}"
    check_installed(flags.optimizer, flags.optimizer_args, optimizer)
    if (options := options_of(flags.optimizer_args)).keys() & {"lr"}:
        raise InvalidArgument(f"--optimizer_args lr={options['lr']}", "--learning_rate sets it", "leave it out")
    check_start(flags)
    check_schedule(flags)
    check_hub(flags)
    # The classes are asked last: to have one is to import torch.
    reads_samples = MERGES.get(flags.merge, MERGES["none"]).needs_moments
    if reads_samples and flags.merge_calibration_samples == 0 and flags.merge in merges_of(flags):
        fix = "give --merge_calibration_samples 64, or another merge"
        raise InvalidArgument(f"--merge {flags.merge}", "needs calibration samples", fix)
    for method in (METHODS[name] for name in flags.method):
        if method.measured and flags.merge_calibration_samples == 0:
            fix = "give --merge_calibration_samples 64, or leave it out"
            raise InvalidArgument(f"--method {method.name}", "needs calibration samples", fix)
    if flags.compile:
        check_compile(flags)
    check_steps(flags.method, flags.max_train_steps, f"--max_train_steps {flags.max_train_steps}")


def check_encoding(flags: Flags) -> None:
    """Refuse names that are no text: safetensors, tokenizers and TensorBoard take them nowhere."""
    for name, value in vars(flags).items():
        for text in listed(value):
            if isinstance(text, str) and clean(text) != text:
                raise InvalidArgument(f"--{name} {text}", "is not UTF-8", "rename it, or give another")


def check_text_encoder(flags: Flags) -> None:
    """Refuse a rate of text encoders that nothing reads or no optimizer takes, and methods of one model alone."""
    rate = flags.text_encoder_lr
    if rate and not flags.train_text_encoder:
        problem = "no text encoder is trained"
        raise InvalidArgument(f"--text_encoder_lr {rate:g}", problem, "add --train_text_encoder")
    if rate not in (None, flags.learning_rate) and named(flags.optimizer).path == PRODIGY:
        problem = f"--optimizer {flags.optimizer} takes one rate for all parts, and --learning_rate is another"
        raise InvalidArgument(f"--text_encoder_lr {rate:g}", problem, "leave it out")
    if flags.train_text_encoder:
        refuse_unable(flags.method, "parts")


def check_compile(flags: Flags) -> None:
    """Refuse to compile what would lose the shortcuts, or the memory that another flag is there to save."""
    if flags.gradient_checkpointing:
        if carries_activations(flags):
            problem = f"--compile with --gradient_checkpointing cannot keep --shortcut {flags.shortcut}"
            raise InvalidArgument("--compile", problem, "leave one of them out, or use --shortcut block")
    elif flags.blocks_to_swap or flags.base_precision != "no":
        saves = "--blocks_to_swap" if flags.blocks_to_swap else f"--base_precision {flags.base_precision}"
        problem = f"keeps whole weights for the backward, which {saves} is there to avoid"
        raise InvalidArgument("--compile", problem, "add --gradient_checkpointing, or leave one of them out")


def check_folders(flags: Flags) -> None:
    """Refuse a run without images, and as many repeats or weights as do not fit their folders."""
    folders, dataset = listed(flags.train_data_dir), flags.dataset_name
    if not dataset and not folders:
        fix = "name a folder of images with captions, or a dataset with --dataset_name"
        raise InvalidArgument("--train_data_dir", "missing", fix)
    places = [Path(folder).resolve() for folder in folders]
    twice = next((folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1), None)
    if twice:
        argument = f"--train_data_dir {' '.join(folders)}"
        raise InvalidArgument(argument, f"{twice} is given twice", "give it once, with --train_data_repeats")
    if dataset and len(folders) > 1:
        problem = f"reads one folder of it, --train_data_dir names {len(folders)}"
        raise InvalidArgument(f"--dataset_name {dataset}", problem, "give folders alone, or the dataset alone")
    if dataset and folders:
        check_part(dataset, folders[0])
    for name in ("train_data_repeats", "train_data_weight"):
        values = listed(getattr(flags, name))
        if len(values) not in (1, max(1, len(folders))):
            problem = f"{counted(len(values), 'value')} for {counted(max(1, len(folders)), 'folder')}"
            raise InvalidArgument(f"--{name} {' '.join(map(str, values))}", problem, "give one, or one for each")


def check_part(dataset: str, folder: str) -> None:
    """Refuse a folder of its own next to a dataset, of which --train_data_dir names a part."""
    part = (Path(dataset) / folder).resolve()  # an absolute folder stays as it is
    inside = part.is_dir() and part.is_relative_to(Path(dataset).resolve())
    if Path(folder).is_dir() and not inside:
        problem = "with --dataset_name it names a folder in that dataset, and this one is a folder of its own"
        raise InvalidArgument(f"--train_data_dir {folder}", problem, "give one of the two")


def merges_of(flags: Flags) -> Collection[str]:
    """The merges that the shortcut has; none for plain LoRA."""
    return () if flags.shortcut == PLAIN else shortcut_class(flags.shortcut).merges


def carries_activations(flags: Flags) -> bool:
    """Whether a method's blocks hand activations to each other."""
    wired = any(METHODS[name].shortcuts for name in flags.method) and flags.shortcut != PLAIN and flags.pre_num != 0
    return wired and shortcut_class(flags.shortcut).carries


def check_validation(flags: Flags) -> None:
    """Refuse options of prompts that are not one for each, and what steers by held-out images where none are."""
    options, prompts = flags.validation_prompt_options, flags.validation_prompt
    if options and len(options) != len(prompts):
        problem = f"{len(options)} for {counted(len(prompts), 'prompt')}"
        raise InvalidArgument("--validation_prompt_options", problem, "give one for each, '{}' where there are none")
    for name in STEERING:
        if not getattr(flags, name):
            continue
        if flags.select_split or flags.test_split:
            fix = "leave it out: experiments choose checkpoints over seeds, by eight timesteps of four noises each"
            raise InvalidArgument(f"--{name}", "this is an experiment", fix)
        if not flags.validation_split:
            raise InvalidArgument(f"--{name}", "no images are held out", "add --validation_split 0.1")


def check_start(flags: Flags) -> None:
    """Refuse to start from a LoRA what would not start from the base model plus that LoRA."""
    if flags.init_lora is None:
        return
    flag = f"--init_lora {flags.init_lora}"
    if not Path(flags.init_lora).exists():
        raise InvalidArgument(flag, "no such file or folder", "give a LoRA file, or a folder with one")
    for method in (METHODS[name] for name in flags.method):
        if not method.trains_lora:
            problem = f"--method {method.name} has no plain LoRA weights that could start from it"
            raise InvalidArgument(flag, problem, "give --method lora or lora_x2")
        if method.measured:
            problem = f"--method {method.name} is measured at a start from zero"
            raise InvalidArgument(flag, problem, "give --method lora or lora_x2")
        if method.shortcuts and flags.shortcut != PLAIN and flags.pre_num != 0:
            problem = (
                f"with --shortcut {flags.shortcut} its blocks would also enter their neighbours, and the first step "
                "would not start from the base model plus that LoRA"
            )
            raise InvalidArgument(flag, problem, "give --method lora, or --shortcut none")


def check_packages(flags: Flags) -> None:
    """Refuse a flag whose package is not installed."""
    if flags.enable_xformers_memory_efficient_attention and importlib.util.find_spec("xformers") is None:
        flag, fix = "--enable_xformers_memory_efficient_attention", "pip install xformers, or leave it out"
        raise InvalidArgument(flag, "xformers is not installed", fix)


def check_loss(flags: Flags) -> None:
    """Refuse settings of losses that are not trained on."""
    for name in ("huber_schedule", "huber_c", "huber_scale"):
        value, unread = getattr(flags, name), "--loss_type l2" if flags.loss_type == "l2" else ""
        if name == "huber_scale" and flags.huber_schedule == "snr":
            unread = unread or "--huber_schedule snr"
        if unread and value != getattr(untouched(), name):
            raise InvalidArgument(f"--{name} {value}", f"{unread} does not read it", "leave it out, or change that")


def check_unread(flags: Flags) -> None:
    """Refuse flags that nothing reads; with its default one may be given, as commands for other scripts have it."""
    measures = flags.select_split or (flags.validation_prompt and flags.num_validation_images)
    tags = flags.shuffle_caption or flags.caption_tag_dropout_rate
    for name, read, fix in (
        ("dataset_config_name", flags.dataset_name, "add --dataset_name, or leave it out"),
        ("keep_tokens", tags, "add --shuffle_caption or --caption_tag_dropout_rate"),
        ("aspect_ratio_buckets", flags.use_aspect_ratio_buckets, "add --use_aspect_ratio_buckets"),
        ("bucket_upscale", flags.use_aspect_ratio_buckets, "add --use_aspect_ratio_buckets"),
        ("bucket_upscale", not flags.aspect_ratio_buckets, "leave it out, --aspect_ratio_buckets scale images up"),
        ("masked_loss_normalised", flags.masked_loss, "add --masked_loss"),
        ("prior_loss_weight", flags.class_data_dir, "add --class_data_dir and --class_prompt"),
        ("num_class_images", flags.class_data_dir, "add --class_data_dir and --class_prompt"),
        ("metric_model", measures, "add --validation_prompt and --num_validation_images 1, or leave it out"),
    ):
        value = getattr(flags, name)
        if not read and value != getattr(untouched(), name):
            given = f"--{name}" if value is True else f"--{name} {value}"
            raise InvalidArgument(given, "nothing reads it", fix)


def tell_idle(flags: Flags) -> None:
    """Says which flags of other scripts' commands nothing reads beside the others; these are not refused."""
    if not speaks():
        return
    if flags.dataset_name and flags.train_data_dir:
        where = f"the folder of that name in --dataset_name {flags.dataset_name}"
        print(f"warning: --train_data_dir {flags.train_data_dir}: {where}", flush=True)
    if flags.validation_split > 0.5:
        print(f"warning: --validation_split {flags.validation_split:g} holds out more images than it trains on")
    warms, adam = flags.lr_scheduler not in ("constant", "piecewise_constant"), flags.optimizer in ADAMS
    of_adam = ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
    for name, read, beside in (
        ("lr_warmup_steps", warms or not flags.lr_warmup_steps, f"with --lr_scheduler {flags.lr_scheduler}"),
        *((flag, adam, f"with --optimizer {flags.optimizer}: --optimizer_args sets its own") for flag in of_adam),
        ("max_validation_images", flags.validation_split or flags.select_split, "without --validation_split"),
    ):
        value = getattr(flags, name)
        if not read and value != getattr(untouched(), name):
            print(f"--{name} {value}: nothing reads it {beside}", flush=True)


def check_schedule(flags: Flags) -> None:
    """Refuse learning rates that their schedule cannot take."""
    if flags.lr_scheduler == "polynomial" and flags.learning_rate <= POLYNOMIAL_END:
        problem = f"--lr_scheduler polynomial ends at {POLYNOMIAL_END:g}"
        raise InvalidArgument(
            f"--learning_rate {flags.learning_rate:g}", problem, "give a larger one, or another schedule"
        )
    rules, piecewise = flags.lr_step_rules, flags.lr_scheduler == "piecewise_constant"
    if rules and not piecewise:
        problem = f"--lr_scheduler {flags.lr_scheduler} does not read it"
        raise InvalidArgument(f"--lr_step_rules {rules}", problem, "add --lr_scheduler piecewise_constant")
    if piecewise and not is_step_rules(rules or ""):
        problem = "--lr_scheduler piecewise_constant needs factor:step pairs and a last factor"
        raise InvalidArgument(f"--lr_step_rules {rules or ''}".strip(), problem, "give some, as 1:100,0.1:200,0.01")


def is_step_rules(text: str) -> bool:
    """Whether diffusers can read the rules: `factor:step` pairs and a last factor."""
    *pairs, last = text.split(",")
    try:
        factors = [float(last), *(float(factor) for factor, _ in (pair.split(":") for pair in pairs))]
        steps = [int(pair.split(":")[1]) for pair in pairs]
    except ValueError:
        return False
    return all(0 <= factor < math.inf for factor in factors) and all(step > 0 for step in steps)


def check_hub(flags: Flags) -> None:
    """Refuse a token that would be published, and a name that no repository can have."""
    if flags.hub_token and flags.report_to not in ("tensorboard", "none"):
        problem = f"--report_to {flags.report_to} would publish it"
        raise InvalidArgument("--hub_token", problem, "log in with `hf auth login` instead")
    if flags.push_to_hub:
        from huggingface_hub.utils import validate_repo_id

        given = f"--hub_model_id {flags.hub_model_id}" if flags.hub_model_id else f"--output_dir {flags.output_dir}"
        with refused_as(given, "give --hub_model_id you/my-style"):
            validate_repo_id(repository_of(flags))


def repository_of(flags: Flags) -> str:
    """The name of the repository on the hub, with or without its owner's."""
    return flags.hub_model_id or Path(flags.output_dir).resolve().name


def check_model_name(name: str) -> None:
    """Refuse a path that is neither a pipeline of a known family nor a single safetensors file."""
    path, flag = Path(name), f"--pretrained_model_name_or_path {name}"
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InvalidArgument(flag, "not a .safetensors file", "give a folder in diffusers format, or such a file")
        refuse_parts(path, flag)
    elif path.is_dir():
        if not (path / "model_index.json").exists():
            refuse_parts(path, flag)
        check_pipeline_class(name, read_index(path, flag))
    elif is_path(name):
        raise InvalidArgument(flag, "no such folder", "give one in diffusers format or a name on the hub")


def read_index(folder: Path, flag: str) -> dict:
    """The content of a pipeline's model_index.json."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index.get("_class_name")
        return index
    except (OSError, ValueError, AttributeError, RecursionError):
        raise InvalidArgument(flag, "no readable model_index.json", "give a pipeline in diffusers format") from None


def check_pipeline_class(name: str, index: dict) -> None:
    """Refuse a pipeline of no known family."""
    found = index.get("_class_name")
    if not isinstance(found, str) or found not in FAMILIES:
        raise InvalidArgument(
            f"--pretrained_model_name_or_path {name}", f"a {found}", f"give one of {', '.join(FAMILIES)}"
        )
