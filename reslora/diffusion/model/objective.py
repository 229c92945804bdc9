"""What the denoiser should predict, and how its error counts: a class an objective, functions of tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from ...common.errors import InvalidArgument, refused_as
from ..arguments import SAMPLINGS, WEIGHTINGS, Flags
from ..settings import untouched
from .families.base import Family


class DdpmObjective:
    """Denoising diffusion (Ho et al., 2020): the noise, or v (Salimans and Ho, 2022), at a timestep drawn evenly.

    Timesteps are drawn from the first of `between` up to before the second: from all, if it is None. Raises
    `ValueError` for a scheduler whose prediction type is neither.
    """

    def __init__(
        self, scheduler: SchedulerMixin, snr_gamma: float | None = None, between: tuple[int, int] | None = None
    ) -> None:
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.snr_gamma = snr_gamma
        self.between = between or (0, self.timesteps)
        self.prediction_type = self.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type {self.prediction_type!r}: only epsilon and v_prediction can be trained")

    @property
    def timesteps(self) -> int:
        """How many timesteps there are."""
        return self.scheduler.config.num_train_timesteps

    def draw(self, generator: torch.Generator, tokens: int = 256) -> torch.Tensor:
        """A timestep for a training sample, whatever its number of tokens."""
        return torch.randint(*self.between, (), generator=generator)

    def at(self, fraction: float) -> torch.Tensor:
        """The timestep at a fraction of the way from the first to the last."""
        return torch.tensor(min(self.timesteps - 1, int(fraction * self.timesteps)))

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`sqrt(a_t) x + sqrt(1 - a_t) e`, batch first."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The noise e, or `v = sqrt(a_t) e - sqrt(1 - a_t) x`."""
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return noise

    def share_of_image(self, timesteps: torch.Tensor) -> torch.Tensor:
        """`sqrt(a_t) / (sqrt(a_t) + sqrt(1 - a_t))`, or `1 / (1 + SNR^(-1/2))`, of each sample."""
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return alphas.sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Weight of each loss: 1, or with gamma min-SNR (Hang et al., 2023): `min(SNR, gamma) / SNR`; v: over SNR + 1.

        Where nothing of the image is left, the SNR is 0 and the weight the limit: 1, for v 0.
        """
        if not self.snr_gamma:
            return torch.ones(timesteps.shape, device=timesteps.device)
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alphas / (1 - alphas)
        if self.prediction_type == "v_prediction":
            return snr.clamp(max=self.snr_gamma) / (snr + 1)
        return (self.snr_gamma / snr).clamp(max=1.0)


@dataclass(frozen=True)
class Density:
    """How timesteps are spread by `logit_normal` (mean and deviation) and `mode` (scale), as in diffusers' scripts.

    Whatever draws them, they are squeezed evenly from all timesteps into those of `between`, if it is not None.
    """

    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    between: tuple[int, int] | None = None


class FlowObjective:
    """Rectified flow (Liu et al., 2022; Esser et al., 2024): the velocity `e - x` at `(1 - s) x + s e`.

    `sampling` says how s is drawn. As in diffusers' scripts, from the scheduler's table, shifted as the scheduler says
    (or by `shift`): `uniform`, `logit_normal`, `mode`. As in kohya's: `sigmoid` of a normal number; `shift`, the same
    shifted by `shift` (3 if it is None); `flux_shift`, by what Flux's pipeline shifts for as many tokens as the sample
    has. Without `sampling` the weighting scheme says it, as in diffusers' scripts. Raises `ValueError` for names that
    are unknown.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        sampling: str | None = None,
        weighting: str = "none",
        shift: float | None = None,
        density: Density = Density(),
    ) -> None:
        own = {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **own)
        self.sampling = sampling or (weighting if weighting in ("logit_normal", "mode") else "uniform")
        if self.sampling not in SAMPLINGS or weighting not in WEIGHTINGS:
            raise ValueError(f"sampling {self.sampling!r} with weighting {weighting!r} is not known")
        self.weighting, self.shift = weighting, shift or 3.0
        self.density = asdict(density)
        self.between = self.density.pop("between") or (0, self.timesteps)

    @property
    def timesteps(self) -> int:
        """How many timesteps there are; they need not be whole numbers."""
        return self.scheduler.config.num_train_timesteps

    def draw(self, generator: torch.Generator, tokens: int = 256) -> torch.Tensor:
        """A timestep for a training sample of so many tokens, from 0 to `timesteps`, or in what `between` leaves."""
        least, below = self.between
        return least + self._drawn(generator, tokens) * ((below - least) / self.timesteps)

    def _drawn(self, generator: torch.Generator, tokens: int) -> torch.Tensor:
        if self.sampling in ("uniform", "logit_normal", "mode"):
            drawn = compute_density_for_timestep_sampling(self.sampling, 1, generator=generator, **self.density)
            return self.at(float(drawn))
        s = torch.sigmoid(torch.randn((), generator=generator))
        if self.sampling == "sigmoid":
            return s * self.timesteps
        shift = self.shift if self.sampling == "shift" else math.exp(calculate_shift(tokens))
        return shift * s / (1 + (shift - 1) * s) * self.timesteps

    def at(self, fraction: float) -> torch.Tensor:
        """The timestep at a fraction of the way down the scheduler's table, from pure noise."""
        return self.scheduler.timesteps[min(self.timesteps - 1, int(fraction * self.timesteps))]

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`(1 - s) x + s e`, batch first."""
        s = self._sigmas(timesteps).view(-1, *[1] * (latents.dim() - 1))
        return (1 - s) * latents + s * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The velocity `e - x`."""
        return noise - latents

    def share_of_image(self, timesteps: torch.Tensor) -> torch.Tensor:
        """`1 - s`, or `1 / (1 + SNR^(-1/2))`, of each sample."""
        return 1 - self._sigmas(timesteps)

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Weight of each loss, as diffusers' scripts have it (Esser et al., 2024, Section 3.1)."""
        return compute_loss_weighting_for_sd3(self.weighting, self._sigmas(timesteps))

    def _sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timesteps / self.timesteps


