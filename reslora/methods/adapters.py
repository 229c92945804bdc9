"""Configure, attach, save and load the adapters of all methods, for models of transformers and diffusers.

settings = AdapterSettings(r=4, alpha=8, dropout=0.0, targets=["to_q", "to_v"], total_steps=1000)
config = adapter_config("reslora", settings)
model = attach(unet, config, ResLoraConfig(shortcut="input"))     # `config` is a LoraConfig
save_adapter(model, "checkpoint"), load_adapter(model, "checkpoint")
"""

import copy
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .. import checkpoint
from ..attributes import override_attributes
from ..config import ResLoraConfig
from ..errors import Diverged
from ..io import check_checksums, read_tensors, write_checksums, write_tensors
from ..linking import base_model, unwrap
from ..model import connect, connection_of
from ..ranks import changes_base
from . import controls, initial
from .controls import DEFAULT
from .targets import CONVOLUTIONS, targeted
from .updates import UpdatesConfig, has_updates, put

ADAPTER_NAME = "adapter.safetensors"
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_RANKS = "ranks"
_CONTROL = "control"  # key in the file's header


# -- configuration -----------------------------------------------------------------------------------------------------


def known_targets(model_type: str) -> list[str] | None:
    """Return PEFT's default target modules for LoRA in a transformers model type; None for an unknown type.

    The target modules are the query and value projections for the models of the paper: `q_proj`, `v_proj` (LLaMA) and
    `query`, `value` (RoBERTa, BERT).
    """
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return list(known[model_type]) if model_type in known else None


# -- attaching ---------------------------------------------------------------------------------------------------------


def attach(
    model: nn.Module,
    config: PeftConfig,
    shortcuts: ResLoraConfig | None = None,
    example_inputs: dict | None = None,
    in_place: bool = False,
) -> nn.Module:
    """Add the adapter of `config` to a bare `model`, connect it by `shortcuts`, and return the model to train.

    Models of diffusers get the adapter in place (`add_adapter`), and `model` itself is returned; others are wrapped
    (`get_peft_model`) unless `in_place` is set. `example_inputs`: see `reslora.connect`. The adapter's initial weights
    are drawn from torch's global random state.

    Raises `ValueError` for targets that match no layer or that the method cannot adapt, for a rank larger than a
    layer's smaller dimension, or if the shortcut finds no neighboring layers to link. Raises `RuntimeError` for
    shortcuts if the installed PEFT does not call the variants of its LoRA layers.
    """
    check_rank(model, config)
    init = getattr(config, "init_lora_weights", True)
    of_linear = (nn.Linear,) if init == "olora" else (nn.Linear, Conv1D)
    for name, module in targeted(model, config) if init not in (True, False, "gaussian") else ():
        if not isinstance(module, of_linear):
            raise ValueError(
                f"{name} is not a linear layer, as init_lora_weights={init!r} needs: do not target it, or choose "
                "another initialization"
            )
    # AdaLoRA does not support convolutions. OFT's implementation sums overlapping patches, so that it changes the
    # output even at initialization.
    for name, module in targeted(model, config) if isinstance(config, (AdaLoraConfig, OFTConfig)) else ():
        if isinstance(module, CONVOLUTIONS):
            title = "OFT" if isinstance(config, OFTConfig) else "AdaLoRA"
            raise ValueError(
                f"{name} is a convolution, which {title} cannot adapt: do not target it, or choose another method"
            )
    # Models of transformers have `add_adapter` too, but are wrapped by default.
    in_place = in_place or (hasattr(model, "add_adapter") and not isinstance(model, PreTrainedModel))
    subtracted = isinstance(config, LoraConfig) and changes_base(config)
    if subtracted and any(value.is_meta for value in model.parameters()):
        config = copy.copy(config)  # a model without weights has none to decompose; the adapter's shapes are the same
        config.init_lora_weights = True
    adapted = _add(model, config, in_place)
    # PEFT would train the divisor of AdaLoRA's scaling if the base is in half precision, and never saves it.
    for name, value in adapted.named_parameters() if isinstance(config, AdaLoraConfig) else ():
        if ".ranknum." in name:
            value.requires_grad_(False)
    if subtracted:
        initial.store(adapted)
    if shortcuts is not None:
        connect(adapted, shortcuts, example_inputs=example_inputs)
    return adapted


