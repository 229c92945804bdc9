"""Lock a run's directory, so that only one run at a time uses it, and remove temporary files of killed runs."""

import contextlib
import hashlib
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import InvalidArgument, RunFailed
from ..io import before_writing, is_running, remove_leftovers, this_process
from ..methods.registry import METHODS
from .status import FILE

# File with the process id and identifier of the owner. The lock itself is a file in the system's temporary directory.
OWNER = ".lock"
_HELD: dict[Path, str] = {}
"""Directories that this process, or the process for which it does jobs, has locked; each with the identifier of the
process that has locked it.
"""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a directory inside this context, so that no second run uses it.

    Raises `InvalidArgument` naming the process that holds the lock.
    """
    made = not folder.exists()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(guarded(folder))
            # `guarded` misses a run with another temporary directory; batch systems create one for each job.
            if is_running(_owner(folder)[1]):
                raise _busy(folder)
            folder.mkdir(parents=True, exist_ok=True)  # not earlier, or a removed directory would be created again
            (folder / OWNER).write_text(f"{os.getpid()}\n{this_process()}")
            _HELD[folder] = this_process()
            stack.callback(_HELD.pop, folder)
        except Timeout:
            raise _busy(folder) from None
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
            raise InvalidArgument(f"--output_dir {folder}", problem, "choose another folder") from None
        try:
            parts = [
                folder / method / part
                for method in ("", *METHODS.folders_in(folder))
                for part in (".", "samples", "best")
            ]
            for place in (folder, folder / "cache", *parts):
                remove_leftovers(place)
            yield
        finally:
            if not _lost(folder, this_process()):
                (folder / FILE).unlink(missing_ok=True)
                (folder / OWNER).unlink(missing_ok=True)
                if made:
                    with contextlib.suppress(OSError):
                        folder.rmdir()  # a run that was refused before it wrote anything leaves nothing


@contextlib.contextmanager
def sharing_lock(folder: Path, owner: str) -> Iterator[None]:
    """Use a directory that the process `owner` has locked, maybe on another machine, until it loses the directory."""
    if _owner(folder)[1] != owner:
        problem = f"is not the folder that the experiment has locked, as seen from {platform.node()}"
        raise RunFailed(f"--output_dir {folder} {problem}; it must be on storage that all machines share")
    _HELD[folder] = owner
    try:
        yield
    finally:
        del _HELD[folder]


def check_held() -> None:
    """Raise `RunFailed` if a directory locked by this run was moved, removed or taken by another run.

    `io.replacing` calls this function before it writes. Call this function also before long work and before removing
    files.
    """
    for folder, owner in _HELD.items():
        if problem := _lost(folder, owner):
            raise RunFailed(f"--output_dir {folder} {problem}")


before_writing.append(check_held)


def make_folder(folder: Path) -> None:
    """Create a directory inside the locked one, if that is still there."""
    check_held()
    folder.mkdir(parents=True, exist_ok=True)


def _lost(folder: Path, owner: str) -> str:
    """Return why a directory that `owner` has locked no longer belongs to this run; empty if the directory still
    belongs to it.
    """
    number, process = _owner(folder)
    if process not in ("", owner):
        # Runs on other machines or in other containers do not see this process, and may have taken its directory.
        return f"is now used by another run (process {number}): nothing more is saved; choose another"
    if not process and not folder.exists():
        fix = "if you moved it, resume with --output_dir NEW_FOLDER --resume_from_checkpoint latest"
        return f"was moved or removed during training, and nothing more is saved; {fix}"
    return ""


def guard_of(folder: Path) -> FileLock:
    """Return the file lock of a directory, which locks only against runs on the same machine.

    The operating system releases the lock when the process ends.
    """
    name = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
    return FileLock(Path(tempfile.gettempdir()) / f"reslora-{getattr(os, 'getuid', int)()}-{name}.lock")


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Lock a directory inside this context against other runs on this machine.

    Raises `Timeout` immediately if another run holds the lock. The lock file is removed before it is unlocked. A
    process that opened it earlier cannot lock it afterwards, because filelock rejects a lock file that has been
    removed.
    """
    guard = guard_of(folder)
    with guard.acquire(timeout=0):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows cannot remove an open file
                Path(guard.lock_file).unlink()


def _busy(folder: Path) -> InvalidArgument:
    problem = f"process {_owner(folder)[0] or '?'} is training in it"
    return InvalidArgument(f"--output_dir {folder}", problem, "wait until it ends, or choose another folder")


def _owner(folder: Path) -> tuple[str, str]:
    """Return the process id and the identifier of the lock's owner; empty if unknown."""
    with contextlib.suppress(OSError, ValueError):
        number, _, process = (folder / OWNER).read_text().partition("\n")
        return number.strip(), process.strip()
    return "", ""
