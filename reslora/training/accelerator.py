"""Start accelerate: processes, precision, trackers and CPU threads."""

import ctypes
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import ProjectConfiguration

from ..errors import InvalidArgument, refused_as
from ..options.shared import TrainOptions
from .zero import configure, uses_deepspeed


def new_accelerator(flag: str, options: TrainOptions, **arguments: Any) -> Accelerator:
    """Return accelerate's `Accelerator`, and configure DeepSpeed; on a CPU, set the number of threads too.

    `flag`: the option of the precision and its value, for messages.
    """
    folder = Path(options.output.output_dir)
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / options["logging_dir"]))
    with refused_as(flag, "choose another", (ValueError,)):
        accelerator = Accelerator(project_config=project, **arguments)
    started = int(os.environ.get("WORLD_SIZE", accelerator.num_processes))
    if started != accelerator.num_processes:  # with DeepSpeed on a CPU every process would treat itself as the only one
        problem = f"accelerate knows {accelerator.num_processes} of the {started} processes that were started"
        raise InvalidArgument("accelerate launch", problem, "give --num_processes 1, or another configuration")
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":
            raise InvalidArgument(flag, "there is no GPU, and fp16 is very slow on a CPU", "give bf16, or no for fp32")
        warn_of_single_process(accelerator.num_processes)
        set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
        keep_freed_memory()
    if uses_deepspeed(accelerator):
        configure(options.adapter, options.training, options.optimizer, accelerator)
    quieten()
    return accelerator


def warn_of_single_process(processes: int) -> None:
    """Print a warning if accelerate launch was asked for several processes on a CPU, but has started one.

    In this case the launcher sets MASTER_ADDR, but no RANK.
    """
    asked = {"ACCELERATE_DYNAMO_BACKEND", "MASTER_ADDR"} <= os.environ.keys()
    if asked and "RANK" not in os.environ and processes == 1:
        started = "accelerate launch has started one process, as always on a CPU without a configuration"
        print(f"warning: {started}; add --config_file assets/accelerate/cpu_two_processes.yaml", flush=True)


def keep_freed_memory() -> None:
    """Configure glibc to keep freed memory: returning it to the system would cost page faults in every step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def set_threads(local_processes: int) -> None:
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
                f"using {threads} threads per process: OMP_NUM_THREADS=1 is ignored, because launchers set it. "
                "Set it to 2 or more to choose another number; for one thread, limit the cores (taskset)",
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
