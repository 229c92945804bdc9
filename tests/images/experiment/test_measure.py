"""Losses at fixed timesteps and noises: the formula by hand, and their independence of other images."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from images import exact_steps
from images.runs import with_options
from reslora.experiment.study import numbers
from reslora.images.data.samples import NOISES, TIMESTEPS, FixedSamples, losses_of, measured_at
from reslora.images.model.loss import masked
from reslora.images.output.reports import Validation
from reslora.runtime.signals import StopRequest


@pytest.fixture(scope="module")
def setting(model):
    """Training data, loss and denoiser in float64; images have content hashes."""
    training_data, loss, denoiser = exact_steps.setting(model)
    marks = [f"mark {number}" for number in range(exact_steps.IMAGES)]
    (source,) = training_data.sources
    images = SimpleNamespace(captions=source.images.captions, marks=marks)
    return dataclasses.replace(training_data, sources=(dataclasses.replace(source, images=images),)), loss, denoiser


def samples(training_data, image: int = 0, batch_size: int = TIMESTEPS * NOISES) -> list:
    """Return all validation samples of an image, in one batch by default."""
    return list(FixedSamples(training_data).batches([(0, image)], batch_size))


def test_timesteps_are_in_the_middle_of_their_strata(setting):
    training_data, *_ = setting
    assert [int(timestep) for timestep in measured_at(training_data.objective)] == [
        62,
        187,
        312,
        437,
        562,
        687,
        812,
        937,
    ]
    found = torch.cat([batch.timesteps for batch in samples(training_data, batch_size=7)])
    assert found.tolist() == [step for step in (62, 187, 312, 437, 562, 687, 812, 937) for _ in range(NOISES)]


def test_noises_depend_on_content_and_number_alone(setting):
    training_data, *_ = setting
    other = {"seed": 5, "noise_offset": 0.3, "random_flip": True, "train_batch_size": 7}
    (source,) = training_data.sources
    moved = SimpleNamespace(captions=source.images.captions[::-1], marks=source.images.marks[::-1])
    there = dataclasses.replace(source, images=moved, train=(), held_out=(0,))
    elsewhere = with_options(dataclasses.replace(training_data, sources=(there,)), **other)
    here = torch.cat([batch.noise for batch in samples(training_data, 1)])
    assert here.equal(torch.cat([batch.noise for batch in samples(elsewhere, exact_steps.IMAGES - 2)]))
    assert len({float(noise.sum()) for noise in here}) == TIMESTEPS * NOISES
    assert not here.equal(torch.cat([batch.noise for batch in samples(training_data, 0)]))


def test_losses_are_means_over_noises_by_hand(setting):
    """The mean squared error of v = sqrt(a) e - sqrt(1 - a) x, without the weights of training."""
    training_data, loss, denoiser = setting
    images = [(0, 4), (0, 2)]
    found = losses_of(lambda batch: loss(denoiser, batch, weighted=False), training_data, images)
    assert found.shape == (2, TIMESTEPS)
    alphas = training_data.objective.scheduler.alphas_cumprod.double()
    for row, (_, image) in zip(found, images, strict=True):
        (batch,) = samples(training_data, image)
        mean, std = batch.moments.double().unbind(1)
        latents = (mean + std * batch.posterior_noise) * loss.pipeline.vae.config.scaling_factor
        a = alphas[batch.timesteps].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * batch.noise
        (text,) = batch.text.values()
        with torch.no_grad():
            (predicted,) = denoiser(noisy, batch.timesteps, text, return_dict=False)
        target = a.sqrt() * batch.noise - (1 - a).sqrt() * latents
        expected = (predicted - target).square().flatten(1).mean(1).view(TIMESTEPS, NOISES).mean(1)
        torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=0)


def test_a_validation_that_steers_is_by_the_same_losses(setting):
    """The means by timestep are logged with it."""
    training_data, loss, denoiser = setting
    training_data = with_options(training_data, validation_noises=2)
    validation = Validation(loss, training_data, None, Accelerator(cpu=True), StopRequest())
    found = validation.losses(denoiser.train())
    assert denoiser.training
    expected = losses_of(
        lambda batch: loss(denoiser.eval(), batch, weighted=False), training_data, training_data.held_out, 2
    )
    assert found.equal(expected)
    by_timestep = validation.by_timestep(found)
    assert list(by_timestep) == ["0.062", "0.187", "0.312", "0.437", "0.562", "0.687", "0.812", "0.937"]
    assert list(by_timestep.values()) == pytest.approx(expected.mean(0).tolist())


def test_small_batches_have_several_images_of_one_size_and_losses_are_the_same(setting):
    """Each image keeps its position, also if images of other sizes are between."""
    training_data, loss, denoiser = setting
    (source,) = training_data.sources
    sizes = (exact_steps.SIZE, dataclasses.replace(exact_steps.SIZE, width=exact_steps.SIZE.width + 1))
    other = dataclasses.replace(source, sizes=tuple(sizes[number % 2] for number in range(exact_steps.IMAGES)))
    shapes = {size: shape for size in sizes for shape in training_data.shapes.values()}  # so that all batches fit
    mixed = dataclasses.replace(training_data, sources=(other,), shapes=shapes)
    lengths, images = [], [(0, number) for number in (3, 0, 4, 1, 2)]

    def losses(batch) -> torch.Tensor:
        lengths.append(len(batch.timesteps))
        return loss(denoiser, batch, weighted=False)

    alone = losses_of(losses, mixed, images, 1)
    assert lengths == [8] * 5
    lengths.clear()
    together = losses_of(losses, mixed, images, 1, most=20)
    assert lengths == [16, 8, 16]
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=0)


def test_an_image_whose_mask_is_zero_where_it_is_cropped_can_be_compared():
    """The statistics need losses above zero."""
    error = torch.ones(2, 4, 8, 8)
    error[1] = torch.nan
    losses = numbers(masked(error, torch.zeros(2, 1, 8, 8)).flatten(1).mean(1).tolist())
    assert 0 < losses[0] < 1e-6 and losses[1] is None
