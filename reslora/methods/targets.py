"""Find target modules, report modules that cannot be adapted, such as a list of layers, and suggest other ones."""

from collections.abc import Iterator, Sequence
from itertools import chain

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import InvalidArgument

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, Conv1D, *CONVOLUTIONS, nn.Embedding)  # that PEFT adapts; quantized layers may have other types
MOST_NAMED = 8  # maximum number of layers of a module that a message suggests


def targeted(model: nn.Module, config: PeftConfig) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, layer) for the layers that PEFT will adapt; `modules_to_save`, trained in full, are excluded."""
    whole = [f".{part}." for part in config.modules_to_save or ()]
    for name, module in model.named_modules():
        if any(part in f".{name}." for part in whole):
            continue
        every = config.target_modules == "all-linear"
        kinds = (nn.Linear, Conv1D) if every else LAYERS
        if isinstance(module, kinds) and (every or check_target_module_exists(config, name)):
            yield name, module


def check_layers(model: nn.Module, targets: Sequence[str] | str, whole: Sequence[str] = ()) -> None:
    """Raise `InvalidArgument` for --target_modules that match a norm or a module with submodules, and suggest layers.

    `targets` is PEFT's `target_modules`: suffixes of names, or a regular expression. `whole`: PEFT's `modules_to_save`.
    """
    if targets == "all-linear":
        return
    asked = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(target_modules=asked, modules_to_save=list(whole) or None)
    fitted = {name: part for name, part in model.named_modules() if name and check_target_module_exists(config, name)}
    layers = [name for name, module in fitted.items() if _is_layer(module)]
    wrong = next((name for name in fitted if name not in layers), None)
    if wrong is None:
        return
    problem = f"{wrong} cannot be adapted ({type(fitted[wrong]).__name__})"
    if isinstance(targets, str):
        such = f", such as {layers[0]}" if layers else ""
        raise InvalidArgument(f"--target_modules {targets}", problem, f"match only layers{such}")
    target = next(target for target in targets if _ends(wrong, target))
    inside = [f"{target}.{rest}" for rest, part in fitted[wrong].named_modules() if isinstance(part, LAYERS)]
    names = " ".join(inside[:MOST_NAMED]) + (" or the like" if len(inside) > MOST_NAMED else "")
    if alone := next((name for name in layers if _ends(name, target)), None):
        problem += f", but {alone} can"
        names = ", and ".join(filter(None, [names, f"the complete names of layers such as {alone}"]))
    raise InvalidArgument(f"--target_modules {target}", problem, f"give {names}" if names else "leave it out")


def _is_layer(module: nn.Module) -> bool:
    """Return whether PEFT can adapt a module: a known layer, or any module with a matrix and without submodules.

    A module without a known type can be a quantized layer.
    """
    if isinstance(module, (*LAYERS, nn.MultiheadAttention)):
        return True
    own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return next(module.children(), None) is None and any(tensor.ndim > 1 for tensor in own)


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")
