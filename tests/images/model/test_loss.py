"""Huber losses and masks, against their formulas written out by hand in float64."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from images.runs import refused
from reslora.images.model.loss import PredictionLoss, loss_of, masked
from reslora.images.model.objective import DdpmObjective, FlowObjective
from reslora.images.settings import parse_args

BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
STEPS = torch.tensor([0, 1, 400, 998, 999])
TIMESTEPS = {"ddpm": STEPS, "flow": STEPS + 0.5}
OBJECTIVES = {
    "ddpm": DdpmObjective(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)),
    "flow": FlowObjective(FlowMatchEulerDiscreteScheduler()),
}


def thresholds(kind: str, schedule: str, c: float, scale: float) -> np.ndarray:
    """Return thresholds as in kohya's scripts; for flows, the signal-to-noise ratio is ((1 - s) / s)^2."""
    t = TIMESTEPS[kind].double().numpy()
    if schedule == "constant":
        return np.full(len(t), c * scale)
    if schedule == "exponential":
        return np.exp(-(-np.log(c) / 1000) * t) * scale
    if kind == "ddpm":
        kept = np.cumprod(1 - BETAS)[STEPS.numpy()]
        sigmas = ((1 - kept) / kept) ** 0.5
    else:
        sigmas = (t / 1000) / (1 - t / 1000)
    return (1 - c) / (1 + sigmas) ** 2 + c


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize(
    ("schedule", "c", "scale"),
    [("constant", 0.1, 1.0), ("constant", 0.3, 2.0), ("exponential", 0.1, 1.5), ("snr", 0.1, 1.0), ("snr", 2.0, 1.0)],
)
def test_the_formulas_of_kohyas_scripts(kind, schedule, c, scale):
    draws = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64, generator=draws)
    by_hand = thresholds(kind, schedule, c, scale).reshape(-1, 1, 1, 1)
    apart = 2 * (np.sqrt((prediction - target).numpy() ** 2 + by_hand**2) - by_hand)
    for name, expected in (("huber", by_hand * apart), ("smooth_l1", apart)):
        found = PredictionLoss(OBJECTIVES[kind], name, schedule, c, scale)(prediction, target, TIMESTEPS[kind])
        np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5)


def test_kind_schedule_threshold_and_scale_are_those_of_the_flags():
    objective = OBJECTIVES["ddpm"]
    words = "--loss_type smooth_l1 --huber_schedule exponential --huber_c 0.2 --huber_scale 1.5"
    assert loss_of(parse_args(words.split()).training, objective) == PredictionLoss(
        objective, kind="smooth_l1", schedule="exponential", c=0.2, scale=1.5
    )
    prediction, target = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    loss = loss_of(parse_args([]).training, objective)(prediction, target, STEPS)
    torch.testing.assert_close(loss, (prediction - target) ** 2, rtol=0, atol=0)


def test_where_nothing_of_the_image_is_left_the_threshold_is_c():
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    assert float(PredictionLoss(DdpmObjective(scheduler), c=0.2).threshold(torch.tensor([999]))) == pytest.approx(0.2)
    assert float(PredictionLoss(OBJECTIVES["flow"], c=0.2).threshold(torch.tensor([1000.0]))) == pytest.approx(0.2)


def test_small_errors_are_squared_and_their_gradients_are_finite():
    """In float32, where the difference of the roots would be mere rounding; and with an error of zero."""
    prediction = torch.tensor([[[[1e-4, 0.0]]]], requires_grad=True)
    loss = PredictionLoss(OBJECTIVES["flow"], "huber", "constant", 1.0)(
        prediction, torch.zeros(1, 1, 1, 2), torch.tensor([5.0])
    )
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([[[[1e-8, 0.0]]]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(prediction.grad, torch.tensor([[[[2e-4, 0.0]]]]), rtol=1e-5, atol=0)


# -- masks -----------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[[[1.0, 1, 0, 0], [1, 0, 0, 0]]], [[[0.0, 0, 0, 0], [0, 0, 0, 0]]]], dtype=torch.float64)


def test_what_is_masked_counts_by_area_and_has_no_gradient():
    prediction = torch.randn(2, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    loss = masked(prediction.square(), MASK).flatten(1).mean(1)
    first = prediction.detach()[0].numpy() ** 2
    assert loss.tolist() == [pytest.approx(0.75 * first[:, 0, 0].sum() / 6), 0]
    loss.sum().backward()
    assert (prediction.grad[0, :, :, 0] != 0).all()
    assert (prediction.grad[0, :, :, 1] == 0).all() and (prediction.grad[1] == 0).all()


def test_normalised_it_is_the_mean_over_what_counts_and_nothing_of_nothing():
    error = torch.rand(2, 3, 2, 4, dtype=torch.float64)
    loss = masked(error, MASK, normalised=True).flatten(1).mean(1)
    counted = (error[0].numpy() * MASK[0].numpy()).sum() / (3 * 3)
    assert loss.tolist() == [pytest.approx(counted), 0]
    assert masked(error, torch.ones(2, 1, 8, 16).double(), normalised=True).equal(error)
    assert masked(error, None) is error


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--huber_c 0.2", "change --loss_type"),
        ("--huber_schedule constant", "change --loss_type"),
        ("--huber_scale 2.0 --loss_type huber", "--huber_schedule snr"),
        ("--huber_c 0 --loss_type huber", "above 0"),
        ("--masked_loss_normalised", "it has no effect"),
        ("--masked_loss", "no image has an alpha channel or a mask"),
    ],
)
def test_what_has_no_effect_is_refused(words, problem, brief_flags, capsys):
    line = refused(capsys, *brief_flags, *words.split())
    assert words.split()[0] in line and problem in line
