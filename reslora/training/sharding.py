"""FSDP2: each process holds a shard of the frozen denoiser, and the complete adapter.

accelerate itself would either shard the adapter too, although shortcuts read adapters of other blocks, or not average
the gradients of the processes. Therefore accelerate's FSDP2 settings are used only to shard the base, and
DistributedDataParallel trains the adapter. Functions import `fully_shard` when they are called, because torch 2.5 has
none.
"""

import inspect
import os

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import InvalidArgument, refused_as
from ..methods.registry import METHODS
from ..options.contradictions import check_initialization
from ..options.images import MethodOptions, ModelOptions, OutputOptions, TrainingOptions

LAUNCHER = "accelerate launch"
USES_FSDP = "ACCELERATE_USE_FSDP"


def take_plugin(
    model: ModelOptions, adapter: MethodOptions, training: TrainingOptions, output: OutputOptions
) -> FullyShardedDataParallelPlugin | None:
    """Return accelerate's FSDP2 settings; None without FSDP.

    Disables FSDP in the environment, so that accelerate treats the run as one with DistributedDataParallel. Raises
    `InvalidArgument` for FSDP1, and for settings and options that are not supported together with FSDP2.
    """
    if not parse_flag_from_env(USES_FSDP):
        return None
    os.environ[USES_FSDP] = "false"  # otherwise transformers would load different weights in each process
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        problem = f"its configuration says FSDP {version}, which also shards the adapter"
        raise InvalidArgument(LAUNCHER, problem, "give fsdp_version: 2, as assets/accelerate/fsdp2.yaml does")
    with refused_as(LAUNCHER, "correct its fsdp_config"):
        plugin = FullyShardedDataParallelPlugin()
    refuse_settings(plugin)
    refuse_flags(model, adapter, training, output)
    return plugin


def refuse_settings(plugin: FullyShardedDataParallelPlugin) -> None:
    """Raise `InvalidArgument` for FSDP2 settings that are not supported here, and if torch has no suitable FSDP2."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        problem = f"torch {torch.__version__} has no FSDP2 that can leave the adapter unsharded"
        raise InvalidArgument(LAUNCHER, problem, "install a newer torch, or train without FSDP2")
    if plugin.activation_checkpointing:
        problem = "its fsdp_activation_checkpointing would lose the shortcuts"
        raise InvalidArgument(LAUNCHER, problem, "set it to false, and add --gradient_checkpointing")
    if not plugin.reshard_after_forward:
        problem = "its fsdp_reshard_after_forward is false, with which each process holds the complete base"
        raise InvalidArgument(LAUNCHER, problem, "set it to true, or train without FSDP2")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        problem = "its fsdp_offload_params, the base on the host, has not been tried"
        raise InvalidArgument(LAUNCHER, problem, "set it to false")


def refuse_flags(model: ModelOptions, adapter: MethodOptions, training: TrainingOptions, output: OutputOptions) -> None:
    """Raise `InvalidArgument` for options that cannot be combined with FSDP2."""
    if training.compile:
        raise InvalidArgument("--compile", "is not possible with FSDP2, which gathers weights in hooks", "leave it out")
    if model.blocks_to_swap:
        problem = "does not work with FSDP2, which gathers blocks itself"
        raise InvalidArgument(f"--blocks_to_swap {model.blocks_to_swap}", problem, "leave it out")
    if output.plan:
        raise InvalidArgument("--plan", "cannot estimate the memory of a base model that FSDP2 shards", "leave it out")
    check_initialization(adapter, changed="FSDP2")
    for name in adapter.method:
        if METHODS[name].measured:
            problem = "needs a measurement on the complete base before its first step, and FSDP2 shards the base"
            raise InvalidArgument(f"--method {name}", problem, "train it without FSDP2")


def share(plugin: FullyShardedDataParallelPlugin | None, accelerator: Accelerator) -> None:
    """Store the FSDP2 settings for sharding the base, unless there is only one process."""
    if plugin is not None and accelerator.num_processes == 1:
        accelerator.print(f"{LAUNCHER}: FSDP2 shards nothing with one process")
    elif plugin is not None:
        accelerator.state.fsdp_plugin = plugin


def cuts_base(accelerator: Accelerator) -> bool:
    """Return whether each process holds only a shard of the base."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def units_of(denoiser: nn.Module, accelerator: Accelerator) -> list[str]:
    """Return the classes of the modules that FSDP2 gathers one by one.

    The classes are those in accelerate's configuration, or by default the denoiser's blocks. Raises `InvalidArgument`
    for a class that no module of the denoiser has.
    """
    classes = {type(module).__name__ for module in denoiser.modules()}
    own = [name for name in getattr(denoiser, "_no_split_modules", None) or [] if name in classes]
    names = accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap or own
    if unknown := [name for name in names if name not in classes]:
        problem = f"its fsdp_transformer_layer_cls_to_wrap has {unknown[0]}, of which the denoiser has none"
        raise InvalidArgument(LAUNCHER, problem, f"leave it out, or give {','.join(own)}")
    return names


def cut(denoiser: nn.Module, accelerator: Accelerator) -> None:
    """Shard every weight of the base; the weights of a block are gathered only while the block is used."""
    from torch.distributed.fsdp import fully_shard

    names = units_of(denoiser, accelerator)
    whole = {parameter for module in adapters_of(denoiser) for parameter in module.parameters()}
    units = [module for module in denoiser.modules() if type(module).__name__ in names]
    for unit in (*reversed(units), denoiser):  # inner modules first
        # The root too: it has all weights outside of units. If they stayed gathered after a forward pass, saving, which
        # only the main process does, would reshard them only there.
        fully_shard(unit, reshard_after_forward=True, ignored_params=whole)


def adapters_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules that PEFT added to the layers of a model."""
    return [
        module
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name in (*layer.adapter_layer_names, *layer.other_param_names)
        if isinstance(module := getattr(layer, name, None), nn.Module)
    ]
