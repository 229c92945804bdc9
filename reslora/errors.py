"""Exceptions that end a run, shared by all scripts."""

import contextlib
import os
from collections.abc import Iterator

_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")
"""Messages of torch and operating systems about exhausted memory."""


class InvalidArgument(ValueError):
    """An argument is invalid; the message has one line: `argument: problem; fix`. The exit status is 2."""

    def __init__(self, argument: str, problem: str, fix: str) -> None:
        super().__init__(argument, problem, fix)  # all three, so that it can be pickled

    def __str__(self) -> str:
        return "{}: {}; {}".format(*self.args)


class RunFailed(RuntimeError):
    """The run failed, for example because the loss is not finite or the disk is full. The exit status is 1."""


class Diverged(RunFailed):
    """Training produced non-finite values; other runs of an experiment continue.

    The message has both `problem` and `advice`. An experiment with many runs stores only `problem`.
    """

    diverged = True

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(f"{problem}; {advice}" if advice else problem)
        self.problem = problem


class Stopped(Exception):
    """Ctrl-C or SIGTERM stopped the run; training that was in progress has been saved."""


class StoppedEarly(Exception):
    """A run of an experiment stopped early because its learning rate is clearly worse; the other runs continue.

    The message gives the reason.
    """


class EndedElsewhere(Exception):
    """Another process of the run failed and reports why; this process prints nothing and exits with the same status."""

    def __init__(self, status: int, diverged: bool = False) -> None:
        super().__init__(f"another process of this run has ended it with status {status}")
        self.status, self.diverged = status, diverged


@contextlib.contextmanager
def refused_as(argument: str, fix: str, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Convert exceptions of the given kinds into an `InvalidArgument` that names `argument` and `fix`.

    By default all exceptions are converted, because a damaged file can raise any. Two kinds are handled differently:

    - `InvalidArgument` and `RunFailed` are raised unchanged.
    - Out-of-memory errors are converted into a `RunFailed`.
    """
    try:
        yield
    except (InvalidArgument, RunFailed):
        raise
    except kinds as error:
        if cause := out_of_memory(error):
            advice = "free memory, or use a smaller model or file"
            raise RunFailed(f"{argument}: memory ran out ({first_line(cause)}); {advice}") from error
        raise InvalidArgument(argument, first_line(error), fix) from error


@contextlib.contextmanager
def loaded_from_hub(argument: str, fix: str) -> Iterator[None]:
    """Convert every exception that is raised while a data set is loaded from the Hub into an `InvalidArgument`."""
    try:
        yield
    except Exception as error:  # anything that a hub, a network or a parser can raise
        code = any(word in str(error) for word in ("script", "remote code", "remote_code"))
        problem = "needs code from the hub, which is never run" if code else f"cannot be loaded ({first_line(error)})"
        raise InvalidArgument(argument, problem, fix) from None


def out_of_memory(error: BaseException | None) -> BaseException | None:
    """Return the error, or one of its causes, that reports exhausted CPU or GPU memory; None if there is none."""
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error) for words in _MEMORY):
            return error
        error = error.__cause__ or error.__context__
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its final period; the class name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def another_ended(error: BaseException) -> str:
    """Return the message for the error of a collective operation after another process of the run has ended."""
    problem, _, _ = first_line(error).partition(". ")  # drop the advice that the library appends
    return f"another process of this run has ended ({problem}); resume with --resume_from_checkpoint latest"


def speaks() -> bool:
    """Return whether this process prints messages: local rank 0 does so for all processes of its machine."""
    return os.environ.get("LOCAL_RANK", "0") in ("0", "-1")
