"""The order in which the layers of a model run: one forward on the meta device, which leaves the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils._pytree import tree_map


def trace(base: nn.Module, names: list[str], example_inputs: dict | None) -> dict[str, list[tuple[int, ...]]]:
    """Returns, in execution order, the token shapes with which each named layer ran in one forward."""
    inputs = _default_inputs(base) if example_inputs is None else example_inputs
    if not isinstance(inputs, Mapping):
        raise ValueError(f"example_inputs is a {type(inputs).__name__}; give a dict of the model's keyword arguments")
    inputs = dict(inputs)
    try:
        with _same_random(base):
            return _run(meta_copy(base), names, to_device(inputs, "meta"))
    except Exception as error:
        # Data-dependent control flow, fused kernels and quantised layers do not run on the meta device: run for real.
        parameter = next(base.parameters(), None)
        if parameter is None or parameter.is_meta:
            raise ValueError(_untraceable(base, error)) from error
        try:
            with _undisturbed(base):
                return _run(base, names, to_device(inputs, parameter.device))
        except Exception as second:
            raise ValueError(_untraceable(base, second)) from second


def _untraceable(base: nn.Module, error: Exception) -> str:
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{type(base).__name__} does not run on example_inputs ({detail}); pass example_inputs= that fit its forward"


def meta_copy(base: nn.Module) -> nn.Module:
    """Returns a copy of `base` without storage, in eval mode, and without hooks: nothing of it reaches the original."""
    memo: dict[int, object] = {}
    for tensor in (*base.parameters(), *base.buffers()):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    twin = copy.deepcopy(base, memo)
    for module in twin.modules():
        module.training = False
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                vars(module)[key] = value.to("meta")
        if isinstance(module, LoraLayer):
            # A wired block of another adapter would ask for the state that the hooks make.
            wired = [name for name, variant in module.lora_variant.items() if hasattr(variant, "wires")]
            for name in wired:
                del module.lora_variant[name]
        # accelerate replaces `forward` on the instance to move data between devices or to convert dtypes.
        for key in ("forward", "_hf_hook", "_old_forward"):
            vars(module).pop(key, None)
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    return twin


def _run(base: nn.Module, names: list[str], inputs: dict) -> dict[str, list[tuple[int, ...]]]:
    runs: dict[str, list[tuple[int, ...]]] = {}

    def note(name):
        def hook(module, args, kwargs):
            x = args[0] if args else next(iter(kwargs.values()))
            runs.setdefault(name, []).append(tuple(x.shape[1:-1]))

        return hook

    modules = dict(base.named_modules())
    handles = [modules[name].register_forward_pre_hook(note(name), with_kwargs=True) for name in names]
    try:
        with torch.no_grad():
            base(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return runs


@contextmanager
def _undisturbed(base: nn.Module):
    """Runs its body with the model in eval mode; modes and random states are as before afterwards."""
    with _same_random(base), evaluating(base):
        yield


def _same_random(base: nn.Module):
    """Random states are afterwards as before; a model may draw numbers in eval mode too."""
    devices = sorted({tensor.device.index for tensor in base.parameters() if tensor.device.type == "cuda"})
    return torch.random.fork_rng(devices=devices)


@contextmanager
def evaluating(base: nn.Module):
    """Puts every module of `base` into eval mode for its body and restores each module's own mode."""
    modes = [(module, module.training) for module in base.modules()]
    try:
        base.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def to_device(inputs: dict, device) -> dict:
    """`inputs` with every tensor in it, at any depth, on `device`."""
    return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, inputs)


def _default_inputs(base: nn.Module) -> dict:
    if any(cls.__name__ == "UNet2DConditionModel" for cls in type(base).__mro__):
        return _unet_inputs(base.config, next(base.parameters()).dtype)
    inputs = getattr(base, "dummy_inputs", None)
    if inputs is None:
        raise ValueError(
            f"{type(base).__name__} does not say what its inputs look like: pass example_inputs= (keyword arguments)"
        )
    # Encoder and decoder must not look like one run of equal shapes.
    return {key: value[..., :-1] if key.startswith("decoder_") else value for key, value in inputs.items()}


def _unet_inputs(config, dtype: torch.dtype) -> dict:
    """Inputs of a `UNet2DConditionModel` at its own sample size, from its configuration (SD 1.x, 2.x and SDXL)."""
    size = config.sample_size or 64
    size = size if isinstance(size, (tuple, list)) else (size, size)
    width = config.cross_attention_dim
    width = width[0] if isinstance(width, (tuple, list)) else width
    width = config.encoder_hid_dim or width
    inputs = {
        "sample": torch.zeros(1, config.in_channels, *size, dtype=dtype),
        "timestep": torch.zeros(1, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(1, 77, width, dtype=dtype),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(1, pooled, dtype=dtype),
            "time_ids": torch.zeros(1, 6, dtype=dtype),
        }
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        projected = config.class_embed_type in ("projection", "simple_projection")
        inputs["class_labels"] = (
            torch.zeros(1, config.projection_class_embeddings_input_dim, dtype=dtype)
            if projected
            else torch.zeros(1, dtype=torch.long)
        )
    return inputs
