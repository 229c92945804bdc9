"""The LoRA that training starts from, or that is active in training only."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftConfig
from torch import nn

from ...export import Factors, lora_config
from ...linking import lora_layers


@dataclass(frozen=True)
class Start:
    """LoRA factors of the denoiser by layer, from --init_lora or --assistant_lora."""

    layers: Mapping[str, Factors]
    targets: str
    """Regular expression that matches exactly the complete names of these layers."""
    mark: str
    """Hash of the content of the LoRA file."""

    def configure(self, config: PeftConfig) -> None:
        """Set each layer's rank and alpha in the configuration of an adapter.

        `config` already has the LoRA's most frequent rank and alpha as its defaults.
        """
        own = lora_config(self.layers)
        more = config.lora_alpha / own.lora_alpha  # 2 for a method that doubles alpha
        config.rank_pattern = own.rank_pattern
        config.alpha_pattern = {name: alpha * more for name, alpha in own.alpha_pattern.items()}

    @torch.no_grad()
    def copy_to(self, denoiser: nn.Module) -> None:
        """Copy the factors into the adapter of a denoiser.

        B is rescaled for the adapter's own scaling, so that the adapter's weight update equals the update in the file.
        """
        for name, layer in lora_layers(denoiser, "default").items():
            down, up, scale = self.layers[name]
            layer.lora_A["default"].weight.copy_(down)
            layer.lora_B["default"].weight.copy_(up * (scale / layer.scaling["default"]))
