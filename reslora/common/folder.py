"""The run's folder belongs to one run at a time, and what a killed run left half-written in it goes away."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import is_running, remove_leftovers, this_process
from .errors import InvalidArgument, RunFailed
from .methods import METHODS
from .status import FILE

OWNER = ".lock"  # holds the process id, and what it is known by; locked is a file of the system's temporary folder
_HELD: dict[Path, os.stat_result] = {}
"""The folders that this process has locked, as they were."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second run out of the folder; raises `InvalidArgument` naming the process that is in it."""
    made = not folder.exists()
    guard = guard_of(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        guard.acquire(timeout=0)
        if is_running(_owner(folder)[1]):  # with another temporary folder, as batch systems give each job its own
            guard.release()
            raise _busy(folder)
        (folder / OWNER).write_text(f"{os.getpid()}\n{this_process()}")
    except Timeout:
        raise _busy(folder) from None
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise InvalidArgument(f"--output_dir {folder}", problem, "choose another folder") from None
    _HELD[folder] = folder.stat()
    try:
        _clear_leftovers(folder)
        yield
    finally:
        if _is_mine(folder):
            (folder / FILE).unlink(missing_ok=True)
            (folder / OWNER).unlink(missing_ok=True)
        del _HELD[folder]
        guard.release()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # a run that was refused before it wrote anything leaves nothing


def check_held() -> None:
    """Raises `RunFailed` where a folder that this process has locked was moved or removed, before it is made anew."""
    for folder in _HELD:
        if not _is_mine(folder):
            problem = f"--output_dir {folder} was moved or removed while it trained, and nothing more is saved"
            raise RunFailed(f"{problem}; where it is now, go on with --resume_from_checkpoint latest")


def _is_mine(folder: Path) -> bool:
    """Whether it is the folder that was locked: by what is in it or, where that alone was deleted, as the disk says."""
    try:
        if (folder / OWNER).exists():
            return (folder / OWNER).read_text().endswith(this_process())
        return os.path.samestat(folder.stat(), _HELD[folder])
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # what a disk cannot tell just now ends no run
        return True


def guard_of(folder: Path) -> FileLock:
    """What locks a folder among the runs of this machine; the system frees it when a process ends."""
    name = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
    return FileLock(Path(tempfile.gettempdir()) / f"reslora-{getattr(os, 'getuid', int)()}-{name}.lock")


def _busy(folder: Path) -> InvalidArgument:
    problem = f"process {_owner(folder)[0] or '?'} is training in it"
    return InvalidArgument(f"--output_dir {folder}", problem, "wait for it, or choose another folder")


def _owner(folder: Path) -> tuple[str, str]:
    """Process id of who has the folder or has left its lock behind, and what it is known by; empty where unknown."""
    with contextlib.suppress(OSError, ValueError):
        number, _, process = (folder / OWNER).read_text().partition("\n")
        return number.strip(), process.strip()
    return "", ""


def _clear_leftovers(folder: Path) -> None:
    for place in (
        folder,
        folder / "cache",
        *(folder / method / part for method in METHODS for part in (".", "samples", "best")),
    ):
        remove_leftovers(place)
