"""DeepSpeed's ZeRO-1 and ZeRO-2: configure them, and gather and load the complete state of the sharded optimizer.

Functions import DeepSpeed when they are called, because it is an optional package.
"""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from ..errors import InvalidArgument
from ..methods.registry import refuse_unable
from ..options.shared import SharedMethodOptions, SharedOptimizerOptions, SharedTrainingOptions

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes with the state of a dynamic loss scaler; a static loss scaler has only the first."""


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Return whether DeepSpeed is used, which takes the optimizer steps itself."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def configure(
    adapter: SharedMethodOptions,
    training: SharedTrainingOptions,
    optimizer: SharedOptimizerOptions,
    accelerator: Accelerator,
) -> None:
    """Pass the options to DeepSpeed's configuration.

    Raises `InvalidArgument` for a configuration or options that contradict each other.
    """
    plugin = accelerator.state.deepspeed_plugin
    settings, launcher = plugin.deepspeed_config, "accelerate launch"
    if plugin.zero_stage not in (1, 2):
        problem = f"its configuration says ZeRO-{plugin.zero_stage}, which also shards the adapter"
        raise InvalidArgument(launcher, problem, "give zero_stage 2 or 1, or FSDP2, as assets/accelerate/fsdp2.yaml")
    for name in ("optimizer", "scheduler"):
        if name in settings:
            problem = f"DeepSpeed's configuration has its own {name}"
            raise InvalidArgument(launcher, problem, "remove it from the configuration, and give options instead")
    refuse_unable(adapter.method, "deepspeed")
    if optimizer.optimizer != "adamw":
        flag = "--use_8bit_adam" if getattr(optimizer, "use_8bit_adam", False) else f"--optimizer {optimizer.optimizer}"
        problem = "ZeRO divides its state in a way that cannot be gathered"
        raise InvalidArgument(flag, problem, "leave it out, or train without DeepSpeed")
    steps = training.gradient_accumulation_steps
    # Otherwise the value in the launcher's configuration file would override the option.
    accelerator.gradient_accumulation_steps = settings["gradient_accumulation_steps"] = steps
    settings["gradient_clipping"] = optimizer.max_grad_norm
    # Otherwise accelerate would read it from a data loader, but the data loader here is not prepared by accelerate.
    settings["train_micro_batch_size_per_gpu"] = training.train_batch_size
    settings["train_batch_size"] = training.train_batch_size * steps * accelerator.num_processes


def full_state(optimizer: Any, named: Iterable[tuple[str, nn.Parameter]]) -> dict:
    """Return the complete state of DeepSpeed's `optimizer` on the CPU, independent of the number of processes.

    `named`: parameters of the prepared model by name. The entry "parameters" of the result has the float32 weight of
    each parameter and, after the first step, its moments and its step. Every process must call this, even if only one
    saves.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    base, parameters = optimizer.optimizer, {}
    # DeepSpeed has one flat tensor for each parameter group; all groups have taken the same number of steps.
    step = max((int(state["step"]) for state in base.state.values() if state), default=0)
    if step:  # DeepSpeed linked parameters to moments in the first step, when a second group had no moments yet
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in named:
        if parameter.requires_grad:
            parameters[name] = {"weight": safe_get_full_fp32_param(parameter).cpu()}
            if step:
                moments = {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in MOMENTS}
                parameters[name] |= moments | {"step": step}
    scaler = vars(optimizer.loss_scaler) if hasattr(optimizer, "loss_scaler") else {}
    return {
        "parameters": parameters,
        "lr": [group["lr"] for group in base.param_groups],
        "loss_scaler": {name: scaler[name] for name in SCALER if name in scaler},
    }


def load_full_state(optimizer: Any, named: Iterable[tuple[str, nn.Parameter]], state: dict) -> None:
    """Load a result of `full_state` into DeepSpeed's optimizer before its first step.

    The number of processes may differ from that of the earlier run. Every process must call this.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    base, parameters = optimizer.optimizer, state["parameters"]
    step = max((values.get("step", 0) for values in parameters.values()), default=0)
    for group, rate in zip(base.param_groups, state["lr"], strict=True):
        group["lr"] = rate
        if step:  # DeepSpeed allocates the moments in its first step
            (flat,) = group["params"]
            # A fused torch optimizer counts steps on the device; DeepSpeed's own Adam counts in Python.
            counter = torch.tensor(float(step), device=flat.device if group.get("fused") else "cpu")
            taken = counter if isinstance(base, torch.optim.Adam) else step
            base.state[flat] = {"step": taken, **{key: torch.zeros_like(flat) for key in MOMENTS}}
    if step:
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in named:
        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, parameters[name]["weight"])
            for key in MOMENTS if step else ():
                safe_set_full_optimizer_state(parameter, parameters[name][key], key)
    optimizer.update_lp_params()
    if hasattr(optimizer, "loss_scaler"):
        vars(optimizer.loss_scaler).update(state["loss_scaler"])
