"""Files of encoded items: found by key, written once, and read variant by variant."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from waiting import LIMIT

from reslora.images.data import store
from reslora.images.data.store import Encoded, fill, remove_damaged


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def numbered(key: int) -> dict[str, torch.Tensor]:
    """Return the tensors of an item with a single variant."""
    return {"half": torch.full((1, key % 3 + 1, 2), key, dtype=torch.bfloat16), "long": torch.tensor([key])}


def filled(folder: Path, keys: Sequence[int], accelerator, made: list | None = None) -> Encoded:
    """Return items whose value is their key; keys of items that are made now are added to `made`."""
    encoded = Encoded(folder, "kind", keys)

    def make(numbers: Sequence[int]):
        for number in numbers:
            if made is not None:
                made.append(keys[number])
            yield numbered(keys[number])

    fill(encoded, make, accelerator)
    return encoded


def values(encoded: Encoded) -> list[int]:
    return [encoded.read(number)["long"].item() for number in range(len(encoded.keys))]


def test_items_of_any_shape_are_read_back(tmp_path, accelerator):
    keys = [7, 3, 2**62, 9, 0, 1, 5, 6, 4, 8]
    found = filled(tmp_path, keys, accelerator)
    assert len(list(tmp_path.iterdir())) == 10
    for number in (9, 0, 4, 3, 8, 2):
        for name, value in numbered(keys[number]).items():
            torch.testing.assert_close(found.read(number)[name], value[0], rtol=0, atol=0)
    assert found.problems() == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool])
def test_every_dtype_is_read_back(tmp_path, dtype):
    """Of tensors with several values and with one."""
    item = {"many": torch.arange(12).view(2, 3, 2).to(dtype), "one": torch.tensor([1, 0]).to(dtype)}
    encoded = Encoded(tmp_path, "kind", [5])
    encoded.write(0, item)
    for variant in range(2):
        found = encoded.read(0, variant)
        assert found.keys() == item.keys() and all(found[name].dtype == dtype for name in item)
        assert all(torch.equal(found[name], item[name][variant]) for name in item)


def test_variants_are_read_one_by_one_and_repeated_where_an_item_has_fewer(tmp_path, accelerator):
    items = [{"long": torch.tensor(variants)} for variants in ([0, 1, 2, 3], [10], [20, 21])]
    encoded = Encoded(tmp_path, "kind", [5, 6, 7])
    fill(encoded, lambda numbers: (items[n] for n in numbers), accelerator)
    found = [[encoded.read(number, variant)["long"].item() for variant in range(4)] for number in range(3)]
    assert found == [[0, 1, 2, 3], [10, 10, 10, 10], [20, 21, 20, 21]]


def test_items_that_cannot_be_encoded_are_told_with_their_reason(tmp_path, accelerator):
    items = {4: numbered(4), 3: "damaged", 2: "gone", 1: numbered(1)}
    for _ in range(2):
        encoded = Encoded(tmp_path, "kind", [4, 3, 2, 1, 3])
        fill(encoded, lambda numbers: (items.pop([4, 3, 2, 1][n]) for n in numbers), accelerator)
        assert encoded.problems() == {1: "damaged", 2: "gone", 4: "damaged"}
        assert encoded.read(3)["long"] == 1 and encoded.read(0)["long"] == 4
    assert Encoded(tmp_path, "kind", [1, 2]).problems() == {1: "gone"}


def test_only_keys_that_are_in_no_file_are_made(tmp_path, accelerator):
    """With one more item, fewer items, another order, and one item twice; files of other kinds are not used."""
    for keys, expected in (([1, 2, 3], [1, 2, 3]), ([1, 4, 2, 3], [4]), ([3, 1], []), ([4, 3, 2, 1, 4], [])):
        made = []
        assert values(filled(tmp_path, keys, accelerator, made=made)) == keys
        assert made == expected
    assert Encoded(tmp_path, "other", [1, 2]).missing() == [0, 1]


@pytest.mark.parametrize("rest", [5, -30])
def test_a_file_that_was_cut_short_is_named_and_made_again_once_it_is_removed(tmp_path, accelerator, rest):
    """In its length, its header or its content."""
    found = filled(tmp_path, [5, 6], accelerator)
    path = tmp_path / f"{found.name(0)}.safetensors"
    path.write_bytes(path.read_bytes()[:rest])
    with pytest.raises(OSError, match=rf"^{path} is damaged \(.+\): remove it, and its content is encoded anew$"):
        found.read(0)
    assert found.read(1)["long"] == 6
    path.unlink()
    made = []
    assert values(filled(tmp_path, [5, 6], accelerator, made=made)) == [5, 6] and made == [5]


def test_a_file_with_a_damaged_header_is_named_with_what_helps(tmp_path, accelerator):
    found = filled(tmp_path, [5], accelerator)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for damaged in (content.replace(*(b'"dtype"', b'"dtypo"')), b"\xff" * 8 + content[8:], b"\xff" * len(content)):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=rf"^{path} is damaged .*remove it"):
            found.read(0)


@pytest.mark.parametrize("damage", ["bit", "short", "no checksum"])
def test_a_damaged_file_is_written_again_and_named(tmp_path, accelerator, capsys, damage):
    found = filled(tmp_path, [5, 6], accelerator)
    path = tmp_path / f"{found.name(0)}.safetensors"
    content = path.read_bytes()
    if damage == "no checksum":
        save_file({name: value.contiguous() for name, value in numbered(5).items()}, path)
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage == "bit" else content[:-1])
    remove_damaged(found, accelerator)
    warning = f"warning: {path} is damaged or without a checksum; encoding the content again\n"
    assert capsys.readouterr().out == warning
    made = []
    assert values(filled(tmp_path, [5, 6], accelerator, made=made)) == [5, 6] and made == [5]
    assert path.read_bytes() == content
    remove_damaged(found, accelerator)
    assert capsys.readouterr().out == ""


def test_what_is_interrupted_leaves_the_files_before_it(tmp_path, accelerator):
    def interrupted(numbers):
        for number in numbers:
            if number == 3:
                raise KeyboardInterrupt
            yield numbered(number)

    with pytest.raises(KeyboardInterrupt):
        fill(Encoded(tmp_path, "kind", range(6)), interrupted, accelerator)
    assert len(list(tmp_path.iterdir())) == 3
    made = []
    assert values(filled(tmp_path, range(6), accelerator, made=made)) == list(range(6))
    assert made == [3, 4, 5]


@pytest.mark.parametrize("folders", [["here"] * 4, ["here", "here", "there", "there"]])
def test_each_item_is_made_once_in_each_folder_that_processes_share(tmp_path, monkeypatch, folders):
    """Two machines with two processes each, as threads: on a shared disk, on one disk each, or on one per process.

    The first folder has some of the items already.
    """
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(store, "wait", threading.Barrier(4, timeout=LIMIT).wait)
    for key in (2, 4):
        Encoded(tmp_path / folders[0], "kind", [key]).write(0, numbered(key))
    made = []

    def process(rank: int) -> list[int]:
        accelerator = SimpleNamespace(
            process_index=rank, num_processes=4, local_process_index=rank % 2, is_local_main_process=rank % 2 == 0
        )
        mine: list[int] = []
        encoded = filled(tmp_path / folders[rank], list(range(9)), accelerator, made=mine)
        made.extend((folders[rank], key) for key in mine)
        return values(encoded)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(process, range(4))) == [list(range(9))] * 4
    there = {(folders[0], 2), (folders[0], 4)}
    assert sorted(made) == sorted({(folder, key) for folder in folders for key in range(9)} - there)
