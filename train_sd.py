"""Fine-tune Stable Diffusion with LoRA and ResLoRA, and compare the two picture by picture.

    accelerate launch train_sd.py
    accelerate launch train_sd.py --pretrained_model_name_or_path MODEL --train_data_dir PICTURES

The first form trains the bundled 64x64 pipeline on the bundled pictures, in a few minutes on two CPU cores; the second
any Stable Diffusion 1.x or 2.x. The flags of diffusers' `train_text_to_image_lora.py` are all here and mean the same.

Every sample (picture, crop, noise, timestep, dropout) is a function of the seed and of its position in the run, and of
nothing else. So all methods see the same data, a resumed run equals an uninterrupted one, and the number of
processes does not matter.

Heavy libraries are imported where they are used, so that `--help` and a refused flag answer at once.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"
BUNDLED_MODEL, BUNDLED_PICTURES = ASSETS / "pipeline", ASSETS / "openmoji"

LORA_METHODS = ("lora", "reslora", "lora_x2")
PLAIN_METHODS = (*LORA_METHODS, "adalora")  # what ends as plain LoRA, and so as a diffusers and a kohya file
METHODS = (*PLAIN_METHODS, "loha", "lokr")

# A flag left alone takes the first value with the bundled pipeline and the second with a model the user names.
BUNDLED_STEPS = 200
DEFAULTS = {
    "method": (["lora", "reslora"], ["reslora"]),
    "resolution": (64, 512),
    "learning_rate": (3e-4, 1e-4),
    "checkpointing_steps": (100, 500),
    "validation_prompt": (["cat face", "sailboat", "red apple", "penguin"], []),
    "num_validation_images": (1, 4),
    "validation_steps": (50, None),
    "validation_split": (0.1, 0.0),
    "num_inference_steps": (20, 30),
    "guidance_scale": (4.0, 7.5),
}

# What may differ between a run and its continuation: how long it trains, and what it shows and keeps.
FREE_ON_RESUME = {
    "config", "output_dir", "logging_dir", "cache_dir", "method", "max_train_steps", "num_train_epochs", "local_rank",
    "validation_prompt", "num_validation_images", "validation_steps", "validation_epochs", "num_inference_steps",
    "guidance_scale", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "report_to",
    "merge", "merge_calibration_samples", "push_to_hub", "hub_token", "hub_model_id", "dataloader_num_workers",
    "gradient_checkpointing", "compile", "train_batch_size", "gradient_accumulation_steps", "strict",
}  # fmt: skip

SWITCH = {"action": argparse.BooleanOptionalAction, "default": False}
RANDOM_CROPS = 4  # crops cached for a picture that isn't square: the centre and three more
VALIDATION_DRAWS = 4  # noises per held-out picture, one in each quarter of the timesteps
TOLERANCE = 2 / 255  # largest difference of any pixel between the merged model and an export read back
IMAGE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".tga", ".ppm",
    ".heic", ".heif",
}  # fmt: skip
LEFTOVER = re.compile(r"\..+\.\d+(\.old)?\.tmp")  # what `reslora.files.replacing` writes to before it renames
LEAST_ADALORA_STEPS = 3
POLYNOMIAL_END = 1e-7  # diffusers' learning rate at the end of that schedule


class InvalidArgument(ValueError):
    """What the user gave cannot work: one line naming the argument, the problem and the fix; exit status 2."""

    def __init__(self, argument: str, problem: str, fix: str):
        super().__init__(f"{argument}: {problem}; {fix}")


class RunFailed(RuntimeError):
    """The run itself went wrong (a loss that is not a number, an export that does not match); exit status 1."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM: the checkpoint is written, nothing else is."""


# -- flags -------------------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """argparse prints ninety flags of usage before its one line of error; only the line is wanted."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole(minimum: int):
    """Type of a flag that takes a whole number of at least `minimum`."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if int(text) >= minimum:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")

    return parse


def number(minimum: float, below: float = math.inf, exclusive: bool = False):
    """Type of a flag that takes a finite number in [minimum, below), or above `minimum` when `exclusive`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = float(text)
            if math.isfinite(value) and value < below and (value > minimum if exclusive else value >= minimum):
                return int(value) if value.is_integer() and re.fullmatch(r"\d+", text) else value
        bounds = f"{'above' if exclusive else 'of at least'} {minimum}" + (
            f" and below {below}" if below < math.inf else ""
        )
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number {bounds}")

    return parse


def build_parser() -> argparse.ArgumentParser:
    """All flags; those in DEFAULTS stay None until `parse_args` knows whose model is trained."""
    parser = OneLineParser(
        prog="train_sd.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", metavar="FILE", help="flags from TOML or a run's config.json; the command line wins"
    )
    for title, add_flags in (
        ("model", add_model_flags),
        ("method", add_method_flags),
        ("pictures and captions", add_data_flags),
        ("training", add_training_flags),
        ("optimizer", add_optimizer_flags),
        ("samples and validation loss", add_validation_flags),
        ("output, checkpoints and reports", add_output_flags),
    ):
        add_flags(parser.add_argument_group(title).add_argument)
    for action in parser._actions:
        if action.dest in DEFAULTS:
            bundled, named = map(in_words, DEFAULTS[action.dest])
            action.help += f" (bundled pipeline: {bundled}; otherwise: {named})"
        elif action.default not in (None, False, argparse.SUPPRESS):
            action.help += f" (default: {in_words(action.default)})"
    return parser


def in_words(value) -> str:
    return ", ".join(value) or "none" if isinstance(value, list) else {None: "none", True: "on"}.get(value, str(value))


# fmt: off
def add_model_flags(add) -> None:
    add("--pretrained_model_name_or_path", metavar="MODEL",
        help="Stable Diffusion 1.x or 2.x: diffusers folder or name on the hub; default: the bundled pipeline")
    add("--revision", help="revision of the model on the hub")
    add("--variant", help="variant of the model's files, such as fp16")
    add("--cache_dir", metavar="FOLDER", help="where downloaded models and data sets are kept")
    add("--prediction_type", choices=["epsilon", "v_prediction"],
        help="what the U-Net predicts; default: what the scheduler says")
    add("--mixed_precision", choices=["no", "fp16", "bf16"],
        help="precision of the frozen parts; the adapter stays fp32; default: what accelerate was started with")
    add("--allow_tf32", **SWITCH, help="allow TF32 matrix products on Ampere and later GPUs")
    add("--enable_xformers_memory_efficient_attention", **SWITCH,
        help="xformers' attention instead of PyTorch's")


def add_method_flags(add) -> None:
    add("--method", nargs="+", choices=METHODS,
        help="trained one after the other on the same samples; lora_x2 is LoRA with doubled alpha")
    add("--rank", type=whole(1), default=16, help="rank of the update matrices")
    add("--lora_alpha", type=number(0, exclusive=True), help="scale times rank; default: twice the rank")
    add("--lora_dropout", type=number(0, below=1), default=0.0,
        help="dropout on the adapter's input (of ranks for loha and lokr)")
    add("--target_modules", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"], metavar="NAME",
        help="layers of the U-Net that get an adapter, by the end of their name")
    add("--shortcut", choices=["none", "input", "block", "middle"], default="input",
        help="ResLoRA: what a block gets from the blocks before it")
    add("--pre_num", type=whole(-1), default=4,
        help="ResLoRA: how many blocks before it, -1 for all; with --shortcut input any number but 0 means one")
    add("--head", choices=["repeat", "none"], default="repeat",
        help="ResLoRA, --shortcut input: what the first block of a chain adds to its input, the same again or nothing")
    add("--merge", choices=["auto", "none", "input", "weights", "lstsq"], default="auto",
        help="ResLoRA: how the shortcuts become plain LoRA weights")
    add("--merge_calibration_samples", type=whole(0), default=64,
        help="ResLoRA: training samples that the merge may read")


def add_data_flags(add) -> None:
    add("--dataset_name", help="data set on the hub, or a folder")
    add("--dataset_config_name", help="configuration of that data set")
    add("--train_data_dir", metavar="FOLDER",
        help="pictures with a metadata.jsonl, or with .txt captions beside them; default: the bundled pictures")
    add("--image_column", default="image", help="column with the picture")
    add("--caption_column", default="text", help="column with the caption, or a list of captions to choose from")
    add("--max_train_samples", type=whole(1), help="train on that many pictures, drawn at random")
    add("--resolution", type=whole(8), help="side of the square that pictures are cropped and scaled to")
    add("--center_crop", **SWITCH, help="crop the centre instead of a random place")
    add("--random_flip", **SWITCH, help="mirror half of the samples")
    add("--image_interpolation_mode", default="lanczos", help="how pictures are scaled",
        choices=["nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"])
    add("--strict", **SWITCH,
        help="refuse pictures that cannot be read or have no caption, instead of leaving them out")
    add("--cache_latents", action=argparse.BooleanOptionalAction, default=True,
        help="encode every picture once, not in every step")
    add("--cache_text_embeddings", action=argparse.BooleanOptionalAction, default=True,
        help="encode every caption once, then free the text encoder")
    add("--dataloader_num_workers", type=whole(0), default=0, help="processes that read pictures")


def add_training_flags(add) -> None:
    add("--seed", type=whole(0), default=0, help="the same seed gives the same bytes")
    add("--train_batch_size", type=whole(1), default=16, help="samples per process and forward")
    add("--gradient_accumulation_steps", type=whole(1), default=1, help="forwards per step")
    add("--num_train_epochs", type=whole(1), help="passes over the pictures; default: 100")
    add("--max_train_steps", type=whole(1), help="steps; wins over --num_train_epochs")
    add("--gradient_checkpointing", **SWITCH, help="less memory, slower")
    add("--compile", **SWITCH, help="torch.compile the U-Net: minutes at the start, then faster steps")
    add("--noise_offset", type=number(0), default=0.0, help="scale of the noise added per channel")
    add("--snr_gamma", type=number(0, exclusive=True), help="min-SNR loss weights; 5.0 is usual")
    add("--local_rank", type=int, default=-1, help="set by launchers")


