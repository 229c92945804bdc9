"""The flow objective against its formulas, written out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from images.runs import parts
from reslora.errors import InvalidArgument
from reslora.images.model.objective import FlowObjective, objective_of
from reslora.images.settings import parse_args
from reslora.options.images import SAMPLINGS

SHIFTED = FlowMatchEulerDiscreteScheduler(shift=3.0)
DYNAMIC = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def draws(objective: FlowObjective, count: int = 4000, tokens: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([objective.draw(generator, tokens) for _ in range(count)]).double() / 1000


def shifted(s, by: float):
    return by * s / (1 + (by - 1) * s)


def test_noisy_target_and_weight():
    objective = FlowObjective(SHIFTED)
    generator = torch.Generator().manual_seed(1)
    x, e = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([250.0, 900.0], dtype=torch.float64)
    expected = torch.stack([0.75 * x[0] + 0.25 * e[0], 0.1 * x[1] + 0.9 * e[1]])
    torch.testing.assert_close(objective.noisy(x, e, t), expected)
    torch.testing.assert_close(objective.target(x, e, t), e - x)
    torch.testing.assert_close(objective.weight(t), torch.ones(2, dtype=torch.float64))
    s = t / 1000
    torch.testing.assert_close(FlowObjective(SHIFTED, weighting="sigma_sqrt").weight(t), (s**-2).float())
    cosmap = 2 / (math.pi * (1 - 2 * s + 2 * s**2))
    torch.testing.assert_close(FlowObjective(SHIFTED, weighting="cosmap").weight(t), cosmap)


@pytest.mark.parametrize(("scheduler", "shift", "by"), [(SHIFTED, None, 3), (DYNAMIC, None, 1), (DYNAMIC, 2.0, 2)])
def test_uniform_draws_come_from_the_schedulers_table(scheduler, shift, by):
    """The static shift is in the table; a dynamic shift is ignored in training, as in diffusers' scripts."""
    objective = FlowObjective(scheduler, "uniform", shift=shift)
    for fraction in (0.0, 0.25, 0.999):
        s = 1 - int(fraction * 1000) / 1000
        assert float(objective.at(fraction)) / 1000 == pytest.approx(shifted(s, by), rel=1e-5)
    # The median of s is the shifted half.
    assert draws(objective).median() == pytest.approx(shifted(0.5, by), abs=0.03)


@pytest.mark.parametrize(("given", "mean", "std"), [({}, 0.0, 1.0), ({"logit_mean": 0.5, "logit_std": 0.7}, 0.5, 0.7)])
def test_logit_normal_draws(given, mean, std):
    drawn = draws(FlowObjective(DYNAMIC, "logit_normal", **given))
    logits = torch.logit((1 - drawn).clamp(1e-4, 1 - 1e-4))  # the table runs from noise to image
    assert logits.mean() == pytest.approx(mean, abs=0.05) and logits.std() == pytest.approx(std, abs=0.05)


def test_mode_draws():
    drawn = 1 - draws(FlowObjective(DYNAMIC, "mode", mode_scale=1.29))
    u = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    expected = 1 - u - 1.29 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    assert drawn.mean() == pytest.approx(float(expected.mean()), abs=0.02)
    assert drawn.std() == pytest.approx(float(expected.std()), abs=0.02)


@pytest.mark.parametrize(
    ("sampling", "shift", "tokens", "by"),
    [
        ("sigmoid", None, 256, 1.0),
        ("shift", None, 256, 3.0),
        ("shift", 2.5, 256, 2.5),
        ("flux_shift", None, 256, math.exp(0.5)),
        ("flux_shift", None, 4096, math.exp(1.15)),
        ("flux_shift", None, 1024, math.exp(0.5 + (1024 - 256) * 0.65 / 3840)),
    ],
)
def test_draws_as_kohyas_scripts_make_them(sampling, shift, tokens, by):
    drawn = draws(FlowObjective(SHIFTED, sampling, shift=shift), tokens=tokens)
    logits = torch.logit(drawn / (by + (1 - by) * drawn))  # undoes the shift
    assert logits.mean() == pytest.approx(0.0, abs=0.05) and logits.std() == pytest.approx(1.0, abs=0.05)


