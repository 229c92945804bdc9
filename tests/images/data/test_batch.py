"""A batch of samples: which values are stacked, which stay lists, and the effect of weights on the loss."""

import dataclasses

import torch
from accelerate import Accelerator

from images import exact_steps
from reslora.images.data.batch import Batch, collate
from reslora.images.data.plan import Plan
from reslora.images.data.samples import TrainingSamples


def sample(number: int, tokens: int = 3) -> Batch:
    numbers = {name: torch.full((4, 2, 2), float(number)) for name in ("noise", "posterior_noise")}
    text = {"states": torch.full((tokens, 5), float(number)), "pooled": torch.full((5,), float(number))}
    scalars = {"timesteps": torch.tensor(number), "weight": torch.tensor(0.5 * number)}
    return Batch(**numbers, **scalars, sizes=torch.arange(6), caption=f"caption {number}", text=text)


def test_samples_are_stacked_and_captions_listed():
    batch = collate([sample(1), sample(2), sample(3)])
    assert batch.timesteps.tolist() == [1, 2, 3] and batch.weight.tolist() == [0.5, 1.0, 1.5]
    assert batch.noise.shape == (3, 4, 2, 2) and batch.sizes.shape == (3, 6)
    assert batch.caption == ["caption 1", "caption 2", "caption 3"]
    assert batch.text["states"].shape == (3, 3, 5) and batch.text["pooled"].shape == (3, 5)
    assert batch.moments is None and batch.pixels is None


def test_text_states_of_different_lengths_stay_a_list():
    batch = collate([sample(1, tokens=2), sample(2, tokens=7)])
    assert [tuple(states.shape) for states in batch.text["states"]] == [(2, 5), (7, 5)]
    assert batch.text["pooled"].shape == (2, 5)


def test_all_of_a_batch_goes_to_a_device():
    moved = collate([sample(1, tokens=2), sample(2, tokens=7)]).to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    tensors += [*moved.text["states"], moved.text["pooled"]]
    assert len(tensors) == 8 and all(value.is_meta for value in tensors)


def test_a_weight_multiplies_the_loss_of_its_sample_in_training_alone(model):
    training_data, loss, denoiser = exact_steps.setting(model, Accelerator(cpu=True))
    source = dataclasses.replace(training_data.sources[0], weight=0.25)
    weighted = dataclasses.replace(training_data, sources=(source,))
    draws = Plan(training_data.sources, 3, 0).forward(0)
    one, other = (collate([TrainingSamples(kind)[draw] for draw in draws]) for kind in (training_data, weighted))
    with torch.no_grad():
        torch.testing.assert_close(loss(denoiser, other), 0.25 * loss(denoiser, one))
        assert torch.equal(loss(denoiser, other, weighted=False), loss(denoiser, one, weighted=False))
        assert (loss(denoiser, one) > 0).all()
