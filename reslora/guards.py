"""Guards against calls that would silently drop the shortcuts of a model, before and while it is connected.

A guard replaces a method on the instance. It passes calls on if they do not concern the connected adapter. `disconnect`
removes all guards.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import peft.utils.hotswap
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from . import ranks
from .chains import base_model, live_connection, merges_itself, with_wrappers
from .shortcuts.base import merge_refused

_COMBINES = "combine the plain LoRA weights without the shortcuts"
_SAVES = "save the plain LoRA weights without the shortcuts"
_HANDS_OUT = "hand out the plain LoRA weights without the shortcuts"
_REPLACES = "put plain LoRA weights under the shortcuts"

# Method -> (what it would do, which adapter it concerns if the call names none; None: the connected one).
_REFUSED = {
    "save_pretrained": (_SAVES, None),
    "push_to_hub": (_SAVES, None),
    "save_lora_adapter": (_SAVES, "default"),
    "load_adapter": (_REPLACES, "default"),
    "load_lora_adapter": (_REPLACES, "a new one"),
}
_NAMING = ("adapter_name", "selected_adapters", "adapters")

# Methods that remove the adapted layers together with their shortcuts.
_LEAVING = ("unload", "unload_lora")

# True while `reslora.checkpoint` gets or sets weights through PEFT: it stores the shortcuts itself.
_keeps_shortcuts = contextvars.ContextVar("reslora_keeps_shortcuts", default=False)


# -- before connecting -------------------------------------------------------------------------------------------------


class _Probe(LoraVariant):
    """A variant whose output no plain LoRA layer returns."""

    def forward(
        self, module: nn.Module, *, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Return a batch of size zero."""
        return result[:0]


def refuse_unknown_peft() -> None:
    """Raise `RuntimeError` if the LoRA layers of the installed PEFT do not call their variants.

    Connected, they would train plain LoRA without an error. PEFT may change this interface.
    """
    try:
        with torch.device("meta"):
            model = get_peft_model(nn.Sequential(nn.Linear(1, 1)), LoraConfig(r=1, target_modules=["0"]))
            layer = model.base_model.model[0]
            layer.lora_variant["default"] = _Probe()
            calls_variant = len(layer(torch.empty(1, 1))) == 0
    except (AttributeError, KeyError, TypeError):
        calls_variant = False
    if not calls_variant:
        raise RuntimeError(
            f"the LoRA layers of peft {peft.__version__} do not call their variants as ResLoRA needs it: install "
            "another version (0.21 does)"
        )


def refuse_inner(base: nn.Module, adapter_name: str) -> None:
    """Raise `ValueError` if the adapter belongs to a model inside `base`, whose methods would not be guarded."""
    if adapter_name in getattr(base, "peft_config", ()):
        return
    for name, module in base.named_modules():
        if adapter_name in (getattr(module, "peft_config", None) or ()):
            raise ValueError(f"{type(base).__name__} holds the model that has the adapter as `{name}`: give that one")


def refuse_merged(layers: Mapping[str, BaseTunerLayer]) -> None:
    """Raise `ValueError` if PEFT has merged an adapter into a layer.

    Such a layer ignores its variant, and its frozen weight is not the base model's.
    """
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(
                f"{name} has the adapter(s) {', '.join(layer.merged_adapters)} merged by PEFT: call unmerge_adapter() "
                "(or unfuse_lora()) first"
            )


def refuse_inactive(layers: dict[str, LoraLayer], adapter_name: str) -> None:
    """Raise `ValueError` if another adapter is active: the variant of this one would never be called."""
    for name, layer in layers.items():
        if adapter_name not in layer.active_adapters:
            active = ", ".join(map(repr, layer.active_adapters)) or "none"
            raise ValueError(
                f"adapter_name={adapter_name!r} is not active on {name} (active: {active}): call "
                f"model.set_adapter({adapter_name!r}) first"
            )


def refuse_changed_base(config: LoraConfig) -> None:
    """Raise `ValueError` if loading the file of a merge with raised ranks would compute other frozen weights."""
    if ranks.changes_base(config):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the frozen weights. PEFT repeats the change when "
            "it loads the adapter, at the rank in the file, and merging shortcut='block' raises that rank: use "
            "shortcut='input' or 'middle', or init_lora_weights=True"
        )


# -- while connected ---------------------------------------------------------------------------------------------------


