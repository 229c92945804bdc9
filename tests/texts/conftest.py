"""Files for the language scripts: a tiny model and a small task."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

import train_llm
from reslora.runtime.script import run_script

from .helpers import VALIDATED, flags, row, write_llama, write_rows


@pytest.fixture(autouse=True)
def _another_run():
    """Reset accelerate's state, as in a new process: it keeps the first precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A tiny LLaMA."""
    return write_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Write word problems: 32 for training, 4 for validation, 6 for tests."""
    rows = [row(n) for n in range(48)]
    return write_rows(tmp_path_factory.mktemp("data"), train=rows[:32], validation=rows[32:36], test=rows[36:42])


@pytest.fixture(scope="session")
def single_process(tiny, data, tmp_path_factory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert run_script("train_llm.py", train_llm.start, flags(tiny, data, folder, *VALIDATED)) == 0
    return folder
