"""Find the directories `checkpoint-N` of `AdapterTrainer`, and validate them for resuming."""

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..checkpoint import WEIGHTS_NAME
from ..errors import first_line
from ..io import CHECKSUMS_NAME, Damaged, check_checksums, read_object
from ..methods.adapters import ADAPTER_NAME
from ..runtime.checkpoint_folders import numbered, set_aside

ALLOCATOR_NAME = "allocator.safetensors"  # AdaLoRA's running importances and ranks
ADAPTER_ALONE = "it holds the adapter alone, as with --save_only_model"

logger = logging.get_logger(__name__)


def named_checkpoint(folder: Path, name: str) -> Path:
    """Return the directory that --resume_from_checkpoint names: relative to the run's directory, or any path."""
    return folder / name if (folder / name).is_dir() else Path(name)


def usable_checkpoint(folder: Path, processes: int = 1) -> str | None:
    """Return the newest complete `checkpoint-N` of a run; None without one.

    Incomplete checkpoints, and those of another number of processes, are skipped with a warning.
    """
    for path in numbered(folder):
        problem = damage(path, processes)
        if problem is None:
            return str(path)
        logger.warning(f"{path} cannot be resumed ({problem}), trying the previous one")
    return None


def damage(folder: Path, processes: int = 1) -> str | None:
    """Return a description of what is missing or damaged in a checkpoint; None if nothing is.

    Reads every file to compare its checksum; without `checksums.json`, files are only listed. Raises `OSError` for a
    file that cannot be read at the moment, which does not mean that the file is damaged.
    """
    if lacking := _lacks(folder, processes):
        return lacking
    try:
        check_checksums(folder)
    except Damaged as error:
        return first_line(error)
    return "it was not finished" if _is_begun(folder) else None


def set_unfinished_aside(folder: Path) -> None:
    """Rename a run's only checkpoint if it was not written completely, so that the run can start anew.

    Nothing is deleted. Does nothing

    - if the run has finished, or has several checkpoints;
    - if the checkpoint was written completely, even if it is damaged now or of another number of processes.
    """
    found = numbered(folder)
    if len(found) != 1 or (folder / "results.json").exists():  # which a finished run has written
        return
    # The trainer's state is the last file, and then its checksum is written.
    if not (found[0] / TRAINER_STATE_NAME).exists() or _is_begun(found[0]):
        set_aside(found[0], "was not finished", "unfinished")  # so that it is not a checkpoint to resume from


def _is_begun(folder: Path) -> bool:
    """Return whether the checksums list only the adapter: the process was killed before it wrote the others."""
    return (folder / CHECKSUMS_NAME).exists() and TRAINER_STATE_NAME not in read_object(folder / CHECKSUMS_NAME)


def _lacks(folder: Path, processes: int) -> str | None:
    if not any((folder / name).exists() for name in (WEIGHTS_NAME, ADAPTER_NAME)):
        return f"no {WEIGHTS_NAME} or {ADAPTER_NAME}"
    if not (folder / TRAINER_STATE_NAME).exists():
        return f"no {TRAINER_STATE_NAME}"
    last = "rng_state.pth" if processes == 1 else f"rng_state_{processes - 1}.pth"
    states = {path.name for path in folder.glob("rng_state*.pth")}
    if not states and not any((folder / name).exists() for name in ("optimizer.pt", "latest")):  # latest: DeepSpeed's
        return ADAPTER_ALONE
    if last not in states:
        return f"no {last}: incomplete, or made by another number of processes"
    if len(states) > processes:
        return f"{len(states)} random states: made by another number of processes"
    return None
