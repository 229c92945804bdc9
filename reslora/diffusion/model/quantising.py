"""A denoiser's frozen weights in 8 or 4 bits: packed once, and unpacked for each product, forward and backward.

diffusers' layerwise casting and torchao's weights do the same in the forward, but keep what they have unpacked for the
backward: then a packed base takes more memory than a plain one. Here only packed weights live from one product to the
next. Any adapter goes on top, for PEFT finds an `nn.Linear` with a weight of the shape and dtype it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# What the codes of NormalFloat stand for: quantiles of the normal distribution, and zero (Dettmers et al., 2023).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_BLOCK = 64
Packed = tuple[torch.Tensor, torch.Tensor]
"""Codes (uint8) and the scales (float32) that belong to them."""


@dataclass(frozen=True)
class Format:
    """How a weight is packed, and unpacked again."""

    pack: Callable[[torch.Tensor], Packed]
    unpack: Callable[[torch.Tensor, torch.Tensor, torch.Size, torch.dtype], torch.Tensor]
    """From codes and scales to a weight of that shape and dtype."""


def pack_rows(weight: torch.Tensor, *, code: torch.dtype, largest: float) -> Packed:
    """Codes of dtype `code`, up to `largest`, and a scale for each row of a weight (q x p)."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * largest) / largest
    scaled = weight / scales
    return (scaled if code.is_floating_point else scaled.round()).to(code).view(torch.uint8), scales


def unpack_rows(
    codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size, dtype: torch.dtype, *, code: torch.dtype
) -> torch.Tensor:
    """The weight that `pack_rows` has packed: `codes * scales`, rounded once."""
    return codes.view(code).to(dtype).mul_(scales)


def pack_nf4(weight: torch.Tensor) -> Packed:
    """NormalFloat codes of 4 bits, two a byte, and a scale for each 64 weights (Dettmers et al., 2023)."""
    flat = weight.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    levels = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(blocks / scales, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return (codes[:, ::2] << 4) | codes[:, 1::2], scales


def unpack_nf4(codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The weight that `pack_nf4` has packed."""
    blocks = F.embedding(codes.int(), nf4_pairs(dtype, codes.device)).flatten(1).mul_(scales)
    return blocks.flatten()[: shape.numel()].view(shape)


@cache
def nf4_pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The two weights that each byte stands for (256 x 2)."""
    levels = torch.tensor(NF4, dtype=dtype)
    return torch.cartesian_prod(levels, levels).to(device)


def by_rows(code: torch.dtype, largest: float) -> Format:
    """A scale for each row."""
    return Format(partial(pack_rows, code=code, largest=largest), partial(unpack_rows, code=code))


FORMATS = {
    "fp8": by_rows(torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max),
    "int8": by_rows(torch.int8, 127.0),
    "nf4": Format(pack_nf4, unpack_nf4),
}


class PackedLinear(nn.Linear):
    """A frozen linear layer with a packed weight, made of one that has it in full."""

    def __init__(self, linear: nn.Linear, form: Format, device: torch.device) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.form, self.dtype = form, linear.weight.dtype
        codes, scales = form.pack(linear.weight.detach().to(device))
        # Parameters, for DDP sends buffers around in every forward; all as bytes, which no cast of the model changes.
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales.view(torch.uint8), requires_grad=False)
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override] # read only, as the docstring says
        """The weight (q x p), unpacked, in the dtype it had; changing it changes nothing."""
        return self.unpacked(self.dtype)

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (q x p) in `dtype`."""
        scales = self.scales.view(torch.float32)
        return self.form.unpack(self.codes, scales, torch.Size((self.out_features, self.in_features)), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`W x + b`, in the dtype of `x`, or that of autocast."""
        rows = x.to(autocast_dtype(x)).reshape(-1, self.in_features)
        return FrozenProduct.apply(rows, self).view(*x.shape[:-1], self.out_features)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a product with `x` is computed; the meta device knows no autocast."""
    kind = x.device.type
    automatic = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if automatic else x.dtype


class FrozenProduct(torch.autograd.Function):
    """`W x + b` with gradients for x alone; keeps nothing but the layer, which unpacks W for the backward again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        """`x` (rows x p) to (rows x q)."""
        ctx.layer = layer
        return F.linear(x, layer.unpacked(x.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """`W^T g`."""
        return gradient @ ctx.layer.unpacked(gradient.dtype), None


def pack(denoiser: nn.Module, precision: str, device: torch.device) -> None:
    """Packs the linear layers of the denoiser's repeated blocks on `device`, one by one, and leaves them there.

    What surrounds the blocks (embeddings, the last projection), norms and convolutions stay as they are.
    """
    for name, layer in list(block_layers(denoiser)):
        denoiser.set_submodule(name, PackedLinear(layer, FORMATS[precision], device))


def try_format(precision: str, dtype: torch.dtype, device: torch.device) -> None:
    """Packs a small layer and runs it forward and backward; raises whatever the device, or a package, raises."""
    with torch.random.fork_rng(devices=[]):
        linear = nn.Linear(64, 64, dtype=dtype)
    layer = PackedLinear(linear.requires_grad_(False), FORMATS[precision], device).to(device)
    layer(torch.ones(1, 64, dtype=dtype, device=device, requires_grad=True)).sum().backward()


def block_layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Names and linear layers of everything that stands in an `nn.ModuleList`."""
    lists = tuple(f"{name}." for name, module in denoiser.named_modules() if isinstance(module, nn.ModuleList))
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(lists):
            yield name, module
