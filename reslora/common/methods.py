"""What can be trained, a row each: a new baseline is a function that makes PEFT's configuration, and a row in METHODS.

Flags, checks, exports and the application go by these rows. Nothing heavy is imported before a row is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .errors import InvalidArgument

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


@dataclass(frozen=True)
class AdapterSettings:
    """What an adapter is made of, whatever its method."""

    r: int
    alpha: float
    dropout: float
    """Of the adapter's input; LoHa's and LoKr's is of ranks."""
    targets: Sequence[str] | str
    """As PEFT's `target_modules`."""
    total_steps: int
    """AdaLoRA's schedule."""
    task_type: str | None = None
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    """LoRA's alone; diffusers' scripts take "gaussian"."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """As PEFT's, as `alpha_pattern`: see `patterns`."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @property
    def of_layers(self) -> dict[str, Any]:
        """Keyword arguments of the configurations that take ranks and alphas of single layers."""
        return {"rank_pattern": dict(self.rank_pattern), "alpha_pattern": dict(self.alpha_pattern)}

    def scaled(self, times: float) -> AdapterSettings:
        """With every alpha multiplied."""
        alphas = {name: times * alpha for name, alpha in self.alpha_pattern.items()}
        return replace(self, alpha=times * self.alpha, alpha_pattern=alphas)

    @property
    def shared(self) -> dict[str, Any]:
        """Keyword arguments of every configuration of PEFT's."""
        return {
            "target_modules": self.targets if isinstance(self.targets, str) else list(self.targets),
            "task_type": self.task_type,
            "modules_to_save": list(self.modules_to_save) if self.modules_to_save else None,
        }


def lora(settings: AdapterSettings, **variant: bool) -> PeftConfig:
    """LoRA (Hu et al., 2022), or a variant that PEFT's configuration has a switch for."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        init_lora_weights=settings.init_lora_weights, **settings.of_layers, **settings.shared, **variant,
    )  # fmt: skip


def lora_x2(settings: AdapterSettings) -> PeftConfig:
    """LoRA with doubled alpha."""
    return lora(settings.scaled(2))


def lora_x4(settings: AdapterSettings) -> PeftConfig:
    """LoRA with alpha times four."""
    return lora(settings.scaled(4))


def rslora(settings: AdapterSettings) -> PeftConfig:
    """Rank-stabilized LoRA: the scale is alpha / sqrt(r) (Kalajdzievski, 2023)."""
    return lora(settings, use_rslora=True)


def dora(settings: AdapterSettings) -> PeftConfig:
    """DoRA: `m (W + s B A) / |W + s B A|`, with a trained magnitude m of each row (Liu et al., 2024)."""
    return lora(settings, use_dora=True)


def adalora(settings: AdapterSettings) -> PeftConfig:
    """AdaLoRA: half as much rank again, taken away to `r` on average between a tenth and a half of the steps
    (Zhang et al., 2023)."""
    from peft import AdaLoraConfig

    steps = settings.total_steps
    return AdaLoraConfig(
        init_r=math.ceil(1.5 * settings.r), target_r=settings.r, lora_alpha=settings.alpha,
        lora_dropout=settings.dropout, total_step=steps, tinit=steps // 10, tfinal=steps // 2,
        deltaT=max(1, steps // 100), **settings.shared,
    )  # fmt: skip


def loha(settings: AdapterSettings) -> PeftConfig:
    """LoHa, whose dropout is of ranks."""
    from peft import LoHaConfig

    return LoHaConfig(
        r=settings.r, alpha=settings.alpha, rank_dropout=settings.dropout, **settings.of_layers, **settings.shared
    )  # fmt: skip


def lokr(settings: AdapterSettings) -> PeftConfig:
    """LoKr, whose dropout is of ranks."""
    from peft import LoKrConfig

    return LoKrConfig(
        r=settings.r, alpha=settings.alpha, rank_dropout=settings.dropout, **settings.of_layers, **settings.shared
    )  # fmt: skip


def oft(settings: AdapterSettings) -> PeftConfig:
    """OFT: rotations of blocks of a layer's input (Qiu et al., 2023), in blocks of four times the rank.

    As many weights as LoRA of that rank then has in a square layer. PEFT takes the nearest divisor of the width.
    """
    from peft import OFTConfig

    return OFTConfig(oft_block_size=4 * settings.r, **settings.shared)


def itself(model: nn.Module) -> nn.Module:
    """What is plain LoRA already."""
    return model


def adalora_as_lora(model: nn.Module) -> nn.Module:
    """See `adapters.as_plain_lora`."""
    from .adapters import as_plain_lora

    return as_plain_lora(model)


def placebo_as_lora(model: nn.Module) -> nn.Module:
    """See `controls.merged`."""
    from .controls import merged

    return merged(model)


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
    config: Callable[[AdapterSettings], PeftConfig]
    """Makes PEFT's configuration."""
    plain_lora: Callable[[nn.Module], nn.Module] | None = itself
    """The trained (and merged) model as the plain LoRA that it amounts to, from which diffusers', kohya's and ComfyUI's
    files are made; None where it amounts to none, and PEFT's form and merged weights are all there is."""
    shortcuts: bool = False
    """Whether blocks are wired, and merged in the end."""
    matched: bool = False
    """Whether each layer's alpha is what the shortcut would make of it: see `controls`."""
    placebo: str = ""
    """The shortcut in which rotations of a block's own input take its neighbours' place: see `controls`."""
    deepspeed: bool = True
    """Whether DeepSpeed can train it."""
    quantised: bool = True
    """Whether PEFT has it for frozen weights in 4 bits."""
    parts: bool = True
    """Whether it can train several models at once, such as a denoiser and its text encoders."""
    of_layers: bool = True
    """Whether single layers can have ranks and alphas of their own."""
    dropout: bool = True
    """Whether PEFT has a dropout for it."""
    alpha: bool = True
    """Whether its scale goes by an alpha."""
    least_steps: int = 1
    """With fewer it cannot move its ranks."""

    @property
    def trains_lora(self) -> bool:
        """Whether what trains is LoRA's own A and B: its checkpoints can be drawn with."""
        return self.plain_lora is itself

    @property
    def reads_shortcut(self) -> bool:
        """Whether it is another one with another --shortcut."""
        return self.shortcuts or self.matched

    @property
    def reads_shortcut_flags(self) -> bool:
        """Whether it is another one with another --pre_num or --head."""
        return self.reads_shortcut or bool(self.placebo)

    @property
    def measured(self) -> bool:
        """Whether a few batches say what it is, before its first step."""
        return self.matched or bool(self.placebo)


