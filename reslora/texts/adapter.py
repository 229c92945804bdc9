"""Add a method's adapter to a language model."""

from collections.abc import Sequence

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import InvalidArgument, refused_as
from ..formatting import pluralize
from ..linking import base_model, lora_layers
from ..methods import adapters
from ..methods.adapters import check_rank, check_usable, known_targets
from ..methods.control_scales import gauged
from ..methods.patterns import entries, spell_out
from ..methods.registry import METHODS, AdapterSettings, adapter_config, check_steps, refusing_own
from ..methods.targets import check_layers
from ..options.texts import MethodOptions

UNFIT = (ValueError, TypeError, ImportError)
"""Exceptions of PEFT for an invalid setting, or a missing package."""
UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
"""Exceptions of transformers for a model that cannot be read."""


def attach(
    model: PreTrainedModel,
    adapter: MethodOptions,
    total_steps: int,
    example_inputs: dict | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> PeftModel:
    """Add the method's adapter to `model`, connect it if the method is ResLoRA, and return PEFT's model.

    `total_steps` is for AdaLoRA's schedule; `example_inputs` as in `reslora.connect`; `modules_to_save` as in PEFT.
    PEFT's task type follows from the model: generation or classification.

    Raises `InvalidArgument` for target modules that are unknown or match nothing, a rank larger than a layer, or
    shortcuts that connect no blocks.
    """
    config, flag = config_for(model, adapter, total_steps, modules_to_save)
    shortcuts = adapter.reslora_config if METHODS[adapter.name].shortcuts else None
    with refused_as(flag, "name other layers, or another --method", UNFIT), refusing_own(adapter.name):
        adapted = adapters.attach(model, config, shortcuts, example_inputs)
        if METHODS[adapter.name].own:
            check_usable(adapted)
        if METHODS[adapter.name].measured:
            with gauged(adapted, adapter.reslora_config, example_inputs):
                pass
    if adapter.merge_and_save:
        _refuse_tied(base_model(adapted), flag)
    return adapted


def config_for(
    model: PreTrainedModel, adapter: MethodOptions, total_steps: int, modules_to_save: Sequence[str] | None
) -> tuple[PeftConfig, str]:
    """Return PEFT's configuration of the method's adapter, and --target_modules for messages.

    The model may be on the meta device. Raises `InvalidArgument` as `attach` does, except for shortcuts.
    """
    targets = _targets(model, adapter)
    check_layers(model, targets, modules_to_save or ())
    check_steps([adapter.name], total_steps, f"--method {adapter.name} with {pluralize(total_steps, 'step')}")
    task = "CAUSAL_LM" if model.can_generate() else "SEQ_CLS"
    settings = AdapterSettings(
        adapter.rank, adapter.lora_alpha, adapter.lora_dropout, targets, total_steps, task, modules_to_save,
        adapter.initialization_of(adapter.name),
        rank_pattern=entries("rank_pattern", adapter.rank_pattern),
        alpha_pattern=entries("alpha_pattern", adapter.alpha_pattern),
    )  # fmt: skip
    config = adapter_config(adapter.name, settings, model)
    with refused_as(f"--lora_r {adapter.rank}", "give a smaller one, or name other --target_modules", UNFIT):
        check_rank(model, config)
    spell_out(model, config)
    return config, f"--target_modules {' '.join(targets) if isinstance(targets, list) else targets}"


@torch.no_grad()
def put_start(model: PeftModel, adapter: MethodOptions) -> None:
    """Copy the LoRA of --init_lora, whose rank and alpha the options have, into a newly initialized adapter.

    B is rescaled for the adapter's own scaling, so that the adapter's weight update equals that of the LoRA.

    Raises `InvalidArgument` if the layers of the LoRA differ from those of the adapter.
    """
    folder, scale = adapter.init_lora, adapter.lora_alpha / adapter.rank
    state = load_peft_weights(folder, device="cpu")
    with_base = any(".base_layer." in name for name in state)  # PEFT saves an adapted embedding whole
    own = get_peft_model_state_dict(model, save_embedding_layers=with_base)
    for name in (*own, *state):
        if name not in own or name not in state or own[name].shape != state[name].shape:
            problem = f"it does not fit the model, first at {name}"
            raise InvalidArgument(f"--init_lora {folder}", problem, "give a LoRA of this model")
    set_peft_model_state_dict(model, state)
    for layer in lora_layers(base_model(model), "default").values():
        for up in (*layer.lora_B.parameters(), *layer.lora_embedding_B.parameters()):
            up.mul_(scale / layer.scaling["default"])


def _refuse_tied(base: PreTrainedModel, flag: str) -> None:
    """Raise `InvalidArgument` for an adapter on tied embeddings, for which a merged model has only one weight."""
    embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]
    embeddings = [module for module in embeddings if module is not None]
    weights = {id(getattr(module, "base_layer", module).weight) for module in embeddings}
    if len(weights) < len(embeddings) and any(isinstance(module, BaseTunerLayer) for module in embeddings):
        raise InvalidArgument(
            flag, "input and output embedding are the same weight", "name other layers, or omit --merge_and_save"
        )


def _targets(model: PreTrainedModel, adapter: MethodOptions) -> list[str] | str:
    linear = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }
    known = ", ".join(sorted(linear))
    targets = adapter.target_modules or known_targets(model.config.model_type)
    if not targets:
        raise InvalidArgument(
            "--target_modules",
            f"is missing, and there is no default for model type {model.config.model_type!r}",
            f"name some of {known}",
        )
    if targets == ["all-linear"]:
        return "all-linear"
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            problem = f"{target} matches no layer of {type(model).__name__}"
            raise InvalidArgument(f"--target_modules {' '.join(targets)}", problem, f"name some of {known}")
    return targets
