"""An assistant LoRA (--assistant_lora): frozen, and added to the denoiser's layers in training passes only.

Bases that are distilled to few steps, such as FLUX.1-schnell and Z-Image-Turbo, lose their distillation while an
adapter is trained on them. An assistant undoes the distillation while the adapter is trained. The trained adapter is
then used on the distilled base, without the assistant. The format and the use are those of ai-toolkit's
`assistant_lora_path`.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from ...attributes import override_attributes
from ...export import Factors

DOWN, UP, OWNER = "assistant_down", "assistant_up", "_assistant"


class Assistant:
    """The forward hook of all layers with an assistant, which computes `W x + s B A x` while `active` is set."""

    active = True

    def __call__(self, layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, with the assistant's product added."""
        if not self.active:
            return output
        (x, *_), down, up = args, getattr(layer, DOWN), getattr(layer, UP)
        if isinstance(layer, nn.Conv2d):
            low = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation, layer.groups)
            return output + F.conv2d(low, up)
        return output + F.linear(F.linear(x, down), up)


def add_assistant(denoiser: nn.Module, layers: Mapping[str, Factors], dtype: torch.dtype, device: torch.device) -> None:
    """Add frozen factors to layers of a denoiser that has no adapter yet; `layers` maps complete names to factors.

    The base's own weights do not change, so that they can be quantized or swapped. The factors are parameters of the
    layers, because DDP would broadcast buffers in every forward pass.
    """
    assistant = Assistant()
    for name, (down, up, scale) in layers.items():
        layer = denoiser.get_submodule(name)
        for key, value in ((DOWN, down), (UP, up * scale)):
            layer.register_parameter(key, nn.Parameter(value.to(device, dtype), requires_grad=False))
        layer.register_forward_hook(assistant)
    vars(denoiser)[OWNER] = assistant


@contextmanager
def without_assistant(denoiser: nn.Module) -> Iterator[None]:
    """Turn off the denoiser's assistant, if it has one, inside this context."""
    with ExitStack() as stack:
        if assistant := vars(denoiser).get(OWNER):
            stack.enter_context(override_attributes(assistant, active=False))
        yield