METHODS = {
    row.name: row
    for row in (
        Method("lora", "LoRA", "plain LoRA", "#8a8f98", lora),
        Method("lora_x2", "LoRA, doubled alpha", "LoRA with doubled alpha, the control", "#1971c2", lora_x2),
        Method("lora_x4", "LoRA, fourfold alpha", "LoRA with alpha times four", "#74a9d8", lora_x4),
        Method(
            "lora_matched", "LoRA, matched alpha", "LoRA with each layer's alpha as the shortcut would scale it",
            "#1098ad", lora, matched=True,
        ),
        Method("reslora", "ResLoRA", "LoRA with shortcuts", "#e8590c", lora, shortcuts=True),
        Method(
            "is_placebo", "Input placebo", "input-shortcuts from rotations in place of neighbours", "#f08c00", lora,
            placebo_as_lora, placebo="input",
        ),
        Method(
            "ms_placebo", "Middle placebo", "middle-shortcuts from rotations in place of neighbours", "#c2255c", lora,
            placebo_as_lora, placebo="middle",
        ),
        Method(
            "adalora", "AdaLoRA", "LoRA that moves ranks between layers", "#2f9e44", adalora,
            adalora_as_lora, deepspeed=False, parts=False, of_layers=False, least_steps=3,
        ),
        Method("rslora", "rsLoRA", "LoRA with the scale alpha / sqrt(rank)", "#5c940d", rslora),
        Method("dora", "DoRA", "LoRA of directions, with trained magnitudes", "#e64980", dora, None),
        Method("loha", "LoHa", "Hadamard products of two", "#9c36b5", loha, None, quantised=False),
        Method("lokr", "LoKr", "Kronecker products", "#0c8599", lokr, None, quantised=False),
        Method(
            "oft", "OFT", "rotations of the input, in blocks of 4 x rank", "#862e9c", oft,
            None, of_layers=False, dropout=False, alpha=False,
        ),
    )
}  # fmt: skip


def adapter_config(method: str, settings: AdapterSettings) -> PeftConfig:
    """Return PEFT's configuration of a method, as its row in `METHODS` makes it; ResLoRA's is LoRA's.

    Raises `ValueError` for a method that is not in `METHODS`.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, METHODS))}")
    return METHODS[method].config(settings)


DEFAULT_PRE_NUM = 4
IN_WORDS = "; ".join(f"{row.name}: {row.help}" for row in METHODS.values())
"""For the help of flags."""


_UNABLE = {
    "deepspeed": ("reads gradients that DeepSpeed keeps to itself", "train it without DeepSpeed"),
    "parts": ("moves ranks within one model, and --train_text_encoder trains several", "leave one out"),
    "quantised": ("PEFT has it for whole weights only", "leave --load_in_4bit out"),
}
"""What is said of a method that cannot do what a field of its row says, and the fix."""


def refuse_unable(names: Iterable[str], ability: str) -> None:
    """Raise `InvalidArgument` for the first of these methods whose row says that it lacks the ability."""
    for name in names:
        if not getattr(METHODS[name], ability):
            raise InvalidArgument(f"--method {name}", *_UNABLE[ability])


def refuse_settings(names: Iterable[str], dropout: float, patterns: Mapping[str, Sequence[str] | None]) -> None:
    """Raise `InvalidArgument` for the first of these methods that has no dropout, or no ranks and alphas by layer,
    where such are given; `patterns` by the names of their flags.
    """
    for method in (METHODS[name] for name in names):
        if dropout and not method.dropout:
            problem = f"PEFT has none for --method {method.name}"
            raise InvalidArgument(f"--lora_dropout {dropout:g}", problem, "leave one of the two out")
        for flag, given in patterns.items():
            if given and not method.of_layers:
                problem = f"--method {method.name} has none of single layers"
                raise InvalidArgument(f"--{flag} {' '.join(given)}", problem, "leave one of the two out")


def check_steps(names: Iterable[str], steps: int | None, argument: str) -> None:
    """Raise `InvalidArgument`, which names `argument`, where a method needs more steps than there are to be."""
    for method in (METHODS[name] for name in names):
        if steps and steps < method.least_steps:
            problem = f"{method.title} needs {method.least_steps} to move ranks"
            raise InvalidArgument(argument, problem, "give more steps or epochs, or another method")
