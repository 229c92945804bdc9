"""Trace the execution order of a model's layers with one forward pass on the meta device."""

import copy
import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .attributes import override_attributes
from .errors import first_line

_HOLDER = "reslora.holder"


@dataclasses.dataclass(frozen=True)
class Trace:
    """Result of a traced forward pass. *Holders* are the repeated modules that contain the traced layers."""

    runs: dict[str, list[tuple[int, ...]]]
    """Layer, in execution order -> token shape of its input in each of its calls."""
    reads: dict[str, set[str]]
    """Holder -> the holders on whose outputs its input depends (its first argument that contains tensors)."""
    inner: dict[str, set[str]]
    """Holder -> the holders inside it on whose outputs its own output depends."""
    readers: list[list[str]] = dataclasses.field(default_factory=list)
    """Groups of layers that read the same tensor, in execution order."""

    def apart(self, holder: str, before: str) -> str:
        """Return why `holder` does not continue the hidden states of the holder `before`; empty if it does."""
        if before.startswith(holder + "."):  # `before` is inside `holder`, and a layer of `holder` follows
            return ""
        if before in self._back_from(self._stream(holder), self._stream):
            return ""
        if before in self._back_from(self.reads[holder], self.reads.__getitem__):
            return f"another stream: {holder} combines the outputs of {' and '.join(sorted(self.reads[holder]))}"
        return f"another stream: {holder} does not read the output of {before}"

    def _stream(self, holder: str) -> set[str]:
        """Return the holders in `reads[holder]` whose hidden states `holder` continues.

        - If one of these holders depends on all the others, they form one stream, and all of them are returned.
        - Otherwise `holder` joins independent streams, such as those of an image and its caption. Then only holders in
          the same list of modules as `holder` are returned; if there are none, a new stream begins.
        """
        sources = self.reads[holder]
        if any(sources <= self._back_from({source}, self.reads.__getitem__) for source in sources):
            return sources
        return {source for source in sources if source.rpartition(".")[0] == holder.rpartition(".")[0]}

    def _back_from(self, holders: set[str], step: Callable[[str], set[str]]) -> set[str]:
        """Return `holders` and all holders that can be reached from them by `step`, or because they are inside one."""
        found, left = set(holders), list(holders)
        while left:
            holder = left.pop()
            new = (step(holder) | self.inner[holder]) - found
            found |= new
            left += new
        return found


def trace(base: nn.Module, holders: Mapping[str, str], example_inputs: dict | None) -> Trace:
    """Run one forward pass, on the meta device if possible, and return the trace.

    `holders` maps the path of each layer to trace to the path of its holder (a layer may be its own holder).
    `example_inputs` are keyword arguments of `base` (default: made from its configuration, or its `dummy_inputs`).
    Random states, training modes and gradients are restored.

    Raises `ValueError` if the model has no default inputs and `example_inputs` is missing, or if the model does not run
    on the inputs.
    """
    inputs = _default_inputs(base) if example_inputs is None else example_inputs
    if not isinstance(inputs, Mapping):
        raise ValueError(f"example_inputs is a {type(inputs).__name__}; give a dict of the model's keyword arguments")
    inputs = dict(inputs)
    try:
        try:
            with _same_random(base):
                return _run(meta_copy(base, adapters=False), holders, to_device(inputs, "meta"))
        except Exception:
            # Data-dependent control flow, fused kernels and quantized layers do not run on the meta device: use the
            # model's own device.
            device = next(base.parameters()).device
            with _undisturbed(base):
                return _run(base, holders, to_device(inputs, device))
    except Exception as error:
        problem = f"does not run on the example inputs ({first_line(error)})"
        raise ValueError(f"{type(base).__name__} {problem}; pass example_inputs= that fit its forward") from error