def add_optimizer_flags(add) -> None:
    add("--learning_rate", type=number(0, exclusive=True), help="highest learning rate")
    add("--scale_lr", **SWITCH, help="multiply it by batch size, accumulation steps and processes")
    add("--lr_scheduler", default="constant", help="how it changes",
        choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"])
    add("--lr_warmup_steps", type=whole(0), default=500, help="steps until it is reached (none with constant)")
    add("--use_8bit_adam", **SWITCH, help="bitsandbytes' 8-bit AdamW")
    add("--adam_beta1", type=number(0, below=1), default=0.9, help="decay of the mean of the gradient")
    add("--adam_beta2", type=number(0, below=1), default=0.999, help="decay of the mean of its square")
    add("--adam_weight_decay", type=number(0), default=1e-2, help="weight decay")
    add("--adam_epsilon", type=number(0, exclusive=True), default=1e-8, help="added to the denominator")
    add("--max_grad_norm", type=number(0, exclusive=True), default=1.0, help="gradients are clipped to this norm")


def add_validation_flags(add) -> None:
    add("--validation_prompt", nargs="+", metavar="PROMPT", help="prompts sampled while training, with fixed seeds")
    add("--num_validation_images", type=whole(1), help="pictures per prompt")
    add("--validation_steps", type=whole(1), help="steps between samples; default: by --validation_epochs")
    add("--validation_epochs", type=whole(1), default=1, help="epochs between samples")
    add("--validation_split", type=number(0, below=1), help="share of the pictures held out for a validation loss")
    add("--num_inference_steps", type=whole(1), help="denoising steps of a sample")
    add("--guidance_scale", type=number(0), help="classifier-free guidance of a sample")


def add_output_flags(add) -> None:
    add("--output_dir", default="runs/sd-model-finetuned-lora", metavar="FOLDER", help="folder of the run")
    add("--logging_dir", default="logs", metavar="FOLDER", help="TensorBoard's folder inside it")
    add("--report_to", default="tensorboard", help="report to this tracker",
        choices=["tensorboard", "wandb", "comet_ml", "all", "none"])
    add("--checkpointing_steps", type=whole(1), help="steps between checkpoints")
    add("--checkpoints_total_limit", type=whole(1), help="checkpoints kept per method; default: all")
    add("--resume_from_checkpoint", metavar="latest|FOLDER", help="go on from the newest usable one, or this one")
    add("--push_to_hub", **SWITCH, help="upload the folder when done")
    add("--hub_token", help="token for the hub")
    add("--hub_model_id", help="repository on the hub; default: the folder's name")
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags with every default filled in; whatever can be refused without loading a library is refused here."""
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    if args.config:
        args = parser.parse_args(config_flags(parser, Path(args.config), argv) + argv)
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    model = args.pretrained_model_name_or_path
    bundled = model is None or Path(model).resolve() == BUNDLED_MODEL
    args.pretrained_model_name_or_path = str(BUNDLED_MODEL) if bundled else model
    if bundled and not args.dataset_name and not args.train_data_dir:
        args.train_data_dir = str(BUNDLED_PICTURES)
    if bundled and args.max_train_steps is None and args.num_train_epochs is None:
        args.max_train_steps = BUNDLED_STEPS
    args.num_train_epochs = args.num_train_epochs or 100
    for name, (with_bundled, with_named) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, with_bundled if bundled else with_named)
    args.lora_alpha = args.lora_alpha or 2 * args.rank
    args.validation_prompt = [clean(prompt).strip() for prompt in args.validation_prompt or []]
    args.method = list(dict.fromkeys(args.method))
    check_args(args)
    return args


# A run's config.json holds both of these; whoever names one on the command line means the other no longer.
GIVES_WAY_TO = {
    "max_train_steps": "num_train_epochs", "num_train_epochs": "max_train_steps", "lora_alpha": "rank",
    "validation_steps": "validation_epochs", "train_data_dir": "dataset_name", "dataset_name": "train_data_dir",
}  # fmt: skip


def config_flags(parser: argparse.ArgumentParser, path: Path, argv: list[str]) -> list[str]:
    """A TOML file or a run's config.json as command-line words, so that they pass the same checks."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgument(
            f"--config {path}", f"cannot be read ({first_line(error)})", "give a TOML file or a run's config.json"
        ) from None
    if not isinstance(table, dict):
        raise InvalidArgument(f"--config {path}", "is not a table of flags", "give a TOML file or a run's config.json")
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    given, resolved = given_flags(argv), path.suffix == ".json"
    words = []
    for name, value in table.items():
        if name not in actions:
            raise InvalidArgument(f"--config {path}", f"{name} is not a flag of train_sd.py", "remove it")
        if GIVES_WAY_TO.get(name) in given and (resolved or name != "lora_alpha"):
            continue  # in TOML somebody wrote the alpha; a run's own may have come from its rank
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            if actions[name].nargs not in ("+", "*"):
                raise InvalidArgument(f"--config {path}", f"{name} = {value} is a list", "give one value")
            # Before a word that begins with a dash argparse sees the next flag; a blank makes it text.
            words += [f"--{name}", *(f" {v}" if str(v).startswith("-") else str(v) for v in value)] if value else []
        elif isinstance(value, dict):
            raise InvalidArgument(f"--config {path}", f"{name} is a table", "write all flags at the top level")
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def given_flags(argv: list[str]) -> set[str]:
    """Names of the flags that are on the command line."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def check_args(args: argparse.Namespace) -> None:
    """Refuse combinations and paths that cannot work."""
    check_local_model(args)
    if not args.dataset_name and not args.train_data_dir:
        raise InvalidArgument(
            "--train_data_dir", "missing", "name a folder of pictures with captions, or a data set with --dataset_name"
        )
    if args.train_data_dir and not args.dataset_name and not Path(args.train_data_dir).is_dir():
        raise InvalidArgument(
            f"--train_data_dir {args.train_data_dir}", "no such folder", "give one with pictures and captions"
        )
    for flag, used, package in (
        ("--use_8bit_adam", args.use_8bit_adam, "bitsandbytes"),
        ("--enable_xformers_memory_efficient_attention", args.enable_xformers_memory_efficient_attention, "xformers"),
        ("--report_to wandb", args.report_to == "wandb", "wandb"),
        ("--report_to comet_ml", args.report_to == "comet_ml", "comet_ml"),
    ):
        if used and importlib.util.find_spec(package) is None:
            raise InvalidArgument(flag, f"{package} is not installed", f"pip install {package}, or leave it out")
    if args.report_to in ("wandb", "comet_ml", "all") and args.hub_token:
        raise InvalidArgument(
            "--hub_token", f"--report_to {args.report_to} would publish it", "log in with `hf auth login` instead"
        )
    if args.merge == "lstsq" and args.shortcut in ("input", "middle") and args.merge_calibration_samples == 0:
        raise InvalidArgument(
            "--merge lstsq", "needs calibration samples", "give --merge_calibration_samples 64, or another merge"
        )
    check_adalora_steps(args)
    if args.lr_scheduler == "polynomial" and args.learning_rate <= POLYNOMIAL_END:
        raise InvalidArgument(
            f"--learning_rate {args.learning_rate:g}",
            f"--lr_scheduler polynomial ends at {POLYNOMIAL_END:g}",
            "give a larger one, or another schedule",
        )
    output = Path(args.output_dir)
    parent = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InvalidArgument(
            f"--output_dir {args.output_dir}", f"{parent} is not a folder that can be written", "choose another"
        )


def check_adalora_steps(args: argparse.Namespace) -> None:
    if "adalora" in args.method and args.max_train_steps and args.max_train_steps < LEAST_ADALORA_STEPS:
        raise InvalidArgument(
            f"--max_train_steps {args.max_train_steps}",
            f"AdaLoRA needs {LEAST_ADALORA_STEPS} to move ranks",
            "give more steps or epochs, or another method",
        )


def check_local_model(args: argparse.Namespace) -> None:
    """Refuse a folder that isn't a Stable Diffusion pipeline, and a resolution its VAE cannot take."""
    name = args.pretrained_model_name_or_path
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise InvalidArgument(
                f"--pretrained_model_name_or_path {name}",
                "no such folder",
                "give one in diffusers format or a name on the hub",
            )
        return
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        check_pipeline_class(name, index)
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        blocks = len(vae.get("block_out_channels", [0]))
    except InvalidArgument:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise InvalidArgument(
            f"--pretrained_model_name_or_path {name}",
            "no readable model_index.json and vae/config.json",
            "give a pipeline in diffusers format",
        ) from None
    check_resolution(args.resolution, 2 ** (blocks - 1))


def check_pipeline_class(name: str, index: dict) -> None:
    found = index.get("_class_name")
    if found != "StableDiffusionPipeline":
        hint = (
            "SDXL is supported by the reslora library only, for now"
            if "XL" in str(found)
            else "give a Stable Diffusion 1.x or 2.x text-to-image pipeline"
        )
        raise InvalidArgument(f"--pretrained_model_name_or_path {name}", f"a {found}", hint)


def check_resolution(resolution: int, factor: int) -> None:
    factor = math.lcm(factor, 8)  # the pipeline that draws the samples takes multiples of 8 whatever its VAE is
    if resolution % factor:
        raise InvalidArgument(
            f"--resolution {resolution}",
            f"the VAE and the pipeline take multiples of {factor}",
            f"give {max(1, resolution // factor) * factor}",
        )


# -- files and interruptions -------------------------------------------------------------------------------------------


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".:") if str(error).strip() else type(error).__name__


def renamed(path: Path):
    """Write a file or folder beside its place, and move it there only when it is complete."""
    from reslora.files import replacing  # with torch behind it: not for --help

    return replacing(path)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    from reslora import files

    files.write_json(path, value)


@contextlib.contextmanager
def locked(folder: Path):
    """Keep a second run out of the folder. The lock holds the process id, for the reader; the system frees it when the
    process ends, however that comes about."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise InvalidArgument(f"--output_dir {folder}", problem, "choose another folder") from None
    with lock:
        refuse_busy(folder, lock)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        for place in (folder, *(folder / method / part for method in METHODS for part in (".", "samples"))):
            for leftover in place.glob(".*.tmp"):
                if LEFTOVER.fullmatch(leftover.name):
                    remove(leftover)  # of a run that was killed while writing
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # a run that was refused before it wrote anything leaves nothing


def refuse_busy(folder: Path, lock) -> None:
    """Take the open file's lock, or name the process that has it."""
    if not take(lock):
        lock.seek(0)
        problem = f"process {lock.read().strip() or '?'} is training in it"
        raise InvalidArgument(f"--output_dir {folder}", problem, "wait for it, or choose another folder")


def take(lock) -> bool:
    """Whether this process, and not its children, now holds the open file's lock."""
    try:
        import fcntl
    except ImportError:  # Windows: the id alone must do
        lock.seek(0)
        owner = lock.read().strip()
        return not owner.isdigit() or int(owner) == os.getpid() or not process_exists(int(owner))
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return os.fstat(lock.fileno()).st_nlink > 0  # else the run that held it has just removed it


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


class StopRequest:
    """The first Ctrl-C or SIGTERM asks the training loop to save and leave; the second leaves at once."""

    def __init__(self):
        self.signal = None
        self.previous = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}

    def __call__(self, number, frame):
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def derive(*key) -> int:
    """A 63-bit seed that depends on the whole key and nothing else, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


# -- resuming and finished runs ----------------------------------------------------------------------------------------


def settings_of(args: argparse.Namespace) -> dict:
    """What a continuation must share with the run it continues."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME}
    for name in ("pretrained_model_name_or_path", "train_data_dir", "dataset_name"):
        if settings[name] and Path(settings[name]).is_dir():
            settings[name] = str(Path(settings[name]).resolve())
    samples = args.train_batch_size * args.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
    return settings | {"samples_per_step": samples}


