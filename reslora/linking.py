"""Find the chains of neighboring LoRA blocks of a model: roles, execution order and links.

A *role* is the path of a layer inside its repeated module, such as `attn1.to_q`. A *chain* is a sequence of consecutive
blocks of one role, in execution order. A chain ends where the next block differs in shape or belongs to another stream
of hidden states. This module only describes a model and changes nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .formatting import pluralize
from .tracing import Trace, trace

Before = Sequence[Sequence[int]]
"""For each block n of a chain, the indices n-1, n-2, ... n-m of the earlier blocks whose terms block n adds."""

# Classes whose `forward` calls `lora_variant[adapter].forward`. Other classes (AWQ, AQLM, EETQ, TE, tensor parallel)
# ignore variants: their layers would train plain LoRA, without an error, although they are connected.
_CALLS_VARIANT = {
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.gptq", "GPTQLoraLinear"),
    ("peft.tuners.lora.hqq", "HqqLoraLinear"),
}

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclasses.dataclass(frozen=True)
class Block:
    """One LoRA block: the factors A and B of one adapted linear layer."""

    name: str
    """Path of the adapted layer in the base model."""
    role: str
    """Path of the layer inside its repeated module, such as `attn1.to_q`."""
    in_features: int
    out_features: int
    rank: int
    tokens: tuple[int, ...]
    """Shape of the layer's input without its first (batch) and last (feature) axis."""
    cut: str = ""
    """Why a new chain begins at this block; empty if the block continues the chain of the previous block."""

    @property
    def shape(self) -> str:
        """Features, rank and token shape as text, such as `320->640 r=4 tokens=4096`."""
        tokens = "x".join(map(str, self.tokens)) or "-"
        return f"{self.in_features}->{self.out_features} r={self.rank} tokens={tokens}"


@dataclasses.dataclass(frozen=True)
class Chain(Sequence):
    """Neighboring blocks of one role, in execution order; the first block is the *head*."""

    role: str
    blocks: tuple[Block, ...]

    def __getitem__(self, index: Any) -> Any:
        return self.blocks[index]

    def __len__(self) -> int:
        return len(self.blocks)


