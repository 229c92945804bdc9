"""Find the directories `checkpoint-N` of `AdapterTrainer`, and validate them for resuming."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import logging

from ..checkpoint import CONFIG_NAME, WEIGHTS_NAME
from ..errors import first_line
from ..io import CHECKSUMS_NAME, Damaged, check_checksums, read_object
from ..methods.adapters import ADAPTER_NAME
from ..runtime.checkpoint_folders import numbered, set_aside

ALLOCATOR_NAME = "allocator.safetensors"  # AdaLoRA's running importances and ranks
ADAPTER_ALONE = "it holds the adapter alone, as with --save_only_model"

logger = logging.get_logger(__name__)


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the directories `checkpoint-N` of a run, newest first, complete or not."""
    return numbered(folder)


def named_checkpoint(folder: Path, name: str) -> Path:
    """Return the directory that --resume_from_checkpoint names: relative to the run's directory, or any path."""
    return folder / name if (folder / name).is_dir() else Path(name)


def usable_checkpoint(folder: Path, processes: int = 1) -> str | None:
    """Return the newest complete `checkpoint-N` of a run; None without one.

    Incomplete checkpoints, and those of another number of processes, are skipped with a warning.
    """
    for path in checkpoints_of(folder):
        problem = damage(path, processes)
        if problem is None:
            return str(path)
        logger.warning(f"{path} cannot be resumed ({problem}), trying the one before")
    return None


def damage(folder: Path, processes: int = 1) -> str | None:
    """Return a description of what is missing or damaged in a checkpoint; None if nothing is.

    Reads every file to compare its checksum. Raises `OSError` for a file that cannot be read at the moment, which does
    not mean that the file is damaged.
    """
    if lacking := _lacks(folder, processes):
        return lacking
    try:
        check_checksums(folder)
    except Damaged as error:
        return first_line(error)
    return None if _is_finished(folder) else _unreadable(folder, processes)


def set_unfinished_aside(folder: Path, processes: int = 1) -> None:
    """Rename a run's only checkpoint if it was not written completely, so that the run can start anew.

    Nothing is deleted. Does nothing

    - if the run has finished, or has several checkpoints;
    - if the checkpoint was written completely, even if it is damaged now or of another number of processes.
    """
    found = checkpoints_of(folder)
    if len(found) != 1 or (folder / "results.json").exists():  # which a finished run has written
        return
    begun = (found[0] / CHECKSUMS_NAME).exists() and not _is_finished(found[0])
    # The trainer's state is written last.
    if not (found[0] / TRAINER_STATE_NAME).exists() or (begun and damage(found[0], processes) is not None):
        set_aside(found[0], "was not finished", "unfinished")  # so that it is not a checkpoint to resume from


def _is_finished(folder: Path) -> bool:
    return TRAINER_STATE_NAME in read_object(folder / CHECKSUMS_NAME)  # until then, the checksums list only the adapter


def _lacks(folder: Path, processes: int) -> str | None:
    if not any((folder / name).exists() for name in (WEIGHTS_NAME, ADAPTER_NAME)):
        return f"no {WEIGHTS_NAME} or {ADAPTER_NAME}"
    if not (folder / TRAINER_STATE_NAME).exists():
        return f"no {TRAINER_STATE_NAME}"
    last, states = _ranks(processes)[-1], {path.name for path in folder.glob("rng_state*.pth")}
    if not states and not any((folder / name).exists() for name in ("optimizer.pt", "latest")):  # latest: DeepSpeed's
        return ADAPTER_ALONE
    if last not in states:
        return f"no {last}: incomplete, or made by another number of processes"
    if len(states) > processes:
        return f"{len(states)} random states: made by another number of processes"
    return None


def _unreadable(folder: Path, processes: int) -> str | None:
    """Return the first error when reading the files of a checkpoint without complete checksums; None without one."""
    try:
        TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
        if (folder / WEIGHTS_NAME).exists():
            json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        # DeepSpeed stores optimizer and scheduler in a separate directory, which it reads and validates itself.
        states = [] if (folder / "latest").exists() else ["optimizer.pt", "scheduler.pt"]
        for name in (*states, *_ranks(processes)):
            with safe_globals():
                torch.load(folder / name, map_location="cpu", weights_only=True)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise
        return first_line(error)
    except Exception as error:  # a truncated file fails with any kind of exception
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _ranks(processes: int) -> list[str]:
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
