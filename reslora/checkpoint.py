"""Save and load an *unmerged* adapter: LoRA weights, shortcuts and recorded norms.

The files are `reslora_config.json`, `reslora_model.safetensors` and the checksums of both. There is no
`adapter_config.json`: stock PEFT would load it as plain LoRA and drop the shortcuts without a warning. To export a
merged adapter, see `reslora.export`.
"""

import copy
import dataclasses
import json
import os
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import PreTrainedModel

from .config import ResLoraConfig
from .errors import first_line
from .guards import (
    keeping_shortcuts,
    refuse_inactive,
    refuse_inner,
    refuse_merged,
    refuse_unknown_peft,
)
from .io import (
    check_checksums,
    forget_checksums,
    read_tensors,
    replacing_both,
    write_checksums,
    write_json,
    write_tensors,
)
from .linking import Block, Chain, Chains, base_model, lora_layers, refused, stays_plain, unwrap
from .ranks import changes_base, rescale, rescaled
from .tracing import meta_copy
from .wiring import attach_wires, connected, connection_of

CONFIG_NAME = "reslora_config.json"
WEIGHTS_NAME = "reslora_model.safetensors"
_NORMS = "reslora.norms"
PEFT_PREFIX = "base_model.model."
WRAPPER = "_peft_wrapper"
"""Key in `vars` of a model whose adapter PEFT can save only with its wrapper, the value."""
LAST_AMENDED = "8aaa5c1e"
"""The last commit with gated shortcuts, averaged shortcuts, and a factor of the shortcut terms."""