def meta_copy(base: nn.Module, adapters: bool = True) -> nn.Module:
    """Return a copy of `base` on the meta device, in eval mode and without hooks; the original is unchanged.

    To make a forward pass faster, norm layers of the copy return a copy of their input. Without `adapters`, PEFT's
    layers are replaced by their base layers, and linear layers have no bias.
    """
    memo: dict[int, object] = {}
    tensors = [*base.parameters(), *base.buffers()]
    for module in base.modules():
        for name, value in vars(module).items():
            # Every module has eleven dicts of hooks, nearly all empty, and copying them takes longer than copying
            # everything else.
            if isinstance(value, OrderedDict) and (not value or name in ("_forward_hooks", "_forward_pre_hooks")):
                memo[id(value)] = OrderedDict()
            elif isinstance(value, torch.Tensor):
                tensors.append(value)
    for tensor in tensors:
        # Weights stored as 8-bit floats are cast to the model's dtype by hooks, which the copy does not have.
        stored = tensor.is_floating_point() and tensor.dtype.itemsize == 1
        empty = torch.empty(tensor.shape, dtype=_dtype(base) if stored else tensor.dtype, device="meta")
        empty = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        # PEFT reads the quantization attributes of bitsandbytes' 4-bit weights.
        vars(empty).update({key: value for key, value in vars(tensor).items() if isinstance(value, bool | int | str)})
        memo[id(tensor)] = empty
    for layer in () if adapters else base.modules():
        if isinstance(layer, BaseTunerLayer):
            memo[id(layer)] = copy.deepcopy(layer.get_base_layer(), memo)
    twin = copy.deepcopy(base, memo)
    for module in twin.modules():
        module.training = False
        # accelerate replaces `forward` on the instance to move data between devices or to convert dtypes.
        for key in ("forward", "_hf_hook", "_old_forward"):
            vars(module).pop(key, None)
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
        # On the meta device a norm is a copy and a bias adds nothing, but PyTorch decomposes both into many operations.
        if type(module) in (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm):
            module.__dict__["forward"] = torch.clone
        elif type(module) is nn.Linear and not adapters:
            module.__dict__["forward"] = partial(nn.functional.linear, weight=module.weight)
    return twin


