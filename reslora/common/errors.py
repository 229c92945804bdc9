"""What can end a run, one class each, for all scripts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")
"""How torch and systems say that memory ran out."""


class InvalidArgument(ValueError):
    """What the user gave cannot work: one line naming the argument, the problem and the fix; exit status 2."""

    def __init__(self, argument: str, problem: str, fix: str) -> None:
        super().__init__(f"{argument}: {problem}; {fix}")


class RunFailed(RuntimeError):
    """The run itself went wrong (a loss that is not finite, an export that does not match); exit status 1."""


class Diverged(RunFailed):
    """Numbers that are not finite: this training is lost, and others may go well.

    `advice` is for a plain run: an experiment keeps the problem alone.
    """

    diverged = True

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(f"{problem}; {advice}" if advice else problem)
        self.problem = problem


class Stopped(Exception):
    """Ctrl-C or SIGTERM ended the run after it was saved."""


class EndedElsewhere(Exception):
    """Another process of the run has failed, and says why; this one leaves with the same exit status, silently."""

    def __init__(self, status: int, diverged: bool = False) -> None:
        super().__init__(f"another process of this run has ended it with status {status}")
        self.status, self.diverged = status, diverged


@contextlib.contextmanager
def refused_as(argument: str, fix: str, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Turn what a reader raises inside into an `InvalidArgument` that names `argument` and `fix`.

    By default whatever it is: damaged files fail in as many ways as there are readers. `InvalidArgument` and
    `RunFailed` pass; memory that ran out is no fault of the files, and becomes a `RunFailed`.
    """
    try:
        yield
    except (InvalidArgument, RunFailed):
        raise
    except kinds as error:
        if cause := out_of_memory(error):
            advice = "free some, or take something smaller"
            raise RunFailed(f"{argument}: memory ran out ({first_line(cause)}); {advice}") from error
        raise InvalidArgument(argument, first_line(error), fix) from error


@contextlib.contextmanager
def loaded_from_hub(argument: str, fix: str) -> Iterator[None]:
    """Turn whatever keeps a data set from being loaded inside into an `InvalidArgument`; its code is never run."""
    try:
        yield
    except Exception as error:  # whatever a hub, a network or a parser can raise
        code = any(word in str(error) for word in ("script", "remote code", "remote_code"))
        problem = "needs code from the hub, which is never run" if code else f"cannot be loaded ({first_line(error)})"
        raise InvalidArgument(argument, problem, fix) from None


def out_of_memory(error: BaseException | None) -> BaseException | None:
    """Return the error, or that which it replaced, by which a CPU or GPU says that memory ran out; None without one."""
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error) for words in _MEMORY):
            return error
        error = error.__cause__ or error.__context__
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def another_ended(error: BaseException) -> str:
    """What a run of several processes says where one of them is gone, by the error of an exchange with it."""
    problem, _, _ = first_line(error).partition(". ")  # advice of the library's follows
    return f"another process of this run has ended ({problem}); go on with --resume_from_checkpoint latest"


def speaks() -> bool:
    """Return whether this process is the one of its machine that reports what all processes of a run find alike."""
    return os.environ.get("LOCAL_RANK", "0") in ("0", "-1")
