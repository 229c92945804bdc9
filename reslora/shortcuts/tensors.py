"""Functions of tensors and modules that the shortcuts share: casts, products with B, and what must not be reused."""

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import nn

_unsafe_view = torch.ops.aten._unsafe_view.default


def rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` (… x p) as (rows x p); one reshape here replaces one around every product."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def cast(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `x`, of any shape, in the dtype of the adapter's `weight`, as PEFT casts it.

    Under autocast `x` is returned unchanged, because matrix products cast their inputs.
    """
    if x.dtype == weight.dtype or autocasts(x.device):
        return x
    return x.to(weight.dtype)


def whole_weight(linear: nn.Linear, shape: tuple[int, int], x: torch.Tensor, name: str) -> torch.Tensor:
    """Return the weight of `linear` (an A or B of shape `shape`) on the device of `x`.

    Raises `RuntimeError` if the weight is sharded or offloaded. Offloaded weights are on the meta device, where a
    product returns garbage instead of raising an error.
    """
    weight = linear.weight
    if weight.shape != shape or weight.is_meta != x.is_meta or sharded(weight):
        raise RuntimeError(
            f"{name} cannot read a LoRA weight: its shape is {tuple(weight.shape)} instead of {tuple(shape)}, or it is "
            "sharded or offloaded; use DDP or ZeRO-2 without offloading the adapter, or "
            'shortcut="middle", which needs no neighbor\'s weight'
        )
    return weight if weight.device == x.device else weight.to(x.device)


def add_product(
    result: torch.Tensor, hidden: torch.Tensor, module: LoraLayer, adapter: str, scaling: float
) -> torch.Tensor:
    """Return `result + scaling * hidden B^T` for `result` (… x q) and `hidden` (rows x r).

    If the weight of B is sharded, the B module is called, because a sharded weight is complete only while its module
    runs.
    """
    lora_b = module.lora_B[adapter]
    weight = lora_b.weight
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.is_meta != hidden.is_meta:
        return result + lora_b(hidden * scaling).view(result.shape)
    # `hidden` has a wider dtype than B if an earlier block with that dtype passed on a term of the sum.
    return add_scaled(result, cast(hidden, weight), weight, scaling, module)


def add_scaled(
    result: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, scaling: float, module: LoraLayer
) -> torch.Tensor:
    """Return `result + scaling * hidden weight^T` for (… x q), (rows x r) and (q x r), without a q-wide temporary.

    `result`, the output of the frozen layer of `module`, is changed in place if nothing else can refer to it.
    """
    if result.dtype != hidden.dtype:
        # With a half-precision frozen layer and a float32 adapter, or the reverse, use the wider dtype, as PEFT does.
        return result + F.linear(hidden * scaling, weight).view(result.shape)
    if torch.compiler.is_compiling() or not _unheld(result, module):
        return torch.addmm(rows(result), hidden, weight.t(), alpha=scaling).view(result.shape)
    if weight.dtype != hidden.dtype:
        weight = weight.to(hidden.dtype)  # autocast casts the inputs of all products except in-place ones
    # Not `view`: autograd would copy the gradient of a tensor that is changed in place through a view.
    flat = _unsafe_view(result, (-1, result.shape[-1]))
    return flat.addmm_(hidden, weight.t(), alpha=scaling).view(result.shape)


def _unheld(result: torch.Tensor, module: LoraLayer) -> bool:
    """Return whether `result`, the output of the frozen layer, can be changed in place.

    The output can be changed if the layer is an `nn.Linear`, whose backward pass does not need its output, and if
    neither a hook nor another adapter can use this output.
    """
    base = module.base_layer
    if type(base) is not nn.Linear or base._forward_hooks or base._backward_hooks or "forward" in vars(base):
        return False
    if nn.modules.module._global_forward_hooks:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # `vmap` over the weights adds a batch axis
        return False
    return type(result) is torch.Tensor and result.is_contiguous() and len(module.active_adapters) == 1


def autocasts(device: torch.device) -> bool:
    """Return whether autocast is enabled for a device; False for the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def sharded(weight: torch.Tensor) -> bool:
    """Return whether a weight holds only a shard of its values, although it has the complete shape."""
    return type(weight) is not nn.Parameter and hasattr(weight, "_local_tensor")


def version_of(x: torch.Tensor) -> int | None:
    """Return the version of a tensor, which every change in place raises.

    None in a compiled graph and for tensors created in inference mode, which have no version.
    """
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def passes(dropout: nn.Module) -> bool:
    """Return whether a dropout module returns its input unchanged."""
    return isinstance(dropout, nn.Identity) or not dropout.training


def inside_checkpoint() -> object:
    """Return an object that identifies the innermost non-reentrant checkpoint or its recomputation; None outside.

    The returned object is one of the saved-tensor hooks that a non-reentrant checkpoint creates anew each time.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks[0] if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint" else None