def _run(base: nn.Module, holders: Mapping[str, str], inputs: dict) -> Trace:
    watch = _Watch(holders)
    # Gradients are enabled, because the autograd graph between holders distinguishes the streams.
    with ExitStack() as hooks, torch.inference_mode(False), torch.enable_grad():
        for path in watch.holders:
            module = base.get_submodule(path)
            hooks.enter_context(module.register_forward_pre_hook(partial(watch.enter, path), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(partial(watch.leave, path)))
        base(**inputs)
    return watch.trace


class _Watch:
    """Hooks that record which modules run, and mark the output of every holder in the autograd graph.

    A holder may be a container whose `forward` is never called. Then a call of the traced layer, or of a module between
    the holder and this layer, counts as a call of the holder.
    """

    def __init__(self, holders: Mapping[str, str]) -> None:
        self.trace = Trace({}, {holder: set() for holder in holders.values()}, {h: set() for h in holders.values()})
        self.layers = set(holders)
        # Every module from a holder down to its layer, by path.
        self.holders = {
            ".".join(name.split(".")[:depth]): holder
            for name, holder in holders.items()
            for depth in range(holder.count(".") + 1, name.count(".") + 2)
        }
        self.calls: list[tuple[str, str]] = []  # (holder, path of the module that was called), outermost first
        # (tensor, version) -> its readers. The tensors are stored, because a freed tensor's id can be reused.
        self.read: dict[tuple[int, int], tuple[torch.Tensor, list[str]]] = {}

    def enter(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Record a call of the module at `path`; a forward pre-hook."""
        hidden = _hidden_states(module, args, kwargs)
        if path in self.layers:
            self.trace.runs.setdefault(path, []).append(tuple(hidden[0].shape[1:-1]) if hidden else ())
            for x in hidden[:1]:
                _, readers = self.read.setdefault((id(x), x._version), (x, []))
                if not readers:
                    self.trace.readers.append(readers)
                readers.append(path)
        holder = self.holders[path]
        if holder not in (open_holder for open_holder, _ in self.calls):
            self.calls.append((holder, path))
            self.trace.reads[holder] |= _origins(hidden) - {holder}

    def leave(self, path: str, module: nn.Module, args: tuple, output: object) -> object:
        """Replace the output of a holder by a copy that is marked with the holder's path; a forward hook."""
        holder = self.holders[path]
        if (holder, path) not in self.calls:
            return None
        self.calls.remove((holder, path))
        inside = holder + "."
        self.trace.inner[holder] |= {origin for origin in _origins(_tensors(output)) if origin.startswith(inside)}
        return tree_map(partial(_fresh, holder), output)


def _hidden_states(module: nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Return the floating-point and complex tensors in the first argument of `forward` that has any.

    Arguments are in the order of the signature, also if they are passed by keyword.
    """
    try:
        arguments = list(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.values())
    except (TypeError, ValueError):
        arguments = [*args, *kwargs.values()]
    return next(filter(None, map(_tensors, arguments)), [])


def _tensors(value: object) -> list[torch.Tensor]:
    """Return the tensors in `value`, at any depth, that can have a gradient."""
    return [leaf for leaf in tree_leaves(value) if _differentiable(leaf)]


def _differentiable(value: object) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _fresh(holder: str, value: Any) -> Any:
    """Return a detached copy of a tensor, marked as an output of `holder`; return any other `value` unchanged."""
    if not _differentiable(value):
        return value
    with torch.enable_grad():
        # A clone is needed, because a model may change the tensor in place, which is an error for a leaf.
        fresh = value.detach().requires_grad_().clone()
    fresh.grad_fn.metadata[_HOLDER] = holder
    return fresh


def _origins(tensors: list[torch.Tensor]) -> set[str]:
    """Return the holders whose outputs `tensors` depend on."""
    found: set[str] = set()
    left: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen = {None}
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if _HOLDER in node.metadata:
            found.add(node.metadata[_HOLDER])
        left += [following for following, _ in node.next_functions]
    return found


@contextmanager
def _undisturbed(base: nn.Module) -> Iterator[None]:
    """Use eval mode and no gradient checkpointing inside this context; restore both, and random states, at the end."""
    with _same_random(base), evaluating(base), ExitStack() as restored:
        for module in base.modules():
            if getattr(module, "gradient_checkpointing", False):
                restored.enter_context(override_attributes(module, gradient_checkpointing=False))
        yield


def _same_random(base: nn.Module) -> AbstractContextManager[None]:
    """Return a context that restores torch's random states at its end: models may use random numbers in eval mode."""
    devices = sorted({tensor.device.index for tensor in base.parameters() if tensor.device.type == "cuda"})
    return torch.random.fork_rng(devices=devices)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put the models into eval mode inside this context, and restore the mode of each of their modules at the end."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def to_device(inputs: dict, device: torch.device | str) -> dict:
    """Return `inputs` with every tensor in it, at any depth, moved to `device`."""
    return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, inputs)


def _default_inputs(base: nn.Module) -> dict:
    for cls in type(base).__mro__:
        if cls.__name__ in _INPUTS:
            return _INPUTS[cls.__name__](base.config, partial(torch.zeros, 1, dtype=_dtype(base)))
    inputs = getattr(base, "dummy_inputs", None)
    if inputs is None:
        raise ValueError(
            f"{type(base).__name__} has no default inputs to trace with: pass example_inputs=, a dict of its arguments"
        )
    inputs = dict(inputs)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False) and "input_ids" in inputs:
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    return inputs


def _dtype(base: nn.Module) -> torch.dtype:
    """Return the dtype that the model computes in: its attribute `dtype`, else the dtype of its first parameter."""
    return getattr(base, "dtype", None) or next(base.parameters()).dtype


def _unet_inputs(config: Any, zeros: Callable) -> dict:
    """Return inputs of a `UNet2DConditionModel` at its own sample size (SD 1.x, 2.x and SDXL)."""
    size = config.sample_size or 64
    width = config.cross_attention_dim
    width = config.encoder_hid_dim or (width[0] if isinstance(width, (tuple, list)) else width)
    # A smaller image would be halved to one pixel before the last stages, which then could not be told apart.
    smallest = 2 ** len(config.down_block_types)
    size = [max(side, smallest) for side in (size if isinstance(size, (tuple, list)) else (size, size))]
    inputs = {
        "sample": zeros(config.in_channels, *size),
        "timestep": torch.zeros(1, dtype=torch.long),
        "encoder_hidden_states": zeros(77, width),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": zeros(pooled), "time_ids": zeros(6)}
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        projected = config.class_embed_type in ("projection", "simple_projection")
        inputs["class_labels"] = (
            zeros(config.projection_class_embeddings_input_dim) if projected else torch.zeros(1, dtype=torch.long)
        )
    return inputs


# In the inputs below, caption and image must differ in their number of tokens, because both run through layers of the
# same class.


def _z_image_inputs(config: Any, zeros: Callable) -> dict:
    patch, frames = config.all_patch_size[0], config.all_f_patch_size[0]
    return {
        # The model pads image and caption to multiples of 32 tokens; these inputs have 64 and 32 tokens.
        "x": [zeros(config.in_channels, frames, 8 * patch, 8 * patch)[0]],
        "t": zeros(),
        "cap_feats": [zeros(32, config.cap_feat_dim)[0]],
        "patch_size": patch,
        "f_patch_size": frames,
    }


def _flux_inputs(config: Any, zeros: Callable) -> dict:
    axes = len(config.axes_dims_rope)
    inputs = {
        "hidden_states": zeros(64, config.in_channels),
        "encoder_hidden_states": zeros(24, config.joint_attention_dim),
        "timestep": zeros(),
        "img_ids": zeros(64, axes)[0],
        "txt_ids": zeros(24, axes)[0],
    }
    if config.get("guidance_embeds"):  # not in Chroma
        inputs["guidance"] = zeros()
    if "pooled_projection_dim" in config:  # not in FLUX.2 and Chroma
        inputs["pooled_projections"] = zeros(config.pooled_projection_dim)
    return inputs


def _sd3_inputs(config: Any, zeros: Callable) -> dict:
    size = min(config.sample_size, 16 * config.patch_size)
    return {
        "hidden_states": zeros(config.in_channels, size, size),
        "encoder_hidden_states": zeros(77, config.joint_attention_dim),
        "pooled_projections": zeros(config.pooled_projection_dim),
        "timestep": zeros(),
    }


def _qwen_image_inputs(config: Any, zeros: Callable) -> dict:
    return {
        "hidden_states": zeros(64, config.in_channels),
        "encoder_hidden_states": zeros(24, config.joint_attention_dim),
        "timestep": zeros(),
        "img_shapes": [[(1, 8, 8)]],
    }


def _krea2_inputs(config: Any, zeros: Callable) -> dict:
    layers = config.num_text_layers
    # The number of caption tokens must also differ from `layers`, the outputs of the text encoder for each token.
    return {
        "hidden_states": zeros(64, config.in_channels),
        "encoder_hidden_states": zeros(2 * layers, layers, config.text_hidden_dim),
        "timestep": zeros(),
        "position_ids": zeros(2 * layers + 64, 3)[0],
    }


class _Ones(torch.Tensor):
    """A mask of ones that has sums on the meta device, too: Lumina 2 reads the lengths of captions from its mask."""

    def sum(self, dim: int) -> torch.Tensor:  # type: ignore[override]
        """Return the sums along a dimension, on the CPU."""
        return torch.full(self.shape[:dim], self.shape[dim])

    def bool(self) -> torch.Tensor:
        """Return a plain tensor of ones on the mask's device."""
        return torch.ones(self.shape, dtype=torch.bool, device=self.device)


def _lumina2_inputs(config: Any, zeros: Callable) -> dict:
    side = 8 * config.patch_size
    return {
        "hidden_states": zeros(config.in_channels, side, side),
        "encoder_hidden_states": zeros(24, config.cap_feat_dim),
        "timestep": zeros(),
        "encoder_attention_mask": torch.ones(1, 24).as_subclass(_Ones),
    }


# By the name of the class: nothing of diffusers is imported here.
_INPUTS = {
    "UNet2DConditionModel": _unet_inputs,
    "ZImageTransformer2DModel": _z_image_inputs,
    "FluxTransformer2DModel": _flux_inputs,
    "Flux2Transformer2DModel": _flux_inputs,
    "ChromaTransformer2DModel": _flux_inputs,
    "SD3Transformer2DModel": _sd3_inputs,
    "QwenImageTransformer2DModel": _qwen_image_inputs,
    "Krea2Transformer2DModel": _krea2_inputs,
    "Lumina2Transformer2DModel": _lumina2_inputs,
}
