"""The difference of two models as the best LoRA of a rank, read one layer at a time."""

import weakref

import pytest
import torch
from safetensors.torch import save_file

from images.model.lora_files.loras import names, update
from reslora.images.model.lora_files.extracting import Weights, difference, extracted


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (6, 3, 3, 3)])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_no_factors_of_that_rank_are_closer(shape, rank):
    """Eckart and Young: the error consists of the other singular values."""
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors, error = difference(delta, rank)
    values, matrix = torch.linalg.svdvals(delta.flatten(1)), delta.flatten(1)
    left = float(values[rank:].norm() / values.norm())
    assert factors.rank == min(rank, *matrix.shape) and factors.down.shape[1:] == delta.shape[1:]
    assert float((update(factors) - matrix).norm() / matrix.norm()) == pytest.approx(left, abs=1e-7)
    assert error == pytest.approx(left, abs=1e-7)


def test_only_one_layers_weights_are_in_memory(tmp_path, monkeypatch):
    known = names("stable_diffusion")
    for number in range(2):
        save_file({f"{k}.weight": torch.randn(v) for k, v in known.shapes.items()}, tmp_path / f"{number}.safetensors")
    alive: list[weakref.ref] = []
    most, read = 0, Weights.read

    def counted(self, *args):
        nonlocal most
        value = read(self, *args)
        alive.append(weakref.ref(value))
        most = max(most, sum(reference() is not None for reference in alive))
        return value

    monkeypatch.setattr(Weights, "read", counted)
    models = [Weights.of(tmp_path / f"{number}.safetensors", "unet", "--extract") for number in range(2)]
    parts, errors, others = extracted(*models, known, 2)
    assert len(parts["unet"]) == len(errors) == len(known.shapes) and not others
    assert most <= 4  # two of this layer, and two of the one before until they are named anew
