"""The flags of train_sd.py: their names, types, defaults and help. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from .. import __version__
from ..common.checks import is_number, is_whole, number_in_words, whole_in_words
from ..common.flags import Flags as Flags
from ..common.flags import listed as listed
from ..common.methods import DEFAULT_PRE_NUM, IN_WORDS, METHODS
from ..common.parser import Parser
from ..common.patterns import HELP as PATTERNS
from ..config import HEADS, SHORTCUTS
from ..merges import AUTO
from ..merges import NAMES as MERGES
from . import foreign
from .optimizers import OPTIMIZERS
from .prompts import LONGEST_SIDE, options_text

SAMPLINGS = ("uniform", "logit_normal", "mode", "sigmoid", "shift", "flux_shift")
BASE_PRECISIONS = ("no", "fp8", "int8", "nf4")
HUBER_SCHEDULES = ("constant", "exponential", "snr")
WEIGHTINGS = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
# Several values of one of these make a run an experiment.
SEVERAL = ("learning_rate", "seed", "rank", "shortcut", "pre_num")
SWITCH = {"action": argparse.BooleanOptionalAction, "default": False}

# A flag left alone takes the first value with a bundled pipeline and the second with a model the user names;
# None is filled in later, by the model's family or from other flags.
DEFAULTS = {
    "method": (["lora", "reslora"], ["lora"]),  # no other ends lower, each at its own rate: RESULTS.md
    "resolution": (64, None),
    "learning_rate": (2.5e-4, 1e-4),
    "snr_gamma": (1.0, None),  # keeps more of the subjects: assets/README.md
    "checkpointing_steps": (100, 500),
    "validation_prompt": (["cat face", "tulip", "guitar", "red apple"], []),
    "num_validation_images": (1, 4),
    "validation_steps": (50, None),
    "validation_split": (0.1, 0.0),
    "num_inference_steps": (20, None),
    "guidance_scale": (4.0, None),
}
# Where a bundled pipeline differs from DEFAULTS.
BUNDLED_DEFAULTS = {"pipeline-flow": {"learning_rate": 1e-3, "snr_gamma": None, "guidance_scale": 3.0}}
NOISES = 4  # at each timestep at which losses of an image are compared
DEFAULT_RANK, HIGHEST_RANK, LARGEST_BATCH = 16, 65536, 65536
# What may be a folder or file of the user's.
PATHS = (
    "config", "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "init_lora", "metric_model",
    "train_data_dir", "dataset_name", "class_data_dir", "cache_dir", "output_dir", "logging_dir",
    "resume_from_checkpoint",
)  # fmt: skip
ONE_OR_SEVERAL = ("train_data_dir", "train_data_repeats", "train_data_weight", "resolution")
BY_FAMILY = {
    "rank": f"{DEFAULT_RANK}; the width of the narrowest adapted layer where that is less",
    "resolution": "Stable Diffusion 1 and 2, Flux.1, FLUX.2 klein, Qwen-Image, Krea 2 512; others 1024",
    "num_inference_steps": "Stable Diffusion 1 and 2, SDXL 30; Qwen-Image 50; others 28",
    "guidance_scale": "Stable Diffusion 1 and 2 7.5; SDXL, Z-Image 5; SD 3 7; Flux.1 3.5; FLUX.2 klein, Qwen-Image 4; "
    "Krea 2 4.5",
    "target_modules": "as in diffusers' script for the model, to_q, to_k, to_v, to_out.0 of U-Nets; but not "
    "Z-Image's refiners and Krea 2's text_fusion.projector, and FLUX.2 klein's add_*_proj and to_add_out as well",
    "weighting_scheme": "SD 3 logit_normal, others none",
    "max_sequence_length": "SD 3 77, others with T5 or Qwen 512",
}


class TrainingParser(Parser):
    """Take `~` for the home folder, and name the options of other trainers by what they are called here."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; `~` is the home folder where no shell has said so: in a file, and behind an equals sign."""
        flags, unknown = super().parse_known_args(args, namespace)
        for name, value in vars(flags).items():
            if name in PATHS and value is not None:
                paths = [os.path.expanduser(path) for path in listed(value)]  # noqa: PTH111 - or a name on the hub
                setattr(flags, name, paths if isinstance(value, list) else paths[0])
        return flags, unknown

    def refuse_unknown(self, words: list[str]) -> NoReturn:
        """Exit with one line that names the unknown options, and what to give instead."""
        if told := foreign.in_words(word.partition("=")[0] for word in words):
            self.error(told)
        super().refuse_unknown(words)


