"""Registry of the trainable methods: a new one needs a function that returns PEFT's configuration, and a row in
METHODS.

Options, validation, exports and the application use these rows. The functions of this module import PEFT and torch when
they are called, so that `--help` appears at once.
"""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument, refused_as
from . import own

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


@dataclass(frozen=True)
class AdapterSettings:
    """Settings of an adapter that are common to all methods."""

    r: int
    alpha: float
    dropout: float
    """Dropout probability of the adapter's input; for LoHa and LoKr, that of single ranks."""
    targets: Sequence[str] | str
    """PEFT's `target_modules`."""
    total_steps: int
    """Number of training steps, for AdaLoRA's schedule."""
    task_type: str | None = None
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: str = "true"
    """PEFT's `init_lora_weights` as text, only for LoRA; diffusers' scripts use "gaussian"."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """PEFT's `rank_pattern`; see the module `patterns` for this field and `alpha_pattern`."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @property
    def shared(self) -> dict[str, Any]:
        """Keyword arguments that the PEFT configurations of all methods have."""
        return {
            "target_modules": self.targets if isinstance(self.targets, str) else list(self.targets),
            "task_type": self.task_type,
            "modules_to_save": list(self.modules_to_save) if self.modules_to_save else None,
        }


def lora(settings: AdapterSettings, times: float = 1, **variant: Any) -> PeftConfig:
    """Return the configuration of LoRA (Hu et al., 2022), or of one of its variants.

    Every alpha is multiplied by `times`. `variant` holds options of PEFT's `LoraConfig`, such as `use_dora`.

    rsLoRA is rank-stabilized LoRA (Kalajdzievski, 2023). DoRA trains `m (W + s B A) / |W + s B A|`, with a magnitude m
    of each row (Liu et al., 2024).
    """
    from peft import LoraConfig

    alphas = {name: times * alpha for name, alpha in settings.alpha_pattern.items()}
    return LoraConfig(
        r=settings.r, lora_alpha=times * settings.alpha, lora_dropout=settings.dropout,
        rank_pattern=dict(settings.rank_pattern), alpha_pattern=alphas, **settings.shared,
        init_lora_weights=True if settings.init_lora_weights == "true" else settings.init_lora_weights, **variant,
    )  # fmt: skip


def adalora(settings: AdapterSettings) -> PeftConfig:
    """Return the configuration of AdaLoRA (Zhang et al., 2023).

    The initial rank is 1.5 `r`. Between 10% and 50% of all steps, ranks are reduced to `r` on average over layers.
    """
    from peft import AdaLoraConfig

    steps = settings.total_steps
    return AdaLoraConfig(
        init_r=math.ceil(1.5 * settings.r), target_r=settings.r, lora_alpha=settings.alpha,
        lora_dropout=settings.dropout, total_step=steps, tinit=steps // 10, tfinal=steps // 2,
        deltaT=max(1, steps // 100), **settings.shared,
    )  # fmt: skip


def lycoris(settings: AdapterSettings, kind: str) -> PeftConfig:
    """Return the configuration of LoHa or LoKr: `kind` is its class in PEFT, and dropout is `rank_dropout`."""
    import peft

    return getattr(peft, kind)(
        r=settings.r, alpha=settings.alpha, rank_dropout=settings.dropout, rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern), **settings.shared,
    )  # fmt: skip


def oft(settings: AdapterSettings) -> PeftConfig:
    """Return the configuration of OFT (Qiu et al., 2023): block rotations of a layer's input, with blocks of 4 `r`.

    In a square layer this has as many weights as LoRA of rank `r`. PEFT uses the block size's nearest divisor of the
    width.
    """
    from peft import OFTConfig

    return OFTConfig(oft_block_size=4 * settings.r, **settings.shared)


def on_original_base(model: nn.Module) -> nn.Module:
    """Return a model with LoRA as plain LoRA on the original base weights; see `initial.merged`."""
    from .initial import merged

    return merged(model)


def plain_if_lora(model: nn.Module) -> nn.Module:
    """Return a method that the user brings as plain LoRA if it is LoRA or AdaLoRA; return other adapters unchanged."""
    from peft import AdaLoraConfig

    from ..linking import base_model

    ada = any(isinstance(config, AdaLoraConfig) for config in base_model(model).peft_config.values())
    return adalora_as_lora(model) if ada else on_original_base(model)


def adalora_as_lora(model: nn.Module) -> nn.Module:
    """Return AdaLoRA as plain LoRA; see `adapters.as_plain_lora`."""
    from .adapters import as_plain_lora

    return as_plain_lora(model)