def checkpoints_of(folder: Path) -> list[Path]:
    """Complete checkpoints of one method, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if (path / "trainer.json").is_file()), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def plan_resume(args: argparse.Namespace) -> dict[str, list[Path]]:
    """Checkpoints each method may start from, best first; empty lists where it starts afresh."""
    output, named = Path(args.output_dir), args.resume_from_checkpoint
    plan = {method: checkpoints_of(output / method) for method in args.method}
    for checkpoint in (checkpoint for found in plan.values() for checkpoint in found):
        check_settings(args, checkpoint)
    done = finished_methods(args)
    if named is None and any(found for method, found in plan.items() if method not in done):
        if (output / ".lock").is_file():
            with (output / ".lock").open("r+") as lock:
                refuse_busy(output, lock)
        raise InvalidArgument(
            f"--output_dir {output}",
            "holds an unfinished run",
            "go on with --resume_from_checkpoint latest, or choose another",
        )
    if named not in (None, "latest"):
        method = next((method for method in args.method if method not in done), args.method[0])
        path = Path(named) if Path(named).is_dir() or os.sep in named else output / method / named
        if not (path / "trainer.json").is_file():
            raise InvalidArgument(f"--resume_from_checkpoint {named}", "no complete checkpoint there", "use latest")
        method = read_trainer_json(path).get("method")
        if method is None:
            raise InvalidArgument(f"--resume_from_checkpoint {named}", "damaged (trainer.json)", "use latest")
        if method not in args.method:
            raise InvalidArgument(f"--resume_from_checkpoint {named}", f"it belongs to --method {method}", "add that")
        check_settings(args, path)
        plan[method] = [path]
    return plan


def check_settings(args: argparse.Namespace, checkpoint: Path) -> None:
    """Refuse to go on with another rank, shortcut, base, data set ... than the checkpoint's."""
    there, here = read_trainer_json(checkpoint).get("settings"), json.loads(json.dumps(settings_of(args)))
    if not isinstance(there, dict):
        return  # damaged
    for name, value in here.items():
        if name in there and there[name] != value:
            flag = f"--{name}" if name != "samples_per_step" else "batch size x accumulation x processes ="
            raise InvalidArgument(
                f"{flag} {value}",
                f"{checkpoint} was trained with {there[name]}",
                "use that, or choose another --output_dir",
            )


def read_trainer_json(checkpoint: Path) -> dict:
    return read_record(checkpoint / "trainer.json")


def read_record(path: Path) -> dict:
    """The JSON object of a file; empty where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}


def finished_methods(args: argparse.Namespace) -> list[str]:
    """Methods whose exports were written and compared, for as many steps or epochs as are asked for now."""
    done = []
    for method in args.method:
        record = read_record(Path(args.output_dir) / method / "exports.json")
        step, steps = record.get("step"), args.max_train_steps
        if isinstance(step, int) and steps and step > steps:
            raise InvalidArgument(
                f"--max_train_steps {steps}",
                f"{Path(args.output_dir) / method} was trained for {step} already",
                "give at least as many, or choose another --output_dir",
            )
        same_epochs = record.get("by_epochs") and record.get("num_train_epochs") == args.num_train_epochs
        done += [method] if (step == steps if steps else same_epochs) else []
    return done


# -- pictures and captions ---------------------------------------------------------------------------------------------


@dataclass
class Pictures:
    """The data set: where each picture is (a path or its bytes), its captions, and what was encoded of it."""

    sources: list
    captions: list[list[str]]
    variants: int = 1  # crops and mirror images encoded of each; number 0 is the upright centre
    moments: object = None  # VAE mean and std, [pictures, variants, 2, channels, height, width]
    square: bool = True  # all of them
    left_out: list[str] = field(default_factory=list)

    def keep(self, indices: list[int]) -> None:
        lazy = isinstance(self.sources, DatasetImages)
        self.sources = self.sources.select(indices) if lazy else [self.sources[i] for i in indices]
        self.captions = [self.captions[i] for i in indices]
        self.moments = self.moments[indices] if self.moments is not None else None

    def sizes(self) -> list[int]:
        """Bytes of each picture in a folder of files: one that was replaced is hardly as long as the one before."""
        return [] if isinstance(self.sources, DatasetImages) else [Path(path).stat().st_size for path in self.sources]

    def leave_out(self, strict: bool, index: int, reason: str) -> None:
        source = self.sources[index]
        name = source if isinstance(source, (str, Path)) else f"picture {index}"
        if strict:
            raise InvalidArgument(f"--strict {name}", reason, "repair or remove it, or leave --strict out")
        self.left_out.append(f"{name}: {reason}")


def find_pictures(args: argparse.Namespace) -> Pictures:
    """Pictures and captions of the folder or data set; nothing but file headers is read yet."""
    folder = Path(args.dataset_name if args.dataset_name else args.train_data_dir)
    pictures = read_folder(folder, args) if folder.is_dir() else None
    pictures = pictures or read_dataset(args)
    keep = []
    for index, captions in enumerate(pictures.captions):
        # A missing caption is a mistake; an empty one is a choice (the picture then trains the empty prompt).
        if isinstance(captions, str):  # what is wrong with the caption
            pictures.leave_out(args.strict, index, captions)
        elif not captions or any(not isinstance(caption, str) for caption in captions):
            pictures.leave_out(args.strict, index, "no caption")
        elif isinstance(size := picture_size(pictures.sources[index]), str):
            pictures.leave_out(args.strict, index, size)
        else:
            keep.append(index)
            pictures.square &= size[0] == size[1]
    pictures.keep(keep)
    pictures.captions = [[clean(caption) for caption in captions] for captions in pictures.captions]
    if not pictures.sources:
        example = f" (for example {pictures.left_out[0]})" if pictures.left_out else ""
        raise InvalidArgument(
            data_flag(args),
            f"no picture with a caption in it{example}",
            "add a metadata.jsonl, or .txt captions beside the pictures",
        )
    if args.max_train_samples and args.max_train_samples < len(pictures.sources):
        pictures.keep(shuffled(len(pictures.sources), args.seed, "max_train_samples")[: args.max_train_samples])
    return pictures


def clean(text: str) -> str:
    """Text that a tokenizer takes: no NUL, and no half of a character."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def data_flag(args: argparse.Namespace) -> str:
    return f"--dataset_name {args.dataset_name}" if args.dataset_name else f"--train_data_dir {args.train_data_dir}"


def read_folder(folder: Path, args: argparse.Namespace) -> Pictures | None:
    """A folder with metadata.jsonl, or with a .txt caption beside each picture; None for what `datasets` reads."""
    if (folder / "metadata.jsonl").is_file():
        return read_metadata(folder, args)
    output, files, everything = Path(args.output_dir).absolute(), [], sorted(folder.rglob("*"))
    if any(path.name in ("metadata.csv", "metadata.jsonl", "metadata.parquet") for path in everything):
        return None
    for path in everything:
        own = output != folder.absolute() and path.absolute().is_relative_to(output)  # samples of this very run
        files += [path] if path.suffix.lower() in IMAGE_SUFFIXES and not own else []
    if not any(path.with_suffix(".txt").is_file() for path in files):
        if any(path.suffix == ".parquet" for path in everything) or args.dataset_name:
            return None
        what = (
            "no pictures" if not files else f"{len(files)} pictures without captions (class folders are not captions)"
        )
        raise InvalidArgument(
            data_flag(args),
            what,
            f"add a metadata.jsonl (file_name, {args.caption_column}), or .txt captions beside the pictures",
        )
    captions = []
    for path in files:
        text = path.with_suffix(".txt")
        captions.append(read_caption(text) if text.is_file() else [])
    return Pictures(files, captions)


def read_caption(path: Path) -> list[str] | str:
    """The caption of a .txt file, or what is wrong with it; Windows' editors write UTF-16 and byte order marks."""
    content = path.read_bytes()
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return [content.decode("utf-16" if marked else "utf-8-sig").strip()]
    except UnicodeDecodeError:
        return "its caption is not UTF-8"


def read_metadata(folder: Path, args: argparse.Namespace) -> Pictures:
    """Rows of metadata.jsonl: file_name, and a caption or a list of captions."""
    sources, captions = [], []
    try:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        where = f"{data_flag(args)}, metadata.jsonl byte {error.start}"
        raise InvalidArgument(where, "not UTF-8", "save the file as UTF-8") from None
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{data_flag(args)}, metadata.jsonl line {line_number}"
        try:
            row = json.loads(line)
            path = folder / row["file_name"]
            inside = path.resolve().is_relative_to(folder.resolve())
        except (ValueError, KeyError, TypeError, RecursionError, OSError, RuntimeError):
            raise InvalidArgument(where, "not an object with the file_name of a picture", "correct it") from None
        if args.caption_column not in row:
            columns = ", ".join(sorted(row))
            raise InvalidArgument(
                f"--caption_column {args.caption_column}", f"{where} has the columns {columns}", "name one of these"
            )
        if not inside:
            raise InvalidArgument(where, f"names {row['file_name']}, outside the folder", "move the picture into it")
        caption = row[args.caption_column]
        sources.append(path)
        captions.append(caption if isinstance(caption, list) else [caption])
    return Pictures(sources, captions)


def read_dataset(args: argparse.Namespace) -> Pictures:
    """A data set of the hub, or a folder in one of the other layouts the datasets library knows."""
    from datasets import Image, disable_progress_bars, load_dataset

    disable_progress_bars()
    try:
        if args.dataset_name:
            splits = load_dataset(
                args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir, data_dir=args.train_data_dir
            )
        else:
            splits = load_dataset("imagefolder", data_dir=args.train_data_dir, cache_dir=args.cache_dir)
    except Exception as error:  # whatever a hub, a network or a parser can raise
        raise InvalidArgument(
            data_flag(args), f"cannot be loaded ({first_line(error)})", "check the name, the connection and the layout"
        ) from None
    rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    for flag, column in (("--image_column", args.image_column), ("--caption_column", args.caption_column)):
        if column not in rows.column_names:
            raise InvalidArgument(
                f"{flag} {column}", f"the columns are {', '.join(rows.column_names)}", "name one of these"
            )
    try:
        rows = rows.cast_column(args.image_column, Image(decode=False))  # decoded by open_picture, which does it right
    except Exception as error:  # whatever arrow raises
        raise InvalidArgument(
            f"--image_column {args.image_column}", f"holds no pictures ({first_line(error)})", "name another column"
        ) from None
    captions = [caption if isinstance(caption, list) else [caption] for caption in rows[args.caption_column]]
    if captions and not any(isinstance(caption, str) for options in captions for caption in options):
        raise InvalidArgument(f"--caption_column {args.caption_column}", "holds no text", "name another column")
    return Pictures(DatasetImages(rows, args.image_column), captions)


