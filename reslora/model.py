"""Connect, disconnect and merge a model, and enable gradient checkpointing on it."""

import dataclasses
import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.utils.checkpoint
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from . import guards, ranks
from .calibration import Calibrator
from .checks import is_whole
from .config import AUTO, MERGES, ResLoraConfig
from .formatting import pluralize
from .linking import Chain, Chains, base_model, before_each, chains, lora_layers
from .merging import Factors, Merge, Merged, relative_error
from .wiring import Connection, attach_wires, connected, connection_of


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """Result of the merge of one block."""

    name: str
    role: str
    alpha: float | list[float] | None
    """alpha*, or the list of alpha_{n-k} (k = 1..m).

    None for exact merges. For `lstsq`: 1 or 0 for a head (see `ResLoraConfig.head`), 0 for a block that it merged by
    `none`, and None for other blocks.
    """
    rank: int
    """Rank after the merge."""
    error: float | None
    """|merged - unmerged| / |unmerged LoRA output| on the calibration batches; None without calibration."""


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """Result of a merge, the content of `merge.json`."""

    method: str
    """Merge method that was used: `none`, `input`, `weights`, `lstsq`, or `exact` (block-shortcuts)."""
    shortcut: str
    blocks: tuple[BlockReport, ...]
    notes: tuple[str, ...] = ()
    """Notes on zero norms, blocks that `lstsq` merged by `none`, the loss by `max_rank`, and calibration passes."""

    def to_dict(self) -> dict:
        """Return the report as JSON-serializable data, the content of `merge.json`."""
        return {
            "method": self.method,
            "shortcut": self.shortcut,
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        errors = [block.error for block in self.blocks if block.error is not None]
        error = (
            f", relative error {sum(errors) / len(errors):.2%} on average, {max(errors):.2%} at most" if errors else ""
        )
        return f"merged {pluralize(len(self.blocks), 'block')} by {self.method!r}{error}"


# -- connect and disconnect ------------------------------------------------------------------------------------------


def connect(
    model: nn.Module,
    config: ResLoraConfig,
    adapter_name: str = "default",
    example_inputs: dict | None = None,
) -> Chains:
    """Connect the LoRA blocks of neighboring layers of `model` in place (Eqs. 2-4) and return the chains.

    `example_inputs` are keyword arguments of the base model, used to trace the order of its layers (see `chains`).
    Hooks that are added to `lora_A` and `lora_B` later are not called, because shortcuts only read the weights of these
    modules. Hooks on the adapted layers are called.

    Raises `ValueError` if the model has no such LoRA adapter, is connected or merged already, has a layer that cannot
    be connected, or has no neighboring layers to link. The model is then unchanged. Raises `RuntimeError` if the
    installed PEFT does not support LoRA variants.
    """
    if not isinstance(config, ResLoraConfig):
        raise ValueError(f"config is a {type(config).__name__}; give a reslora.ResLoraConfig")
    base = base_model(model)
    present = connection_of(base)
    if present is not None:
        raise ValueError(
            f"this model is connected already (adapter {present.adapter_name!r}): call reslora.merge or "
            "reslora.disconnect first"
        )
    guards.refuse_inner(base, adapter_name)
    if config.wired:
        guards.refuse_unknown_peft()
    layers = lora_layers(base, adapter_name)
    guards.refuse_merged(layers)
    guards.refuse_inactive(layers, adapter_name)
    if config.wired and not config.carries:
        guards.refuse_changed_base(base.peft_config[adapter_name])
    plan = _plan(base, config, adapter_name, example_inputs)
    attach_wires(model, config, adapter_name, plan)
    return plan


def disconnect(model: nn.Module, adapter_name: str = "default") -> None:
    """Remove the shortcuts that `connect` added; A and B keep their values, as plain LoRA.

    Raises `ValueError` if the model is not connected.
    """
    connected(base_model(model), adapter_name).clear(model)


def _plan(base: nn.Module, config: ResLoraConfig, adapter_name: str, example_inputs: dict | None) -> Chains:
    try:
        plan = chains(base, adapter_name, example_inputs)
    except ValueError:
        if config.wired:
            raise
        return Chains(())  # plain LoRA: the execution order does not matter
    if not config.wired:
        return plan
    if plan.problems:
        name, reason = plan.problems[0]
        raise ValueError(f"{name} {reason}")
    if plan.links == 0:
        shapes = [f"{block.name} {block.shape}" for block in plan.blocks[:8]]
        listed = ", ".join(shapes + [f"{name} ({reason}, stays plain)" for name, reason in plan.unlinked[:8]])
        raise ValueError(
            f"shortcut={config.shortcut!r} finds no link among the {len(plan.blocks)} LoRA blocks (neighbors must "
            f"have the same role and shape): {listed}; adapt layers of repeated modules, or use shortcut='none'"
        )
    return plan


# -- gradient checkpointing ------------------------------------------------------------------------------------------


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Enable non-reentrant gradient checkpointing that preserves the shortcuts of a connected model.

    Works for models of transformers and diffusers. Turn the trainer's own option for gradient checkpointing off,
    because it would enable reentrant checkpointing. With the shortcuts `input` and `middle`, use either gradient
    checkpointing or `torch.compile`; with `block` the two can be combined.

    Raises `ValueError` for a model without a method that enables gradient checkpointing.
    """
    base = base_model(model)
    connection = connection_of(base)
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if connection is not None and connection.config.carries:
        kwargs["context_fn"] = connection.wires.contexts
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    elif hasattr(base, "gradient_checkpointing_enable"):
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    elif hasattr(base, "enable_gradient_checkpointing"):
        call = functools.partial(torch.utils.checkpoint.checkpoint, **kwargs)
        base.enable_gradient_checkpointing(_with_mask(base, call) if type(base).__name__ == MASKED else call)
    else:
        raise ValueError(
            f"{type(base).__name__} has no method to enable gradient checkpointing: if its own code calls "
            "torch.utils.checkpoint, use shortcut='block', or checkpoint only modules without connected layers"
        )


MASKED = "ChromaTransformer2DModel"
"""A model of diffusers that does not pass the attention mask to its single blocks under gradient checkpointing."""


def _with_mask(model: nn.Module, call: Callable) -> Callable:
    """Return the checkpointing function `call`, but with the mask of the forward pass for blocks that get none."""
    current = threading.local()  # one forward pass per thread; a recomputed block has the mask among its arguments

    def store_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Store the attention mask of the forward pass that is starting."""
        current.mask = kwargs.get("attention_mask")

    def call_with_mask(module: nn.Module, *args: object) -> Any:
        """Call the block with the stored mask if its arguments include none."""
        without = len(args) == 3  # hidden states, modulation, positions
        return call(module, *args, *([current.mask] if without else []))

    model.register_forward_pre_hook(store_mask, with_kwargs=True)
    return call_with_mask


# -- merge -----------------------------------------------------------------------------------------------------------


def merge(
    model: nn.Module,
    method: str = "auto",
    calibration: Iterable[Mapping] | None = None,
    adapter_name: str = "default",
    max_rank: int | None = None,
) -> MergeReport:
    """Fold the shortcuts into plain LoRA weights in place; the model is ordinary PEFT LoRA afterwards.

    `method`: `none`, `input` (Eqs. 6-9, 12), `weights` (Eqs. 10-11, 13), `lstsq` (not in the paper) or `auto`.

    - For block-shortcuts, every method except `none` is the exact merge (Eq. 5), which raises the rank to (m + 1) r, or
      to `max_rank` by truncation.
    - For other shortcuts, `auto` is `lstsq` with calibration, else `input` if training recorded norms, else `weights`.

    `calibration`: batches, as dicts of keyword arguments of the base model. The batches are read once and run through
    the unmerged model in eval mode without gradients. `lstsq` also stores the batches, and runs them several times if
    the inputs of all layers need more memory than `reslora.calibration.BUDGET`.

    The adapter keeps its dtype, device and requires_grad. With several processes, merge on rank 0 and broadcast the
    result; only the norms that rank 0 recorded are used.

    Raises `ValueError` for an unknown method, missing calibration or norms, non-finite values, or parametrized A or B.
    The model is unchanged after such an error, and also if memory runs out.
    """
    base = base_model(model)
    connection = connected(base, adapter_name)
    method = _resolve(method, connection, calibration, max_rank)
    layers = lora_layers(base, adapter_name)
    guards.refuse_merged(layers)
    _check_factors(layers, connection)
    plan = [_factors(chain, layers, connection) for chain in connection.chains] if connection.shortcut else []
    merged: list[list[Merged]] = []
    notes: list[str] = []
    with torch.no_grad():
        if plan:
            merge_chain = dataclasses.replace(connection.shortcut.merges[method], max_rank=max_rank)
            merged, notes = _merge_chains(base, connection, plan, merge_chain, calibration)
        blocks: list[BlockReport] = []
        written: dict[LoraLayer, Merged] = {}
        for chain, chain_factors, results in zip(connection.chains, plan, merged, strict=False):
            for block, factors, result in zip(chain, chain_factors, results, strict=True):
                error = None if calibration is None else relative_error(factors, result)
                blocks.append(BlockReport(block.name, block.role, result.alpha, result.a.shape[0], error))
                written[layers[block.name]] = ranks.prepared(layers[block.name], result, adapter_name)
                notes += result.notes
        disconnect(model, adapter_name)  # no allocation from here on, so all layers change or none
        for layer, result in written.items():
            ranks.write(layer, result, adapter_name)
        ranks.declare(base, layers, adapter_name)
    torch.clear_autocast_cache()  # an enclosing autocast context still caches casts of the old weights
    return MergeReport(method, connection.config.shortcut, tuple(blocks), tuple(dict.fromkeys(notes)))


def _resolve(name: str, connection: Connection, calibration: object, max_rank: int | None) -> str:
    """Return the name of the merge method to run.

    Raises `ValueError` if the method is unknown, if its statistics are missing, or if `max_rank` does not apply to it.
    """
    if name not in (AUTO, *MERGES):
        raise ValueError(f"method={name!r} is not one of {', '.join(map(repr, (AUTO, *MERGES)))}")
    shortcut = connection.shortcut
    if max_rank is not None:
        if not is_whole(max_rank, 1):
            raise ValueError(f"max_rank={max_rank!r} must be an integer of at least 1")
        if shortcut is None or not shortcut.raises_rank:
            kept = connection.config.shortcut
            raise ValueError(f"max_rank={max_rank} is only for shortcut='block'; merging {kept!r} keeps the rank")
    if shortcut is None or name == "none":
        return "none"
    means = connection.wires.norms.means().values()
    recorded = bool(means) and all(map(math.isfinite, means))
    if "exact" in shortcut.merges:
        resolved = "exact"
    elif name == AUTO:
        resolved = "lstsq" if calibration is not None else "input" if recorded else "weights"
    else:
        resolved = name
    row = shortcut.merges[resolved]
    if name == AUTO and calibration is None and any(each.needs_moments for each in shortcut.merges.values()):
        message = f"merging by {resolved!r} because calibration= is missing; the more accurate 'lstsq' needs it"
        warnings.warn(message, stacklevel=3)  # attributed to the caller of `merge`
    if row.needs_moments and calibration is None:
        raise ValueError(f"method={name!r} needs calibration=, an iterable of dicts of the base model's arguments")
    if row.needs_norms and calibration is None and not recorded:
        raise ValueError(
            f"method={name!r} needs norms of every block: train with ResLoraConfig(window=...) above 0, or give "
            "calibration="
        )
    return resolved


def _check_factors(layers: dict[str, LoraLayer], connection: Connection) -> None:
    """Raise `ValueError` if an A or B is on the meta device, is not finite, or cannot be overwritten by the merge.

    Parametrized weights cannot be written, because they are computed each time they are read.
    """
    written = {block.name for block in connection.chains.blocks if connection.shortcut}
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            if connection.adapter_name not in getattr(layer, part):
                continue
            factor = getattr(layer, part)[connection.adapter_name]
            if factor.weight.is_meta:
                raise ValueError(f"{name} has its {part} on the meta device: load it, or disable offloading, first")
            if not bool(torch.isfinite(factor.weight).all()):
                raise ValueError(f"{name} has NaN or infinity in its {part}: resume from an earlier checkpoint")
            if name in written and "weight" not in factor._parameters:
                raise ValueError(
                    f"{name} computes the weight of its {part} from other tensors, so the merge cannot set it: first "
                    "call torch.nn.utils.parametrize.remove_parametrizations (or prune.remove, remove_weight_norm)"
                )


def _factors(chain: Chain, layers: dict[str, LoraLayer], connection: Connection) -> list[Factors]:
    adapter, config, shortcut = connection.adapter_name, connection.config, connection.shortcut
    down = [layers[block.name].lora_A[adapter].weight.detach() for block in chain]
    return [
        Factors(
            name=block.name,
            a=down[n],
            b=layers[block.name].lora_B[adapter].weight.detach(),
            scaling=layers[block.name].scaling[adapter],
            weight=functools.partial(base_weight, layers[block.name]),
            before=before,
            parts=shortcut.parts(down, n, before),
            alpha_of_head=float(shortcut.repeats_heads and config.head == "repeat"),
        )
        for n, (block, before) in enumerate(zip(chain, before_each(len(chain), config.reach), strict=True))
    ]


def base_weight(layer: LoraLayer) -> torch.Tensor:
    """Return the frozen weight as q x p, dequantized (`Conv1D` stores p x q)."""
    weight = dequantize_module_weight(layer.get_base_layer()).detach()
    return weight.t() if getattr(layer, "fan_in_fan_out", False) else weight


def _merge_chains(
    base: nn.Module,
    connection: Connection,
    plan: list[list[Factors]],
    merge_chain: Merge,
    calibration: Iterable[Mapping] | None,
) -> tuple[list[list[Merged]], list[str]]:
    """Merge every chain, and return the results and notes for the report.

    A method that needs no statistics runs before the calibration, which then measures the error of the merge.
    """
    merged = None if merge_chain.needs_norms or merge_chain.needs_moments else [merge_chain(chain) for chain in plan]
    notes: list[str] = []
    if calibration is not None:
        calibrator = Calibrator(plan, merged, merge_chain.needs_moments)
        notes = calibrator.read(base, connection.wires, calibration)
    elif merge_chain.needs_norms:
        means = connection.wires.norms.means()
        for block in (block for chain in plan if len(chain) > 1 for block in chain):
            block.norm = means[block.name]
    return ([merge_chain(chain) for chain in plan] if merged is None else merged), notes
