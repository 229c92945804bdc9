"""Training objectives: what the denoiser predicts, and the weight of its loss."""

import math

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from ...errors import InvalidArgument, refused_as
from ...options.images import ModelOptions, Options, TrainingOptions
from .families.base import Family


class DdpmObjective:
    """Denoising diffusion (Ho et al., 2020) with epsilon or v prediction (Salimans and Ho, 2022).

    Training timesteps are uniform from `between[0]` up to, but not including, `between[1]`. If `between` is None, they
    are uniform over all timesteps. Raises `ValueError` if the scheduler has another prediction type.
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
        """The number of timesteps."""
        return self.scheduler.config.num_train_timesteps

    def draw(self, generator: torch.Generator, tokens: int = 256) -> torch.Tensor:
        """Return a random training timestep, a scalar integer; the number of tokens has no effect."""
        return torch.randint(*self.between, (), generator=generator)

    def at(self, fraction: float) -> torch.Tensor:
        """Return the timestep, a scalar, at a fraction (0 to 1) of the way from the first to the last."""
        return torch.tensor(min(self.timesteps - 1, int(fraction * self.timesteps)))

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return `sqrt(a_t) x + sqrt(1 - a_t) e` for latents x and noise e (batch first), and timesteps t (batch)."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the target of the prediction, in the shape of the latents.

        The target is the noise e or, for v prediction, `v = sqrt(a_t) e - sqrt(1 - a_t) x`.
        """
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return noise

    def share_of_image(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return `sqrt(a_t) / (sqrt(a_t) + sqrt(1 - a_t))` of each sample, of shape (batch,).

        The result equals `1 / (1 + SNR^(-1/2))`.
        """
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return alphas.sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the weight of each sample's loss, of shape (batch,): 1, or min-SNR (Hang et al., 2023) with gamma.

        Min-SNR is `min(SNR, gamma) / SNR` for epsilon, and `min(SNR, gamma) / (SNR + 1)` for v. At zero terminal SNR
        the weight is the limit: 1 for epsilon, 0 for v.
        """
        if not self.snr_gamma:
            return torch.ones(timesteps.shape, device=timesteps.device)
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alphas / (1 - alphas)
        if self.prediction_type == "v_prediction":
            return snr.clamp(max=self.snr_gamma) / (snr + 1)
        return (self.snr_gamma / snr).clamp(max=1.0)


class FlowObjective:
    """Rectified flow (Liu et al., 2022; Esser et al., 2024): predict the velocity `e - x` at `(1 - s) x + s e`.

    `sampling` is the distribution of the noise level s:

    - `uniform`, `logit_normal`, `mode`: as in diffusers' scripts, from the scheduler's table of timesteps. The shift of
      the table is `shift` or, if that is None, the scheduler's own.
    - `sigmoid`: the sigmoid of a normally distributed number, as in kohya's scripts.
    - `shift`: like `sigmoid`, then shifted by `shift` (default: 3).
    - `flux_shift`: like `sigmoid`, then shifted as in Flux's pipeline for the sample's number of tokens.

    Without `sampling`, the weighting scheme determines the distribution, as in diffusers' scripts. `density` overrides
    the mean and the standard deviation of `logit_normal`, and the scale of `mode`. If `between` is not None, timesteps
    are scaled linearly from the full range to the range `between`.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        sampling: str | None = None,
        weighting: str = "none",
        shift: float | None = None,
        between: tuple[int, int] | None = None,
        **density: float,
    ) -> None:
        own = {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **own)
        self.sampling = sampling or (weighting if weighting in ("logit_normal", "mode") else "uniform")
        self.weighting, self.shift = weighting, shift or 3.0
        self.density = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29} | density
        self.between = between or (0, self.timesteps)

    @property
    def timesteps(self) -> int:
        """The scheduler's number of timesteps. Training draws them as real numbers between 0 and it."""
        return self.scheduler.config.num_train_timesteps

    def draw(self, generator: torch.Generator, tokens: int = 256) -> torch.Tensor:
        """Return a random training timestep, a scalar from 0 to `timesteps`, scaled to the range `between`.

        `tokens`: number of tokens of the sample; only `flux_shift` depends on this number.
        """
        least, below = self.between
        return least + self._sample(generator, tokens) * ((below - least) / self.timesteps)

    def _sample(self, generator: torch.Generator, tokens: int) -> torch.Tensor:
        if self.sampling in ("uniform", "logit_normal", "mode"):
            drawn = compute_density_for_timestep_sampling(self.sampling, 1, generator=generator, **self.density)
            return self.at(float(drawn))
        s = torch.sigmoid(torch.randn((), generator=generator))
        if self.sampling == "sigmoid":
            return s * self.timesteps
        shift = self.shift if self.sampling == "shift" else math.exp(calculate_shift(tokens))
        return shift * s / (1 + (shift - 1) * s) * self.timesteps

    def at(self, fraction: float) -> torch.Tensor:
        """Return the timestep, a scalar, at a fraction (0 to 1) of the scheduler's table; 0 is pure noise."""
        return self.scheduler.timesteps[min(self.timesteps - 1, int(fraction * self.timesteps))]

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return `(1 - s) x + s e` for latents x, noise e (batch first), and noise levels s at timesteps (batch)."""
        s = self._sigmas(timesteps).view(-1, *[1] * (latents.dim() - 1))
        return (1 - s) * latents + s * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the velocity `e - x`, in the shape of the latents."""
        return noise - latents

    def share_of_image(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return `1 - s` of each sample, of shape (batch,); this equals `1 / (1 + SNR^(-1/2))`."""
        return 1 - self._sigmas(timesteps)

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the weight of each sample's loss, of shape (batch,).

        The weights are those of diffusers' scripts (Esser et al., 2024, Section 3.1).
        """
        return compute_loss_weighting_for_sd3(self.weighting, self._sigmas(timesteps))

    def _sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timesteps / self.timesteps


Objective = DdpmObjective | FlowObjective


def between_of(options: TrainingOptions, timesteps: int) -> tuple[int, int]:
    """Return the range of timesteps to sample from, without its end.

    Raises `InvalidArgument` if the range is empty, or the model has fewer timesteps.
    """
    least, below = options.min_timestep, timesteps if options.max_timestep is None else options.max_timestep
    if below > timesteps:
        problem = f"the model has {timesteps} timesteps"
        raise InvalidArgument(f"--max_timestep {below}", problem, f"give {timesteps} or less")
    if least >= below:
        problem = f"it has to be below --max_timestep, {below}"
        raise InvalidArgument(f"--min_timestep {least}", problem, "lower it, or raise --max_timestep")
    return least, below


def check_sampling(options: TrainingOptions, sampling: str) -> None:
    """Raise `InvalidArgument` if an option is not at its default, but has no effect with this timestep sampling."""
    for name, option in Options.table().items():
        if option.samplings and sampling not in option.samplings:
            value, default = getattr(options, name), option.default
            if value != default:
                problem = f"timesteps are sampled by {sampling}, which does not use it"
                stay = "leave it out" if default is None else f"leave it at {default}"
                fix = f"{stay}, or add --timestep_sampling {option.samplings[-1]}"
                raise InvalidArgument(f"--{name} {value}", problem, fix)


def check_objective(model: ModelOptions, training: TrainingOptions, family: Family) -> None:
    """Raise `InvalidArgument` if an option that applies only to another objective is not at its default."""
    learns_flow = family.objective == "flow"
    for name, option in Options.table().items():
        value = getattr({"model": model, "training": training}.get(option.group), name, option.default)
        # snr_gamma 0 gives all timesteps the same weight, as a flow does.
        if option.objective not in ("", family.objective) and (value if learns_flow else value != option.default):
            problem = f"it has no effect: {family.name} is {'a' if learns_flow else 'no'} flow-matching model"
            raise InvalidArgument(f"--{name} {value}", problem, "leave it out")


def objective_of(
    model: ModelOptions, training: TrainingOptions, family: Family, pipeline: DiffusionPipeline
) -> Objective:
    """Return the objective of the model's family; raises `InvalidArgument` for options that have no effect with it."""
    between = between_of(training, pipeline.scheduler.config.num_train_timesteps)
    check_objective(model, training, family)
    argument = f"--pretrained_model_name_or_path {model.pretrained_model_name_or_path}"
    # Noise levels are computed from one of these fields. EDM's schedulers, as in Playground 2.5, have neither field.
    if ("shift" if family.objective == "flow" else "beta_schedule") not in pipeline.scheduler.config:
        problem = f"its {type(pipeline.scheduler).__name__} does not have the noise levels of {family.name}"
        raise InvalidArgument(argument, problem, "give another model")
    if family.objective == "flow":
        objective = FlowObjective(
            pipeline.scheduler, training.timestep_sampling, training.weighting_scheme, training.discrete_flow_shift,
            between, logit_mean=training.logit_mean, logit_std=training.logit_std, mode_scale=training.mode_scale,
        )  # fmt: skip
        check_sampling(training, objective.sampling)
        return objective
    with refused_as(argument, "give another model, or --prediction_type", (ValueError,)):
        return DdpmObjective(pipeline.scheduler, training.snr_gamma, between)