class DatasetImages:
    """Encoded pictures of a data set, read when they are asked for."""

    def __init__(self, rows, column: str):
        self.rows, self.column = rows, column

    def __len__(self):
        return len(self.rows)

    def select(self, indices: list[int]) -> DatasetImages:
        return DatasetImages(self.rows.select(indices), self.column)

    def __getitem__(self, index: int):
        image = self.rows[index][self.column]
        return image["bytes"] or image["path"] if image else b""


def shuffled(length: int, *key) -> list[int]:
    import torch

    return torch.randperm(length, generator=torch.Generator().manual_seed(derive(*key))).tolist()


def open_source(source):
    """PIL's view of a path, or of a file's bytes."""
    import io

    import PIL.Image

    return PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def picture_size(source) -> tuple[int, int] | str:
    """Width and height from the header, or why there is none. PIL refuses what would decode to gigabytes."""
    try:
        with open_source(source) as image:
            return image.size
    except FileNotFoundError:
        return "no such file"
    except Exception as error:  # each format's reader has exceptions of its own
        return "too many pixels" if type(error).__name__ == "DecompressionBombError" else "not a picture"


def open_picture(source):
    """The picture as 8-bit RGB: upright, transparency on white, 16 bits scaled down, an animation's first frame."""
    import numpy as np
    import PIL.Image
    import PIL.ImageOps

    with open_source(source) as image:
        image.load()
        image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip these at 255
        values = np.asarray(image, dtype=np.float32)
        top = 65535 if image.mode != "F" or values.max() > 255 else 255 if values.max() > 1 else 1
        image = PIL.Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    if "transparency" in image.info or "A" in image.getbands() or "a" in image.getbands():
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    return image.convert("RGB")


def crop_and_scale(image, crop: tuple[float, float], flip: bool, args: argparse.Namespace):
    """A [3, resolution, resolution] tensor in [-1, 1]: the square at `crop` (0 to 1 across and down) of the picture.

    Cropping before scaling gives what scaling before cropping gives, and a 1 x 5000 picture stays small.
    """
    import numpy as np
    import PIL.Image
    import torch

    side = min(image.size)
    left, top = (fraction * (length - side) for fraction, length in zip(crop, image.size, strict=True))
    name = args.image_interpolation_mode.upper().replace("NEAREST_EXACT", "NEAREST")
    size = (args.resolution, args.resolution)
    image = image.resize(size, PIL.Image.Resampling[name], box=(left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels.flip(2) if flip else pixels


class VariantPixels:
    """Every variant of picture `index` as pixels, for encoding; a string says why it cannot be read."""

    def __init__(self, pictures: Pictures, args: argparse.Namespace):
        self.pictures, self.args = pictures, args
        self.crops = 1 if args.center_crop or pictures.square else RANDOM_CROPS
        pictures.variants = self.crops * (2 if args.random_flip else 1)

    def __len__(self):
        return len(self.pictures.sources)

    def __getitem__(self, index: int):
        import torch

        try:
            image = open_picture(self.pictures.sources[index])
        except Exception as error:
            return f"damaged ({first_line(error)})"
        generator = torch.Generator().manual_seed(derive(self.args.seed, "crops", index))
        corners = [(0.5, 0.5), *torch.rand(self.crops - 1, 2, generator=generator).tolist()]
        flips = (False, True) if self.args.random_flip else (False,)
        return torch.stack([crop_and_scale(image, crop, flip, self.args) for crop in corners for flip in flips])


def encode_pictures(run: Run) -> None:
    """Run the VAE over every variant of every picture; damaged pictures are left out here."""
    import torch

    moments, keep = [], []
    for index, found in enumerate(encoded_pictures(run)):
        if isinstance(found, str):
            run.pictures.leave_out(run.args.strict, index, found)
            continue
        keep.append(index)
        moments.append(found)
    run.pictures.moments = None
    run.pictures.keep(keep)
    if not keep:
        raise InvalidArgument(data_flag(run.args), "every picture is damaged", "give pictures that can be opened")
    if run.args.cache_latents:
        run.pictures.moments = torch.stack(moments)


def encoded_pictures(run: Run, share: int = 32):
    """Yields, picture by picture, the moments of its variants (None without --cache_latents) or what is wrong with it.

    Each process encodes its part of every round of `share` pictures for each of them, and gets the others'.
    """
    from accelerate.utils import gather_object
    from torch.utils.data import DataLoader
    from tqdm.auto import tqdm

    pixels, vae = VariantPixels(run.pictures, run.args), run.pipeline.vae
    rounds = range(0, len(pixels), share * run.accelerator.num_processes)
    rank, last = run.accelerator.process_index, len(pixels)
    mine = [range(min(r + rank * share, last), min(r + (rank + 1) * share, last)) for r in rounds]
    order = [index for part in mine for index in part]
    loader = iter(DataLoader(pixels, batch_size=None, sampler=order, **workers(run.args.dataloader_num_workers)))
    with tqdm(desc="encoding pictures", total=sum(map(len, mine)), disable=not run.main, dynamic_ncols=True) as bar:
        for part in mine:
            found = []
            for _ in part:
                leave_if_asked(run, "stopped before training began")
                stack = next(loader)
                if not isinstance(stack, str):
                    stack = encode(vae, stack) if run.args.cache_latents else None
                found.append(stack)
                bar.update()
            yield from gather_object(found)


def workers(count: int) -> dict:
    """DataLoader's arguments for so many processes, which leave it to the trainer to answer Ctrl-C and SIGTERM."""
    import multiprocessing

    if count == 0:
        return {"num_workers": 0}
    fork = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return {"num_workers": count, "worker_init_fn": ignore_signals, "multiprocessing_context": fork}


def ignore_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def leave_if_asked(run: Run, message: str) -> None:
    """End long work that has nothing to save; with several processes only the training loop ends them together."""
    if run.stop is not None and run.stop.signal is not None and run.accelerator.num_processes == 1:
        raise Stopped(message)


def encode(vae, stack):
    """Mean and standard deviation of the latents, [variants, 2, channels, height, width]."""
    import torch

    with torch.no_grad():
        posterior = vae.encode(stack.to(vae.device, vae.dtype)).latent_dist
    return torch.stack([posterior.mean, posterior.std], dim=1).cpu()


def encode_captions(run: Run, captions: list[str]) -> dict:
    """Text encoder states of each distinct caption, as the pipeline computes them; [tokens, width] each."""
    import torch

    captions, states = list(dict.fromkeys(captions)), {}
    for start in range(0, len(captions), 64):
        chunk = captions[start : start + 64]
        with torch.no_grad():
            hidden = run.pipeline.text_encoder(tokenize(run, chunk).to(run.accelerator.device))[0]
        states.update(zip(chunk, hidden.cpu().clone(), strict=True))
    return states


def tokenize(run: Run, captions: list[str]):
    tokenizer = run.pipeline.tokenizer
    length = tokenizer.model_max_length
    return tokenizer(captions, max_length=length, padding="max_length", truncation=True, return_tensors="pt").input_ids


# -- the run -----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What all methods of a run share."""

    args: argparse.Namespace
    accelerator: object
    stop: StopRequest
    pictures: Pictures
    pipeline: object = None  # VAE, scheduler and text encoder; each method brings its own U-Net
    noise_scheduler: object = None
    train: list[int] = field(default_factory=list)
    held_out: list[int] = field(default_factory=list)
    embeddings: dict = field(default_factory=dict)  # text -> text encoder states, of captions and prompts
    plan: dict = field(default_factory=dict)
    scaler_state: dict | None = None
    by_epochs: bool = False  # the number of steps came from --num_train_epochs

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def output(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def fingerprint(self) -> str:
        """The data set in short: a run can only be continued on the same pictures in the same order."""
        return f"{len(self.pictures.captions)} pictures, {derive(self.pictures.captions, self.pictures.sizes()):x}"

    @property
    def weight_dtype(self):
        import torch

        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, torch.float32)


def start_accelerator(args: argparse.Namespace):
    """Accelerate with the trackers that are installed, and this process's share of the cores."""
    import logging
    import warnings

    import diffusers
    import torch
    import transformers
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    tracker = args.report_to
    if tracker == "none" or (tracker == "tensorboard" and importlib.util.find_spec("tensorboard") is None):
        tracker = None
    folder = Path(args.output_dir)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=tracker,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / args.logging_dir)),
        )
    except ValueError as error:
        raise InvalidArgument(
            f"--mixed_precision {args.mixed_precision}", first_line(error), "choose another"
        ) from None
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":
            raise InvalidArgument("--mixed_precision fp16", "there is no GPU, and CPUs crawl in fp16", "use bf16 or no")
        take_cores(int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
    return accelerator


def take_cores(local_processes: int) -> None:
    """Use all cores: launchers leave one thread where nothing is configured. A user's own choice is kept."""
    import torch

    launched = {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen is None or (launched and chosen == "1"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // local_processes))


def load_pipeline(run: Run) -> None:
    """VAE, text encoder, tokenizer and scheduler; the U-Net is loaded for each method."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    args, name = run.args, run.args.pretrained_model_name_or_path
    check_hub(args)
    try:
        check_pipeline_class(
            name, StableDiffusionPipeline.load_config(name, revision=args.revision, cache_dir=args.cache_dir)
        )
        run.pipeline = StableDiffusionPipeline.from_pretrained(
            name, unet=None, safety_checker=None, feature_extractor=None, image_encoder=None,
            requires_safety_checker=False, revision=args.revision, variant=args.variant, cache_dir=args.cache_dir,
            torch_dtype=run.weight_dtype, use_safetensors=True,
        )  # fmt: skip
        check_unet(run)
    except InvalidArgument:
        raise
    except Exception as error:  # damaged files fail in as many ways as there are readers
        fix = "repair the folder" if Path(name).is_dir() else "check the name and the connection"
        raise InvalidArgument(f"--pretrained_model_name_or_path {name}", first_line(error), fix) from None
    known = run.pipeline.scheduler.config.num_train_timesteps
    if args.num_inference_steps > known:
        raise InvalidArgument(
            f"--num_inference_steps {args.num_inference_steps}", f"the model knows {known} timesteps", "give fewer"
        )
    check_resolution(args.resolution, run.pipeline.vae_scale_factor)
    if args.prediction_type:
        run.pipeline.scheduler.register_to_config(prediction_type=args.prediction_type)
    run.noise_scheduler = DDPMScheduler.from_config(run.pipeline.scheduler.config)
    run.pipeline.set_progress_bar_config(disable=True)
    run.pipeline.to(run.accelerator.device)
    for module in (run.pipeline.vae, run.pipeline.text_encoder):
        module.requires_grad_(False).eval()


def check_hub(args: argparse.Namespace) -> None:
    """Refuse a hub's name at once where the hub cannot be reached; its own library tries for most of a minute."""
    import huggingface_hub
    from huggingface_hub import constants

    name, file = args.pretrained_model_name_or_path, "model_index.json"
    if Path(name).is_dir() or constants.HF_HUB_OFFLINE:
        return
    cached = huggingface_hub.try_to_load_from_cache(name, file, cache_dir=args.cache_dir, revision=args.revision)
    if isinstance(cached, str):
        return
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=15)
    except Exception as error:  # requests' or httpx's, by the version of the hub's library
        raise InvalidArgument(
            f"--pretrained_model_name_or_path {name}",
            f"no such folder, and {constants.ENDPOINT} cannot be reached ({first_line(error)})",
            "give a folder in diffusers format, or check the connection",
        ) from None


def load_unet(run: Run, dtype):
    from diffusers import UNet2DConditionModel

    args = run.args
    unet = UNet2DConditionModel.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="unet", revision=args.revision, variant=args.variant,
        cache_dir=args.cache_dir, torch_dtype=dtype, use_safetensors=True,
    )  # fmt: skip
    return unet.requires_grad_(False).to(run.accelerator.device)


def check_unet(run: Run) -> None:
    """Try every method on a U-Net without weights: targets and shortcuts are refused before anything is encoded."""
    import torch
    from diffusers import UNet2DConditionModel

    args = run.args
    config = UNet2DConditionModel.load_config(
        args.pretrained_model_name_or_path, subfolder="unet", revision=args.revision, cache_dir=args.cache_dir
    )
    for method in args.method:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
        check_unet_weights(run, unet)
        names = [name for name, _ in unet.named_modules()]
        matching = [
            target for target in args.target_modules if any(f".{name}".endswith(f".{target}") for name in names)
        ]
        if not matching:
            raise InvalidArgument(
                f"--target_modules {' '.join(args.target_modules)}",
                "no layer of the U-Net ends in any of these",
                "try to_q to_k to_v to_out.0",
            )
        if missing := [target for target in args.target_modules if target not in matching]:
            run.accelerator.print(f"--target_modules: no layer of the U-Net ends in {', '.join(missing)}")
        if method == "adalora":
            check_linear(unet, args.target_modules)
        try:
            add_adapter(unet, method, args, total_steps=1000)
        except (ValueError, RuntimeError) as error:
            raise InvalidArgument(f"--method {method}", first_line(error), "change the flag it names") from None


def check_linear(unet, targets: Sequence[str]) -> None:
    """Refuse convolutions for AdaLoRA: PEFT would take them for linear layers."""
    import torch

    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Conv2d) and any(f".{name}".endswith(f".{target}") for target in targets):
            raise InvalidArgument(
                f"--target_modules {' '.join(targets)}",
                f"{name} is a convolution, which AdaLoRA cannot adapt",
                "leave it out, or choose another method",
            )


