"""The paper's methods, ResLoRA's and its baselines, as PEFT configurations for language models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftConfig

METHODS = ("lora", "lora_x2", "reslora", "adalora", "loha", "lokr")
LORA_METHODS = ("lora", "lora_x2", "reslora")


def adapter_config(
    method: str,
    *,
    r: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] | str,
    total_steps: int,
    task_type: str | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> PeftConfig:
    """Returns PEFT's configuration of a method; ResLoRA's is LoRA's, `lora_x2` is LoRA with doubled alpha.

    AdaLoRA starts with half as much rank again, ends with `r` on average, and takes its budget away between a tenth and
    a half of `total_steps` (Zhang et al., 2023). LoHa and LoKr have no dropout of their input: theirs is of ranks.

    Raises `ValueError` for a method that is not in `METHODS`.
    """
    import peft

    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, METHODS))}")
    shared = {
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": task_type,
        "modules_to_save": list(modules_to_save) if modules_to_save else None,
    }
    if method in LORA_METHODS:
        alpha = 2 * alpha if method == "lora_x2" else alpha
        return peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, **shared)
    if method == "adalora":
        return peft.AdaLoraConfig(
            init_r=math.ceil(1.5 * r),
            target_r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            total_step=total_steps,
            tinit=total_steps // 10,
            tfinal=total_steps // 2,
            deltaT=max(1, total_steps // 100),
            **shared,
        )
    config = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[method]
    return config(r=r, alpha=alpha, rank_dropout=dropout, **shared)


def known_targets(model_type: str) -> list[str] | None:
    """Returns the layers that LoRA adapts in a transformers model type, as PEFT lists them; None for an unknown type.

    Query and value projections for the models of the paper: `q_proj`, `v_proj` (LLaMA), `query`, `value` (RoBERTa,
    BERT).
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    return list(known[model_type]) if model_type in known else None
