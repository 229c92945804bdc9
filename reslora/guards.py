"""Guards against calls that would silently drop the shortcuts of a model, before and while it is connected.

A guard replaces a method on the instance, and forwards calls that do not concern the connected adapter. `disconnect`
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
from .linking import base_model, live_connection, merges_itself, with_wrappers
from .shortcuts.base import merge_refused

_COMBINES = "combine the plain LoRA weights without the shortcuts"
_SAVES = "save the plain LoRA weights without the shortcuts"
_HANDS_OUT = "return the plain LoRA weights without the shortcuts"
_REPLACES = "replace the LoRA weights, but not the shortcuts,"

# Method -> (what the method would do, the adapter that it uses if the call names none; None: the connected adapter).
_REFUSED = {
    "save_pretrained": (_SAVES, None),
    "push_to_hub": (_SAVES, None),
    "save_lora_adapter": (_SAVES, "default"),
    "load_adapter": (_REPLACES, "default"),
    "load_lora_adapter": (_REPLACES, "a new one"),
}
_NAMING = ("adapter_name", "adapter_names", "selected_adapters", "adapters")

# Methods that remove adapters. With the connected adapter, its shortcuts are removed.
_LEAVING = ("unload", "unload_lora", "delete_adapter", "delete_adapters")

# Methods that merge adapters, or undo it. Even if they name another adapter, merged layers do not call the shortcuts.
_MERGING = ("merge_adapter", "merge_and_unload", "unmerge_adapter", "fuse_lora", "unfuse_lora")

_GUARDED = (*_REFUSED, *_LEAVING, *_MERGING)

# True while `reslora.checkpoint`, which stores the shortcuts itself, gets or sets weights through PEFT.
_keeps_shortcuts = contextvars.ContextVar("reslora_keeps_shortcuts", default=False)


# -- before connecting -------------------------------------------------------------------------------------------------


class _Probe(LoraVariant):
    """A LoRA variant that returns an empty batch, which shows whether PEFT calls it."""

    def forward(
        self, module: nn.Module, *, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Return a batch of size zero."""
        return result[:0]


def refuse_unknown_peft() -> None:
    """Raise `RuntimeError` if the LoRA layers of the installed PEFT do not call their variants (`lora_variant`).

    With such a version a connected model would train as plain LoRA, without an error. PEFT may change this interface.
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
            f"the LoRA layers of peft {peft.__version__} do not call their variants, which ResLoRA needs: install "
            "another version, such as 0.21"
        )


def refuse_inner(base: nn.Module, adapter_name: str) -> None:
    """Raise `ValueError` if the adapter belongs to a model inside `base`: inner models get no guards."""
    if adapter_name in getattr(base, "peft_config", ()):
        return
    for name, module in base.named_modules():
        if adapter_name in (getattr(module, "peft_config", None) or ()):
            raise ValueError(f"the adapter is on the submodule `{name}` of {type(base).__name__}: give that submodule")


def refuse_merged(layers: Mapping[str, BaseTunerLayer]) -> None:
    """Raise `ValueError` if PEFT has merged an adapter into a layer.

    A layer with a merged adapter does not call its variant, and its weight includes the merged adapter.
    """
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(
                f"{name} has the adapter(s) {', '.join(layer.merged_adapters)} merged by PEFT: call unmerge_adapter() "
                "(or unfuse_lora()) first"
            )


def refuse_inactive(layers: dict[str, LoraLayer], adapter_name: str) -> None:
    """Raise `ValueError` if the adapter is not active on a layer: PEFT would not call its variant there."""
    for name, layer in layers.items():
        if adapter_name not in layer.active_adapters:
            active = ", ".join(map(repr, layer.active_adapters)) or "none"
            raise ValueError(
                f"adapter_name={adapter_name!r} is not active on {name} (active: {active}): call "
                f"model.set_adapter({adapter_name!r}) first"
            )


def refuse_changed_base(config: LoraConfig) -> None:
    """Raise `ValueError` if the adapter's initialization changes the frozen weights, and differently for each rank.

    PEFT repeats such an initialization when it loads an adapter. After a merge that raises the rank, the loaded model
    would have different frozen weights.
    """
    if ranks.changes_base(config):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the frozen weights. PEFT repeats the change when "
            "it loads the adapter, at the rank in the file, and merging shortcut='block' raises that rank: use "
            "shortcut='input' or 'middle', or init_lora_weights=True"
        )


# -- while connected ---------------------------------------------------------------------------------------------------


class _Guard:
    """Callable that replaces a method of a connected base model or of a wrapper around that model."""

    def __init__(self, module: nn.Module, verb: str, outer: nn.Module) -> None:
        self.module, self.verb, self.outer = module, verb, outer
        self.previous = vars(module).get(verb)  # the attribute of this name that the instance had, if any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, or raise `RuntimeError` if the call concerns the connected adapter.

        Methods that remove adapters are always called. Before the connected adapter, its shortcuts are removed.
        """
        method = self.previous or functools.partial(getattr(type(self.module), self.verb), self.module)
        connection = live_connection(base_model(self.module))
        if connection is not None:
            connected = connection.adapter_name
            arguments = inspect.signature(method).bind(*args, **kwargs).arguments
            if self.verb in _LEAVING:
                if connected in _named(arguments, connected):
                    connection.clear(self.outer)
            elif connection.config.wired:
                if self.verb in _MERGING:
                    raise merge_refused(f"the adapter {connected!r}")
                _refuse(connected, arguments, self.verb, *_REFUSED[self.verb])
        return method(*args, **kwargs)

    def remove(self) -> None:
        """Remove this guard and restore the attribute that the instance had before, if any."""
        del vars(self.module)[self.verb]
        if self.previous is not None:
            vars(self.module)[self.verb] = self.previous