def check_rank(model: nn.Module, config: PeftConfig) -> None:
    """Raise `ValueError` if the rank exceeds the smaller dimension of an adapted layer, naming the narrowest layer.

    A higher rank would only cost memory, because the rank of the weight's update cannot exceed this dimension. LoKr and
    OFT accept any value, because their parameter `rank` is not the rank of the update: a large value means full factors
    or blocks.
    """
    rank = config.target_r if isinstance(config, AdaLoraConfig) else getattr(config, "r", 0)
    name, least = narrowest_layer(model, config)
    if rank > least:
        raise ValueError(
            f"rank {rank} is larger than {least}, the smaller dimension of {name}: give a rank of at most {least}, or "
            "do not target this layer"
        )


def narrowest_layer(model: nn.Module, config: PeftConfig) -> tuple[str, float]:
    """Return the name of the adapted layer with the smallest dimension, and that dimension, the maximum useful rank.

    The maximum is infinite for LoKr, OFT and methods without a rank, and if no layer is adapted. Layers in
    `rank_pattern` are not considered.
    """
    if isinstance(config, (LoKrConfig, OFTConfig)) or not hasattr(config, "r"):
        return "", math.inf
    own = getattr(config, "rank_pattern", None) or {}
    layers = (layer for layer in targeted(model, config) if get_pattern_key(own.keys(), layer[0]) not in own)
    sides = ((name, smaller_side(module)) for name, module in layers)
    return min(sides, key=lambda found: found[1], default=("", math.inf))


