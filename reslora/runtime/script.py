"""Common entry code of all scripts: turn errors into one line and an exit status, and signals into stop requests."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence

from ..attributes import override_attributes
from ..errors import (
    EndedElsewhere,
    InvalidArgument,
    RunFailed,
    Stopped,
    another_ended,
    first_line,
    out_of_memory,
    speaks,
)
from ..formatting import printable
from .signals import StopRequest
from .stdio import ignore_broken_pipes, take_any_file_name

# Messages of gloo and NCCL in a collective if another process of the run has ended.
_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


def run_script(
    prog: str, main: Callable[[Sequence[str] | None, StopRequest], None], argv: Sequence[str] | None = None
) -> int:
    """Run `main(argv, stop)` and return the exit status; print errors that the user can fix as one line on stderr.

    The exit status is:

    - 0 after success;
    - 1 for `RunFailed`, exhausted memory, and files that cannot be read or written;
    - 2 for `InvalidArgument`;
    - 128 + signal after Ctrl-C or SIGTERM. The signal sets `stop`; `main` saves and then raises `Stopped`. A closed
      terminal is treated as SIGTERM.

    Other exceptions are bugs and are raised.
    """
    # The user cannot do anything about warnings of one library about another.
    warnings.filterwarnings("ignore", category=FutureWarning)
    take_any_file_name()
    with ignore_broken_pipes(), override_attributes(warnings, formatwarning=warning_line), StopRequest() as stop:
        try:
            main(argv, stop)
            status = 0
        except InvalidArgument as error:
            if speaks():
                _say(f"{prog}: error: {error}")
            status = 2
        except (RunFailed, OSError) as error:  # a full disk or a removed directory: the last checkpoint is intact
            _say(f"{prog}: {error}")
            status = 1
        except (RuntimeError, MemoryError) as error:
            if cause := out_of_memory(error):
                _say(f"{prog}: memory ran out ({first_line(cause)}); free memory, or use a smaller model or batch")
            elif any(words in str(error) for words in _GONE):
                _say(f"{prog}: {another_ended(error)}")
            elif "DataLoader worker" in str(error):  # torch raises this from a signal handler, at any place
                fix = "give a lower --dataloader_num_workers, or more memory"
                _say(f"{prog}: {first_line(error)}; {fix}; the last checkpoint is intact")
            else:
                raise
            status = 1
        except Stopped as error:
            if speaks():
                _say(f"{prog}: {error}")
            status = 128 + (stop.signal or signal.SIGINT)
        except EndedElsewhere as error:
            status = error.status
        # On a busy machine, gloo's threads abort a process that exits with a live group (status -6 after a good run).
        # Scripts import the module, with torch, only after their options are validated.
        processes = sys.modules.get(f"{__package__}.processes")
        if processes is not None:
            processes.leave(everyone=status not in (1, 2))
        return status


def print_error(prog: str, error: Exception) -> int:
    """Print an error as one line on stderr and return the exit status: 2 for `InvalidArgument`, otherwise 1."""
    refused = isinstance(error, InvalidArgument)
    _say(f"{prog}: {'error: ' if refused else ''}{error}")
    return 2 if refused else 1


def warning_line(message: Warning | str, *where: object, **more: object) -> str:
    """Return a warning as one line, without the code location that Python adds."""
    return f"warning: {' '.join(str(message).split())}\n"


def limit_spinning() -> None:
    """Limit how long an idle thread of GNU OpenMP spins before it sleeps; call this before torch is imported.

    By default an idle thread spins 300,000 times, which is ten times slower on cores that other processes use too.
    Without spinning, a step of a small U-Net takes half as long again.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def shares_the_cpu() -> bool:
    """Return whether several processes run on a machine without an accelerator.

    In this case `Accelerator` needs `cpu=True`: accelerate's launcher does not pass `use_cpu` to several
    processes, so without it each process would find no backend and run as the only one. With DeepSpeed this returns
    False, because `cpu=True` would disable DeepSpeed.
    """
    import torch  # slow, and therefore imported only after the options are validated

    several = int(os.environ.get("WORLD_SIZE", 1)) > 1 and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true"
    return several and not torch.accelerator.is_available()


def _say(text: str) -> None:
    print(printable(" ".join(text.split())), file=sys.stderr)
