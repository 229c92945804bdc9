"""Validation on resume: settings and training examples must equal those of the earlier run."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from transformers.utils import logging

from ..errors import InvalidArgument
from ..experiment.record import EXPERIMENT
from ..io import read_object
from ..options.texts import PASSED_ON, TextOptions
from ..options.values import refuse_other_value
from ..runtime.checkpoint_folders import refuse_afresh
from ..runtime.processes import is_main
from .checkpoints import named_checkpoint

logger = logging.get_logger(__name__)

FOLDERS = ("model_name_or_path", "config_name", "tokenizer_name", "deepspeed")
"""Options with paths that may have moved: only the last component is compared."""


def free_on_resume(kind: type[TextOptions]) -> set[str]:
    """Return the options that a resumed run may change; options that a newer transformers adds are not among them."""
    return {*PASSED_ON["free"], *(name for name, option in kind.table().items() if option.resume != "fixed")}


def check_resume(output: Path, resume: str | None, current: Mapping[str, object], free: Collection[str]) -> None:
    """Raise `InvalidArgument` if a run cannot be resumed, or would mix its files with those of another run.

    `output` is the run's directory, and `resume` the value of --resume_from_checkpoint. The error is raised if

    - the directory has an experiment;
    - the directory has checkpoints, and `resume` is None;
    - the checkpoints of the directory's run are all missing or renamed, and `resume` does not name another checkpoint;
    - a setting of `current` that is not `free` differs from the directory's `config.json`, or from that of the run
      whose checkpoint `resume` names.
    """
    if (output / EXPERIMENT).exists():
        fix = "give its methods, rates and seeds, or choose another"
        raise InvalidArgument(f"--output_dir {output}", "contains an experiment", fix)
    finished, checkpoints = (output / "results.json").exists(), any(output.glob("checkpoint-*"))
    if not checkpoints and resume in (None, "latest"):
        refuse_afresh(output, output, finished)
    if resume is None:
        if checkpoints:
            raise InvalidArgument(
                f"--output_dir {output}",
                f"holds {'a finished' if finished else 'an unfinished'} run",
                "resume with --resume_from_checkpoint latest, or choose another",
            )
        return
    for run, earlier in _earlier(output, resume):
        if not earlier and run != output and is_main():
            logger.warning(f"no config.json in {run}: its checkpoint may be of other settings or examples than these")
        for name, value in current.items():
            if name not in free and name in earlier and not is_same(name, earlier[name], value):
                otherwise = "start afresh in another --output_dir"
                refuse_other_value(f"--{name}", value, f"{run} was trained with", earlier[name], otherwise)


def check_data(output: Path, resume: str | None, data: str) -> None:
    """Raise `InvalidArgument` if a resumed run has other training examples than before.

    `data` is the `fingerprint` of the training examples; their location does not matter. It is compared with the same
    earlier runs as in `check_resume`.
    """
    for run, earlier in _earlier(output, resume) if resume is not None else ():
        if earlier.get("data", data) != data:
            raise InvalidArgument(
                "--resume_from_checkpoint",
                f"{run} was trained on other examples than these",
                "give the same examples and --eval_strategy as before, or start afresh in another --output_dir",
            )


def _earlier(output: Path, resume: str) -> list[tuple[Path, dict]]:
    """Return the directories and settings of the runs that a resumed run must match.

    These are the run in `output`, and, if `resume` names a checkpoint in another directory, the run of that checkpoint.
    """
    runs, checkpoint = [output], named_checkpoint(output, resume)
    if resume != "latest" and checkpoint.is_dir() and checkpoint.resolve().parent != output.resolve():
        runs.append(checkpoint.resolve().parent)
    return [(run, read_object(run / "config.json")) for run in runs]


def fingerprint(rows: Iterable[object]) -> str:
    """Return a hash of all training examples, in order."""
    found = hashlib.blake2b(digest_size=16)
    for row in rows:
        found.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def is_same(name: str, earlier: object, current: object) -> bool:
    """Return whether a setting equals that of an earlier run; paths may have moved."""
    if name in FOLDERS and Path(str(current)).exists():
        return Path(str(earlier)).name == Path(str(current)).name
    return earlier == current