def smaller_side(module: nn.Module) -> int:
    """Return the smaller dimension of a layer's weight, also if the weight is quantized and stored in another shape."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return min(module.in_features, module.out_features)
    return min(module.weight.shape[0], math.prod(module.weight.shape[1:]))


def _add(model: nn.Module, config: PeftConfig, in_place: bool) -> nn.Module:
    if not in_place:
        adapted = get_peft_model(model, config)
        if isinstance(config, UpdatesConfig):
            put(adapted, config)
        return adapted
    if isinstance(config, AdaLoraConfig):
        # `add_adapter` would discard the rank allocator. The rank allocator is a plain attribute, which no `state_dict`
        # includes.
        model._rank_allocator = RankAllocator(AdaLoraModel(model, config, DEFAULT))
        model._hf_peft_config_loaded = True
    elif not isinstance(config, (LoraConfig, LoHaConfig, LoKrConfig, OFTConfig)):
        # Some of PEFT's tuners share tensors over layers. The shared tensors belong to the wrapper, which also saves
        # them.
        vars(model)[checkpoint.WRAPPER] = get_peft_model(model, config)
        if hasattr(model, "_hf_peft_config_loaded"):
            model._hf_peft_config_loaded = True
    elif isinstance(model, PreTrainedModel):
        inject_adapter_in_model(config, model)  # `add_adapter` of newer transformers may refuse this version of PEFT
    else:
        model.add_adapter(config)
    if isinstance(config, UpdatesConfig):
        put(model, config)
    return model


def check_usable(model: nn.Module) -> None:
    """Raise `ValueError` for an adapter that trains nothing, or that cannot be saved or merged.

    Only adapters of methods that the user brings are checked.
    """
    trained = {name for name, value in unwrap(model).named_parameters() if value.requires_grad}
    if not trained:
        raise ValueError("it leaves nothing trainable")
    if unsaved := sorted(trained - trained_state(model).keys()):
        raise ValueError(f"{unsaved[0]} is trained, but is not in one of PEFT's layers, so that it would not be saved")
    for name, layer in base_model(model).named_modules():
        if isinstance(layer, BaseTunerLayer) and type(layer).merge is BaseTunerLayer.merge:
            raise ValueError(f"{name} is {type(layer).__name__}, which PEFT cannot merge into the weights")
    if not has_updates(model):
        checkpoint.adapter_state(model, DEFAULT)  # PEFT's own errors


# -- AdaLoRA -----------------------------------------------------------------------------------------------------------


class RankAllocator:
    """AdaLoRA's regularizer and rank allocation for the training loop."""

    def __init__(self, tuner: AdaLoraModel) -> None:
        self.tuner = tuner

    @property
    def _config(self) -> AdaLoraConfig:
        return self.tuner.peft_config[self.tuner.trainable_adapter_name]

    def factors(self) -> list[nn.Parameter]:
        """Return the factors that the regularizer keeps orthonormal, A before B in every layer."""
        name = self.tuner.trainable_adapter_name
        layers = [layer for layer in self.tuner.model.modules() if hasattr(layer, "lora_E") and name in layer.lora_E]
        return [factor for layer in layers for factor in (layer.lora_A[name], layer.lora_B[name])]

    def penalty(self) -> torch.Tensor:
        """Return the orthogonality regularizer, a scalar (Zhang et al., 2023).

        The regularizer is `orth_reg_weight` times the mean of the Frobenius norms of `A A^T - I` and `B^T B - I` over
        all layers.
        """
        norms = []
        for number, factor in enumerate(self.factors()):
            gram = factor.T @ factor if number % 2 else factor @ factor.T
            norms.append(torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
        return self._config.orth_reg_weight * torch.stack(norms).mean()

    def add_gradient(self, accelerator: Accelerator) -> None:
        """Add the regularizer's gradient; call it after the last backward pass of a step, before gradients are clipped.

        Every process adds the same gradient after gradients are averaged: `torch.autograd.grad` bypasses DDP's hooks.
        """
        if not accelerator.sync_gradients:
            return
        scale, factors = accelerator.scaler.get_scale() if accelerator.scaler else 1.0, self.factors()
        gradients = torch.autograd.grad(scale * self.penalty(), factors)
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient if factor.grad is None else factor.grad.add_(gradient)

    def step(self, global_step: int) -> None:
        """Reallocate ranks; call this after optimizer step number `global_step`, before gradients are cleared."""
        self.tuner.update_and_allocate(global_step)

    def read_ranks(self) -> None:
        """Set the allocated ranks to the ranks of the present weights: E is zero for all others.

        Loaded or averaged weights may have ranks that the latest allocation has removed, and an export would drop
        them.
        """
        parameters = self.tuner.model.named_parameters()
        ranks = {name: (value != 0).flatten().tolist() for name, value in parameters if f"lora_E.{DEFAULT}" in name}
        self._config.rank_pattern = ranks

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return each parameter's running importance and the allocated ranks, as tensors by name.

        An importance has the shape of its parameter. The ranks of a layer are booleans, of shape (initial rank,).
        """
        state = {
            f"{kind}/{name}": value
            for kind in _AVERAGES
            for name, value in getattr(self.tuner.rankallocator, kind).items()
        }
        pattern = self._config.rank_pattern or {}
        return state | {f"{_RANKS}/{name}": torch.tensor(kept) for name, kept in pattern.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the tensors that `state_dict` returned.

        Raises `ValueError`, and changes nothing, if the tensors belong to another model.
        """
        parameters = dict(self.tuner.model.named_parameters())
        averages: dict[str, dict] = {kind: {} for kind in _AVERAGES}
        pattern = {}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            # PEFT shortens the names in `rank_pattern` when it saves an adapter.
            found = parameters.get(name, parameters.get(f"{name}.{DEFAULT}") if kind == _RANKS else None)
            if kind == _RANKS and found is not None and len(found) == len(value):
                pattern[name] = value.tolist()
            elif kind in averages and found is not None and found.shape == value.shape:
                averages[kind][name] = value.to(found.device)
            else:
                raise ValueError(f"AdaLoRA's saved state does not fit the model; the first difference is {key}")
        vars(self.tuner.rankallocator).update(averages)
        self._config.rank_pattern = pattern or None


def rank_allocator(model: nn.Module) -> RankAllocator | None:
    """Return the rank allocator that `attach` put on an AdaLoRA model; None for another method."""
    tuner = getattr(unwrap(model), "base_model", None)
    if isinstance(tuner, AdaLoraModel):
        return RankAllocator(tuner)
    return vars(base_model(model)).get("_rank_allocator")


def as_plain_lora(model: nn.Module) -> nn.Module:
    """Convert the AdaLoRA of a model of diffusers to the equivalent plain LoRA, `s B diag(E) A`, in place.

    Returns the model. The base model's weights are unchanged. The rank is AdaLoRA's initial rank, and the scaling is 1.
    Outputs are equal up to rounding.
    """
    factors = {
        name: (
            (layer.lora_E[DEFAULT] * layer.lora_A[DEFAULT]).detach(),
            (layer.lora_B[DEFAULT] * (layer.scaling[DEFAULT] / (layer.ranknum[DEFAULT] + 1e-5))).detach(),
        )
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_E")
    }
    ada, training = model.peft_config[DEFAULT], model.training
    remove_adapters(model)
    settings = {"lora_dropout": ada.lora_dropout, "target_modules": ada.target_modules}
    model.add_adapter(LoraConfig(r=ada.init_r, lora_alpha=ada.init_r, **settings))
    for name, (down, up) in factors.items():
        layer = model.get_submodule(name)
        layer.lora_A[DEFAULT].weight.data, layer.lora_B[DEFAULT].weight.data = down, up
    return model.train(training)


def remove_adapters(base: nn.Module) -> None:
    """Replace every PEFT layer by its base layer."""
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, module.get_base_layer())
    del base.peft_config
    for name in ("_rank_allocator", "_control", checkpoint.WRAPPER):
        vars(base).pop(name, None)
    if hasattr(base, "_hf_peft_config_loaded"):
        base._hf_peft_config_loaded = False