@dataclass(frozen=True)
class Method:
    """Properties of a method for training, saving, export and display."""

    name: str
    """Name in options and directories."""
    title: str
    """Name for display."""
    help: str
    """Description in one line."""
    color: str
    """Color of the method's curve on the application's page."""
    config: Callable[..., PeftConfig]
    """Function that returns PEFT's configuration for the settings; if `own` is set, the function takes the model, too.
    """
    plain_lora: Callable[[nn.Module], nn.Module] | None = on_original_base
    """Function that converts the trained (and merged) model to plain LoRA, for the files of diffusers and kohya.

    None if there is no equivalent plain LoRA: then only PEFT's format and merged weights can be exported.
    """
    lycoris: bool = False
    """Whether LyCORIS's format holds the method; see `reslora.lycoris`."""
    shortcuts: bool = False
    """Whether the method connects blocks by shortcuts, which are merged after training."""
    measured: bool = False
    """Whether the method is calibrated on a few batches before its first training step; see `controls`."""
    deepspeed: bool = True
    """Whether the method can be trained with DeepSpeed."""
    quantised: bool = True
    """Whether PEFT supports the method on 4-bit base weights."""
    parts: bool = True
    """Whether the method can train several models together, such as a denoiser and its text encoders."""
    of_layers: bool = True
    """Whether single layers can have their own rank and alpha."""
    dropout: bool = True
    """Whether PEFT supports dropout for the method."""
    alpha: bool = True
    """Whether the method's scale depends on an alpha."""
    trains_b: bool = True
    """Whether the method trains LoRA's matrices A and B, so that LoRA+ can give B its own learning rate."""
    ranked: bool = True
    """Whether the method has a rank."""
    own: bool = False
    """Whether the user brings the method; see the module `own`."""
    least_steps: int = 1
    """Minimum number of steps, for methods that reallocate ranks."""

    @property
    def trains_lora(self) -> bool:
        """Whether the trained tensors are LoRA's own A and B, so that its checkpoints can generate images."""
        return self.plain_lora is on_original_base

    @property
    def reads_initialization(self) -> bool:
        """Whether the method depends on --init_lora_weights; methods that do not depend on it have one start."""
        return self.trains_lora and not self.reads_shortcut

    @property
    def reads_shortcut(self) -> bool:
        """Whether the method depends on --shortcut, --pre_num or --head."""
        return self.shortcuts or self.measured


@cache
def _own_row(name: str) -> Method:
    """Return the row of a method that a user brings; its module is imported only if PEFT has it."""
    fields = own.fields_of(name)

    def has(*settings: str) -> bool:
        """Return whether the method uses one of these settings; a function gets all settings."""
        return fields is None or not fields.isdisjoint(settings)

    return Method(
        name, own.title_of(name), own.help_of(name), own.color_of(name),
        partial(own.configuration, name), plain_if_lora, of_layers=has("rank_pattern"),
        dropout=fields is None or own.dropout_in(fields) is not None, alpha=has("alpha", "lora_alpha"), ranked=has("r"),
        own=True,
    )  # fmt: skip


class Methods(dict[str, Method]):
    """The built-in methods by name. A method that a user brings is found by its name, but the built-in methods are the
    only listed ones.
    """

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or own.is_own(name)

    def __missing__(self, name: str) -> Method:
        if not own.is_own(name):
            raise KeyError(name)
        return _own_row(name)

    def folders_in(self, folder: Path) -> list[str]:
        """Return the built-in methods, and the others that have a directory in `folder`."""
        there = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        return [*self, *(name for name in there if own.is_own(name))]


METHODS = Methods(
    (row.name, row)
    for row in (
        Method("lora", "LoRA", "plain LoRA", "#8a8f98", lora),
        Method(
            "lora_x2", "LoRA x2", "LoRA with doubled alpha, a control", "#1971c2",
            partial(lora, times=2),
        ),
        Method(
            "lora_matched", "LoRA matched", "LoRA with each layer's alpha matched to the shortcut's scale",
            "#1098ad", lora, measured=True,
        ),
        Method("reslora", "ResLoRA", "LoRA with shortcuts between layers", "#e8590c", lora, shortcuts=True),
        Method(
            "adalora", "AdaLoRA", "LoRA that gives important layers a higher rank", "#2f9e44", adalora,
            adalora_as_lora, deepspeed=False, parts=False, of_layers=False, least_steps=3,
        ),
        Method(
            "rslora", "rsLoRA", "LoRA scaled for high ranks: alpha / sqrt(rank)", "#5c940d",
            partial(lora, use_rslora=True),
        ),
        Method(
            "dora", "DoRA", "LoRA that trains direction and magnitude of weights apart", "#e64980",
            partial(lora, use_dora=True), None, lycoris=True,
        ),
        Method(
            "loha", "LoHa", "two LoRAs, multiplied entry by entry", "#9c36b5",
            partial(lycoris, kind="LoHaConfig"), None, lycoris=True, quantised=False, trains_b=False,
        ),
        Method(
            "lokr", "LoKr", "a small matrix, repeated with other factors (Kronecker product)", "#0c8599",
            partial(lycoris, kind="LoKrConfig"), None, lycoris=True, quantised=False, trains_b=False,
        ),
        Method(
            "oft", "OFT", "rotates the input of layers instead of adding to it", "#862e9c", oft,
            None, of_layers=False, dropout=False, alpha=False, trains_b=False,
        ),
    )
)  # fmt: skip


