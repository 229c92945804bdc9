"""What can be trained, a row each: a new baseline is a function that makes PEFT's configuration, and a row in METHODS.

Flags, checks, exports and the application go by these rows. Nothing heavy is imported before a row is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import InvalidArgument

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


def lora(
    *, r: int, alpha: float, dropout: float, init_lora_weights: bool | str, total_steps: int, **shared: Any
) -> PeftConfig:
    """LoRA (Hu et al., 2022)."""
    from peft import LoraConfig

    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, init_lora_weights=init_lora_weights, **shared)


def lora_x2(*, alpha: float, **settings: Any) -> PeftConfig:
    """LoRA with doubled alpha."""
    return lora(alpha=2 * alpha, **settings)


def adalora(
    *, r: int, alpha: float, dropout: float, init_lora_weights: bool | str, total_steps: int, **shared: Any
) -> PeftConfig:
    """AdaLoRA: half as much rank again, taken away to `r` on average between a tenth and a half of the steps
    (Zhang et al., 2023)."""
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        init_r=math.ceil(1.5 * r), target_r=r, lora_alpha=alpha, lora_dropout=dropout, total_step=total_steps,
        tinit=total_steps // 10, tfinal=total_steps // 2, deltaT=max(1, total_steps // 100), **shared,
    )  # fmt: skip


def loha(
    *, r: int, alpha: float, dropout: float, init_lora_weights: bool | str, total_steps: int, **shared: Any
) -> PeftConfig:
    """LoHa, whose dropout is of ranks."""
    from peft import LoHaConfig

    return LoHaConfig(r=r, alpha=alpha, rank_dropout=dropout, **shared)


def lokr(
    *, r: int, alpha: float, dropout: float, init_lora_weights: bool | str, total_steps: int, **shared: Any
) -> PeftConfig:
    """LoKr, whose dropout is of ranks."""
    from peft import LoKrConfig

    return LoKrConfig(r=r, alpha=alpha, rank_dropout=dropout, **shared)


def itself(model: nn.Module) -> nn.Module:
    """What is plain LoRA already."""
    return model


def adalora_as_lora(model: nn.Module) -> nn.Module:
    """See `adapters.as_plain_lora`."""
    from .adapters import as_plain_lora

    return as_plain_lora(model)


@dataclass(frozen=True)
class Method:
    """What is to be known of a method to train, save, export and show it."""

    name: str
    """As flags and folders have it."""
    title: str
    """As a person reads it."""
    help: str
    """What it is, in a line."""
    color: str
    """Of its curve on the application's page."""
    config: Callable[..., PeftConfig]
    """PEFT's configuration; takes what `adapter_config` does."""
    plain_lora: Callable[[nn.Module], nn.Module] | None = itself
    """The trained (and merged) model as the plain LoRA that it amounts to, from which diffusers', kohya's and ComfyUI's
    files are made; None where it amounts to none, and PEFT's form and merged weights are all there is."""
    shortcuts: bool = False
    """Whether blocks are wired, and merged in the end."""
    deepspeed: bool = True
    """Whether DeepSpeed can train it."""
    quantised: bool = True
    """Whether PEFT has it for frozen weights in 4 bits."""
    least_steps: int = 1
    """With fewer it cannot move its ranks."""

    @property
    def trains_lora(self) -> bool:
        """Whether what trains is LoRA's own A and B: its checkpoints can be drawn with."""
        return self.plain_lora is itself


METHODS = {
    row.name: row
    for row in (
        Method("lora", "LoRA", "plain LoRA", "#8a8f98", lora),
        Method("lora_x2", "LoRA, doubled alpha", "LoRA with doubled alpha, the control", "#1971c2", lora_x2),
        Method("reslora", "ResLoRA", "LoRA with shortcuts", "#e8590c", lora, shortcuts=True),
        Method(
            "adalora", "AdaLoRA", "LoRA that moves ranks between layers", "#2f9e44", adalora,
            adalora_as_lora, deepspeed=False, least_steps=3,
        ),
        Method("loha", "LoHa", "Hadamard products of two", "#9c36b5", loha, None, quantised=False),
        Method("lokr", "LoKr", "Kronecker products", "#0c8599", lokr, None, quantised=False),
    )
}  # fmt: skip


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
    init_lora_weights: bool | str = True,
) -> PeftConfig:
    """Returns PEFT's configuration of a method, as its row in `METHODS` makes it; ResLoRA's is LoRA's.

    `total_steps` is AdaLoRA's schedule. LoHa and LoKr have no dropout of their input: theirs is of ranks.
    `init_lora_weights` is LoRA's alone; diffusers' scripts take "gaussian".

    Raises `ValueError` for a method that is not in `METHODS`.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, METHODS))}")
    shared = {
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": task_type,
        "modules_to_save": list(modules_to_save) if modules_to_save else None,
    }
    settings = {"r": r, "alpha": alpha, "dropout": dropout, "init_lora_weights": init_lora_weights}
    return METHODS[method].config(**settings, total_steps=total_steps, **shared)


IN_WORDS = "; ".join(f"{row.name}: {row.help}" for row in METHODS.values())
"""For the help of flags."""


def any_with_shortcuts(names: Iterable[str]) -> bool:
    """Whether blocks are wired in any of these methods."""
    return any(METHODS[name].shortcuts for name in names)


def refuse_deepspeed(names: Iterable[str]) -> None:
    """Raises `InvalidArgument` for the first of these methods that DeepSpeed cannot train."""
    for name in names:
        if not METHODS[name].deepspeed:
            problem, fix = "reads gradients that DeepSpeed keeps to itself", "train it without DeepSpeed"
            raise InvalidArgument(f"--method {name}", problem, fix)


def check_steps(names: Iterable[str], steps: int | None, argument: str) -> None:
    """Raises `InvalidArgument`, which names `argument`, where a method needs more steps than there are to be."""
    for method in (METHODS[name] for name in names):
        if steps and steps < method.least_steps:
            problem = f"{method.title} needs {method.least_steps} to move ranks"
            raise InvalidArgument(argument, problem, "give more steps or epochs, or another method")
