"""What a run needs before its first step: accelerate, its trackers, the cores, and how long it trains."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import sys
import warnings
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import ProjectConfiguration
from diffusers import DiffusionPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..common.errors import InvalidArgument, first_line
from ..common.script import shares_the_cpu
from ..common.together import decided
from ..files import write_json
from .arguments import Flags
from .checks import check_fsdp
from .context import Context
from .data.samples import Material
from .model.loading import Model
from .model.objective import DdpmObjective, FlowObjective, Objective
from .settings import check_adalora_steps, is_bundled
from .training.state import Schedule
from .training.zero import configure, uses_deepspeed

LONGEST_WARMUP, WARMUP_SHARE = 500, 0.1
FEW_TOKENS = 64
TENSORBOARD_SECONDS = 10  # until it shows what is new
PLACES = (
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "train_data_dir",
    "dataset_name",
    "cache_dir",
)


def start_accelerator(flags: Flags) -> Accelerator:
    """Accelerate with the tracker that is asked for, and this process's share of the cores."""
    folder = Path(flags.output_dir)
    check_fsdp()
    if not flags.mixed_precision and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        problem = "its configuration says fp8, in which nothing is trained here"
        raise InvalidArgument("accelerate launch", problem, "give --mixed_precision bf16, or another configuration")
    try:
        accelerator = Accelerator(
            cpu=shares_the_cpu(),
            gradient_accumulation_steps=flags.gradient_accumulation_steps,
            mixed_precision=precision_of(flags),
            log_with=tracker_of(flags.report_to),
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / flags.logging_dir)),
        )
    except ValueError as error:
        raise InvalidArgument(
            f"--mixed_precision {flags.mixed_precision}", first_line(error), "choose another"
        ) from None
    started = int(os.environ.get("WORLD_SIZE", accelerator.num_processes))
    if started != accelerator.num_processes:  # so it is with DeepSpeed on a CPU: each would take itself for all
        problem = f"accelerate knows {accelerator.num_processes} of the {started} processes that were started"
        raise InvalidArgument("accelerate launch", problem, "give --num_processes 1, or another configuration")
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":
            raise InvalidArgument("--mixed_precision fp16", "there is no GPU, and CPUs crawl in fp16", "use bf16 or no")
        take_cores(int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
        keep_freed_memory()
    if uses_deepspeed(accelerator):
        configure(flags, accelerator)
    torch.backends.cuda.matmul.allow_tf32 = flags.allow_tf32
    quieten()
    return accelerator


def precision_of(flags: Flags) -> str | None:
    """`--mixed_precision`; where nobody has a wish, bf16 for the small pipelines on a CPU that computes in it.

    bf16 takes them two thirds of the time there, and merges and exports are made in float32 all the same.
    """
    settled = is_initialized()  # by a run before, in a process that makes several
    wish = settled or flags.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
    if wish or os.environ.get("ACCELERATE_USE_DEEPSPEED") or not is_bundled(flags.pretrained_model_name_or_path):
        return flags.mixed_precision
    if not computes_in_bf16():
        return None
    if int(os.environ.get("RANK", 0)) == 0:
        print("training in bf16, in which this processor computes; --mixed_precision no: in float32", flush=True)
    return "bf16"


def computes_in_bf16() -> bool:
    """Whether this is a CPU, and one with instructions for bf16."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16")) and not torch.accelerator.is_available()


def keep_freed_memory() -> None:
    """Tells glibc to use freed memory again rather than return it: a step would fetch all of it anew, page by page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def attention_of(accelerator: Accelerator, material: Material) -> contextlib.AbstractContextManager:
    """Plain attention for the few tokens of a small pipeline: PyTorch's fused one crawls on a CPU in bf16."""
    tokens = max(math.prod(shape[-2:]) for shape in material.shapes.values())
    small = accelerator.device.type == "cpu" and tokens <= FEW_TOKENS
    plain = small and accelerator.mixed_precision == "bf16"
    return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()


def tracker_of(name: str) -> str | None:
    """The tracker as accelerate takes it; raises `InvalidArgument` for one it does not know or cannot import."""
    known, installed = sorted(map(str, LOGGER_TYPE_TO_CLASS)), set(map(str, get_available_trackers()))
    if name == "none" or (name == "tensorboard" and name not in installed):
        return None
    if name != "all" and name not in known:
        raise InvalidArgument(
            f"--report_to {name}", "accelerate does not know it", f"give one of {', '.join(known)}, all, none"
        )
    if name != "all" and name not in installed:
        raise InvalidArgument(f"--report_to {name}", f"{name} is not installed", f"pip install {name}, or leave it out")
    return name


def objective_of(flags: Flags, model: Model, pipeline: DiffusionPipeline) -> Objective:
    """What the model's family learns; refuses flags that belong to another objective."""
    if model.family.objective == "flow":
        for name in ("prediction_type", "snr_gamma"):
            if getattr(flags, name) is not None:
                problem = f"{model.family.name} learns a flow, which has none"
                raise InvalidArgument(f"--{name} {getattr(flags, name)}", problem, "leave it out")
        return FlowObjective(
            pipeline.scheduler, flags.timestep_sampling, flags.weighting_scheme, shift=flags.discrete_flow_shift,
            logit_mean=flags.logit_mean, logit_std=flags.logit_std,
            mode_scale=flags.mode_scale,
        )  # fmt: skip
    for name in ("timestep_sampling", "discrete_flow_shift", "weighting_scheme"):
        if getattr(flags, name) is not None:
            problem = f"{model.family.name} does not learn a flow"
            raise InvalidArgument(f"--{name} {getattr(flags, name)}", problem, "leave it out")
    if flags.prediction_type:
        pipeline.scheduler.register_to_config(prediction_type=flags.prediction_type)
    try:
        return DdpmObjective(pipeline.scheduler, flags.snr_gamma)
    except ValueError as error:
        raise InvalidArgument(model.flag, first_line(error), "give another model, or --prediction_type") from None


def take_cores(local_processes: int) -> None:
    """Use all cores: launchers leave one thread where nothing is configured. A user's own choice is kept."""
    launched = {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen is None or (launched and chosen == "1"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // local_processes))


def quieten() -> None:
    """Warnings that are not for whoever trains."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")


def schedule_of(material: Material, context: Context) -> Schedule:
    """How long each method trains, and when it is looked at."""
    flags = context.flags
    plan = material.plan(context.accelerator.num_processes)
    updates = plan.updates_per_epoch(flags.gradient_accumulation_steps)
    steps = flags.max_train_steps or flags.num_train_epochs * updates
    check_adalora_steps(flags.method, steps)
    validation_steps = flags.validation_steps or flags.validation_epochs * updates
    warmup = flags.lr_warmup_steps
    warmup = min(LONGEST_WARMUP, int(WARMUP_SHARE * steps)) if warmup is None else warmup
    return Schedule(steps, validation_steps, warmup, by_epochs=not flags.max_train_steps)


def start_trackers(schedule: Schedule, context: Context) -> None:
    """`config.json`, and the trackers."""
    steps = {"max_train_steps": schedule.steps, "validation_steps": schedule.validation_steps}
    flags, accelerator = context.flags.replace(**steps), context.accelerator
    public = {name: value for name, value in vars(flags).items() if name not in ("config", "hub_token")}
    for name in PLACES:
        if public[name] and Path(public[name]).exists():  # whoever reads it later may be in another folder
            public[name] = str(Path(public[name]).resolve())
    decided(lambda: write_json(Path(flags.output_dir) / "config.json", public))
    plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in public.items()}
    often = {"tensorboard": {"flush_secs": TENSORBOARD_SECONDS}}
    accelerator.init_trackers("train_sd", config=plain, init_kwargs=often)
