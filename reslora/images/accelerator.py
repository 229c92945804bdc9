"""Set up accelerate: tracker, precision and CPU threads."""

import ctypes
import logging
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

from ..errors import InvalidArgument, refused_as
from ..options.images import ModelOptions, Options
from ..runtime.script import shares_the_cpu
from ..training.sharding import share, take_plugin
from ..training.zero import configure, uses_deepspeed
from .settings import is_bundled


def start_accelerator(options: Options) -> Accelerator:
    """Return accelerate's `Accelerator` with the requested tracker; on a CPU, set the number of threads too."""
    folder = Path(options.output.output_dir)
    plugin = take_plugin(options.model, options.adapter, options.training, options.output)
    if not options.model.mixed_precision and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        problem = "its configuration says fp8, in which nothing is trained here"
        raise InvalidArgument("accelerate launch", problem, "give --mixed_precision bf16, or another configuration")
    with refused_as(f"--mixed_precision {options.model.mixed_precision}", "choose another", (ValueError,)):
        accelerator = Accelerator(
            cpu=shares_the_cpu(),
            gradient_accumulation_steps=options.training.gradient_accumulation_steps,
            mixed_precision=precision_of(options.model),
            log_with=tracker_of(options.output.report_to),
            project_config=ProjectConfiguration(
                project_dir=str(folder), logging_dir=str(folder / options.output.logging_dir)
            ),
        )
    started = int(os.environ.get("WORLD_SIZE", accelerator.num_processes))
    if started != accelerator.num_processes:  # with DeepSpeed on a CPU every process would treat itself as the only one
        problem = f"accelerate knows {accelerator.num_processes} of the {started} processes that were started"
        raise InvalidArgument("accelerate launch", problem, "give --num_processes 1, or another configuration")
    share(plugin, accelerator)
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":
            raise InvalidArgument(
                "--mixed_precision fp16", "there is no GPU, and fp16 is very slow on a CPU", "use bf16 or no"
            )
        take_cores(int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
        keep_freed_memory()
    if uses_deepspeed(accelerator):
        configure(options.adapter, options.training, options.optimizer, accelerator)
    torch.backends.cuda.matmul.allow_tf32 = options.model.allow_tf32
    quieten()
    return accelerator


def precision_of(options: ModelOptions) -> str | None:
    """Return `--mixed_precision`, or its default: bf16 for bundled pipelines on a CPU with bf16 instructions.

    On such a CPU, bf16 makes a step a third faster. Merges and exports are computed in float32 in any case.
    """
    settled = is_initialized()  # initialized by an earlier run in the same process
    asked = settled or options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
    if asked or os.environ.get("ACCELERATE_USE_DEEPSPEED") or not is_bundled(options.pretrained_model_name_or_path):
        return options.mixed_precision
    if not cpu_has_bf16():
        return None
    if int(os.environ.get("RANK", 0)) == 0:
        print("training in bf16, for which this CPU has instructions; --mixed_precision no: float32", flush=True)
    return "bf16"


def cpu_has_bf16() -> bool:
    """Return whether this machine has no accelerator and a CPU with bf16 instructions."""
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16")) and not torch.accelerator.is_available()


def keep_freed_memory() -> None:
    """Configure glibc to keep freed memory: returning it to the system would cost page faults in every step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def take_cores(local_processes: int) -> None:
    """Use this process's share of the CPU cores, or as many threads as OMP_NUM_THREADS specifies.

    Launchers set OMP_NUM_THREADS to 1 if the user has not set it. Therefore a 1 is ignored in a process that a launcher
    started, and a line explains how to choose the number.
    """
    launched = {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen is None or (launched and chosen == "1"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // local_processes)
        torch.set_num_threads(threads)
        if chosen and threads > 1 and int(os.environ.get("RANK", 0)) == 0:
            print(
                f"using {threads} threads per process, because launchers set OMP_NUM_THREADS=1 by default; set it to 2 "
                "or more to choose the number; for one thread, limit the cores to the number of processes (taskset)",
                flush=True,
            )


def quieten() -> None:
    """Suppress warnings that are not relevant to the user."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")


def tracker_of(name: str) -> str | None:
    """Return the name that accelerate uses for a tracker.

    Raises `InvalidArgument` for a tracker that is unknown or cannot be imported.
    """
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
