"""Several processes: the main process decides and broadcasts, and no process waits forever if one fails."""

import json
from pathlib import Path

import pytest
from launching import forked, start_forked
from waiting import ended

from reslora.errors import InvalidArgument
from reslora.runtime import processes as together

# Each process writes what it saw to a file of its own.
SCRIPT = """
import json, os, pathlib, sys, time
import accelerate
from reslora.errors import Diverged, EndedElsewhere, InvalidArgument, RunFailed
from reslora.runtime import processes as together
from reslora.runtime.script import shares_the_cpu

accelerator = accelerate.Accelerator(cpu=shares_the_cpu())
rank, seen = accelerator.process_index, {{}}
seen["main"] = together.is_main()
seen["decided"] = together.broadcast_from_main(lambda: [rank, "said"])
seen["each"] = together.on_all(lambda: rank)
seen["gathered"] = together.all_gather(rank)
seen["any"] = [together.any_of(rank == 1), together.any_of(False)]
seen["any of each"] = together.any_of_each([rank == 1, False, rank == 0])

def fails(error, at):
    if rank == at:
        raise error
    return "well"

for name, do in {{
    "main refuses": lambda: together.broadcast_from_main(lambda: fails(InvalidArgument("--a", "b", "c"), 0)),
    "main fails": lambda: together.broadcast_from_main(lambda: fails(OSError("disk"), 0)),
    "main diverges": lambda: together.broadcast_from_main(lambda: fails(Diverged("loss"), 0)),
    "main meets": lambda: together.broadcast_from_main(lambda: together.any_of(True)),
    "other fails": lambda: together.on_all(lambda: fails(RunFailed("other"), 1)),
}}.items():
    try:
        do()
    except Exception as error:
        seen[name] = [type(error).__name__, getattr(error, "status", None)]
        seen[name] += [error.diverged] if name == "main diverges" and rank == 1 else []
done = pathlib.Path("{folder}/done")
together.broadcast_from_main(lambda: time.sleep(0.1) or done.touch())
seen["waited"] = done.exists()
pathlib.Path(f"{folder}/{{rank}}.json").write_text(json.dumps(seen))
together.wait()
accelerator.end_training()
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("together")
    (folder / "script.py").write_text(SCRIPT.format(folder=folder))
    forked(folder / "script.py", folder=folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.exhaustive
def test_what_the_main_process_decides_all_know(seen):
    assert [found["main"] for found in seen] == [True, False]
    assert [found["decided"] for found in seen] == [[0, "said"], [0, "said"]]
    assert [found["each"] for found in seen] == [0, 1]
    assert [found["gathered"] for found in seen] == [[0, 1], [0, 1]]
    assert [found["any"] for found in seen] == [[True, False], [True, False]]
    assert [found["any of each"] for found in seen] == [[True, False, True]] * 2
    assert all(found["waited"] for found in seen)


@pytest.mark.exhaustive
def test_what_fails_in_one_process_ends_all_with_its_status(seen):
    assert [found["main refuses"] for found in seen] == [["InvalidArgument", None], ["EndedElsewhere", 2]]
    assert [found["main fails"] for found in seen] == [["OSError", None], ["EndedElsewhere", 1]]
    assert [found["main diverges"] for found in seen] == [["Diverged", None], ["EndedElsewhere", 1, True]]
    assert [found["main meets"] for found in seen] == [["AssertionError", None], ["EndedElsewhere", 1]]
    assert [found["other fails"] for found in seen] == [["EndedElsewhere", 1], ["RunFailed", None]]


def test_alone_everything_is_a_plain_call():
    assert together.is_single_process() and together.is_main()
    assert together.broadcast_from_main(lambda: 3) == together.on_all(lambda: 3) == 3
    assert together.all_gather(3) == [3]
    assert together.any_of(True) is True and together.any_of(False) is False
    nobody_else = together.wait
    nobody_else()
    for collective in (together.broadcast_from_main, together.on_all):
        with pytest.raises(InvalidArgument):
            collective(refuse)


def test_no_decision_is_made_inside_another_alone_either():
    """Tests with one process detect code that would block several processes."""
    for _ in range(2):
        with pytest.raises(AssertionError, match="enters a collective operation"):
            together.broadcast_from_main(lambda: together.broadcast_from_main(lambda: 1))
    assert together.broadcast_from_main(lambda: 1) == 1


def refuse() -> None:
    raise InvalidArgument("--a", "b", "c")


# Rank 1 dies without a word while rank 0 waits for it.
DEAD = """
import os, sys
import torch
import torch.distributed as dist
from reslora.runtime import processes as together
from reslora.runtime.script import shares_the_cpu
from reslora.runtime.script import run_script

def main(argv, stop):
    dist.init_process_group("gloo")
    together.wait()
    if dist.get_rank() == 1:
        os._exit(9)
    {waiting}

sys.exit(run_script("script", main))
"""


WAITING = [
    f"together.{verb}" for verb in ("wait()", "any_of(False)", "broadcast_from_main(lambda: 1)", "on_all(lambda: 1)")
]


@pytest.mark.parametrize(
    "waiting", [*WAITING, "dist.all_reduce(torch.ones(1))"]
)  # the last: as gradients are exchanged
def test_a_process_that_dies_is_not_waited_for(tmp_path, waiting):
    statuses, printed = outcome(tmp_path, DEAD.format(waiting=waiting))
    last = printed.splitlines()[-1]
    assert statuses == [1, 9] and "another process of this run has ended" in last, printed
    assert "typically" not in last
    assert "Traceback" not in printed


def outcome(folder: Path, script: str) -> tuple[list[int], str]:
    """Return the exit statuses of two processes of a script, by rank, and their output."""
    (folder / "script.py").write_text(script)
    processes = start_forked(folder / "script.py", printed=folder / "printed.txt")
    return [ended(process) for process in processes], (folder / "printed.txt").read_text()


# Collectives of this group expire after ten seconds; the main process takes twelve, and does not always get through.
# To find each other they have longer.
PATIENT = """
import os, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from reslora.runtime import processes as together
from reslora.runtime.script import shares_the_cpu
from reslora.runtime.script import run_script

def main(argv, stop):
    dist.init_process_group("gloo")
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=10))
    assert together.broadcast_from_main(lambda: time.sleep({first}) or "merged") == "merged"
    together.broadcast_from_main(lambda: time.sleep(12) or {then})
    together.wait()

sys.exit(run_script("script", main))
"""


@pytest.mark.exhaustive
def test_the_others_outwait_what_a_collective_does_not(tmp_path):
    """Merging, sampling and reading back take longer than the time limit of a collective."""
    statuses, printed = outcome(tmp_path, PATIENT.format(first=12, then=None))
    assert statuses == [0, 0], printed


@pytest.mark.exhaustive
def test_who_waits_for_a_main_process_that_dies_ends_in_one_line(tmp_path):
    """The main process also holds the store by which the processes found each other."""
    statuses, printed = outcome(tmp_path, PATIENT.format(first=0, then="os._exit(9)"))
    assert statuses == [9, 1], printed
    assert "another process of this run has ended" in printed.splitlines()[-1] and "Traceback" not in printed