def whole(minimum: int, most: float = math.inf) -> Callable[[str], int]:
    """Type of a flag that takes a whole number of at least `minimum`, and at most `most`."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if is_whole(int(text), minimum, most):
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {whole_in_words(minimum, most)}")

    return parse


def buckets(text: str) -> str:
    """Type of a flag that takes heights and widths, as diffusers' scripts spell them: `512,512;448,576`."""
    found = re.fullmatch(r"\s*\d{1,5}\s*,\s*\d{1,5}\s*(;\s*\d{1,5}\s*,\s*\d{1,5}\s*)*;?\s*", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not height,width;height,width")
    return re.sub(r"\s", "", text).strip(";")


def number(minimum: float = -math.inf, below: float = math.inf, exclusive: bool = False) -> Callable[[str], float]:
    """Type of a flag that takes a finite number in [minimum, below), or above `minimum` when `exclusive`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = float(text)
            if is_number(value, minimum, below, exclusive):
                return int(value) if value.is_integer() and re.fullmatch(r"\d+", text) else value
        raise argparse.ArgumentTypeError(f"{text!r} is not {number_in_words(minimum, below, exclusive)}")

    return parse


def is_path(name: str) -> bool:
    """Return whether a model's name can only be a path: a repository on the hub has at most one slash."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def is_experiment(flags: Mapping[str, object]) -> bool:
    """Whether several values of a flag in SEVERAL are asked for, by the flags as a table."""
    return any(len(listed(flags.get(name))) > 1 for name in SEVERAL)


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """All flags; those in DEFAULTS stay None until `settings.parse_args` knows whose model is trained."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = TrainingParser(prog="train_sd.py", description=description, formatter_class=raw)
    parser.add_argument(
        "--config", metavar="FILE", help="flags from TOML or a run's config.json; the command line wins"
    )
    # Like --help, it is no setting of a run: who lists the flags leaves out what is called help.
    version = f"reslora-sd {__version__}"
    parser.add_argument("--version", action="version", version=version, dest="help", help="tell the version and exit")
    for title, add_flags in (
        ("model", add_model_flags),
        ("method", add_method_flags),
        ("images and captions", add_data_flags),
        ("training", add_training_flags),
        ("optimizer", add_optimizer_flags),
        ("samples and validation loss", add_validation_flags),
        ("experiments", add_experiment_flags),
        ("output, checkpoints and reports", add_output_flags),
    ):
        add_flags(parser.add_argument_group(title).add_argument)
    for action in parser._actions:
        action.help = f"{action.help}{_default_in_words(action)}"
    return parser


def _default_in_words(action: argparse.Action) -> str:
    if action.dest in DEFAULTS:
        bundled, named = DEFAULTS[action.dest]
        otherwise = BY_FAMILY.get(action.dest, in_words(named))
        others = [f", {name}: {own[action.dest]}" for name, own in BUNDLED_DEFAULTS.items() if action.dest in own]
        return f" (bundled pipeline: {in_words(bundled)}{''.join(others)}; otherwise: {otherwise})"
    if action.dest in BY_FAMILY:
        return f" (default: {BY_FAMILY[action.dest]})"
    if action.default not in (None, False, argparse.SUPPRESS):
        return f" (default: {in_words(action.default)})"
    return ""


def in_words(value: Any) -> str:
    """A flag's value as a person would write it."""
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "none" if value is None else "on" if value is True else str(value)  # 1 is equal to True


# fmt: off
def add_model_flags(add: Callable) -> None:
    """Which model, and in which precision."""
    add("--pretrained_model_name_or_path", metavar="MODEL",
        help="a model of any family in docs/models.md: diffusers folder or name on the hub; of Stable Diffusion 1, 2 "
             "and SDXL a .safetensors file, too; default: the bundled pipeline")
    add("--pretrained_vae_model_name_or_path", metavar="VAE",
        help="another autoencoder: diffusers folder or name on the hub")
    add("--revision", help="revision of the model on the hub")
    add("--variant", help="variant of the model's files, such as fp16")
    add("--cache_dir", metavar="FOLDER",
        help="where downloads and encoded images and captions are kept; default: the hub's own cache, and "
             "<output_dir>/cache")
    add("--prediction_type", choices=["epsilon", "v_prediction"],
        help="what the denoiser predicts; default: what the scheduler says")
    add("--mixed_precision", choices=["no", "fp16", "bf16"],
        help="precision of the frozen parts; the adapter stays fp32; default: what accelerate was started with, "
             "or bf16 for a bundled pipeline on a CPU that has instructions for it")
    add("--base_precision", choices=BASE_PRECISIONS, default="no",
        help="keep the weights of the linear layers in the denoiser's blocks in 8 or 4 bits, and compute in "
             "--mixed_precision: less memory, slower")
    add("--blocks_to_swap", type=whole(0), default=0,
        help="keep the weights of the linear layers in this many of the denoiser's blocks in the CPU's memory, and "
             "copy each to the GPU whenever it is needed: less memory, slower, and the same numbers")
    add("--allow_tf32", **SWITCH, help="allow TF32 matrix products on Ampere and later GPUs")
    add("--enable_xformers_memory_efficient_attention", **SWITCH, help="attention of xformers instead of PyTorch's")


def add_method_flags(add: Callable) -> None:
    """Which adapter, and how it is merged."""
    add("--method", nargs="+", choices=METHODS,
        help=f"one or several, trained one after the other on the same images and noise. {IN_WORDS}. With a flag of "
             "the shortcuts or their merge the default is reslora")
    add("--rank", type=whole(1, HIGHEST_RANK), nargs="+", help="rank of the update matrices")
    add("--lora_alpha", type=number(0, exclusive=True), help="scale times rank; default: twice the rank")
    for name, meaning in PATTERNS.items():
        add(f"--{name}", nargs="+", metavar="NAME=VALUE", help=f"{meaning}; for the denoiser alone")
    add("--init_lora", metavar="FILE",
        help="go on from this LoRA, of any tool, instead of from zero: its layers, ranks and alphas are trained")
    add("--lora_dropout", type=number(0, below=1), default=0.0,
        help="dropout on the adapter's input; of ranks for loha and lokr")
    add("--target_modules", nargs="+", metavar="NAME",
        help="layers of the denoiser that get an adapter, by the end of their name; or one regular expression of "
             "their whole names")
    add("--train_text_encoder", **SWITCH,
        help="train the CLIP text encoders, too: their attention gets the same adapter, with shortcuts between their "
             "own layers; Stable Diffusion, SDXL, SD 3, Flux.1. T5 stays as it is")
    add("--shortcut", nargs="+", choices=SHORTCUTS, default="input",
        help="ResLoRA and lora_matched: what a block gets from the blocks before it")
    add("--pre_num", nargs="+", type=whole(-1), default=DEFAULT_PRE_NUM,
        help="ResLoRA, lora_matched and ms_placebo: how many of the blocks before a block take part, -1 for all; with "
             "--shortcut input any number but 0 means one")
    add("--head", choices=HEADS, default="repeat",
        help="--shortcut input and is_placebo: what the first block of a chain adds to its input, the same input "
             "again or nothing")
    add("--merge", choices=MERGES, default=AUTO, help="ResLoRA: how the shortcuts become plain LoRA weights")
    add("--merge_calibration_samples", type=whole(0), default=64,
        help="images for ResLoRA's merge and for measuring controls; with 0, --merge input takes norms of the training")


def add_data_flags(add: Callable) -> None:
    """Where images and captions come from, and what becomes of them."""
    add("--dataset_name", help="dataset on the hub, or a folder")
    add("--dataset_config_name", help="configuration of that dataset")
    add("--train_data_dir", nargs="+", metavar="FOLDER",
        help="images with a metadata.jsonl or .csv, or with .txt or .caption files beside them; or Parquet, .tar "
             "(webdataset) or JSON files, or what save_to_disk wrote; or kohya's folders, named <repeats>_<caption>; "
             "default: the bundled images")
    add("--train_data_repeats", nargs="+", type=whole(1), default=1, metavar="N",
        help="how often an epoch meets each image: one number for all folders, or one for each; kohya's folders have "
             "theirs as well, which it multiplies")
    add("--train_data_weight", nargs="+", type=number(0, exclusive=True), default=1.0, metavar="WEIGHT",
        help="weight of each image's loss: one number for all folders, or one for each")
    add("--image_column", default="image", help="column with the image")
    add("--caption_column", default="text", help="column with the caption, or a list of captions to choose from")
    add("--caption_prefix", metavar="TEXT", help="trigger word, put before every caption except those of class images")
    add("--caption_suffix", metavar="TEXT", help="put behind every caption except those of class images")
    add("--caption_dropout", type=number(0, below=1), default=0.0,
        help="share of the training samples that get the empty caption; class images keep theirs")
    add("--enable_wildcard", **SWITCH,
        help="each training sample gets one choice of {red|blue}, and one of a caption's lines; {{ and }} are braces")
    add("--shuffle_caption", **SWITCH, help="put the tags of a caption, between commas, into another order each time")
    add("--caption_tag_dropout_rate", type=number(0, below=1), default=0.0,
        help="share of a caption's tags that each training sample is without")
    add("--keep_tokens", type=whole(0), default=0,
        help="how many tags, the prefix counted, are neither shuffled nor left out")
    add("--class_data_dir", metavar="FOLDER",
        help="folder of class images, which keep what the model knows: images of the kind of thing that is learnt; if "
             "it holds kohya's folders, the model draws none")
    add("--class_prompt", metavar="PROMPT",
        help="what class images show: the caption of those without one, and what the model draws if there are too few")
    add("--num_class_images", type=whole(0), default=100, help="class images; the model draws those that are missing")
    add("--prior_loss_weight", type=number(0), default=1.0, help="weight of the loss of class images")
    add("--max_train_samples", type=whole(1), help="train on that many images, drawn at random")
    add("--resolution", nargs="+", type=whole(8, LONGEST_SIDE), metavar="SIDE",
        help="side of the square that images are cropped and scaled to; with several, each image is trained at all of "
             "them, and samples and the validation loss take the first")
    add("--use_aspect_ratio_buckets", **SWITCH,
        help="train each image near its own shape, at about the area of a --resolution square, without scaling it up")
    add("--aspect_ratio_buckets", type=buckets, metavar="H,W;H,W",
        help="the buckets, as heights and widths, instead of a ladder around --resolution; images may be scaled up")
    add("--bucket_upscale", **SWITCH, help="scale small images up to a bucket of the ladder")
    add("--center_crop", **SWITCH,
        help="crop the centre instead of a random place; with --cache_latents, images of which a bucket keeps 93%% "
             "are always cropped so")
    add("--random_flip", **SWITCH, help="mirror images, half of the time")
    add("--image_interpolation_mode", default="lanczos", help="how images are scaled",
        choices=["nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"])
    add("--strict", **SWITCH, help="refuse images that cannot be read or have no caption, instead of leaving them out")
    add("--cache_latents", action=argparse.BooleanOptionalAction, default=True,
        help="encode every image once and keep its latents on disk, instead of encoding it in every step")
    add("--cache_text_embeddings", action=argparse.BooleanOptionalAction, default=True,
        help="encode every caption once and keep it on disk, then free the text encoder; it stays if captions have "
             "more than 1000 variants in a run, and more than four each")
    add("--dataloader_num_workers", type=whole(0), default=0, help="processes that read images")


def add_training_flags(add: Callable) -> None:
    """How long, how much at once, and on which loss."""
    add("--seed", type=whole(0), nargs="+", default=0, help="the same seed gives the same bytes")
    add("--train_batch_size", type=whole(1, LARGEST_BATCH), default=16, help="images per process and forward")
    add("--gradient_accumulation_steps", type=whole(1), default=1, help="forwards per step")
    add("--num_train_epochs", type=whole(1),
        help="passes over the images; each takes images / (batch x processes) forwards, rounded up for every bucket. "
             "A step takes --gradient_accumulation_steps of these; default: 100, with a bundled pipeline 200 steps")
    add("--max_train_steps", type=whole(1), help="steps; wins over --num_train_epochs (default of bundled models: 200)")
    add("--gradient_checkpointing", **SWITCH, help="less memory, slower")
    add("--compile", **SWITCH,
        help="compile the denoiser by torch.compile: minutes at the start, then faster steps; refused where its first "
             "gradients are not those of the same step without it")
    add("--noise_offset", type=number(0), default=0.0, help="scale of the noise added per channel while training")
    add("--min_timestep", type=whole(0), default=0,
        help="train from this timestep on; 0 is the image, and the last timestep noise. Low ones hold the details, "
             "which then stay much as they are. The validation loss is measured at all timesteps")
    add("--max_timestep", type=whole(1),
        help="train below this timestep; high ones hold the composition, which then stays much as it is (default: all)")
    add("--snr_gamma", type=number(0), help="min-SNR loss weights; 5.0 is usual, 0 weighs all timesteps alike")
    add("--loss_type", choices=["l2", "huber", "smooth_l1"], default="l2",
        help="squared error, or kohya's pseudo-Huber losses, which count large errors less; the validation loss is the "
             "squared error all the same")
    add("--huber_schedule", choices=HUBER_SCHEDULES, default="snr",
        help="huber, smooth_l1: how the threshold above which errors count less depends on the timestep. constant: it "
             "is --huber_c; exponential: it falls from 1 without noise to --huber_c in noise; snr: the same, by the "
             "signal-to-noise ratio")
    add("--huber_c", type=number(0, exclusive=True), default=0.1,
        help="huber, smooth_l1: the threshold above which errors count less, or what it falls to")
    add("--huber_scale", type=number(0, exclusive=True), default=1.0,
        help="huber, smooth_l1: multiplies that threshold; not with --huber_schedule snr")
    add("--masked_loss", **SWITCH,
        help="weigh the loss of each pixel by how white and opaque the image's mask is there. The mask is a file that "
             "the column mask of metadata.jsonl or .csv names, otherwise the image's alpha channel; images without a "
             "mask count whole. The validation loss is masked, too")
    add("--masked_loss_normalised", **SWITCH, help="mean of the loss over the part that counts, not the whole image")
    add("--timestep_sampling", choices=SAMPLINGS,
        help="flow matching: how timesteps are drawn. uniform, logit_normal and mode: as in diffusers' scripts, from "
             "the scheduler's table; sigmoid, shift, flux_shift: as in kohya's. Default: by --weighting_scheme")
    add("--weighting_scheme", choices=WEIGHTINGS,
        help="flow matching: how losses are weighted, as in diffusers' scripts; logit_normal and mode draw timesteps")
    add("--logit_mean", type=number(), default=0.0, help="flow matching, logit_normal: mean of the normal number")
    add("--logit_std", type=number(0, exclusive=True), default=1.0, help="flow matching, logit_normal: its deviation")
    add("--mode_scale", type=number(), default=1.29, help="flow matching, mode: how far from uniform")
    add("--discrete_flow_shift", type=number(0, exclusive=True),
        help="flow matching: shift of the timesteps towards noise; default: the scheduler's; 3 with shift")
    add("--guidance_scale_train", type=number(0), default=1.0,
        help="guidance that the denoiser is told while training: Flux.1 dev alone, for which diffusers' script has 3.5")
    add("--max_sequence_length", type=whole(1), help="tokens of a caption that T5 or Qwen reads")
    add("--local_rank", type=int, default=-1, help="set by launchers")


def add_optimizer_flags(add: Callable) -> None:
    """AdamW and its learning rate."""
    add("--learning_rate", type=number(0, exclusive=True), nargs="+",
        help="highest learning rate; with --optimizer prodigy the default is 1")
    add("--text_encoder_lr", type=number(0, exclusive=True),
        help="learning rate of the text encoders; default: --learning_rate. The schedule is the same")
    add("--scale_lr", **SWITCH, help="multiply learning rates by batch size, accumulation steps and processes")
    add("--lr_scheduler", default="constant", help="how the learning rate changes",
        choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
                 "piecewise_constant"])
    add("--lr_warmup_steps", type=whole(0),
        help="steps in which the learning rate rises (none with constant); default: 500, at most a tenth of the run")
    add("--lr_step_rules", metavar="RULES",
        help="of piecewise_constant: factors and the steps they end at, and the last factor, as 1:100,0.1:200,0.01")
    add("--optimizer", default=None, metavar="NAME",
        help=f"one of {', '.join(OPTIMIZERS)}, or the path of a class as package.Class (default: adamw); all but both "
             "AdamW have their authors' settings, which --optimizer_args changes")
    add("--optimizer_args", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of that class, as beta3=0.98")
    add("--use_8bit_adam", **SWITCH, help="8-bit AdamW of bitsandbytes, as --optimizer adamw8bit")
    add("--adam_beta1", type=number(0, below=1), default=0.9, help="decay of the mean of the gradient")
    add("--adam_beta2", type=number(0, below=1), default=0.999, help="decay of the mean of the squared gradient")
    add("--adam_weight_decay", type=number(0), default=1e-2, help="weight decay")
    add("--adam_epsilon", type=number(0, exclusive=True), default=1e-8, help="added to the denominator")
    add("--max_grad_norm", type=number(0), default=1.0, help="gradients are clipped to this norm; 0: they are not")


def add_validation_flags(add: Callable) -> None:
    """What is drawn and measured while training."""
    add("--validation_prompt", nargs="+", metavar="PROMPT",
        help="prompts drawn while training, with fixed seeds; or a .txt file of prompts as kohya's scripts read it (a "
             "line each, with --n --w --h --d --s --l --g), or a .json list of objects with a prompt and its options")
    add("--validation_prompt_options", nargs="+", type=options_text, default=[], metavar="JSON",
        help="options of each prompt, as such a file has them: negative_prompt, width, height, seed, "
             "num_inference_steps, guidance_scale, cfg_scale; {} for none")
    add("--num_validation_images", type=whole(0), help="samples per prompt; 0 draws none while training")
    add("--validation_height", type=whole(8), help="height of a sample in pixels; default: the first --resolution")
    add("--validation_width", type=whole(8), help="width of a sample in pixels; default: the first --resolution")
    add("--validation_steps", type=whole(1),
        help="steps between samples; if not given, --validation_epochs decides, in experiments ten times at most")
    add("--validation_epochs", type=whole(1),
        help="epochs between samples, unless --validation_steps is given; default: 1, but of a bundled pipeline 50 "
             "steps")
    add("--validation_split", type=number(0, below=1), help="share of the images held out for a validation loss")
    add("--max_validation_images", type=whole(1), default=64,
        help="how many of the held-out images measure the validation loss, at most: drawn by --seed, or by their "
             "content where --validation_noises are measured; the others are not trained on either")
    add("--validation_noises", type=whole(1), metavar="N",
        help="measure the validation loss at eight timesteps, with N noises each, seeded by the image's content; "
             "default: 4 with --save_best or --early_stopping_patience, else one timestep and noise in each quarter")
    add("--save_best", **SWITCH,
        help="keep the adapter with the lowest validation loss in <method>/best, and export that one in the end")
    add("--early_stopping_patience", type=whole(1), metavar="N",
        help="stop a method after N validations in a row without a lower loss than before")
    add("--metric_model", metavar="MODEL",
        help="DINOv2 or CLIP, a folder or a name on the hub: measure how near samples are to the held-out images and, "
             "with CLIP, to their prompts; experiments judge each chosen arm by this and more")
    add("--num_inference_steps", type=whole(1), help="denoising steps of a sample")
    add("--guidance_scale", type=number(0), help="classifier-free guidance of a sample")


def add_experiment_flags(add: Callable) -> None:
    """Several values of a flag in SEVERAL: what is tried, and which images judge it."""
    add("--select_split", type=number(0, below=1, exclusive=True),
        help="experiments: share of the images by which learning rates and checkpoints are chosen (default: 0.1)")
    add("--test_split", type=number(0, below=1, exclusive=True),
        help="experiments: share of the images by which methods are compared; if there are few, 0.3 (default: 0.1)")
    add("--extend_rates", **SWITCH,
        help="experiments: where the best learning rate is the lowest or highest, try the next one, up to three times")
    add("--experiment_minutes", type=number(0, exclusive=True),
        help="experiments: begin no arm that would not end within so many minutes; the same command goes on later")
    add("--arms_at_once", type=whole(1),
        help="experiments: how many arms are trained at once, each in a process of its own; with several GPUs, on one "
             "each (default: 1)")
    add("--merged_weights", **SWITCH,
        help="experiments: write the merged weights of every arm too, as a run with one rate and seed does")


def add_output_flags(add: Callable) -> None:
    """Where everything goes."""
    add("--output_dir", default="runs/sd-model-finetuned-lora", metavar="FOLDER", help="folder of the run")
    add("--logging_dir", default="logs", metavar="FOLDER", help="TensorBoard's folder inside --output_dir")
    add("--report_to", default="tensorboard", help="a tracker that accelerate knows, such as wandb; all, or none")
    add("--checkpointing_steps", type=whole(1), help="steps between checkpoints")
    add("--checkpointing_minutes", type=number(0, exclusive=True),
        help="save a checkpoint also when so many minutes have passed since the last one")
    add("--checkpoints_total_limit", type=whole(1), help="checkpoints kept per method; default: all")
    add("--resume_from_checkpoint", metavar="latest|FOLDER",
        help="latest: go on from the newest whole checkpoint; FOLDER: go back to that one; not in a finished run")
    add("--plan", action=argparse.BooleanOptionalAction,
        help="tell how much memory each phase of the run would hold, and end; status 2, and flags that would make it "
             "fit, where it does not. Without it, a run that may not fit tells this first and is refused; --no-plan "
             "tries it all the same")
    add("--push_to_hub", **SWITCH,
        help="upload LoRA files, samples, losses, figures and a model card when done; the card is the README.md in the "
             "run's folder, where there is one")
    add("--hub_token", help="token for the hub")
    add("--hub_model_id", help="repository on the hub; default: the folder's name")
# fmt: on
