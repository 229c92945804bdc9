"""A LoRA variant of your own: layers with inputs of one width share the matrix A (as in Tied-LoRA, arXiv 2311.09578).

This method has little more than half of LoRA's parameters. Run this command in the repository's root; it compares the
method with LoRA by learning rates and seeds, and writes report.html and the files of both:

    python train_sd.py --method lora examples.my_method:shared_a --learning_rate 1e-3 3e-3 --seed 0 1 2
"""

import torch
from torch import nn

from reslora.methods.updates import layers, sides


class SharedA(nn.Module):
    """The update `scale * B A` of one layer, whose A also belongs to other layers."""

    def __init__(self, down: nn.Parameter, outputs: int, scale: float) -> None:
        super().__init__()
        self.down, self.up, self.scale = down, nn.Parameter(torch.zeros(outputs, len(down))), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what is added to the layer's output."""
        return (x @ self.down.T) @ self.up.T * self.scale

    def delta(self) -> torch.Tensor:
        """Return the update as a change of the layer's weight."""
        return self.scale * self.up @ self.down


def shared_a(model: nn.Module, settings) -> dict[str, nn.Module]:
    """Return an update for each layer that --target_modules names."""
    shared, updates = {}, {}
    for name, layer in layers(model, settings).items():
        outputs, inputs = sides(layer)
        if inputs not in shared:
            shared[inputs] = nn.Parameter(torch.randn(settings.r, inputs) / inputs**0.5)
        updates[name] = SharedA(shared[inputs], outputs, settings.alpha / settings.r)
    return updates
