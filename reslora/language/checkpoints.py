"""The folders `checkpoint-N` that `AdapterTrainer` writes: which there are, and which can be resumed from."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import logging

from ..adapters import ADAPTER_NAME
from ..checkpoint import CONFIG_NAME, WEIGHTS_NAME
from ..errors import first_line
from ..files import check_checksums

ALLOCATOR_NAME = "allocator.safetensors"  # AdaLoRA's running importances and ranks

logger = logging.get_logger(__name__)


def checkpoints_of(output_dir: str | os.PathLike) -> list[Path]:
    """The folders `checkpoint-N` of a run, newest first, whatever their state."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def usable_checkpoint(output_dir: str | os.PathLike, processes: int = 1) -> str | None:
    """Returns the newest complete `checkpoint-N` of a run, or None; damaged ones are left out with a warning."""
    for path in checkpoints_of(output_dir):
        problem = damage(path, processes)
        if problem is None:
            return str(path)
        logger.warning(f"{path} is damaged ({problem}), trying the one before")
    return None


def damage(folder: Path, processes: int = 1) -> str | None:
    """What keeps a checkpoint from being resumed from, or None; reads every file and compares its checksum."""
    try:
        TrainerState.load_from_json(str(folder / "trainer_state.json"))
        return _lacks(folder, processes) or _unreadable(folder, processes)
    except Exception as error:  # a truncated file fails in as many ways as there are readers
        return f"{type(error).__name__}: {first_line(error)}"


def _lacks(folder: Path, processes: int) -> str | None:
    if not any((folder / name).exists() for name in (WEIGHTS_NAME, ADAPTER_NAME)):
        return f"no {WEIGHTS_NAME} or {ADAPTER_NAME}"
    last = _ranks(processes)[-1]
    if not (folder / last).exists():
        return f"no {last}: incomplete, or made by another number of processes"
    return None


def _unreadable(folder: Path, processes: int) -> None:
    """Raises what a reader raises."""
    check_checksums(folder)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt"):
            pass
    if (folder / WEIGHTS_NAME).exists():
        json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    # DeepSpeed keeps optimizer and scheduler in a folder of its own, which it reads itself.
    states = [] if (folder / "latest").exists() else ["optimizer.pt", "scheduler.pt"]
    for name in (*states, *_ranks(processes)):
        with safe_globals():
            torch.load(folder / name, map_location="cpu", weights_only=True)


def _ranks(processes: int) -> list[str]:
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