def save(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> None:
    """Write the connected adapter of `model` to `directory`: `reslora_config.json` and `reslora_model.safetensors`.

    The checkpoint includes `modules_to_save`, the recorded norms, and scales changed by `set_scale`. `checksums.json`
    is written last; call `reslora.io.write_checksums` again after adding files. With several processes, call this on
    rank 0 only.

    Raises `ValueError` if the model is not connected, or `directory` is a file.
    """
    base = base_model(model)
    connection = connected(base, adapter_name)
    if Path(directory).is_file():
        raise ValueError(f"directory={str(directory)!r} is a file; give a folder")
    norms = connection.wires.norms
    tensors = adapter_state(model, adapter_name)
    if norms.values is not None:
        tensors[_NORMS] = norms.values
    content = {
        "lora": jsonable(base.peft_config[adapter_name]),
        "reslora": connection.config.to_dict(),
        "chains": connection.chains.to_dict(),
        "norms": {"names": norms.names, "pushed": norms.count},
        "scaling": rescaled(lora_layers(base, adapter_name), adapter_name),
        "peft_model": isinstance(unwrap(model), PeftModel),
    }
    # If a write fails, the old files stay. If the process is killed, the old or the new files remain, without
    # checksums. In the worst case, weights remain without a configuration; `load` then raises an error.
    names, directory = [CONFIG_NAME, WEIGHTS_NAME], Path(directory)
    with replacing_both(directory / CONFIG_NAME, directory / WEIGHTS_NAME) as (described, weights):
        write_json(described, content)
        write_tensors(weights, tensors, {"format": "pt"})
        forget_checksums(directory, names)
    write_checksums(directory, names)


def load(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> nn.Module:
    """Load what `save` wrote into `model` and return the connected model.

    `model` is a base model without the adapter, or a model with a matching LoRA adapter, connected or not. A missing
    adapter is added in the way in which the saved model had it: by `get_peft_model`, which wraps the model, or in place
    by `add_adapter`.

    Raises `ValueError`, and leaves the model unchanged, in these cases:

    - Files are missing or damaged, or have shortcuts of an earlier version (see `LAST_AMENDED`).
    - Layers, ranks, alphas or shapes differ, or an initialization that changes the frozen weights; the message names
      the first difference.
    - The model is already connected, with other chains or another configuration.

    Raises `RuntimeError` if the installed PEFT does not support LoRA variants.
    """
    directory = Path(directory)
    saved = _read(directory)
    base, outer = base_model(model), unwrap(model)
    refuse_inner(base, adapter_name)
    connection = connection_of(base)
    if connection is not None and (connection.adapter_name, connection.config) != (adapter_name, saved.config):
        raise ValueError(
            f"this model is connected already, as {connection.adapter_name!r} with {connection.config}: call "
            f"reslora.disconnect before loading {directory}"
        )
    wirable = connection is None and saved.config.wired
    if wirable:
        refuse_unknown_peft()
    try:
        layers = lora_layers(base, adapter_name)
    except ValueError:
        layers = {}
    if layers:
        adapter, fields = base.peft_config[adapter_name], ["lora_alpha", "use_rslora", "alpha_pattern"]
        if changes_base(adapter) or changes_base(saved.lora):
            fields.append("init_lora_weights")
        for field in fields:
            here, there = getattr(adapter, field), getattr(saved.lora, field)
            if here != there:
                raise ValueError(f"the adapter has {field}={here!r}, but {directory / CONFIG_NAME} has {there!r}")
        if connection is None:
            refuse_merged(layers)
            refuse_inactive(layers, adapter_name)
        _check(saved, outer, adapter_name, directory, wirable)
        if connection is not None and connection.config.wired and _wiring(connection.chains) != _wiring(saved.plan):
            raise ValueError(
                f"this model is connected by other chains ({connection.chains.links} links) than those saved in "
                f"{directory / CONFIG_NAME} ({saved.plan.links} links): call reslora.disconnect before reslora.load, "
                "which connects the saved chains"
            )
    else:
        # Load into a copy without storage first, so that an error leaves the model unchanged.
        lora = copy.deepcopy(saved.lora)
        lora.init_lora_weights = False  # some initializations read the frozen weight, which has no storage here
        tried = _attach(meta_copy(base), lora, adapter_name, saved, directory)
        _check(saved, tried, adapter_name, directory, wirable)
    check_checksums(directory, [CONFIG_NAME, WEIGHTS_NAME])
    loaded = outer if layers else _attach(outer, saved.lora, adapter_name, saved, directory)
    if connection is None:
        connection = attach_wires(loaded, saved.config, adapter_name, saved.plan)
    _fill(loaded, saved.tensors, adapter_name)
    rescale(lora_layers(base_model(loaded), adapter_name), saved.scaling, adapter_name)
    norms = connection.wires.norms
    norms.clear()
    if saved.norms is not None and saved.names == norms.names:
        norms.restore(saved.norms, saved.pushed)
    return loaded


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Saved:
    """The content of a directory that `save` wrote."""

    config: ResLoraConfig
    lora: LoraConfig
    plan: Chains
    scaling: dict[str, float]
    """Layer name -> scaling, for the layers whose scaling differs from that given by rank and alpha."""
    wrapped: bool
    """Whether the saved model was a `PeftModel`."""
    names: list[str]
    pushed: int
    tensors: dict[str, torch.Tensor]
    norms: torch.Tensor | None


def _read(directory: Path) -> _Saved:
    path = directory / CONFIG_NAME
    content = _read_json(path)
    if not (directory / WEIGHTS_NAME).is_file():
        raise ValueError(f"{directory / WEIGHTS_NAME} is missing: give a folder that reslora.save wrote")
    tensors, _ = read_tensors(directory / WEIGHTS_NAME)
    norms = tensors.pop(_NORMS, None)
    try:
        fields = dict(content["reslora"])
        scale, factor = fields.pop("shortcut_scale", "sum"), float(content.get("factor", 1))
        amended = fields.get("shortcut") == "gated" or scale != "sum" or factor != 1
        config = None if amended else ResLoraConfig(**fields)
        lora = LoraConfig(**{key: value for key, value in content["lora"].items() if key != "peft_type"})
        plan = _read_plan(content["chains"])
        names, pushed = content["norms"]["names"], int(content["norms"]["pushed"])
        scaling, wrapped = dict(content["scaling"]), content["peft_model"]
    except Exception as error:  # a file of another format fails with any kind of exception
        raise ValueError(f"{path} is damaged: {first_line(error)}") from error
    if config is None:
        raise ValueError(f"{path} has gated, averaged or fading shortcuts: load it with commit {LAST_AMENDED}")
    return _Saved(config, lora, plan, scaling, wrapped, names, pushed, tensors, norms)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        folder = str(path.parent)
        problem = f"is a file, no folder with a {path.name}" if path.parent.is_file() else f"has no {path.name}"
        raise ValueError(f"directory={folder!r} {problem}: give a folder that reslora.save wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error


def _read_plan(content: dict) -> Chains:
    chains = []
    for chain in content["chains"]:
        blocks = [Block(**{**block, "tokens": tuple(block["tokens"])}) for block in chain["blocks"]]
        chains.append(Chain(chain["role"], tuple(blocks)))
    unlinked = tuple((item["name"], item["reason"]) for item in content["unlinked"])
    return Chains(tuple(chains), unlinked, readers=tuple(map(tuple, content["readers"])))


# -- comparing and filling ---------------------------------------------------------------------------------------------


def adapter_state(model: nn.Module, adapter_name: str, keep_vars: bool = False) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors by names that are the same for wrapped and unwrapped models.

    With `keep_vars`, the tensors are the parameters themselves.
    """
    return {key.removeprefix(PEFT_PREFIX): value for key, value in peft_state(model, adapter_name, keep_vars).items()}


def peft_state(model: nn.Module, adapter_name: str, keep_vars: bool = False) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors by their names in PEFT's files; see `adapter_state`."""
    outer = unwrap(model)
    base = base_model(outer)
    source = outer if isinstance(outer, PeftModel) else vars(base).get(WRAPPER, base)
    values = source.state_dict(keep_vars=True) if keep_vars else None
    with keeping_shortcuts():
        state = get_peft_model_state_dict(source, values, adapter_name, save_embedding_layers=False)
    return state if isinstance(source, PeftModel) else {PEFT_PREFIX + key: value for key, value in state.items()}


def _fill(outer: nn.Module, tensors: dict[str, torch.Tensor], adapter_name: str) -> None:
    # PEFT copies into the existing parameters. A float32 adapter on a half-precision base must stay float32. Modules of
    # `modules_to_save` have the dtype of the model, whose inputs they do not cast.
    for key, parameter in adapter_state(outer, adapter_name, keep_vars=True).items():
        if "lora_" in key:
            parameter.data = parameter.data.to(tensors[key].dtype)
    wrapped = isinstance(outer, PeftModel)
    state = {PEFT_PREFIX + key: value for key, value in tensors.items()} if wrapped else tensors
    with keeping_shortcuts():
        set_peft_model_state_dict(outer if wrapped else base_model(outer), state, adapter_name=adapter_name)


def _attach(model: nn.Module, lora: LoraConfig, adapter_name: str, saved: _Saved, directory: Path) -> nn.Module:
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, lora)
            model.set_adapter(adapter_name)
            return model
        if saved.wrapped or not hasattr(model, "add_adapter"):
            return get_peft_model(model, lora, adapter_name=adapter_name)
        if isinstance(model, PreTrainedModel):  # its `add_adapter` may refuse this version of PEFT
            return inject_adapter_in_model(lora, model, adapter_name)
        model.add_adapter(lora, adapter_name=adapter_name)
        return model
    except Exception as error:  # PEFT validates little of a configuration before using it
        raise ValueError(
            f"the adapter saved in {directory / CONFIG_NAME} does not fit {type(model).__name__}: {first_line(error)}"
        ) from error


def _check(saved: _Saved, model: nn.Module, adapter_name: str, directory: Path, wirable: bool) -> None:
    """Raise `ValueError` for the first key or shape in which the model's adapter and the files differ.

    With `wirable`, also raise for layers that `connect` does not support: they would run as plain LoRA.
    """
    base, tensors = base_model(model), saved.tensors
    expected = {key: tuple(value.shape) for key, value in adapter_state(model, adapter_name).items()}
    for key in (*expected, *tensors):
        if key not in tensors:
            raise ValueError(f"{directory / WEIGHTS_NAME} has no {key}, which the model's adapter has")
        if key not in expected:
            raise ValueError(f"{directory / WEIGHTS_NAME} has {key}, which the model's adapter does not have")
        here, there = expected[key], tuple(tensors[key].shape)
        if here != there:
            raise ValueError(f"{key} has shape {there} in {directory / WEIGHTS_NAME}, but {here} in the model")
    for name, layer in lora_layers(base, adapter_name).items() if wirable else ():
        if not stays_plain(name, layer) and (reason := refused(layer, adapter_name)):
            raise ValueError(f"{name} {reason}")


def _wiring(plan: Chains) -> list[list[str]]:
    """Return the block names of each chain, which determine the forward pass."""
    return [[block.name for block in chain] for chain in plan]


def jsonable(config: PeftConfig) -> dict:
    """Return a configuration as JSON-serializable data; sets are sorted, because their order differs between runs."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
