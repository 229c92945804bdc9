"""A replaced image or model file is detected, whichever part of it differs."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from reslora.content_hash import PIECE, PIECES, content_mark, folder_mark

LARGE = (256, 400)  # float32: longer than all pieces that are read of it


@pytest.fixture
def weights(tmp_path):
    """Write a file of two large tensors around two small ones."""
    path = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": LARGE, "b": (3,), "c": (7, 5), "d": LARGE}
    save_file({name: torch.randn(size, generator=generator) for name, size in sizes.items()}, path)
    assert LARGE[0] * LARGE[1] * 4 > 2 * PIECES * PIECE
    return path


def flip(path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("place", [0, 99_999])
def test_one_bit_anywhere_in_a_file_is_noticed(tmp_path, place):
    path = tmp_path / "0.png"
    path.write_bytes(bytes(100_000))
    before = content_mark(path)
    assert before == content_mark(path.read_bytes())
    flip(path, place)
    assert content_mark(path) != before


@pytest.mark.parametrize("name", ["a", "d"])
@pytest.mark.parametrize("part", ["all", "lower half"])
def test_every_tensor_that_is_another_is_noticed(weights, name, part):
    before, tensors = content_mark(weights), load_file(weights)
    half = len(tensors[name]) // 2
    rows = {"all": slice(None), "upper half": slice(half), "lower half": slice(half, None)}[part]
    tensors[name][rows] *= -3
    save_file(tensors, weights)
    assert content_mark(weights) != before


def test_the_same_weights_by_other_names_are_others(weights):
    before, tensors = content_mark(weights), load_file(weights)
    save_file(tensors | {"a": tensors["d"], "d": tensors["a"]}, weights)
    assert content_mark(weights) != before
    save_file({name.upper(): value for name, value in tensors.items()}, weights)
    assert content_mark(weights) != before


def test_little_of_a_large_model_is_read(weights):
    """Only the intended parts of each tensor are read: the gap between two parts is not."""
    before, start = content_mark(weights), 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    flip(weights, start + 2 * PIECE)
    assert content_mark(weights) == before
    flip(weights, start + PIECE - 1)
    assert content_mark(weights) != before


@pytest.mark.parametrize("content", [b"12", (2).to_bytes(8, "little") + b"[]x"])
def test_a_damaged_safetensors_file_is_read_as_any_other(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert content_mark(path) == content_mark(content)


def test_of_a_folder_names_count_and_weights_that_are_never_loaded_do_not(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text("{}")
    before = folder_mark(tmp_path / "one")
    (tmp_path / "one" / "model.bin").write_bytes(b"other")
    assert folder_mark(tmp_path / "one") == before
    (tmp_path / "one" / "config.json").rename(tmp_path / "one" / "other.json")
    assert folder_mark(tmp_path / "one") != before
