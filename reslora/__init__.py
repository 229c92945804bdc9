"""ResLoRA (Shi et al., 2024): residual shortcuts between the LoRA blocks of neighboring layers, merged for inference.

model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
reslora.connect(model, reslora.ResLoraConfig(shortcut="block", pre_num=4))
...                                     # train as usual
report = reslora.merge(model, calibration=batches)  # plain LoRA from here on

Names are imported on first use, so that `import reslora` does not import torch and PEFT.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "Block": "linking",
    "BlockReport": "model",
    "Chain": "linking",
    "Chains": "linking",
    "MergeReport": "model",
    "ResLoraConfig": "config",
    "chains": "linking",
    "connect": "model",
    "disconnect": "model",
    "enable_gradient_checkpointing": "model",
    "load": "checkpoint",
    "merge": "model",
    "save": "checkpoint",
}
_MODULES = ("calibration", "export")  # modules that are attributes of the package

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name or module on first use."""
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names of all attributes, including those that are not imported yet."""
    return sorted({*globals(), *__all__, *_MODULES})
