"""The file of calibration batches: any arguments of a denoiser are read back unchanged."""

import json

import pytest
import torch
from core_models import assert_one_line
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

from reslora.images.output.calibration_file import read_calibration, write_calibration


def batch(size: int, captions: list[int], side: int = 4) -> dict:
    """Return a batch with every kind of argument."""
    return {
        "sample": torch.randn(size, 2, side, side),
        "timestep": torch.randint(0, 1000, (size,)),
        "added_cond_kwargs": {"text_embeds": torch.randn(size, 3), "time_ids": torch.ones(size, 6).bfloat16()},
        "x": [torch.randn(2, 1, side, side) for _ in range(size)],
        "cap_feats": [torch.randn(length, 3) for length in captions],
        "txt_ids": torch.zeros(5, 3),
        "t": torch.tensor(0.5),
        "guidance": None,
        "patch_size": 2,
        "return_dict": False,
    }


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other and type(one) is type(other)


def test_batches_come_back_as_they_were(tmp_path):
    batches = [batch(2, [5, 3]), batch(2, [5, 3], side=6), batch(3, [2, 2, 2], side=4)]
    write_calibration(tmp_path / "calibration.safetensors", batches)
    found = read_calibration(tmp_path / "calibration.safetensors")
    assert same(found, batches)
    # A product's last digit depends on where its operands begin: as torch would have placed them itself.
    assert all(value.data_ptr() % 64 == 0 for value in tree_leaves(found) if isinstance(value, torch.Tensor))


def test_names_say_where_a_tensor_is_and_join_the_batches(tmp_path):
    batches = [batch(2, [5, 3]), batch(1, [4]), batch(1, [4], side=6)]
    write_calibration(tmp_path / "calibration.safetensors", batches)
    tensors = load_file(tmp_path / "calibration.safetensors")
    assert torch.equal(tensors["sample"], torch.cat([part["sample"] for part in batches[:2]]))
    assert torch.equal(tensors["sample@2"], batches[2]["sample"])
    assert torch.equal(tensors["timestep"], torch.cat([part["timestep"] for part in batches]))
    ids = [part["added_cond_kwargs"]["time_ids"] for part in batches]
    assert torch.equal(tensors["added_cond_kwargs.time_ids"], torch.cat(ids))
    assert torch.equal(tensors["cap_feats.0"], torch.cat([part["cap_feats"][0] for part in batches]))
    assert torch.equal(tensors["cap_feats.1"], batches[0]["cap_feats"][1])


def test_same_batches_give_the_same_bytes(tmp_path):
    batches = [batch(2, [5, 3]), batch(1, [4])]
    for name in ("one", "other"):
        write_calibration(tmp_path / name, batches)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


TENSOR = {"tensor": "sample", "rows": [0, 2]}


@pytest.mark.parametrize(
    "wrong",
    [None, [], TENSOR | {"rows": [0]}],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("depth", [0, 2])
def test_damaged_batches_are_an_error_in_one_line(tmp_path, wrong, depth):
    path = tmp_path / "calibration.safetensors"
    trees = [[[]], [wrong], [{"sample": TENSOR}, wrong]][depth] if depth or wrong == [] else wrong
    save_file({"sample": torch.ones(2, 3)}, path, {"batches": json.dumps(trees)})
    with pytest.raises(ValueError) as error:
        read_calibration(path)
    assert_one_line(error, "calibration.safetensors", "train again")


@pytest.mark.parametrize(
    "metadata",
    [None, {"batches": "{"}],
    ids=["none", "cut off"],
)
def test_file_of_another_kind_is_an_error_in_one_line(tmp_path, metadata):
    path = tmp_path / "calibration.safetensors"
    save_file({"sample": torch.ones(2, 3)}, path, metadata)
    with pytest.raises(ValueError) as error:
        read_calibration(path)
    assert_one_line(error, "calibration.safetensors", "train again")


@pytest.mark.parametrize("content", [None, b"no tensors"])
def test_file_that_is_no_safetensors_is_an_error_in_one_line(tmp_path, content):
    path = tmp_path / "calibration.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_calibration(path)
    assert_one_line(error, "calibration.safetensors")
