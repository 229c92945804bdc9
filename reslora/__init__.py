"""ResLoRA (Shi et al., 2024): residual shortcuts between the LoRA blocks of neighbouring layers, merged for inference.

model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
reslora.connect(model, reslora.ResLoraConfig(shortcut="block", pre_num=4))
...                                     # train as usual
report = reslora.merge(model, calibration=batches)  # plain LoRA from here on

Names are imported when they are first used: a script that only parses its flags does not wait for torch and PEFT.
"""

import importlib
import sys
import types
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "Block": "chains",
    "BlockReport": "model",
    "Chain": "chains",
    "Chains": "chains",
    "MergeReport": "model",
    "ResLoraConfig": "config",
    "chains": "chains",
    "connect": "model",
    "disconnect": "model",
    "enable_gradient_checkpointing": "model",
    "load": "checkpoint",
    "merge": "model",
    "save": "checkpoint",
}
_MODULES = ("calibration", "export")  # which are named as a whole

__all__ = sorted(_HOMES)


class _Package(types.ModuleType):
    """The package; importing the module `reslora.chains` does not hide the function of that name."""

    @property
    def chains(self) -> Any:
        """The function of `reslora/chains.py`."""
        return importlib.import_module(".chains", __name__).chains

    @chains.setter
    def chains(self, module: types.ModuleType) -> None:
        """What the import system does when it has loaded the module."""


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