Objective = DdpmObjective | FlowObjective
READ_BY = {
    "logit_mean": ("logit_normal",), "logit_std": ("logit_normal",), "mode_scale": ("mode",),
    "discrete_flow_shift": ("uniform", "logit_normal", "mode", "shift"),
}  # fmt: skip
"""The ways to draw timesteps that a flag is about."""


def between_of(flags: Flags, timesteps: int) -> tuple[int, int]:
    """The timesteps to draw from: from the first up to before the second; refuses what the model does not have."""
    least, below = flags.min_timestep, timesteps if flags.max_timestep is None else flags.max_timestep
    if below > timesteps:
        raise InvalidArgument(f"--max_timestep {below}", f"the model has {timesteps}", f"give {timesteps} or less")
    if least >= below:
        problem = f"it has to be below --max_timestep, {below}"
        raise InvalidArgument(f"--min_timestep {least}", problem, "give less of the one, or more of the other")
    return least, below


def check_read(flags: Flags, sampling: str) -> None:
    """Refuse settings that this way to draw timesteps does not read; with its default one may be given."""
    for name, samplings in READ_BY.items():
        value, default = getattr(flags, name), getattr(untouched(), name)
        if sampling not in samplings and value != default:
            problem = f"timesteps are drawn by {sampling}, which does not read it"
            stay = "leave it out" if default is None else f"leave it at {default}"
            raise InvalidArgument(f"--{name} {value}", problem, f"{stay}, or add --timestep_sampling {samplings[-1]}")


def objective_of(flags: Flags, family: Family, pipeline: DiffusionPipeline) -> Objective:
    """What the model's family learns; refuses flags that belong to another objective."""
    between = between_of(flags, pipeline.scheduler.config.num_train_timesteps)
    if family.objective == "flow":
        for name in ("prediction_type", "snr_gamma"):
            if getattr(flags, name):
                problem = f"{family.name} learns a flow, which has none"
                raise InvalidArgument(f"--{name} {getattr(flags, name)}", problem, "leave it out")
        density = Density(flags.logit_mean, flags.logit_std, flags.mode_scale, between)
        objective = FlowObjective(
            pipeline.scheduler, flags.timestep_sampling, flags.weighting_scheme, flags.discrete_flow_shift, density
        )
        check_read(flags, objective.sampling)
        return objective
    for name in ("timestep_sampling", "weighting_scheme", *READ_BY):
        value = getattr(flags, name)
        if value != getattr(untouched(), name):
            raise InvalidArgument(f"--{name} {value}", f"{family.name} does not learn a flow", "leave it out")
    argument = f"--pretrained_model_name_or_path {flags.pretrained_model_name_or_path}"
    with refused_as(argument, "give another model, or --prediction_type", (ValueError,)):
        return DdpmObjective(pipeline.scheduler, flags.snr_gamma, between)