def adapter_config(method: str, settings: AdapterSettings, model: nn.Module | None = None) -> PeftConfig:
    """Return PEFT's configuration of a method in `METHODS`; ResLoRA uses LoRA's.

    A method that the user brings gets the `model`, which has no adapter.
    """
    row = METHODS[method]
    return row.config(settings, model) if row.own else row.config(settings)


def refusing_own(method: str) -> AbstractContextManager[None]:
    """Return a context that converts every error of a method that the user brings into an `InvalidArgument`."""
    return refused_as(own.flag_of(method), own.FIX) if METHODS[method].own else nullcontext()


ZERO_B = ("true", "gaussian")
INITIALIZATIONS = f"{', '.join(ZERO_B)}, orthogonal, olora, pissa or pissa_niter_N"
NEED_DATA = ("eva", "corda", "loftq", "lora_ga")


def initialization(text: str) -> str:
    """Return PEFT's `init_lora_weights` as text; the parser of an option.

    Raises `ArgumentTypeError` for unknown names, and for initializations that need data or gradients before the adapter
    is made.
    """
    if re.fullmatch(r"true|gaussian|orthogonal|olora|pissa(_niter_[1-9]\d*)?", text.lower()):
        return text.lower()
    problem = "needs a setup of its own in PEFT" if text in NEED_DATA else "is unknown"
    raise ArgumentTypeError(f"{text!r} {problem}: give {INITIALIZATIONS}")


def own_name(text: str) -> str:
    """Return the name of a method that the user brings, `package.module.function`; return other texts unchanged.

    The parser of an option that names a method or one of its variants. Raises `ArgumentTypeError` for the path of a
    folder that no name can hold.
    """
    try:
        return own.name_of(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def known_method(text: str) -> str:
    """Return the name of a method; the parser of an option, which compares it with `METHODS`.

    A method that the user brings is named by its module and function, with a colon or a dot between them, or by a
    folder. Raises `ArgumentTypeError` for methods that are initializations, and for a name with a colon of another
    form.
    """
    text = own_name(text)
    if ":" in text:
        raise ArgumentTypeError(f"{text!r} is not {own.FORM}")
    if text in ("pissa", "orthogonal"):
        raise ArgumentTypeError(f"{text!r} is an initialization: give --method lora --init_lora_weights {text}")
    return text


DEFAULT_PRE_NUM = 4
IN_WORDS = "; ".join(f"{row.name}: {row.help}" for row in METHODS.values()) + f". Or a method of your own: {own.FORM}"
"""Methods and their descriptions, for the help of options."""


_UNABLE = {
    "deepspeed": ("needs gradients that DeepSpeed does not expose", "train it without DeepSpeed"),
    "parts": ("moves ranks within one model, but --train_text_encoder trains several", "leave one of the two out"),
    "quantised": ("PEFT supports it only on unquantized weights", "leave --load_in_4bit out"),
}
"""Problem and fix for each ability that a method can lack."""


def refuse_unable(names: Iterable[str], ability: str) -> None:
    """Raise `InvalidArgument` for the first method in `names` that lacks an ability, a key of `_UNABLE`."""
    for name in names:
        if not getattr(METHODS[name], ability):
            raise InvalidArgument(f"--method {name}", *_UNABLE[ability])


def refuse_settings(names: Iterable[str], dropout: float, patterns: Mapping[str, Sequence[str] | None]) -> None:
    """Raise `InvalidArgument` for the first method that does not support a given option.

    `dropout`: the given dropout; zero is supported by all. `patterns`: the given values by option name, `rank_pattern`
    or `alpha_pattern`.
    """
    for method in (METHODS[name] for name in names):
        if dropout and not method.dropout:
            problem = f"PEFT has no dropout for --method {method.name}"
            raise InvalidArgument(f"--lora_dropout {dropout:g}", problem, "leave one of the two out")
        for flag, given in patterns.items():
            if given and not method.of_layers:
                problem = f"--method {method.name} does not support this option"
                raise InvalidArgument(f"--{flag} {' '.join(given)}", problem, "leave one of the two out")


def check_steps(names: Iterable[str], steps: int | None, argument: str) -> None:
    """Raise `InvalidArgument` naming `argument` if a method needs more training steps than `steps`."""
    for method in (METHODS[name] for name in names):
        if steps and steps < method.least_steps:
            problem = f"{method.title} needs at least {method.least_steps} steps to move ranks"
            raise InvalidArgument(argument, problem, "give more steps or epochs, or another method")