@contextmanager
def without_adapters(*models: nn.Module) -> Iterator[None]:
    """Disable the adapters inside this context, so that models in eval mode compute what the base models compute.

    PEFT's own `enable_adapters` would also freeze the adapters, and afterwards train all their weights.
    """
    with ExitStack() as stack:
        for layer in (layer for model in models for layer in model.modules() if isinstance(layer, BaseTunerLayer)):
            if initial.factors_of(layer):
                stack.enter_context(initial.untrained(layer))
            else:
                stack.enter_context(override_attributes(layer, _disable_adapters=True))
        yield


# -- saving and loading ------------------------------------------------------------------------------------------------


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that PEFT added to a model, by name, without the frozen base layers.

    The tensors share their storage with the model. Names are relative to the model inside DDP and `torch.compile`.
    """
    outer = unwrap(model)
    prefixes = tuple(
        f"{name}.{part}."
        for name, module in outer.named_modules()
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))
        for part in (*module.adapter_layer_names, *module.other_param_names)
    )
    tensors = chain(outer.named_parameters(), outer.named_buffers())
    return {name: value.detach() for name, value in tensors if name.startswith(prefixes)}


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the trained tensors, without the base model, and a checksum of each file.

    A connected model is written by `reslora.save`, any other model as `adapter.safetensors`. With several processes,
    call this on rank 0 only. Raises `Diverged`, and writes nothing, if a weight is not finite.
    """
    state = trained_state(model)
    for name, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise Diverged(f"{name} is not finite", "lower --learning_rate; earlier checkpoints are intact")
    if connection_of(base_model(model)) is not None:
        checkpoint.save(model, directory)
    else:
        control = controls.settings_of(model)
        header = {"format": "pt"} | ({_CONTROL: json.dumps(control)} if control else {})
        write_tensors(Path(directory) / ADAPTER_NAME, state, header)
        write_checksums(directory, [ADAPTER_NAME])


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Load what `save_adapter` wrote into a model with a matching adapter, connected if the saved model was connected.

    Raises `ValueError` if files are missing or damaged, if names or shapes differ, or if a matched alpha of an earlier
    version fades; the model is unchanged then.
    """
    if connection_of(base_model(model)) is not None:
        checkpoint.load(model, directory)
        return
    path = Path(directory) / ADAPTER_NAME
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is incomplete, or of another method")
    check_checksums(directory, [ADAPTER_NAME])
    saved, metadata = read_tensors(path)
    state = trained_state(model)
    for name in (*state, *saved):
        if name not in saved or name not in state or saved[name].shape != state[name].shape:
            raise ValueError(f"{path} does not fit the model's adapter; the first difference is {name}")
    control = json.loads(metadata.get(_CONTROL, "{}"))
    if control.get("factor", 1) != 1:
        raise ValueError(f"{path} has a fading alpha: load it with commit {checkpoint.LAST_AMENDED}")
    if control:
        controls.put_on(model, control)
    with torch.no_grad(), initial.frozen_weights_follow(model):
        for name, value in state.items():
            value.copy_(saved[name])
