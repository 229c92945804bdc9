"""The state of one method in training: model with adapter, optimizer, schedule, and progress."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.optimization import get_scheduler
from torch import nn
from transformers.optimization import get_inverse_sqrt_schedule

from ..errors import refused_as
from ..methods.adapters import RankAllocator, rank_allocator
from ..options.optimizers import ADAMS, class_of, named, options_of
from ..options.shared import SharedOptimizerOptions, SharedTrainingOptions
from .context import Context
from .learning_rates import FACTOR, at_rate, groups_of
from .schedule import Schedule
from .sharding import adapters_of, cuts_base
from .trained import Trained
from .zero import full_state, uses_deepspeed


@dataclass
class Learner:
    """The model, optimizer and progress of one method."""

    method: str
    trained: Trained
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    allocator: RankAllocator | None
    model: nn.Module
    """The same as `trained`; once the learner is prepared, accelerate's wrapper around it."""
    step: int = 0
    seconds: float = 0.0
    name: str = ""
    """Name in messages, and directory relative to the output directory; see `Context.name_of`."""
    before: int = 0
    """Number of methods, or of runs of an experiment, before this one."""
    used_rate: float | None = None
    """The denoiser's learning rate in the latest step, without factors of single layers; None before the first step."""
    over: bool = False
    """Whether training ends because the validation loss has stopped improving."""
    awaited: dict | None = None
    """Restored state to load into DeepSpeed's optimizer once the learner is prepared."""

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser with its adapter."""
        return self.trained.denoiser

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def learning_rate(self) -> float:
        """The denoiser's learning rate in the next step, without factors of single layers."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group.get(FACTOR, 1)

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's optimizer; available once the learner is prepared."""
        assert isinstance(self.optimizer, AcceleratedOptimizer)
        return self.optimizer.optimizer

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time spent inside this context to the training time."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    @property
    def averaging(self) -> Any:
        """The optimizer if it is schedule-free, else None.

        A schedule-free optimizer trains other weights than those to evaluate.
        """
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if hasattr(optimizer, "eval") else None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the weights to evaluate inside this context: for validation, samples, checkpoints and exports.

        Has an effect only with a schedule-free optimizer (see `averaging`).
        """
        if (optimizer := self.averaging) is None:
            yield
            return
        trained = self._copied()
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            self._put(trained)  # exact; the optimizer's own conversion back is not

    def _copied(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def _put(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state(self, accelerator: Accelerator) -> dict:
        """Return the state, without the adapter, with which a resumed run equals an uninterrupted one.

        With DeepSpeed, every process must call this.
        """
        if uses_deepspeed(accelerator):
            optimizer = full_state(self.zero_optimizer, self.trained.named())
        else:
            optimizer = self.optimizer.state_dict()
        return {
            "optimizer": optimizer,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "used_rate": self.used_rate,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "allocator": self.allocator.state_dict() if self.allocator else None,
            "trained": self._copied() if self.averaging else None,
        }

    def load_state(self, state: dict, step: int, seconds: float, accelerator: Accelerator) -> None:
        """Restore a result of `state` that was saved after `step` steps and `seconds` of training.

        Raises `ValueError` if it was saved with DeepSpeed and is loaded without, or the reverse.
        """
        deepspeed = uses_deepspeed(accelerator)
        if deepspeed != ("parameters" in state["optimizer"]):
            raise ValueError(f"was saved {'without' if deepspeed else 'with'} DeepSpeed")
        if self.allocator:
            self.allocator.load_state_dict(state["allocator"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        # The schedule of this run decides: it may have another length than that of the run that saved the state.
        rates = [
            rate * factor(self.lr_scheduler.last_epoch)
            for rate, factor in zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True)
        ]
        if deepspeed:
            self.awaited = state["optimizer"] | {"lr": rates}
        else:
            self.optimizer.load_state_dict(state["optimizer"])
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        if state["trained"]:
            self._put(state["trained"])
        if accelerator.scaler and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.used_rate = step, seconds, state.get("used_rate")


def new_learner(method: str, trained: Trained, schedule: Schedule, context: Context) -> Learner:
    """Return the learner of a method before its first step; the models in `trained` already have adapters."""
    options, denoiser = context.options, trained.denoiser
    if cuts_base(context.accelerator):
        for module in adapters_of(denoiser):  # the base stays on the CPU until it is sharded
            module.to(context.accelerator.device)
    groups, of_encoders = groups_of(trained, options.optimizer)
    optimizer = new_optimizer(groups, options.training, options.optimizer, context.accelerator, of_encoders)
    if options.optimizer.lr_scheduler == "inverse_sqrt":  # only transformers has it
        lr_scheduler = get_inverse_sqrt_schedule(optimizer, schedule.warmup_steps)
    else:
        lr_scheduler = get_scheduler(
            options.optimizer.lr_scheduler, optimizer, step_rules=options.optimizer.lr_step_rules,
            num_warmup_steps=schedule.warmup_steps, num_training_steps=schedule.steps,
        )  # fmt: skip
    return Learner(
        method, trained, optimizer, lr_scheduler, rank_allocator(denoiser), trained, name=context.name_of(method),
        before=context.before + options.adapter.method.index(method),
    )  # fmt: skip


def new_optimizer(
    parameters: list,
    training: SharedTrainingOptions,
    optimizer_options: SharedOptimizerOptions,
    accelerator: Accelerator,
    of_encoders: Sequence = (),
) -> torch.optim.Optimizer:
    """Return the optimizer that the options specify; text encoders have their own parameter groups and learning rate.

    `parameters`, `of_encoders`: parameters, or groups of `groups_of`.

    Raises `InvalidArgument` for arguments that the optimizer does not accept.
    """
    per_step = training.gradient_accumulation_steps * training.train_batch_size * accelerator.num_processes
    scale = per_step if optimizer_options.scale_lr else 1
    rate = optimizer_options.learning_rate * scale
    groups = at_rate(parameters, rate)
    if of_encoders:
        own = getattr(optimizer_options, "text_encoder_lr", None)
        groups += at_rate(of_encoders, scale * (own or optimizer_options.learning_rate))
    arguments = {"lr": rate} | dict(named(optimizer_options.optimizer).options)
    if optimizer_options.optimizer in ADAMS:
        arguments |= {
            "betas": (optimizer_options.adam_beta1, optimizer_options.adam_beta2),
            "weight_decay": optimizer_options.adam_weight_decay,
            "eps": optimizer_options.adam_epsilon,
        }
    if optimizer_options.optimizer == "adamw":
        # A fused step hides from accelerate that the fp16 scaler skipped it.
        arguments["fused"] = accelerator.device.type in ("cpu", "cuda") and accelerator.scaler is None
    kind = class_of(optimizer_options.optimizer)
    with _refused(optimizer_options):
        optimizer = kind(groups, **arguments | options_of(optimizer_options.optimizer_args))
    if hasattr(optimizer, "train"):  # schedule-free optimizers have two sets of weights and train one of them
        optimizer.train()
    return optimizer


def check_optimizer(context: Context) -> None:
    """Raise `InvalidArgument` if the optimizer cannot take a step on small parameters with its arguments.

    If the options set factors of learning rates, the step is tried on two parameters with different factors.
    """
    options, device = context.options, context.accelerator.device
    groups: list[dict[str, Any]] = [{}, {FACTOR: 2.0}] if options.optimizer.has_factors else [{}]
    for group in groups:
        weight = nn.Parameter(torch.zeros(1, 1, device=device))  # a matrix, which Muon requires
        weight.grad = torch.ones_like(weight)
        group["params"] = [weight]
    with _refused(options.optimizer):
        new_optimizer(groups, options.training, options.optimizer, context.accelerator).step()


def _refused(options: SharedOptimizerOptions) -> AbstractContextManager:
    words = " ".join([f"--optimizer {options.optimizer}", *options.optimizer_args])
    return refused_as(words, "give arguments that it takes with --optimizer_args, or another optimizer")