@dataclasses.dataclass(frozen=True)
class Chains(Sequence):
    """The chains of a model, the LoRA layers without shortcuts, and the layers that cannot be connected."""

    chains: tuple[Chain, ...]
    unlinked: tuple[tuple[str, str], ...] = ()
    """(name, reason) of LoRA layers without shortcuts, which stay plain LoRA."""
    problems: tuple[tuple[str, str], ...] = ()
    """(name, reason) of layers for which `connect` raises an error."""
    readers: tuple[tuple[str, ...], ...] = ()
    """Groups of blocks that read the same tensor, such as q, k and v of one attention, in execution order."""

    def __getitem__(self, index: Any) -> Any:
        return self.chains[index]

    def __len__(self) -> int:
        return len(self.chains)

    @property
    def links(self) -> int:
        """Number of links, the pairs of neighboring blocks in a chain."""
        return sum(len(chain) - 1 for chain in self.chains)

    @property
    def blocks(self) -> list[Block]:
        """Blocks of all chains, in the order of the chains."""
        return [block for chain in self.chains for block in chain]

    def clipped(self, reach: int | None) -> list[Chain]:
        """Return the chains of at least two blocks in which every block has fewer than `reach` earlier blocks."""
        return [] if reach is None else [chain for chain in self.chains if 1 < len(chain) <= reach]

    def to_dict(self) -> dict:
        """Return the chains as JSON-serializable data, the content of `chains.json`."""
        return {
            "links": self.links,
            "chains": [
                {"role": chain.role, "blocks": [dataclasses.asdict(block) for block in chain]} for chain in self.chains
            ],
            "unlinked": [{"name": name, "reason": reason} for name, reason in self.unlinked],
            "readers": [list(names) for names in self.readers],
        }

    def __str__(self) -> str:
        count = pluralize(len(self.blocks), "LoRA block")
        lines = [f"{count} in {pluralize(len(self), 'chain')}, {pluralize(self.links, 'link')}"]
        rows = [
            ("" if number else chain.role, "-> " * bool(number) + block.name, block.shape, block.cut)
            for chain in self
            for number, block in enumerate(chain)
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines += [f"unlinked  {name}  {reason}" for name, reason in self.unlinked]
        lines += [f"refused  {name}  {reason}" for name, reason in self.problems]
        return "\n".join(lines)


def before_each(blocks: int, reach: int | None) -> Before:
    """Return, for each block of a chain with `blocks` blocks, the indices of the earlier blocks whose terms it adds.

    Block n (counted from 0) adds the terms of `m = min(reach, n)` earlier blocks, or of all n if `reach` is None.
    """
    return [range(n - 1, -1 if reach is None else max(0, n - reach) - 1, -1) for n in range(blocks)]


def chains(model: nn.Module, adapter_name: str = "default", example_inputs: dict | None = None) -> Chains:
    """Return the chains of neighboring LoRA blocks of `model`; `print` shows them as a table.

    `example_inputs` are keyword arguments of the base model, used only to trace the execution order, on the meta device
    if possible. For a U-Net, and for a Z-Image, Flux, Stable Diffusion 3, Qwen-Image, Krea 2 or Lumina 2 transformer,
    the default is made from the configuration; for other models it is their `dummy_inputs`. The trace leaves random
    states, training modes and gradients unchanged. Where two independent streams join, such as those of an image and
    its caption, new chains begin.

    Raises `ValueError` if the model has no LoRA layer of this adapter, has no default inputs and `example_inputs` is
    missing, or does not run on the inputs.
    """
    base = base_model(model)
    connection = live_connection(base)
    connected = connection is not None and connection.adapter_name == adapter_name
    if connected and (connection.chains or example_inputs is None):
        return connection.chains
    linkable, unlinked, problems = _sort_layers(lora_layers(base, adapter_name), adapter_name)
    places = {name: _place(base, name) for name in linkable}
    seen = trace(base, {name: holder or name for name, (holder, _) in places.items()}, example_inputs)
    problems += [
        (name, f"runs {len(shapes)} times in one forward pass, so its previous block is ambiguous; do not adapt it")
        for name, shapes in seen.runs.items()
        if len(shapes) > 1
    ]
    unlinked += [(name, "did not run in the traced forward pass") for name in linkable if name not in seen.runs]
    by_role: dict[str, list[Block]] = {}
    for name, shapes in seen.runs.items():
        layer, role = linkable[name], places[name][1]
        inputs, outputs = layer.lora_A[adapter_name].weight.shape[-1], layer.lora_B[adapter_name].weight.shape[0]
        block = Block(name, role, inputs, outputs, layer.r[adapter_name], shapes[0])
        by_role.setdefault(role, []).append(block)

    def reason_to_cut(before: Block, block: Block) -> str:
        """Return why `block` cannot be linked to `before`, the previous block of its role; empty if it can."""
        one, other = places[before.name][0], places[block.name][0]
        apart = seen.apart(other, one) if one and other else "one of the two is in no list of modules of one class"
        return apart or _difference(before, block)

    found = tuple(chain for role, blocks in by_role.items() for chain in _cut(role, blocks, reason_to_cut))
    holders = {name: place[0] or name.rpartition(".")[0] for name, place in places.items()}
    return Chains(found, tuple(unlinked), tuple(problems), tuple(_readers(seen, holders)))


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP and `torch.compile` wrappers; a `PeftModel` is not unwrapped.

    Raises `ValueError` for `nn.DataParallel`, or if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; give an nn.Module, such as a pipeline's unet")
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "model is an nn.DataParallel, which runs copies of its layers: use DistributedDataParallel, "
                "for instance through `accelerate launch`"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        else:
            return model


def base_model(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, `torch.compile` and PEFT wrappers.

    Raises `ValueError` for `nn.DataParallel`.
    """
    return with_wrappers(model)[-1]


def with_wrappers(model: nn.Module) -> list[nn.Module]:
    """Return PEFT's wrappers around the base model, outermost first, and the base model itself."""
    found = [unwrap(model)]
    while hasattr(type(found[-1]), "get_base_model") or isinstance(found[-1], BaseTuner):
        found.append(unwrap(found[-1].model if isinstance(found[-1], BaseTuner) else found[-1].base_model))
    return found


def live_connection(base: nn.Module) -> Any:
    """Return the `wiring.Connection` of a base model; None if the model is not connected or the adapter
    has been removed.
    """
    connection = vars(base).get("_reslora")
    return connection if connection is not None and connection.alive(base) else None


def lora_layers(base: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Return the LoRA layers that have the adapter `adapter_name`, by their path in the base model.

    AdaLoRA's layers are excluded: they derive from PEFT's `LoraLayer` but have other parameters. Raises `ValueError` if
    the model has no LoRA layers, or none with this adapter.
    """
    layers = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and not hasattr(module, "lora_E")
    }
    if not layers:
        others = {config.peft_type.value for config in vars(base).get("peft_config", {}).values()} - {"LORA"}
        raise ValueError(
            f"{type(base).__name__} has no LoRA layers{', only ' * bool(others)}{', '.join(sorted(others))}: first "
            "call get_peft_model(model, LoraConfig(...)) or model.add_adapter(LoraConfig(...)), with target_modules "
            "that match layers of the model"
        )
    chosen = {name: layer for name, layer in layers.items() if adapter_name in (*layer.lora_A, *layer.lora_embedding_A)}
    if not chosen:
        known = sorted({key for layer in layers.values() for key in (*layer.lora_A, *layer.lora_embedding_A)})
        raise ValueError(
            f"adapter_name={adapter_name!r} is not on this model; its adapters: {', '.join(map(repr, known))}"
        )
    return chosen


def _sort_layers(layers: dict[str, LoraLayer], adapter_name: str) -> tuple[dict, list, list]:
    """Sort LoRA layers by whether they can have shortcuts.

    Returns the layers that can be linked, by name; (name, reason) of the layers that stay plain LoRA; and
    (name, reason) of those linkable layers for which `connect` raises an error.
    """
    linkable: dict[str, LoraLayer] = {}
    unlinked, problems = [], []
    for name, layer in layers.items():
        if reason := stays_plain(name, layer):
            unlinked.append((name, reason))
            continue
        linkable[name] = layer
        if problem := refused(layer, adapter_name):
            problems.append((name, problem))
    return linkable, unlinked, problems + _tied(linkable, adapter_name)


def stays_plain(name: str, layer: LoraLayer) -> str:
    """Return why a LoRA layer gets no shortcut and stays plain; empty if it can be linked."""
    if isinstance(layer, LoraEmbedding):
        return "embedding"
    if isinstance(layer.get_base_layer(), (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "convolution"
    if "experts" in name.split(".") or type(layer).__name__ == "ParamWrapper":
        return "expert"
    if merges_itself(layer):
        return "merged into nn.MultiheadAttention in each forward pass"
    return ""


def merges_itself(module: nn.Module) -> bool:
    """Return whether a module is PEFT's LoRA on `nn.MultiheadAttention`, which merges weights in its `forward`."""
    return isinstance(module, LoraLayer) and type(module).__name__ == "MultiheadAttention"


def refused(layer: LoraLayer, adapter_name: str) -> str:
    """Return why a LoRA layer cannot be connected; empty if it can."""
    owner = next(cls for cls in type(layer).__mro__ if "forward" in vars(cls))
    if (owner.__module__, owner.__name__) not in _CALLS_VARIANT:
        return f"is a {type(layer).__module__}.{type(layer).__name__}, which does not call LoRA variants"
    variant = layer.lora_variant.get(adapter_name)
    if variant is not None:
        return f"already has the variant {type(variant).__name__}; ResLoRA needs plain LoRA layers"
    if layer.lora_bias.get(adapter_name):
        return "has lora_bias=True, which ResLoRA does not support; set it to False"
    for part in ("lora_A", "lora_B"):
        factor = getattr(layer, part)[adapter_name]
        if any(getattr(factor, hooks) for hooks in _HOOKS):
            return (
                f"has hooks on its {part}, which a shortcut would not call: call torch.nn.utils.prune.remove if it is "
                "pruned, else remove them, or put them on the layer itself"
            )
    rank, weight = layer.r[adapter_name], layer.lora_A[adapter_name].weight
    if weight.dim() == 2 and weight.shape[0] != rank:
        return (
            f"has rank {rank}, but its lora_A was padded to {weight.shape[0]} rows for hot-swapping; load the adapter "
            "again, without prepare_model_for_compiled_hotswap"
        )
    return ""


def _tied(layers: dict[str, LoraLayer], adapter_name: str) -> list[tuple[str, str]]:
    owners: dict[int, str] = {}
    problems = []
    for name, layer in layers.items():
        # Only registered parameters: a parametrized weight is a new tensor each time it is read.
        registered = layer.get_base_layer()._parameters.get("weight")
        for tensor in (registered, layer.lora_A[adapter_name].weight):
            other = owners.setdefault(id(tensor), name) if tensor is not None else name
            if other != name:
                problems.append((name, f"is tied to {other} (the weight is the same tensor); adapt only one of them"))
                break
    return problems


def _readers(seen: Trace, holders: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """Yield groups of at least two layers that read the same tensor and have the same holder (see `_place`).

    A gradient checkpoint may begin between two holders, so layers of different holders cannot compute `A x` together.
    """
    for names in seen.readers:
        by_holder: dict[str, list[str]] = {}
        for name in names:
            by_holder.setdefault(holders[name], []).append(name)
        yield from (tuple(group) for group in by_holder.values() if len(group) > 1)


def _place(base: nn.Module, name: str) -> tuple[str, str]:
    """Return the path of a layer's *holder* and its *role*, the path below the holder.

    The holder is the layer's deepest ancestor that is an item of a ModuleList whose items share one class. Without such
    a ModuleList, an `nn.Sequential` with items of one class is used instead (timm's vision transformers). If the items
    are the adapted layers themselves, the layer is its own holder, and its role is the path of the list. Without a
    holder, the first path is empty and the role is the layer's complete path.
    """
    parts = name.split(".")
    for container in (nn.ModuleList, nn.Sequential):
        for depth in range(len(parts) - 1, 0, -1):
            if _repeats(base, parts[: depth - 1], container):
                return ".".join(parts[:depth]), ".".join(parts[depth:])
    if _repeats(base, parts[:-1], (nn.ModuleList, nn.Sequential)):
        return name, ".".join(parts[:-1])
    return "", name


def _repeats(base: nn.Module, path: list[str], containers: Any) -> bool:
    container = base.get_submodule(".".join(path))
    if not isinstance(container, containers):
        return False
    return len({type(getattr(item, "base_layer", item)) for item in container}) == 1


def _cut(role: str, blocks: list[Block], reason_to_cut: Callable[[Block, Block], str]) -> Iterator[Chain]:
    """Split the blocks of one role, in execution order, into chains.

    A new chain begins wherever `reason_to_cut(previous_block, block)` returns a reason instead of an empty string.
    """
    run: list[Block] = []
    for block in blocks:
        reason = reason_to_cut(run[-1], block) if run else "first of its role"
        if reason and run:
            yield Chain(role, tuple(run))
            run = []
        run.append(dataclasses.replace(block, cut=reason))
    yield Chain(role, tuple(run))


def _difference(before: Block, block: Block) -> str:
    if (before.in_features, before.out_features) != (block.in_features, block.out_features):
        return f"{block.in_features}->{block.out_features} follows {before.in_features}->{before.out_features} features"
    if before.tokens != block.tokens:
        return f"{math.prod(block.tokens)} follows {math.prod(before.tokens)} tokens"
    if before.rank != block.rank:
        return f"rank {block.rank} follows rank {before.rank}"
    return ""
