"""Files of tensors: what is written is read back, whole files only, one cell in memory at a time."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from launching import launch

from diffusion.runs import leave_behind
from reslora.diffusion.data.store import cached, missing, write


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def numbered(number: int) -> dict[str, torch.Tensor]:
    return {"half": torch.full((number % 3 + 1, 2), number, dtype=torch.bfloat16), "long": torch.tensor(number)}


def test_cells_of_any_shape_and_dtype_are_read_back_across_files(tmp_path, accelerator):
    paths = [tmp_path / f"{number}.arrow" for number in range(3)]
    found = cached(paths, 4, lambda file: (numbered(i) for i in range(4 * file, min(10, 4 * file + 4))), accelerator)
    for number in (9, 0, 4, 3, 8):
        for name, value in numbered(number).items():
            torch.testing.assert_close(found[number][name], value, rtol=0, atol=0)
    assert found.problems() == {}


def test_empty_cells_are_told_with_their_reason(tmp_path, accelerator):
    parts = [[numbered(0), "damaged"], ["gone", numbered(3)]]
    found = cached([tmp_path / "0", tmp_path / "1"], 2, lambda file: (cell for cell in parts[file]), accelerator)
    assert found.problems() == {1: "damaged", 2: "gone"} and found[3]["long"] == 3


def test_files_that_are_there_are_not_made_again(tmp_path, accelerator):
    paths = [tmp_path / "0", tmp_path / "1"]
    cached(paths[:1], 2, lambda file: (numbered(i) for i in (7, 8)), accelerator)
    made = []

    def make(file: int):
        made.append(file)
        yield numbered(file)

    found = cached(paths, 2, make, accelerator)
    assert made == [1] and found[0]["long"] == 7 and found[2]["long"] == 1


@pytest.mark.parametrize("rest", [0, 100, -1])
def test_a_file_that_was_cut_short_is_made_again(tmp_path, accelerator, rest):
    path = tmp_path / "0"
    write(path, iter([numbered(0)]))
    path.write_bytes(path.read_bytes()[:rest])
    assert missing([path], accelerator) == [0]
    assert cached([path], 1, lambda file: (numbered(i) for i in (5,)), accelerator)[0]["long"] == 5


def test_what_is_interrupted_leaves_nothing(tmp_path):
    def interrupted():
        yield numbered(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "0", interrupted())
    assert list(tmp_path.iterdir()) == []


def test_all_processes_share_the_work(tmp_path, accelerator, monkeypatch):
    """Those of all machines, whatever their number on this one."""
    paths = [tmp_path / str(number) for number in range(7)]
    write(paths[2], iter([]))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(type(accelerator), "num_processes", 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(type(accelerator), "process_index", rank)
        monkeypatch.setattr(type(accelerator), "local_process_index", rank % 2)
        shares.append(missing(paths, accelerator))
    assert shares == [[0, 4], [1, 5], [6], [3]]


@pytest.mark.parametrize("folders", [["here"] * 4, ["here", "here", "there", "there"], ["1", "2", "3", "4"]])
def test_each_file_is_made_once_in_each_folder_that_processes_share(tmp_path, monkeypatch, folders):
    """Two machines with two processes each, as threads: on one disk, on one each, or on one for each process."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    barrier, made = threading.Barrier(4, timeout=60), []

    def process(rank: int) -> list[int]:
        accelerator = SimpleNamespace(
            process_index=rank, num_processes=4, local_process_index=rank % 2, is_local_main_process=rank % 2 == 0,
            wait_for_everyone=barrier.wait,
        )  # fmt: skip
        (tmp_path / folders[rank]).mkdir(exist_ok=True)

        def make(number: int):
            made.append((folders[rank], number))
            yield numbered(number)

        cells = cached([tmp_path / folders[rank] / str(n) for n in range(6)], 1, make, accelerator)
        return [cells[number]["long"].item() for number in range(6)]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(process, range(4))) == [list(range(6))] * 4
    assert sorted(made) == sorted((folder, number) for folder in set(folders) for number in range(6))


MACHINE = """
import os, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from diffusion.runs import leave_behind
from reslora.diffusion.data.store import cached

accelerator = Accelerator(cpu=True)
assert os.environ["LOCAL_WORLD_SIZE"] == "1" and accelerator.num_processes == 2
for name in ("shared", f"disk-{accelerator.process_index}"):
    folder, made = Path(sys.argv[1]) / name, []

    def make(number):
        made.append(number)
        yield {"value": torch.tensor(number)}

    cells = cached([folder / str(number) for number in range(5)], 1, make, accelerator)
    assert [cells[number]["value"].item() for number in range(5)] == list(range(5))
    print("MADE", name, *made, flush=True)
"""


def test_two_machines_make_each_file_once_on_a_shared_disk_and_all_on_their_own(tmp_path):
    """Two launchers, which know each other by the network alone."""
    (tmp_path / "machine.py").write_text(MACHINE)
    printed = launch("two_nodes.yaml", tmp_path / "machine.py", str(tmp_path), folder=tmp_path)
    lines = sorted(line for line in printed.splitlines() if line.startswith("MADE"))
    assert lines == ["MADE disk-0 0 2 4 1 3", "MADE disk-1 1 3 0 2 4", "MADE shared 0 2 4", "MADE shared 1 3"]


def test_what_a_killed_process_left_is_removed(tmp_path, accelerator):
    leave_behind(tmp_path / "0")
    cached([tmp_path / "0"], 1, lambda file: (numbered(i) for i in (0,)), accelerator)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_one_cell_is_in_memory_while_a_file_is_written(tmp_path):
    alive: list[weakref.ref] = []

    def watched():
        for number in range(20):
            assert sum(tensor() is not None for tensor in alive) <= 1
            tensor = torch.full((2,), number)
            alive.append(weakref.ref(tensor))
            yield {"value": tensor}
            del tensor

    write(tmp_path / "0", watched())
    assert len(alive) == 20


def test_a_cell_is_read_without_its_neighbours(tmp_path, accelerator):
    """All the rest of the file is wiped out but its beginning and the footer: nothing misses it."""
    path = tmp_path / "0"
    write(path, ({"value": torch.full((4096,), number)} for number in range(32)))
    content, ends, footer = bytearray(path.read_bytes()), 8, 8192
    start = content.index(torch.full((64,), 20).numpy().tobytes())
    before, after = slice(ends, start - 1024), slice(start + 8 * 4096, len(content) - footer)
    for wiped in (before, after):
        content[wiped] = bytes(wiped.stop - wiped.start)
    path.write_bytes(content)
    assert (cached([path], 32, lambda file: iter(()), accelerator)[20]["value"] == 20).all()
