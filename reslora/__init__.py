"""ResLoRA (Shi et al., 2024): residual shortcuts between the LoRA blocks of neighbouring layers, merged for inference.

model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
reslora.connect(model, reslora.ResLoraConfig(shortcut="block", pre_num=4))
...                                     # train as usual
report = reslora.merge(model)           # plain LoRA from here on
"""

from .chains import Block, Chain, Chains, chains
from .checkpoint import load, save
from .config import ResLoraConfig
from .model import BlockReport, MergeReport, connect, disconnect, enable_gradient_checkpointing, merge

__version__ = "0.1.0"

__all__ = [
    "Block",
    "BlockReport",
    "Chain",
    "Chains",
    "MergeReport",
    "ResLoraConfig",
    "chains",
    "connect",
    "disconnect",
    "enable_gradient_checkpointing",
    "load",
    "merge",
    "save",
]