def install(model: nn.Module, wired: Iterable[tuple[str, LoraLayer]]) -> None:
    """Install guards on `model`, its wrappers and its base model.

    `wired`: (name, layer) of the blocks with shortcuts. If there are any, `merge` and `unmerge` raise an error on all
    layers that PEFT would merge. On the layers in `wired`, an error is also raised if PEFT would create new A and B for
    the connected adapter.
    """
    modules, wired = with_wrappers(model), list(wired)
    outer, base = modules[0], modules[-1]
    for module in modules:
        for verb in _GUARDED:
            if hasattr(type(module), verb) and not isinstance(vars(module).get(verb), _Guard):
                vars(module)[verb] = _Guard(module, verb, base if module is base else outer)
    # PEFT merges layer by layer: without this, plain layers would be merged before the first connected one raises.
    # PEFT's merge does not visit layers that merge in their `forward`.
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
        for verb in _GUARDED:
            if isinstance(guard := vars(module).get(verb), _Guard):
                guard.remove()
    for module in modules[-1].modules():
        if isinstance(module, LoraLayer):
            for verb in ("merge", "unmerge", "update_layer"):
                vars(module).pop(verb, None)


@contextlib.contextmanager
def keeping_shortcuts() -> Iterator[None]:
    """Allow PEFT's functions to get and set the weights of a connected adapter inside this context."""
    token = _keeps_shortcuts.set(True)
    try:
        yield
    finally:
        _keeps_shortcuts.reset(token)


def _refuse(connected: str, arguments: dict, verb: str, does: str, default: str | None = None) -> None:
    """Raise `RuntimeError` if a call of the method `verb` with `arguments` applies to the connected adapter.

    `does`: what the call would do, for the message. A call that names no adapter applies to the adapter `default`, or
    to the connected one if `default` is None.
    """
    if connected in _named(arguments, default or connected):
        raise RuntimeError(
            f"{verb} would {does} of the connected adapter {connected!r}: call reslora.merge first, or use "
            "reslora.save and reslora.load, which keep the shortcuts"
        )


def _named(arguments: dict, default: str) -> list[str]:
    """Return the names of the adapters in the arguments of a call; `default` if it names none."""
    arguments = {**arguments, **arguments.get("kwargs", {})}
    found = [arguments[key] for key in _NAMING if arguments.get(key) is not None]
    return [name for value in found for name in ([value] if isinstance(value, str) else value)] or [default]


def _refuse_merge(name: str, *args: object, **kwargs: object) -> None:
    raise merge_refused(name)


def _refuse_update(name: str, layer: LoraLayer, adapter_name: str, *args: object, **kwargs: object) -> None:
    """Raise `RuntimeError` if PEFT would create new A and B for the connected adapter, as EVA does to change ranks.

    Calls for other adapters are passed on to PEFT.
    """
    if getattr(layer.lora_variant.get(adapter_name), "wires", None) is not None:
        raise RuntimeError(
            f"{name} is connected by ResLoRA, and new A and B would have no shortcuts: call reslora.disconnect, "
            f"initialize the adapter {adapter_name!r} (EVA), and then call reslora.connect"
        )
    type(layer).update_layer(layer, adapter_name, *args, **kwargs)


def watch_peft() -> None:
    """Guard, in this process, functions of PEFT that do not call the guarded methods of a connected model.

    - Hot-swapping and its preparation are functions.
    - `add_weighted_adapter` and `load_adapter` are methods of PEFT's wrappers.
    - The functions that get and set an adapter's weights are imported by name into other modules. Therefore the
      functions that they call for LoRA are guarded.
    """
    swaps = peft.utils.hotswap
    swaps.hotswap_adapter_from_state_dict = _guarded(
        swaps.hotswap_adapter_from_state_dict, "hotswap_adapter", _REPLACES
    )
    swaps._convert_scalings_to_tensor = _guarded(
        swaps._convert_scalings_to_tensor, "prepare_model_for_compiled_hotswap", _REPLACES
    )
    LoraModel.add_weighted_adapter = _guarded(LoraModel.add_weighted_adapter, "add_weighted_adapter", _COMBINES)
    for name, verb, does in (
        ("_get_adapter_state_dict", "get_peft_model_state_dict", _HANDS_OUT),
        ("_remap_adapter_state_dict_for_load", "set_peft_model_state_dict (or load_adapter)", _REPLACES),
    ):
        setattr(LoraModel, name, classmethod(_guarded(vars(LoraModel)[name].__func__, verb, does)))


def _guarded(original: Any, verb: str, does: str) -> Any:
    """Wrap `original` so that it raises `RuntimeError` if a call names the model's connected adapter, or no adapter.

    `verb` and `does`: name and effect of the call, for the message.
    """
    if hasattr(original, "guarded_by_reslora"):
        return original
    signature = inspect.signature(original)

    @functools.wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        """Raise `RuntimeError` if the connected adapter is used; else call `original`."""
        arguments = signature.bind(*args, **kwargs).arguments
        model = arguments["self"] if "self" in arguments else arguments["model"]
        connection = None if _keeps_shortcuts.get() else live_connection(base_model(model))
        if connection is not None and connection.config.wired:
            _refuse(connection.adapter_name, arguments, verb, does)
        return original(*args, **kwargs)

    guarded.guarded_by_reslora = True  # type: ignore[attr-defined]
    return guarded
