"""The run's folder belongs to one run at a time, and what a killed run left half-written in it goes away."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import before_writing, is_running, remove_leftovers, this_process
from .errors import InvalidArgument, RunFailed
from .methods import METHODS
from .status import FILE

OWNER = ".lock"  # holds the process id, and what it is known by; locked is a file of the system's temporary folder
_HELD: dict[Path, os.stat_result] = {}
"""The folders that this process has locked, or another one for it, as they were."""
_LENDERS: dict[Path, str] = {}
"""The other ones, by what they are known by."""
_FILLED: dict[Path, os.stat_result] = {}
"""Those in them that it is writing into."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder; raises `InvalidArgument` naming the process that is in it."""
    made = not folder.exists()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(guarded(folder))
            if is_running(_owner(folder)[1]):  # with another temporary folder, as batch systems give each job its own
                raise _busy(folder)
            folder.mkdir(parents=True, exist_ok=True)  # and not before: a removed one would be there again
            (folder / OWNER).write_text(f"{os.getpid()}\n{this_process()}")
            stack.enter_context(_noted(folder, _HELD))
        except Timeout:
            raise _busy(folder) from None
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
            raise InvalidArgument(f"--output_dir {folder}", problem, "choose another folder") from None
        try:
            _clear_leftovers(folder)
            yield
        finally:
            if not _lost(folder):
                (folder / FILE).unlink(missing_ok=True)
                (folder / OWNER).unlink(missing_ok=True)
                if made:
                    with contextlib.suppress(OSError):
                        folder.rmdir()  # a run that was refused before it wrote anything leaves nothing


@contextlib.contextmanager
def lent(folder: Path) -> Iterator[None]:
    """In a process that the one which has locked the folder has started: `check_held` looks whether it still has."""
    _LENDERS[folder] = _owner(folder)[1]
    try:
        with _noted(folder, _HELD):
            yield
    finally:
        del _LENDERS[folder]


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[None]:
    """While what is trained writes into a folder inside the locked one, `check_held` looks at that as well."""
    folder.mkdir(parents=True, exist_ok=True)
    with _noted(folder, _FILLED):
        try:
            yield
        except (OSError, RuntimeError):  # torch.save raises the latter
            check_held()  # it may have gone in the midst of a write
            raise


@contextlib.contextmanager
def _noted(folder: Path, noted: dict[Path, os.stat_result]) -> Iterator[None]:
    """Meanwhile it is known which folder this is."""
    with contextlib.ExitStack() as stack:
        if os.name == "posix":
            stack.callback(os.close, os.open(folder, os.O_RDONLY))  # while open, its number is given to no other
        noted[folder] = folder.stat()
        stack.callback(noted.pop, folder)
        yield


def check_held() -> None:
    """Raise `RunFailed` where a folder that this process has locked is gone, before it is made anew, or another's.

    Or where one in it that is being filled is gone: what is written from then on would be the second half alone. What
    `files.replacing` writes is preceded by it; ask before long work too, and before something is removed.
    """
    for folder in _HELD:
        if problem := _lost(folder):
            raise RunFailed(f"--output_dir {folder} {problem}")
    # A disk that gives all folders new numbers, as those of networks may, has given the locked ones theirs, too.
    numbered = all(_is_still(folder, before) for folder, before in _HELD.items())
    for folder, before in _FILLED.items():
        if numbered and not _is_still(folder, before):
            problem = f"{folder} was moved or removed while it was trained, and nothing more is saved"
            raise RunFailed(f"{problem}; put it back, and go on with --resume_from_checkpoint latest")


before_writing.append(check_held)


def _is_still(folder: Path, before: os.stat_result) -> bool:
    """Return whether a folder is the one that it was."""
    try:
        return os.path.samestat(folder.stat(), before)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # what a disk cannot tell just now ends no run
        return True


def _lost(folder: Path) -> str:
    """Return why a folder that was locked is this run's no more, by its lock or, without one, as the disk says; else
    empty.
    """
    number, process = _owner(folder)
    if process == _LENDERS.get(folder, this_process()):
        return ""
    if not _is_still(folder, _HELD[folder]):
        fix = "if it is elsewhere, go on with --output_dir PLACE --resume_from_checkpoint latest"
        return f"was moved or removed while it trained, and nothing more is saved; {fix}"
    # A process of another machine, or container, is not seen from here, nor this one from there.
    return f"is another run's by now (process {number}), and nothing more is saved; choose another" if process else ""


def guard_of(folder: Path) -> FileLock:
    """What locks a folder among the runs of this machine; the system frees it when a process ends."""
    name = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
    return FileLock(Path(tempfile.gettempdir()) / f"reslora-{getattr(os, 'getuid', int)()}-{name}.lock")


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Lock a folder among the runs of this machine; raises `Timeout` at once where another has it.

    The file is removed while it is still locked. filelock refuses it to who has opened it by then: it has no name.
    """
    guard = guard_of(folder)
    with guard.acquire(timeout=0):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                Path(guard.lock_file).unlink()


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
