"""What every script does around its `main`: errors become one line and a status, signals a request to stop."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence

from ..words import printable
from .errors import (
    EndedElsewhere,
    InvalidArgument,
    RunFailed,
    Stopped,
    another_ended,
    first_line,
    out_of_memory,
    speaks,
)
from .readers import outlived, take_any_file_name
from .signals import StopRequest
from .temporarily import temporarily

# How gloo and NCCL say, where gradients are exchanged, that another process of the run is gone.
_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


def run_script(
    prog: str, main: Callable[[Sequence[str] | None, StopRequest], None], argv: Sequence[str] | None = None
) -> int:
    """Run `main(argv, stop)` and return the script's exit status; what the user can mend is one line on stderr.

    0; 2 for `InvalidArgument`; 1 for `RunFailed`, for memory that runs out and for files that cannot be read or
    written; 128 + signal after Ctrl-C or SIGTERM, which `stop` notes and `main` answers by raising `Stopped` once it
    has saved; a terminal that closes is as SIGTERM. Other exceptions are mistakes of ours, and pass.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # how one library calls another is not for who trains
    take_any_file_name()
    with outlived(), temporarily(warnings, formatwarning=warning_line), StopRequest() as stop:
        try:
            main(argv, stop)
            status = 0
        except InvalidArgument as error:
            if speaks():
                _say(f"{prog}: error: {error}")
            status = 2
        except (RunFailed, OSError) as error:  # a full disk, a folder that went away: the last checkpoint is intact
            _say(f"{prog}: {error}")
            status = 1
        except (RuntimeError, MemoryError) as error:
            if cause := out_of_memory(error):
                _say(f"{prog}: memory ran out ({first_line(cause)}); free some, or take a smaller model or batch")
            elif any(words in str(error) for words in _GONE):
                _say(f"{prog}: {another_ended(error)}")
            else:
                raise
            status = 1
        except Stopped as error:
            if speaks():
                _say(f"{prog}: {error}")
            status = 128 + (stop.signal or signal.SIGINT)
        except EndedElsewhere as error:
            status = error.status
        _leave_process_group(together=status not in (1, 2))
        return status


def warning_line(message: Warning | str, *where: object, **more: object) -> str:
    """Return a warning as one line, without the place in the code that Python names."""
    return f"warning: {' '.join(str(message).split())}\n"


def shares_the_cpu() -> bool:
    """Return whether this is one of several processes on a machine without a GPU or another accelerator.

    accelerate must be told: without a device it finds no backend, and would take each process for the only one. Its
    launcher does not pass `use_cpu` on to several. False with DeepSpeed, which accelerate drops where it is told.
    """
    import torch  # only once the flags make sense

    several = int(os.environ.get("WORLD_SIZE", 1)) > 1 and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true"
    return several and not torch.accelerator.is_available()


def _say(text: str) -> None:
    print(printable(" ".join(text.split())), file=sys.stderr)


def _leave_process_group(together: bool) -> None:
    """On a busy machine gloo's threads abort a process that exits while its group is alive: status -6 after a good run.

    `together`: all processes of the run leave; where only some do, groups that wait for the others are left alone.
    """
    together_module = sys.modules.get(f"{__package__}.together")  # scripts import it, and torch, after their flags
    if together_module is not None:
        together_module.leave(everyone=together)
