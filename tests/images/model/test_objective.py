"""Prediction targets against the formulas of DDPM, v-prediction and min-SNR, written out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from core_models import assert_equal
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from images.runs import parts
from reslora.errors import InvalidArgument
from reslora.images.model.objective import DdpmObjective, between_of, objective_of
from reslora.images.settings import parse_args
from reslora.options.images import Options

TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])
BETAS = {
    "scaled_linear": np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,  # Stable Diffusion's
    "linear": np.linspace(0.00085, 0.012, 1000),
}


def scheduler(**config) -> DDPMScheduler:
    return DDPMScheduler(
        **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, **config}
    )


def remaining(schedule: str = "scaled_linear") -> torch.Tensor:
    """Return the product of (1 - beta) at each timestep, the fraction of the signal's variance that remains."""
    return torch.from_numpy(np.cumprod(1 - BETAS[schedule]))[TIMESTEPS]


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(TIMESTEPS), 4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2)]


def column(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


@pytest.mark.parametrize("schedule", BETAS)
def test_noisy_latents_keep_the_variance(schedule):
    """x_t = sqrt(a) x_0 + sqrt(1 - a) noise; the scheduler keeps its table in float32."""
    latents, noise = tensors()
    left = column(remaining(schedule))
    noisy = DdpmObjective(scheduler(beta_schedule=schedule)).noisy(latents, noise, TIMESTEPS)
    assert_equal(noisy, left.sqrt() * latents + (1 - left).sqrt() * noise, rtol=1e-4, atol=1e-5)


def test_epsilon_is_the_noise():
    latents, noise = tensors()
    target = DdpmObjective(scheduler(prediction_type="epsilon")).target(latents, noise, TIMESTEPS)
    assert torch.equal(target, noise)


def test_v_is_the_velocity_from_the_latents_to_the_noise():
    """v = sqrt(a) noise - sqrt(1 - a) x_0 (Salimans and Ho, 2022)."""
    latents, noise = tensors()
    left = column(remaining())
    target = DdpmObjective(scheduler(prediction_type="v_prediction")).target(latents, noise, TIMESTEPS)
    assert_equal(target, left.sqrt() * noise - (1 - left).sqrt() * latents, rtol=1e-4, atol=1e-5)


def test_noise_and_v_give_the_latents_back():
    """x_0 = sqrt(a) x_t - sqrt(1 - a) v: the target belongs to the noisy latents."""
    latents, noise = tensors()
    objective, left = DdpmObjective(scheduler(prediction_type="v_prediction")), column(remaining())
    noisy, v = (make(latents, noise, TIMESTEPS) for make in (objective.noisy, objective.target))
    assert_equal(left.sqrt() * noisy - (1 - left).sqrt() * v, latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [None, 0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_without_gamma_every_sample_weighs_the_same(prediction_type, gamma):
    weight = DdpmObjective(scheduler(prediction_type=prediction_type), gamma).weight(TIMESTEPS)
    assert_equal(weight.double(), torch.ones(len(TIMESTEPS), dtype=torch.float64))


@pytest.mark.parametrize("gamma", [0.5, 5.0, 20.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction_type, gamma):
    """min(snr, gamma) / snr for the noise and / (snr + 1) for v, with snr = a / (1 - a) (Hang et al., 2023)."""
    snr = remaining() / (1 - remaining())
    assert snr.min() < gamma < snr.max()
    divisor = snr + 1 if prediction_type == "v_prediction" else snr
    weight = DdpmObjective(scheduler(prediction_type=prediction_type), snr_gamma=gamma).weight(TIMESTEPS)
    assert weight.shape == (len(TIMESTEPS),)
    assert_equal(weight.double(), snr.clamp(max=gamma) / divisor, rtol=1e-3)


@pytest.mark.parametrize(("prediction_type", "last"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_weights_are_finite_where_nothing_of_the_image_is_left(prediction_type, last):
    """A schedule that ends in pure noise has snr 0 there; the weight is the limit of the formula."""
    objective = DdpmObjective(scheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True), snr_gamma=5.0)
    assert objective.weight(torch.tensor([999])).item() == pytest.approx(last, abs=1e-3)


@pytest.mark.parametrize(("fraction", "timestep"), [(0.0, 0), (0.25, 250), (0.9999, 999), (1.0, 999)])
def test_a_fraction_of_the_way_is_a_timestep_that_there_is(fraction, timestep):
    assert DdpmObjective(scheduler()).at(fraction).item() == timestep


def drawn_of(objective: DdpmObjective, count: int = 2000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([objective.draw(generator) for _ in range(count)])


def test_timesteps_are_drawn_evenly_from_those_asked_for():
    assert set(drawn_of(DdpmObjective(scheduler(), between=(7, 12))).tolist()) == {7, 8, 9, 10, 11}
    drawn = drawn_of(DdpmObjective(scheduler(), between=(200, 700))).double()
    assert drawn.mean() == pytest.approx(449.5, abs=10) and drawn.std() == pytest.approx(500 / 12**0.5, abs=5)
    drawn = drawn_of(DdpmObjective(scheduler()))
    assert drawn.min() < 5 and drawn.max() > 994


def flags(*words: str) -> Options:
    return parse_args(list(words))


def test_all_timesteps_are_trained_where_no_end_is_given():
    assert between_of(flags().training, 1000) == (0, 1000)
    assert between_of(flags("--min_timestep", "300").training, 1000) == (300, 1000)
    assert between_of(flags("--max_timestep", "10").training, 1000) == (0, 10)


def test_gamma_and_the_timesteps_are_those_of_the_flags():
    family, pipeline = SimpleNamespace(name="of noise", objective="ddpm"), SimpleNamespace(scheduler=scheduler())
    words = ("--snr_gamma", "3", "--min_timestep", "200", "--max_timestep", "203")
    objective = objective_of(*parts(flags(*words), "model", "training"), family, pipeline)
    assert set(drawn_of(objective, 100).tolist()) == {200, 201, 202}
    snr = remaining() / (1 - remaining())
    assert_equal(objective.weight(TIMESTEPS).double(), snr.clamp(max=3) / snr, rtol=1e-3)
    plain = objective_of(*parts(flags("--snr_gamma", "0"), "model", "training"), family, pipeline)
    assert plain.weight(TIMESTEPS).tolist() == [1] * len(TIMESTEPS) and drawn_of(plain, 100).max() > 203


@pytest.mark.parametrize(
    ("kind", "other"),
    [("ddpm", EDMEulerScheduler), ("ddpm", FlowMatchEulerDiscreteScheduler), ("flow", DDPMScheduler)],
)
def test_a_scheduler_with_noise_levels_of_another_kind_is_refused(kind, other):
    """As of Playground 2.5, whose pipeline has SDXL's class; the noise levels would be the default ones of DDPM."""
    family, pipeline = SimpleNamespace(name="sdxl", objective=kind), SimpleNamespace(scheduler=other())
    options = Options.of(snr_gamma=None)
    with pytest.raises(InvalidArgument, match=f"its {other.__name__} does not have the noise levels of sdxl"):
        objective_of(options.model, options.training, family, pipeline)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_timestep", "1001"], "--max_timestep 1001: the model has 1000 timesteps; give 1000 or less"),
        (["--min_timestep", "1000"], "--min_timestep 1000: it has to be below --max_timestep, 1000"),
        (["--min_timestep", "500", "--max_timestep", "500"], "--min_timestep 500: it has to be below"),
    ],
)
def test_timesteps_that_there_are_not_are_refused(words, said):
    with pytest.raises(InvalidArgument) as refusal:
        between_of(flags(*words).training, 1000)
    assert str(refusal.value).startswith(said)
