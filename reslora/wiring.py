"""Install the shortcuts of `connect` on a model, and remove them."""

import dataclasses
import itertools

from peft.tuners.lora import LoraLayer
from torch import nn

from . import guards
from .config import ResLoraConfig
from .linking import Chain, Chains, base_model, before_each, live_connection, lora_layers
from .shortcuts import CLASSES
from .shortcuts.base import CastOthers, Shortcut
from .shortcuts.shared import SharedProduct
from .shortcuts.state import Wires

# Attribute that `attach_wires` sets on an adapter's lora_A modules. The modules of a recreated adapter do not have it.
_MARK = "_reslora_wires"


@dataclasses.dataclass
class Connection:
    """The shortcuts of one adapter, stored on the base model as a plain attribute that no `state_dict` includes."""

    config: ResLoraConfig
    adapter_name: str
    chains: Chains
    wires: Wires
    handles: list = dataclasses.field(default_factory=list)

    def __setstate__(self, state: dict) -> None:
        """Restore an unpickled connection, and guard PEFT's functions in this process."""
        vars(self).update(state)
        guards.watch_peft()

    @property
    def shortcut(self) -> type[Shortcut] | None:
        """Class of the configured shortcut; None if the configuration is plain LoRA."""
        return CLASSES[self.config.shortcut] if self.config.wired else None

    def alive(self, base: nn.Module) -> bool:
        """Return whether the connected adapter is still on the model: not deleted, unloaded or replaced."""
        adapter, layers = self.adapter_name, [module for module in base.modules() if isinstance(module, LoraLayer)]
        marks = [vars(layer.lora_A[adapter]).get(_MARK) for layer in layers if adapter in layer.lora_A]
        if marks:
            return any(mark is self.wires for mark in marks)
        return any(adapter in layer.lora_embedding_A for layer in layers)

    def clear(self, model: nn.Module) -> None:
        """Remove everything that `attach_wires` installed on the model."""
        base = base_model(model)
        guards.remove(model)
        for module in base.modules():
            if not isinstance(module, LoraLayer):
                continue
            for adapter, variant in list(module.lora_variant.items()):
                if isinstance(variant, Shortcut):
                    del module.lora_variant[adapter]
            for lora_a in module.lora_A.values():
                vars(lora_a).pop(_MARK, None)
            if isinstance(module.cast_input_dtype_enabled, CastOthers):
                module.cast_input_dtype_enabled = module.cast_input_dtype_enabled.previous
        for handle in self.handles:
            handle.remove()
        del base._reslora


def connection_of(base: nn.Module) -> Connection | None:
    """Return the connection of a base model; None if it is not connected.

    If the connected adapter was removed, remove the connection and return None.
    """
    if "_reslora" in vars(base) and live_connection(base) is None:
        vars(base)["_reslora"].clear(base)
    return vars(base).get("_reslora")


def connected(base: nn.Module, adapter_name: str) -> Connection:
    """Return the connection of a base model for this adapter.

    Raises `ValueError` if the model is not connected, or if another of its adapters is connected.
    """
    connection = connection_of(base)
    if connection is None:
        raise ValueError(
            f"adapter_name={adapter_name!r} is not connected on this {type(base).__name__} (or is merged already): "
            "call reslora.connect first"
        )
    if connection.adapter_name != adapter_name:
        raise ValueError(
            f"adapter_name={adapter_name!r} is not connected; the connected adapter is {connection.adapter_name!r}"
        )
    return connection


def attach_wires(model: nn.Module, config: ResLoraConfig, adapter_name: str, plan: Chains) -> Connection:
    """Connect the layers of a model by the validated chains in `plan`, and return the connection."""
    base = base_model(model)
    layers = lora_layers(base, adapter_name)
    recorded = [block.name for chain in plan if config.carries and len(chain) > 1 for block in chain]
    wires = Wires(recorded, config.window)
    connection = Connection(config, adapter_name, plan, wires)
    for layer in layers.values():
        if adapter_name in layer.lora_A:
            vars(layer.lora_A[adapter_name])[_MARK] = wires
    if config.wired:
        for chain in plan:
            _wire(chain, layers, connection)
        for names in plan.readers:  # the blocks that read the same tensor share one product
            blocks = {
                name: (layers[name].lora_variant[adapter_name], layers[name].lora_A[adapter_name]) for name in names
            }
            shared = SharedProduct(blocks)
            for variant, _ in blocks.values():
                variant.shared = shared
        if config.carries or plan.readers or config.reach is None:
            connection.handles = _hook(base, plan, wires)
    guards.install(model, ((block.name, layers[block.name]) for block in plan.blocks if config.wired))
    base._reslora = connection
    return connection


def _hook(base: nn.Module, plan: Chains, wires: Wires) -> list:
    parts = [base.get_submodule(name) for name in _parts(plan)]
    return [
        base.register_forward_pre_hook(wires.begin, prepend=True),
        base.register_forward_hook(wires.end, always_call=True),
        *(part.register_forward_pre_hook(wires.begin_part, prepend=True) for part in parts),
        *(part.register_forward_hook(wires.end_part, always_call=True) for part in parts),
    ]


def _parts(plan: Chains) -> list[str]:
    """Return the paths of modules that contain one or more complete chains, and no part of other chains.

    A module with complete chains can run separately from the base model, as an encoder does in `generate`.
    """
    whole, cut = set(), set()
    for chain in plan:
        above = [set(itertools.accumulate(block.name.split(".")[:-1], "{}.{}".format)) for block in chain]
        shared = set.intersection(*above)
        cut |= set.union(*above) - shared
        whole |= shared if len(chain) > 1 else set()
    return sorted(whole - cut)


def _wire(chain: Chain, layers: dict[str, LoraLayer], connection: Connection) -> None:
    adapter, config = connection.adapter_name, connection.config
    names = [block.name for block in chain]
    wired = [layers[name] for name in names]
    factors = [(layer.lora_A[adapter], layer.lora_B[adapter]) for layer in wired]
    before = before_each(len(chain), config.reach)
    variants = connection.shortcut.wire(connection.wires, names, factors, before, config.head)
    for layer, variant in zip(wired, variants, strict=True):
        layer.lora_variant[adapter] = variant
        layer.cast_input_dtype_enabled = CastOthers(layer.cast_input_dtype_enabled, layer, adapter)