def check_unet_weights(run: Run, unet) -> None:
    """Refuse a folder whose U-Net weights are missing, cut off, or of other shapes than its configuration says."""
    from safetensors import SafetensorError, safe_open

    folder, variant = Path(run.args.pretrained_model_name_or_path) / "unet", run.args.variant
    if not folder.is_dir():
        return  # on the hub
    stem = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
    files = [*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*.safetensors")]
    flag = f"--pretrained_model_name_or_path {run.args.pretrained_model_name_or_path}"
    if not files and not variant:
        raise InvalidArgument(flag, f"no {stem}.safetensors in {folder}", "give a pipeline with safetensors weights")
    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    found = tuple(file.get_slice(name).get_shape())
                    if shapes.get(name, found) != found:
                        problem = f"{name} is {found} in {path}, {shapes[name]} by its config.json"
                        raise InvalidArgument(flag, problem, "repair the folder")
        except (SafetensorError, OSError) as error:
            raise InvalidArgument(flag, f"{path} cannot be read ({first_line(error)})", "repair the folder") from None


def prepare_data(run: Run) -> None:
    """Encode pictures and captions, free the encoders, and hold pictures out for validation."""
    args, pictures = run.args, run.pictures
    prompts = ["", *(args.validation_prompt or pictures.captions[0][:1])]
    captions = [caption for options in pictures.captions for caption in options] if args.cache_text_embeddings else []
    run.embeddings = encode_captions(run, prompts + captions)
    encode_pictures(run)
    if args.cache_text_embeddings:
        run.pipeline.register_modules(text_encoder=None, tokenizer=None)
    if args.cache_latents:
        run.pipeline.vae.encoder = None  # samples need the decoder alone
    for line in pictures.left_out[:20]:
        run.accelerator.print(f"left out: {line}")
    if pictures.left_out:
        run.accelerator.print(f"left out {len(pictures.left_out)} pictures, kept {len(pictures.sources)}")
    order = shuffled(len(pictures.sources), args.seed, "validation_split")
    count = min(max(1, round(args.validation_split * len(order))), len(order) - 1) if args.validation_split else 0
    run.held_out, run.train = sorted(order[:count]), sorted(order[count:])
    updates = math.ceil(len(run.train) / args.train_batch_size / run.accelerator.num_processes)
    updates = max(1, math.ceil(updates / args.gradient_accumulation_steps))
    run.by_epochs = not args.max_train_steps
    args.max_train_steps = args.max_train_steps or args.num_train_epochs * updates
    check_adalora_steps(args)
    args.validation_steps = args.validation_steps or args.validation_epochs * updates


# -- samples -----------------------------------------------------------------------------------------------------------


class TrainingSamples:
    """Sample number `position` of the run, a function of the seed and the position alone; a map-style dataset."""

    purpose = "training"

    def __init__(self, run: Run):
        self.run, self.args = run, run.args
        vae, self.side = run.pipeline.vae.config, run.args.resolution // run.pipeline.vae_scale_factor
        self.shape = (vae.latent_channels, self.side, self.side)
        self.timesteps = run.noise_scheduler.config.num_train_timesteps
        self.epoch, self.order = None, None

    def picture(self, position: int) -> int:
        epoch, place = divmod(position, len(self.run.train))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, shuffled(len(self.run.train), self.args.seed, "order", epoch)
        return self.run.train[self.order[place]]

    def timestep(self, position: int, generator) -> int:
        import torch

        return int(torch.randint(self.timesteps, (), generator=generator))

    def __getitem__(self, position: int) -> dict:
        import torch

        generator = torch.Generator().manual_seed(derive(self.args.seed, self.purpose, position))
        index = self.picture(position)
        choose = lambda count: int(torch.randint(count, (), generator=generator))  # noqa: E731
        sample = {"timesteps": torch.tensor(self.timestep(position, generator))}
        sample["noise"] = torch.randn(self.shape, generator=generator)
        if self.args.noise_offset:
            sample["noise"] += self.args.noise_offset * torch.randn(self.shape[0], 1, 1, generator=generator)
        sample["posterior_noise"] = torch.randn(self.shape, generator=generator)
        captions = self.run.pictures.captions[index]
        caption = captions[choose(len(captions))]
        if self.args.cache_text_embeddings:
            sample["states"] = self.run.embeddings[caption]
        else:
            sample["input_ids"] = tokenize(self.run, [caption])[0]
        if self.run.pictures.moments is not None:
            sample["moments"] = self.run.pictures.moments[index, choose(self.run.pictures.variants)]
        else:
            sample["pixels"] = self.fresh_pixels(index, generator)
        return sample

    def fresh_pixels(self, index: int, generator):
        import torch

        crop = (0.5, 0.5) if self.args.center_crop else torch.rand(2, generator=generator).tolist()
        flip = self.args.random_flip and bool(torch.rand((), generator=generator) < 0.5)
        return crop_and_scale(open_picture(self.run.pictures.sources[index]), crop, flip, self.args)


class CalibrationSamples(TrainingSamples):
    """Training pictures with noise of their own, for the merge."""

    purpose = "calibration"


class ValidationSamples(TrainingSamples):
    """Held-out pictures, each with VALIDATION_DRAWS noises spread evenly over the timesteps."""

    purpose = "validation"

    def picture(self, position: int) -> int:
        return self.run.held_out[position // VALIDATION_DRAWS]

    def timestep(self, position: int, generator) -> int:
        import torch

        quarter = position % VALIDATION_DRAWS + float(torch.rand((), generator=generator))
        return min(self.timesteps - 1, int(quarter / VALIDATION_DRAWS * self.timesteps))


def training_batches(run: Run, steps_done: int):
    """This process's batches from the first step that isn't done; N processes share what one process would read."""
    from torch.utils.data import DataLoader

    args, processes, rank = run.args, run.accelerator.num_processes, run.accelerator.process_index
    batch, forwards = args.train_batch_size, args.gradient_accumulation_steps
    positions = [
        [(forward * processes + rank) * batch + i for i in range(batch)]
        for forward in range(steps_done * forwards, args.max_train_steps * forwards)
    ]
    return DataLoader(
        TrainingSamples(run),
        batch_sampler=positions,
        pin_memory=run.accelerator.device.type == "cuda",
        **workers(args.dataloader_num_workers),
    )


def batches(samples, count: int, size: int):
    from torch.utils.data import default_collate

    for start in range(0, count, size):
        yield default_collate([samples[position] for position in range(start, min(start + size, count))])


def noised(run: Run, batch: dict) -> tuple[dict, object]:
    """The U-Net's keyword arguments for a batch, and what it should predict."""
    device, scheduler = run.accelerator.device, run.noise_scheduler
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    if "moments" in batch:
        mean, std = batch["moments"].float().unbind(1)
    else:
        posterior = run.pipeline.vae.encode(batch["pixels"].to(run.weight_dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
    latents = (mean + std * batch["posterior_noise"]) * run.pipeline.vae.config.scaling_factor
    states = batch["states"] if "states" in batch else run.pipeline.text_encoder(batch["input_ids"])[0]
    noisy = scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
    inputs = {"sample": noisy.to(run.weight_dtype), "timestep": batch["timesteps"], "encoder_hidden_states": states}
    if scheduler.config.prediction_type == "v_prediction":
        return inputs, scheduler.get_velocity(latents, batch["noise"], batch["timesteps"])
    return inputs, batch["noise"]


def diffusion_loss(run: Run, model, batch: dict, snr_gamma: float | None = None):
    """Squared error of each sample's prediction, [batch]; with `snr_gamma`, min-SNR weighted (Hang et al., 2023)."""
    import torch

    inputs, target = noised(run, batch)
    error = (model(**inputs, return_dict=False)[0].float() - target.float()).square().mean(dim=(1, 2, 3))
    if snr_gamma is None:
        return error
    alphas = run.noise_scheduler.alphas_cumprod.to(error.device)[inputs["timestep"]]
    snr = alphas / (1 - alphas)
    divisor = snr + 1 if run.noise_scheduler.config.prediction_type == "v_prediction" else snr
    return error * torch.clamp(snr, max=snr_gamma) / divisor


def validation_loss(run: Run, unet) -> float:
    """Mean error on the held-out pictures, the same noise and timesteps at every call."""
    import torch

    unet.eval()
    count = len(run.held_out) * VALIDATION_DRAWS
    with torch.no_grad(), run.accelerator.autocast():
        losses = [
            diffusion_loss(run, unet, batch)
            for batch in batches(ValidationSamples(run), count, run.args.train_batch_size)
        ]
    unet.train()
    return torch.cat(losses).mean().item()


def sample(run: Run, unet, prompts: list[str], images: int, callback=None) -> list:
    """Pictures from the pipeline around `unet` in eval mode, prompt by prompt, each with a seed of its own."""
    import torch

    args, pipeline = run.args, run.pipeline
    training = unet.training
    pipeline.unet = unet.eval()
    jobs = [(prompt, derive(args.seed, "sample", p, i)) for p, prompt in enumerate(prompts) for i in range(images)]
    pictures = []
    for start in range(0, len(jobs), args.train_batch_size):
        chunk = jobs[start : start + args.train_batch_size]
        states = torch.stack([run.embeddings[prompt] for prompt, _ in chunk]).to(run.accelerator.device)
        empty = run.embeddings[""].to(states).expand_as(states)
        pictures += pipeline(
            prompt_embeds=states, negative_prompt_embeds=empty,
            generator=[torch.Generator().manual_seed(seed) for _, seed in chunk],
            num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale,
            height=args.resolution, width=args.resolution, callback_on_step_end=callback,
        ).images  # fmt: skip
    pipeline.unet = None
    unet.train(training)
    return pictures


def write_samples(run: Run, unet, method: str, step: int) -> None:
    args = run.args

    def between_steps(pipeline, index, timestep, tensors):
        leave_if_asked(run, f"{method} stopped while drawing the samples of step {step}")
        return tensors

    with run.accelerator.autocast():
        pictures = sample(run, unet, args.validation_prompt, args.num_validation_images, between_steps)
    save_pictures(run.output / method / "samples" / f"step-{step:06d}", pictures, args.num_validation_images)
    for tracker in run.accelerator.trackers:
        if tracker.name == "wandb":
            tracker.log_images({f"samples/{method}": pictures}, step=tracker_step(run, tracker, method, step))
        if tracker.name == "tensorboard":
            import numpy as np

            tracker.writer.add_images(
                f"samples/{method}", np.stack([np.asarray(p) for p in pictures]), step, dataformats="NHWC"
            )


def save_pictures(folder: Path, pictures: list, images: int) -> None:
    with renamed(folder) as temporary:
        temporary.mkdir()
        for number, picture in enumerate(pictures):
            picture.save(temporary / f"{number // images}-{number % images}.png")


# -- adapters ----------------------------------------------------------------------------------------------------------


def adapter_config(method: str, args: argparse.Namespace, total_steps: int):
    """PEFT's configuration of a method; ResLoRA's is LoRA's."""
    from reslora import adapters as methods

    config = methods.adapter_config(
        method, r=args.rank, alpha=args.lora_alpha, dropout=args.lora_dropout, targets=args.target_modules,
        total_steps=total_steps,
    )  # fmt: skip
    if method in LORA_METHODS:
        config.init_lora_weights = "gaussian"  # as in diffusers' scripts
    return config


def add_adapter(unet, method: str, args: argparse.Namespace, total_steps: int):
    """Attach the method's adapter with weights drawn from the seed; returns AdaLoRA's tuner, None for the others."""
    import torch
    from diffusers.training_utils import cast_training_params

    config, tuner = adapter_config(method, args, total_steps), None
    torch.manual_seed(derive(args.seed, "adapter"))
    if method == "adalora":
        from peft.tuners.adalora import AdaLoraModel

        tuner = AdaLoraModel(unet, config, "default")  # it allocates the ranks, so unlike the others it must be kept
        unet._hf_peft_config_loaded = True
    else:
        unet.add_adapter(config)
    if method == "reslora":
        import reslora

        reslora.connect(unet, reslora.ResLoraConfig(shortcut=args.shortcut, pre_num=args.pre_num, head=args.head))
    cast_training_params(unet, dtype=torch.float32)
    return tuner


def orthogonal_penalty(unet):
    """AdaLoRA's regularizer: how far the factors' rows and columns are from orthonormal, averaged over the factors."""
    import torch

    penalties = []
    for name, factor in unet.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
            penalties.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)))
    return torch.stack(penalties).mean()


def adapter_state(unet) -> dict:
    """Everything PEFT added to the U-Net, by its own name: parameters and buffers, but not the layers it wraps."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    prefixes = tuple(
        f"{n}.{part}."
        for n, m in unet.named_modules()
        if isinstance(m, BaseTunerLayer)
        for part in (*m.adapter_layer_names, *m.other_param_names)
    )
    return {name: value for name, value in unet.state_dict().items() if name.startswith(prefixes)}


@dataclass
class Trainer:
    """What one method trains, and how far it is."""

    method: str
    unet: object
    tuner: object
    optimizer: object = None
    lr_scheduler: object = None
    model: object = None  # the U-Net as accelerate prepared it
    step: int = 0
    seconds: float = 0.0


def build_trainer(run: Run, method: str) -> Trainer:
    """The method's U-Net, optimizer and schedule, at the newest usable checkpoint or at the start."""
    from diffusers.optimization import get_scheduler

    args = run.args
    if run.accelerator.scaler:  # each method begins with the same scale, whatever came before
        run.scaler_state = run.scaler_state or run.accelerator.scaler.state_dict()
        run.accelerator.scaler.load_state_dict(run.scaler_state)
    for checkpoint in [*run.plan[method], None]:
        unet = load_unet(run, run.weight_dtype)
        trainer = Trainer(method, unet, add_adapter(unet, method, args, args.max_train_steps))
        trainer.optimizer = build_optimizer(run, [p for p in unet.parameters() if p.requires_grad])
        trainer.lr_scheduler = get_scheduler(
            args.lr_scheduler,
            trainer.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
        )
        if checkpoint is None or restore(run, trainer, checkpoint):
            break
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing and method == "reslora":
        import reslora

        reslora.enable_gradient_checkpointing(unet)
    elif args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    trainer.model, trainer.optimizer = run.accelerator.prepare(unet.train(), trainer.optimizer)
    if args.compile:
        trainer.model = compiled(trainer.model)
    return trainer


def compiled(model):
    """The model for training steps only: samples and validation batches have other shapes, and go without."""
    import torch

    return torch.compile(model)


def build_optimizer(run: Run, parameters: list):
    import torch

    args = run.args
    per_step = args.gradient_accumulation_steps * args.train_batch_size * run.accelerator.num_processes
    options = {
        "lr": args.learning_rate * (per_step if args.scale_lr else 1),
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    # A fused step hides from accelerate that the fp16 scaler has skipped it.
    fused = run.accelerator.device.type in ("cpu", "cuda") and run.accelerator.scaler is None
    return torch.optim.AdamW(parameters, **options, fused=fused)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def save_checkpoint(run: Run, trainer: Trainer) -> Path:
    """`checkpoint-<step>`: the adapter and what a resumed run needs to equal an uninterrupted one. Old ones go then."""
    import torch
    from safetensors.torch import save as serialize

    folder = run.output / trainer.method
    state = adapter_state(trainer.unet)
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise RunFailed(
            f"{trainer.method}: adapter weights are not finite at step {trainer.step}; lower --learning_rate"
        )
    with renamed(folder / f"checkpoint-{trainer.step}") as temporary:
        temporary.mkdir()
        if trainer.method == "reslora":
            import reslora

            reslora.save(trainer.unet, temporary)
        else:
            tensors = {name: value.contiguous() for name, value in state.items()}
            (temporary / "adapter.safetensors").write_bytes(serialize(tensors))
        state = {
            "optimizer": trainer.optimizer.state_dict(),
            "lr_scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else None,
            "allocator": allocator_state(trainer.tuner),
        }
        buffer = io.BytesIO()  # torch.save's own writing names no cause where a disk is full
        torch.save(state, buffer)
        (temporary / "trainer.pt").write_bytes(buffer.getbuffer())
        record = {
            "method": trainer.method,
            "step": trainer.step,
            "seconds": trainer.seconds,
            "pictures": run.fingerprint,
            "settings": settings_of(run.args),
        }
        (temporary / "trainer.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if run.args.checkpoints_total_limit:
        # Later ones are of an earlier try, damaged or left behind: they do not count, and are overwritten in turn.
        kept = [old for old in checkpoints_of(folder) if step_of(old) <= trainer.step]
        for old in kept[run.args.checkpoints_total_limit :]:
            remove(old)
    return folder / f"checkpoint-{trainer.step}"


def allocator_state(tuner) -> dict | None:
    """AdaLoRA's running importance of each parameter, and the ranks it has settled on."""
    if tuner is None:
        return None
    allocator = tuner.rankallocator
    averages = {name: getattr(allocator, name) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
    return averages | {"rank_pattern": tuner.peft_config["default"].rank_pattern}


def restore(run: Run, trainer: Trainer, checkpoint: Path) -> bool:
    """Bring the trainer to the checkpoint; False, with a warning, where it is damaged."""
    import torch

    record = read_trainer_json(checkpoint)
    if record.get("pictures", run.fingerprint) != run.fingerprint:
        problem = f"{checkpoint} was trained on {record['pictures']}, these are {run.fingerprint}"
        raise InvalidArgument(data_flag(run.args), problem, "bring them back, or choose another --output_dir")
    try:
        state = torch.load(checkpoint / "trainer.pt", map_location=run.accelerator.device, weights_only=True)
        load_adapter(trainer.unet, trainer.method, checkpoint)
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if run.accelerator.scaler and state["scaler"]:
            run.accelerator.scaler.load_state_dict(state["scaler"])
        if trainer.tuner is not None:
            trainer.tuner.peft_config["default"].rank_pattern = state["allocator"].pop("rank_pattern")
            vars(trainer.tuner.rankallocator).update(state["allocator"])
        trainer.step, trainer.seconds = record["step"], record["seconds"]
    except Exception as error:  # a truncated file fails in as many ways as there are readers
        if run.args.resume_from_checkpoint != "latest":
            raise InvalidArgument(
                f"--resume_from_checkpoint {checkpoint}", f"damaged ({first_line(error)})", "use latest"
            ) from None
        run.accelerator.print(f"warning: {checkpoint} is damaged ({first_line(error)}), trying the one before")
        return False
    run.accelerator.print(f"{trainer.method}: going on from {checkpoint}")
    return True


def load_adapter(unet, method: str, checkpoint: Path) -> None:
    """Read the checkpoint's adapter into a U-Net that has a matching one."""
    from safetensors.torch import load_file

    if method == "reslora":
        import reslora

        reslora.load(unet, checkpoint)
        return
    state, wanted = load_file(checkpoint / "adapter.safetensors"), set(adapter_state(unet))
    if state.keys() != wanted:
        raise ValueError(f"adapter.safetensors has other layers, first {min(state.keys() ^ wanted)}")
    unet.load_state_dict(state, strict=False)


# -- training ----------------------------------------------------------------------------------------------------------


class TrainingLog:
    """`log.jsonl`, continued from the rows up to the step a run resumes at; and the trackers."""

    def __init__(self, run: Run, trainer: Trainer):
        self.run, self.trainer, self.file = run, trainer, None
        if run.main:
            path = run.output / trainer.method / "log.jsonl"
            rows = [row for row in read_log(path) if row["step"] <= trainer.step] if trainer.step else []
            with renamed(path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            self.file = path.open("a", encoding="utf-8")

    def write(self, split: str, loss: float) -> None:
        trainer = self.trainer
        learning_rate = trainer.lr_scheduler.get_last_lr()[0]
        row = {
            "step": trainer.step,
            "split": split,
            "loss": loss,
            "lr": learning_rate,
            "seconds": round(trainer.seconds, 3),
        }
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        values = {f"{split}_loss/{trainer.method}": loss, f"lr/{trainer.method}": learning_rate}
        for tracker in self.run.accelerator.trackers:
            tracker.log(values, step=tracker_step(self.run, tracker, trainer.method, trainer.step))


def tracker_step(run: Run, tracker, method: str, step: int) -> int:
    """The method's step; TensorBoard alone takes the steps of the next method from 0 again."""
    before = 0 if tracker.name == "tensorboard" else run.args.method.index(method) * (run.args.max_train_steps + 1)
    return before + step


def read_log(path: Path) -> list[dict]:
    """Rows of a log; a last line cut short by a kill is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def train(run: Run, method: str) -> int:
    """Train one method from where it stands to --max_train_steps; returns the step of its last checkpoint."""
    from tqdm.auto import tqdm

    args = run.args
    trainer = build_trainer(run, method)
    log = TrainingLog(run, trainer)
    if parts := overdue(run, trainer):
        validate(run, trainer, log, parts)
    stream = iter(training_batches(run, trainer.step))
    bar = tqdm(desc=method, total=args.max_train_steps, initial=trainer.step, disable=not run.main, dynamic_ncols=True)
    with bar:  # closed before an error is told
        while trainer.step < args.max_train_steps:
            started = time.perf_counter()
            loss = train_step(run, trainer, stream)
            trainer.seconds += time.perf_counter() - started
            if not math.isfinite(loss):
                problem = f"loss {loss} at step {trainer.step}"
                raise RunFailed(
                    f"{method}: {problem}; checkpoints before it are intact: go on from one, or "
                    "start in another --output_dir with a lower --learning_rate"
                )
            log.write("train", loss)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
            last = stop_requested(run) or trainer.step == args.max_train_steps
            save = trainer.step % args.checkpointing_steps == 0 or last
            if save and run.main:
                save_checkpoint(run, trainer)
            if run.stop.signal is None and is_due(run, trainer.step):
                validate(run, trainer, log)
                last = stop_requested(run) or last
            if last and not save and run.main:
                save_checkpoint(run, trainer)
            run.accelerator.wait_for_everyone()
            if last:
                break
    run.accelerator.free_memory()
    if run.stop.signal is not None and trainer.step < args.max_train_steps:
        raise Stopped(f"{method} stopped after step {trainer.step}; go on with --resume_from_checkpoint latest")
    return trainer.step


def stop_requested(run: Run) -> bool:
    """Whether any process was asked to stop: all of them must leave after the same step."""
    import torch

    asked = run.stop.signal is not None
    if run.accelerator.num_processes > 1:
        asked = bool(run.accelerator.reduce(torch.tensor(float(asked), device=run.accelerator.device)) > 0)
        run.stop.signal = run.stop.signal or (signal.SIGTERM if asked else None)
    return asked


def train_step(run: Run, trainer: Trainer, stream) -> float:
    """One update of the adapter, from --gradient_accumulation_steps batches; returns their mean loss everywhere."""
    import torch

    args, accelerator, total = run.args, run.accelerator, 0.0
    trainer.step += 1
    for forward in range(args.gradient_accumulation_steps):
        # Dropout masks, the only random numbers left: seeding them here makes them a function of the step.
        torch.manual_seed(derive(args.seed, "dropout", trainer.step, forward, accelerator.process_index))
        with accelerator.accumulate(trainer.model):
            loss = diffusion_loss(run, trainer.model, next(stream), args.snr_gamma).mean()
            total += loss.detach()
            if trainer.tuner is not None:
                loss = loss + trainer.tuner.peft_config["default"].orth_reg_weight * orthogonal_penalty(trainer.unet)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(
                    [p for p in trainer.unet.parameters() if p.requires_grad], args.max_grad_norm
                )
            trainer.optimizer.step()
            skipped = accelerator.optimizer_step_was_skipped  # its gradients are no numbers
            if accelerator.sync_gradients and trainer.tuner is not None and not skipped:
                trainer.tuner.update_and_allocate(trainer.step)
            trainer.optimizer.zero_grad()
    if not accelerator.optimizer_step_was_skipped:
        trainer.lr_scheduler.step()
    return accelerator.reduce(total / args.gradient_accumulation_steps, "mean").item()


def is_due(run: Run, step: int) -> bool:
    """Whether there are to be a validation loss and samples after that step."""
    return step % run.args.validation_steps == 0 or step == run.args.max_train_steps


VALIDATION = ("loss", "samples")


def overdue(run: Run, trainer: Trainer) -> list[str]:
    """What of VALIDATION the step that training goes on from lacks: a run may be stopped before or within it."""
    if trainer.step == 0:
        return list(VALIDATION)
    folder, step = run.output / trainer.method, trainer.step
    rows = read_log(folder / "log.jsonl")
    done = {
        "loss": any(row["step"] == step and row["split"] == "validation" for row in rows),
        "samples": (folder / "samples" / f"step-{step:06d}").is_dir(),
    }
    return [part for part in VALIDATION if not done[part]] if is_due(run, step) else []


def validate(run: Run, trainer: Trainer, log: TrainingLog, parts: Sequence[str] = VALIDATION) -> None:
    """Validation loss and samples; samples that a stop cuts short are drawn when the run goes on."""
    if run.main:
        if "loss" in parts and run.held_out:
            log.write("validation", validation_loss(run, trainer.unet))
        if "samples" in parts and run.args.validation_prompt:
            try:
                write_samples(run, trainer.unet, trainer.method, trainer.step)
            except Stopped:
                run.pipeline.unet = None
                trainer.unet.train()
    run.accelerator.wait_for_everyone()


# -- merging and exporting ---------------------------------------------------------------------------------------------


def export(run: Run, method: str, step: int) -> None:
    """Merge the checkpoint of the last step in fp32, write every format, read each back, and compare the pictures."""
    import torch

    args, folder = run.args, run.output / method
    run.accelerator.print(f"{method}: merging, exporting and comparing")
    exact = {torch.backends.cuda.matmul: args.allow_tf32, torch.backends.cudnn: torch.backends.cudnn.allow_tf32}
    for backend in exact:  # pictures are compared: TF32 would differ by more than the exports may
        backend.allow_tf32 = False
    unet = load_unet(run, torch.float32)
    add_adapter(unet, method, args, args.max_train_steps)
    load_adapter(unet, method, folder / f"checkpoint-{step}")
    if method == "reslora":
        merge_reslora(run, unet, folder)
    if method == "adalora":
        unet = plain_lora(run, unet)
    write_formats(run, unet.eval(), method)

    run.pipeline.to(torch.float32)
    prompts = args.validation_prompt or [next((text for text in run.embeddings if text), "")]
    pictures = sample(run, unet, prompts, args.num_validation_images)
    save_pictures(folder / "merged", pictures, args.num_validation_images)
    del unet
    differences = read_back(run, method, prompts[:1], pictures[0])
    run.pipeline.to(run.weight_dtype)
    for backend, allowed in exact.items():
        backend.allow_tf32 = allowed
    for name, difference in differences.items():
        if difference > TOLERANCE * 255:
            raise RunFailed(
                f"{method}/{name}: its picture differs by {difference}/255 from the merged model's; 2/255 is allowed"
            )
    record = {"step": step, "num_train_epochs": args.num_train_epochs, "by_epochs": run.by_epochs}
    record["difference_of_255"] = differences
    write_json(folder / "exports.json", record)


def merge_reslora(run: Run, unet, folder: Path) -> None:
    """Fold the shortcuts into plain LoRA weights, and keep the plan, the report and the samples the merge read."""
    import torch
    from safetensors.torch import save as serialize

    import reslora

    args, size = run.args, run.args.train_batch_size
    write_json(folder / "chains.json", reslora.chains(unet).to_dict())
    calibration = None
    if args.merge_calibration_samples:
        samples = batches(CalibrationSamples(run), args.merge_calibration_samples, size)
        with torch.no_grad():
            calibration = [noised(run, batch)[0] for batch in samples]
        calibration = [
            {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()} for inputs in calibration
        ]
        together = {
            name: torch.cat([inputs[name] for inputs in calibration]).cpu().contiguous() for name in calibration[0]
        }
        with renamed(folder / "calibration.safetensors") as temporary:
            temporary.write_bytes(serialize(together))
    report = reslora.merge(unet, method=args.merge, calibration=calibration)
    write_json(folder / "merge.json", report.to_dict())
    run.accelerator.print(f"reslora: {report}")


def plain_lora(run: Run, unet):
    """A U-Net with the plain LoRA that AdaLoRA's `s B diag(E) A` amounts to, which every tool reads."""
    import peft
    import torch

    layers = {name: layer for name, layer in unet.named_modules() if hasattr(layer, "lora_E")}
    rank = math.ceil(1.5 * run.args.rank)
    plain = load_unet(run, torch.float32)
    plain.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=run.args.target_modules))
    with torch.no_grad():
        for name, layer in layers.items():
            twin, scale = plain.get_submodule(name), layer.scaling["default"] / (layer.ranknum["default"] + 1e-5)
            twin.lora_A["default"].weight.copy_(layer.lora_E["default"] * layer.lora_A["default"])
            twin.lora_B["default"].weight.copy_(layer.lora_B["default"] * scale)
    return plain


def write_formats(run: Run, unet, method: str) -> None:
    from reslora import export as formats

    args, folder = run.args, run.output / method
    formats.export_peft(unet, folder / "peft")
    formats.export_merged(unet, folder / "unet")
    if method in PLAIN_METHODS:
        formats.export_diffusers(unet, folder)
        metadata = {
            "ss_base_model": Path(args.pretrained_model_name_or_path).name,
            "ss_learning_rate": str(args.learning_rate),
            "ss_seed": str(args.seed),
            "ss_steps": str(args.max_train_steps),
            "ss_resolution": str(args.resolution),
        }
        formats.export_kohya(unet, folder / "kohya.safetensors", metadata=metadata)


def read_back(run: Run, method: str, prompts: list[str], reference) -> dict[str, int]:
    """Largest difference, of 255, of each export's picture in stock diffusers or PEFT from the merged model's."""
    import numpy as np
    import torch
    from diffusers import UNet2DConditionModel
    from peft import PeftModel

    folder, differences = run.output / method, {}

    def compare(name: str, unet) -> None:
        picture = sample(run, unet, prompts, 1)[0]
        differences[name] = int(np.abs(np.asarray(picture, dtype=int) - np.asarray(reference, dtype=int)).max())

    base = load_unet(run, torch.float32)
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors") if method in PLAIN_METHODS else ():
        run.pipeline.unet = base
        run.pipeline.load_lora_weights(folder, weight_name=name)
        compare(name, base)
        run.pipeline.unet = base
        run.pipeline.unload_lora_weights()
    compare("peft", PeftModel.from_pretrained(base, folder / "peft").get_base_model())
    compare("unet", UNet2DConditionModel.from_pretrained(folder / "unet").to(run.accelerator.device))
    return differences


# -- what the run shows ------------------------------------------------------------------------------------------------


def start_reports(run: Run) -> None:
    """`config.json`, and the trackers."""
    public = {name: value for name, value in vars(run.args).items() if name not in ("config", "hub_token")}
    for name in ("pretrained_model_name_or_path", "train_data_dir", "dataset_name", "cache_dir"):
        if public[name] and Path(public[name]).is_dir():  # whoever reads it later may be in another folder
            public[name] = str(Path(public[name]).resolve())
    if run.main:
        write_json(run.output / "config.json", public)
    plain = {
        name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in public.items()
    }
    run.accelerator.init_trackers("train_sd", config=plain)


def write_comparison(run: Run) -> None:
    """`comparison.png`, the paper's Figure 3: steps across; prompts down, and the methods under each."""
    from PIL import Image, ImageDraw, ImageFont

    args, columns = run.args, comparison_columns(run)
    tile, gap, top = 128 if args.resolution <= 128 else 192, 6, 40
    font, bold = ImageFont.load_default(16), font_for("".join(args.validation_prompt), 20)
    left = 24 + max(int(font.getlength(method)) for method in args.method)
    height_of_prompt = 34 + len(args.method) * (tile + gap) + 10
    width = left + len(columns) * (tile + gap) + gap
    sheet = Image.new("RGB", (width, top + len(args.validation_prompt) * height_of_prompt), "white")
    draw = ImageDraw.Draw(sheet)
    for c, (title, _) in enumerate(columns):
        draw.text((left + c * (tile + gap) + tile // 2, top // 2), title, fill="black", font=font, anchor="mm")
    for p, prompt in enumerate(args.validation_prompt):
        y = top + p * height_of_prompt
        draw.line((12, y, width - 12, y), fill="#cccccc")
        draw.text((left, y + 8), shorten(prompt, (width - left) // 11), fill="black", font=bold)
        for m, method in enumerate(args.method):
            row = y + 36 + m * (tile + gap)
            draw.text((left - 12, row + tile // 2), method, fill="#444444", font=font, anchor="rm")
            for c, (_, folder) in enumerate(columns):
                path = run.output / method / folder / f"{p}-0.png"
                if path.is_file():
                    picture = Image.open(path).resize((tile, tile), Image.Resampling.LANCZOS)
                    sheet.paste(picture, (left + c * (tile + gap), row))
    with renamed(run.output / "comparison.png") as temporary:
        sheet.save(temporary, format="png")


def font_for(text: str, size: int):
    """Pillow's own font, or, where that lacks a character, the first installed font that has them all."""
    from PIL import ImageFont

    needed = {ord(character) for character in text if ord(character) > 0x24F}
    if needed:
        from matplotlib import font_manager

        for path in sorted(font_manager.findSystemFonts(fontext="ttf")):
            with contextlib.suppress(OSError, RuntimeError):
                if needed <= font_manager.get_font(path).get_charmap().keys():
                    return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def comparison_columns(run: Run, most: int = 9) -> list[tuple[str, str]]:
    """Titles and folders of the steps shown: evenly chosen ones, the last, and the merged model."""
    found = sorted({int(path.name[5:]) for path in run.output.glob("*/samples/step-*") if path.name[5:].isdigit()})
    chosen = sorted({found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)}) if found else []
    return [(f"step {step}", f"samples/step-{step:06d}") for step in chosen] + [("merged", "merged")]


def write_loss_curves(run: Run) -> None:
    """`loss.png`: smoothed training loss, and the loss on held-out pictures, of each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 2 if run.held_out else 1, figsize=(11 if run.held_out else 6, 4), layout="constrained", squeeze=False
    )
    axes = dict(zip(("train", "validation"), axes[0], strict=False))
    for method in run.args.method:
        rows = read_log(run.output / method / "log.jsonl")
        for split, axis in axes.items():
            steps = [row["step"] for row in rows if row["split"] == split]
            losses = [row["loss"] for row in rows if row["split"] == split]
            if split == "train":
                axis.plot(steps, smooth(losses), label=method, linewidth=1.8)
            else:
                axis.plot(steps, losses, label=method, linewidth=1.8, marker="o", markersize=4)
    titles = {"train": "training loss (running mean)", "validation": f"loss on {len(run.held_out)} held-out pictures"}
    for split, axis in axes.items():
        axis.set(title=titles[split], xlabel="step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    with renamed(run.output / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)


def smooth(values: list[float], share: float = 0.1) -> list[float]:
    """Mean of the values up to each one, over a window of `share` of them."""
    window = max(1, round(len(values) * share))
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def hub_repository(args: argparse.Namespace) -> str:
    """The repository to upload to, which is made if need be."""
    from huggingface_hub import create_repo

    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    except Exception as error:  # requests' or httpx's, by the version of the hub's library
        problem = f"cannot make or reach the repository {name} ({first_line(error)})"
        raise InvalidArgument("--push_to_hub", problem, "log in with `hf auth login`, or leave it out") from None


def publish(args: argparse.Namespace) -> None:
    """Upload the folder with a model card, as diffusers' script does."""
    from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
    from huggingface_hub import upload_folder

    output, name = Path(args.output_dir), hub_repository(args)
    base = args.pretrained_model_name_or_path
    description = (
        f"# {name}\n\n{', '.join(args.method)} weights for {Path(base).name if Path(base).is_dir() else base}, "
        f"trained on {Path(args.dataset_name or args.train_data_dir).name} for {args.max_train_steps} steps.\n"
    )
    if (output / "comparison.png").is_file():
        description += "\n![samples](comparison.png)\n"
    try:
        card = load_or_create_model_card(
            repo_id_or_path=name,
            token=args.hub_token,
            from_training=True,
            base_model=None if Path(base).is_dir() else base,  # the hub refuses what is no name of its own
            model_description=description,
            inference=True,
        )
        tags = ["text-to-image", "diffusers", "diffusers-training", "lora", "reslora"]
        populate_model_card(card, tags=tags).save(output / "README.md")
        upload_folder(
            repo_id=name,
            folder_path=output,
            commit_message="End of training",
            ignore_patterns=["*/checkpoint-*", "*/.*", ".*", "app.log", "config.json", "*/unet/*"],
            token=args.hub_token,
        )
    except Exception as error:
        problem = f"{name} could not be uploaded ({first_line(error)})"
        raise RunFailed(f"{problem}; the run is complete, the same command tries again") from None
    print(f"uploaded to {name}")


def print_summary(args: argparse.Namespace) -> None:
    """What was written, and how to look at it."""
    output = Path(args.output_dir)
    lines = [
        "",
        f"{output}/",
        "  comparison.png   steps across; prompts and methods down",
        "  loss.png         training and validation loss",
        "  config.json      every setting of this run",
    ]
    uses = {
        "pytorch_lora_weights.safetensors": "diffusers: pipeline.load_lora_weights(folder)",
        "kohya.safetensors": "ComfyUI, A1111/Forge, kohya",
        "peft": "PeftModel.from_pretrained(unet, folder)",
        "unet": "merged weights: UNet2DConditionModel.from_pretrained(folder)",
    }
    for method in args.method:
        lines.append(f"  {method}/")
        record = json.loads((output / method / "exports.json").read_text(encoding="utf-8"))
        for name, difference in record["difference_of_255"].items():
            lines.append(f"    {name:<34}{uses[name]:<62}read back: {difference}/255")
    lines.append(
        "Each was read back by stock diffusers or PEFT; its picture may differ from the merged model's by 2/255 (fp32)."
    )
    lines.append("Look at the run: python -m app")
    print("\n".join(lines))


def finish(run: Run) -> None:
    """Figures, the single method's file where diffusers' script leaves it, and the hub."""
    if not run.main:
        return
    if run.args.validation_prompt:
        write_comparison(run)
    write_loss_curves(run)
    if len(run.args.method) == 1 and run.args.method[0] in PLAIN_METHODS:
        name = "pytorch_lora_weights.safetensors"
        with renamed(run.output / name) as temporary:
            shutil.copyfile(run.output / run.args.method[0] / name, temporary)
    print_summary(run.args)
    if run.args.push_to_hub:
        publish(run.args)


def main(argv: list[str] | None = None) -> int:
    """Check, load, encode, train and export each method, and show what came of it; returns the exit status."""
    # How long an idle thread of GNU OpenMP spins before it sleeps (its default: 300,000 turns). Spinning that long is
    # ten times slower on cores that others use too; sleeping at once makes a small U-Net's step half as long again.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        args = parse_args(argv)
        plan, done = plan_resume(args), finished_methods(args)
        if done == args.method and (Path(args.output_dir) / "loss.png").is_file():
            print(f"{args.output_dir} holds this run already, finished; nothing to do")
            print_summary(args)
            if args.push_to_hub:
                publish(args)
            return 0
        pictures = find_pictures(args)
        first = int(os.environ.get("RANK", 0)) == 0
        with locked(Path(args.output_dir)) if first else contextlib.nullcontext(), StopRequest() as stop:
            plan, done = plan_resume(args), finished_methods(args)  # once more: another run may just have ended
            run = Run(args, start_accelerator(args), stop, pictures, plan=plan)
            load_pipeline(run)
            if args.push_to_hub and run.main:
                hub_repository(args)
            prepare_data(run)
            start_reports(run)
            for method in args.method:
                if method not in done:
                    step = train(run, method)
                    if run.main:
                        export(run, method, step)
                    run.accelerator.wait_for_everyone()
            finish(run)
            run.accelerator.end_training()
        return 0
    except InvalidArgument as error:
        print(f"train_sd.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before training began", file=sys.stderr)
        return 128 + signal.SIGINT
    except RunFailed as error:
        print(f"train_sd.py: {error}", file=sys.stderr)
        return 1
    except Stopped as error:
        print(error, file=sys.stderr)
        return 128 + stop.signal
    except OSError as error:  # a full disk, a folder that went away: the last checkpoint is intact
        print(f"train_sd.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