class _Guard:
    """Replacement of a method of a connected model, or of a wrapper around it."""

    def __init__(self, module: nn.Module, verb: str, outer: nn.Module) -> None:
        self.module, self.verb, self.outer = module, verb, outer
        self.previous = vars(module).get(verb)  # what the instance had before, if anything

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise `RuntimeError` if the call concerns the connected adapter, else call the method."""
        method = self.previous or functools.partial(getattr(type(self.module), self.verb), self.module)
        connection = live_connection(base_model(self.module))
        if connection is not None and self.verb in _LEAVING:
            connection.clear(self.outer)
        elif connection is not None and connection.config.wired:
            arguments = inspect.signature(method).bind(*args, **kwargs).arguments
            _refuse(connection.adapter_name, arguments, self.verb, *_REFUSED[self.verb])
        return method(*args, **kwargs)

    def remove(self) -> None:
        """Restore what the instance had before."""
        del vars(self.module)[self.verb]
        if self.previous is not None:
            vars(self.module)[self.verb] = self.previous


def install(model: nn.Module, wired: Iterable[tuple[str, LoraLayer]]) -> None:
    """Install guards on `model`, on every wrapper around its base model, and on its layers if any are `wired`."""
    modules, wired = with_wrappers(model), list(wired)
    outer, base = modules[0], modules[-1]
    for module in modules:
        for verb in (*_REFUSED, *_LEAVING):
            if hasattr(type(module), verb) and not isinstance(vars(module).get(verb), _Guard):
                vars(module)[verb] = _Guard(module, verb, base if module is base else outer)
    # PEFT merges layer by layer: without this, plain layers would be merged before the first connected one raises. Its
    # merge does not visit layers that merge in their `forward`.
    itself = [f"{name}." for name, module in base.named_modules() if merges_itself(module)]
    for name, module in base.named_modules() if wired else ():
        if isinstance(module, LoraLayer) and not f"{name}.".startswith(tuple(itself)):
            module.merge = module.unmerge = functools.partial(_refuse_merge, name)
    for name, layer in wired:
        layer.update_layer = functools.partial(_refuse_update, name, layer)
    watch_peft()


def remove(model: nn.Module) -> None:
    """Remove the guards that `install` installed."""
    modules = with_wrappers(model)
    for module in modules:
        for verb in (*_REFUSED, *_LEAVING):
            if isinstance(guard := vars(module).get(verb), _Guard):
                guard.remove()
    for module in modules[-1].modules():
        if isinstance(module, LoraLayer):
            for verb in ("merge", "unmerge", "update_layer"):
                vars(module).pop(verb, None)


@contextlib.contextmanager
def keeping_shortcuts() -> Iterator[None]:
    """Let PEFT's functions get and set a connected adapter's weights inside this context."""
    token = _keeps_shortcuts.set(True)
    try:
        yield
    finally:
        _keeps_shortcuts.reset(token)


def _refuse(connected: str, arguments: dict, verb: str, does: str, default: str | None = None) -> None:
    """Raise `RuntimeError` if a call names the connected adapter, or none and concerns it by default (None)."""
    arguments = {**arguments, **arguments.get("kwargs", {})}
    found = [arguments[key] for key in _NAMING if arguments.get(key) is not None]
    named = [name for value in found for name in ([value] if isinstance(value, str) else value)]
    if connected in (named or [default or connected]):
        raise RuntimeError(
            f"{verb} would {does} of the connected adapter {connected!r}: call reslora.merge first, or use "
            "reslora.save and reslora.load, which keep the shortcuts"
        )


def _refuse_merge(name: str, *args: object, **kwargs: object) -> None:
    raise merge_refused(name)


def _refuse_update(name: str, layer: LoraLayer, adapter_name: str, *args: object, **kwargs: object) -> None:
    """Raise `RuntimeError` if PEFT would create new A and B for this adapter, as EVA does to change its rank.

    Calls for other adapters pass.
    """
    if getattr(layer.lora_variant.get(adapter_name), "wires", None) is not None:
        raise RuntimeError(
            f"{name} is wired by ResLoRA, and a new A and B would not be: call reslora.disconnect, initialize the "
            f"adapter {adapter_name!r} (EVA), and call reslora.connect after that"
        )
    type(layer).update_layer(layer, adapter_name, *args, **kwargs)


def watch_peft() -> None:
    """Guard, for this process, PEFT's functions and classes that bypass the methods of a connected base model.

    Hot-swapping is a function, and so is its preparation; `add_weighted_adapter` and `load_adapter` are methods of
    wrappers. The functions that get and set an adapter's weights are imported by name elsewhere, so the function that
    they call for LoRA is guarded instead.
    """
    swaps = peft.utils.hotswap
    swaps.hotswap_adapter_from_state_dict = _asking(swaps.hotswap_adapter_from_state_dict, "hotswap_adapter", _REPLACES)
    swaps._convert_scalings_to_tensor = _asking(
        swaps._convert_scalings_to_tensor, "prepare_model_for_compiled_hotswap", _REPLACES
    )
    LoraModel.add_weighted_adapter = _asking(LoraModel.add_weighted_adapter, "add_weighted_adapter", _COMBINES)
    for name, verb, does in (
        ("_get_adapter_state_dict", "get_peft_model_state_dict", _HANDS_OUT),
        ("_remap_adapter_state_dict_for_load", "set_peft_model_state_dict (or load_adapter)", _REPLACES),
    ):
        setattr(LoraModel, name, classmethod(_asking(vars(LoraModel)[name].__func__, verb, does)))


def _asking(original: Any, verb: str, does: str) -> Any:
    """Return `original` with a check that raises if the call names a connected adapter of its model, or no adapter."""
    if hasattr(original, "asks_reslora"):
        return original
    signature = inspect.signature(original)

    @functools.wraps(original)
    def asking(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        model = arguments["self"] if "self" in arguments else arguments["model"]
        connection = None if _keeps_shortcuts.get() else live_connection(base_model(model))
        if connection is not None and connection.config.wired:
            _refuse(connection.adapter_name, arguments, verb, does)
        return original(*args, **kwargs)

    asking.asks_reslora = True  # type: ignore[attr-defined]
    return asking
