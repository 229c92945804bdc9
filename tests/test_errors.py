"""The errors that end a run, and the conversion of other errors to them."""

import pytest
import torch

from reslora.errors import InvalidArgument, RunFailed, first_line, loaded_from_hub, out_of_memory, refused_as


def test_what_a_reader_raises_is_refused_in_one_line():
    line = "^--model x: cut off; give another$"
    with pytest.raises(InvalidArgument, match=line), refused_as("--model x", "give another"):
        raise OSError("cut off.\nmore")


def test_other_kinds_pass_and_so_does_what_is_refused_already():
    with pytest.raises(KeyError), refused_as("--model x", "give another", (OSError,)):
        raise KeyError("x")
    with pytest.raises(InvalidArgument, match=r"^--a: b; c$"), refused_as("--model x", "give another"):
        raise InvalidArgument("--a", "b", "c")
    with pytest.raises(KeyboardInterrupt), refused_as("--model x", "give another"):
        raise KeyboardInterrupt


def load_too_much() -> None:
    """Run out of memory as in diffusers' loading of weights, which hides the error under one of its own."""
    try:
        torch.empty(2**60)
    except RuntimeError:
        raise OSError("Unable to load weights from checkpoint file for 'x'") from None


def test_memory_that_runs_out_is_no_fault_of_the_files():
    line = r"^--model x: memory ran out \(.*allocate memory.*\); free memory, or use a smaller model or file$"
    with pytest.raises(RunFailed, match=line), refused_as("--model x", "repair the folder"):
        load_too_much()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 2.00 EiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_the_ways_to_say_that_memory_ran_out(error):
    assert out_of_memory(error) is error
    assert out_of_memory(RuntimeError("shapes do not fit")) is None


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("Dataset scripts are no longer supported, but found a.py", "needs code from the hub, which is never run"),
        ("set trust_remote_code=True", "needs code from the hub, which is never run"),
        ("no network\nat all", r"cannot be loaded \(no network\)"),
    ],
)
def test_what_keeps_a_data_set_from_being_loaded(message, problem):
    with (
        pytest.raises(InvalidArgument, match=rf"^--data x: {problem}; give a folder$"),
        loaded_from_hub("--data x", "give a folder"),
    ):
        raise RuntimeError(message)


@pytest.mark.parametrize(("message", "line"), [("a.\nb", "a"), ("", "ValueError")])
def test_first_line(message, line):
    assert first_line(ValueError(message)) == line