def test_the_weighting_scheme_says_how_timesteps_are_drawn_unless_that_is_said():
    assert FlowObjective(SHIFTED, weighting="logit_normal").sampling == "logit_normal"
    assert FlowObjective(SHIFTED, weighting="mode").sampling == "mode"
    assert FlowObjective(SHIFTED, weighting="cosmap").sampling == "uniform"
    assert FlowObjective(SHIFTED, "sigmoid", weighting="logit_normal").sampling == "sigmoid"


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_draws_lie_within_the_flow_and_repeat(sampling):
    objective = FlowObjective(SHIFTED, sampling)
    drawn = draws(objective, 200)
    assert drawn.min() > 0 and drawn.max() <= 1
    assert torch.equal(drawn, draws(objective, 200))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_draws_are_squeezed_into_the_timesteps_asked_for(sampling):
    """Linearly: t of all timesteps becomes 200 + t * 300 / 1000."""
    drawn = draws(FlowObjective(SHIFTED, sampling, between=(200, 500)), 200)
    torch.testing.assert_close(drawn, 0.2 + 0.3 * draws(FlowObjective(SHIFTED, sampling), 200), rtol=1e-5, atol=0)


def objective_for(words: str) -> FlowObjective:
    pipeline = SimpleNamespace(scheduler=SHIFTED)
    return of(words.split(), SimpleNamespace(name="a flow", objective="flow"), pipeline)


def of(words: list[str], family, pipeline) -> FlowObjective:
    return objective_of(*parts(parse_args(words), "model", "training"), family, pipeline)


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (
            "--timestep_sampling logit_normal --logit_mean 0.5 --logit_std 0.7",
            {"sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 0.7},
        ),
        ("--weighting_scheme mode --mode_scale 0.4", {"weighting": "mode", "mode_scale": 0.4}),
        ("--weighting_scheme sigma_sqrt --discrete_flow_shift 2", {"weighting": "sigma_sqrt", "shift": 2.0}),
        (
            "--timestep_sampling shift --discrete_flow_shift 2.5 --weighting_scheme cosmap",
            {"sampling": "shift", "shift": 2.5, "weighting": "cosmap"},
        ),
        ("--min_timestep 200 --max_timestep 500", {"between": (200, 500)}),
    ],
)
def test_each_flag_says_what_its_name_says(words, own):
    """Two exchanged options would silently train other timesteps."""
    found, expected = objective_for(f"--snr_gamma 0 --weighting_scheme none {words}"), FlowObjective(SHIFTED, **own)
    timesteps = draws(found, 50)
    assert torch.equal(timesteps, draws(expected, 50)) and not torch.equal(timesteps, draws(FlowObjective(SHIFTED), 50))
    torch.testing.assert_close(found.weight(timesteps * 1000), expected.weight(timesteps * 1000), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "with_which"),
    [
        ("--logit_mean 0.5", "--timestep_sampling logit_normal"),
        ("--logit_std 2 --timestep_sampling shift", "--timestep_sampling logit_normal"),
        ("--mode_scale 1 --weighting_scheme logit_normal", "--weighting_scheme mode"),
        ("--discrete_flow_shift 2 --timestep_sampling sigmoid", "--timestep_sampling shift"),
        ("--discrete_flow_shift 2 --timestep_sampling flux_shift", "--timestep_sampling uniform"),
    ],
)
def test_what_the_sampling_does_not_read_is_refused(words, with_which):
    of_flow = ["--snr_gamma", "0", "--weighting_scheme", "none", *words.split()]
    flow, pipeline = SimpleNamespace(name="a flow", objective="flow"), SimpleNamespace(scheduler=SHIFTED)
    with pytest.raises(InvalidArgument, match=f"^{words.split()[0]} .* by .*, which does not use it"):
        of(of_flow, flow, pipeline)
    of([*of_flow, *with_which.split()], flow, pipeline)
    noise = SimpleNamespace(name="of noise", objective="ddpm")
    pipeline = SimpleNamespace(scheduler=DDPMScheduler())
    with pytest.raises(InvalidArgument, match="of noise is no flow-matching model"):
        of(words.split()[:2], noise, pipeline)
    of(["--logit_mean", "0", "--logit_std", "1"], noise, pipeline)
