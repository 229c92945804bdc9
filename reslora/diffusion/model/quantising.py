"""A denoiser's frozen weights in 8 or 4 bits, in the CPU's memory, or both: made ready for each product, and let go.

Only packed weights live from one product to the next, forward and backward, and those of swapped blocks are not on the
device at all. Any adapter goes on top, for PEFT finds an `nn.Linear` with a weight of the shape and dtype it had.

Why not other libraries' layers? A weight of 1024 x 768 takes 1,572,864 bytes in bf16. As many are kept for the
backward, beside the packed ones, by diffusers' layerwise casting (0.42) and torchao's int8 and fp8 weights (0.18): such
a base takes more memory than a plain one. torchao's NF4 and bitsandbytes' 4 and 8 bits (0.50) keep nothing unpacked, as
ours. But torchao's NF4 rounds the scales, bitsandbytes' int8 on a GPU rounds activations, and neither has fp8.
bitsandbytes' NF4 has the very codes and scales of ours, in a layer whose weight has another shape and cannot be
swapped: a second kind beside this one, which the other formats need anyway.

Why not diffusers' group offloading? It is for inference. In a U-Net, and in any denoiser without checkpointing, no
gradient was right: the backward finds weights that have left the device again. With streams, each offload puts back the
adapter's first values (`ModuleGroup._offload_to_memory`). Only blocks of a transformer under checkpointing trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn

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
WHOLE = Format(lambda weight: (weight, torch.ones(1)), lambda codes, scales, shape, dtype: codes.to(dtype))
"""A weight as it is, to be swapped."""


class PackedLinear(nn.Linear):
    """A frozen linear layer with a packed weight, made of one that has it in full."""

    codes: torch.Tensor

    def __init__(self, linear: nn.Linear, form: Format, device: torch.device) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.form, self.dtype = form, linear.weight.dtype
        codes, scales = form.pack(linear.weight.detach().to(device))
        # Parameters, for DDP sends buffers around in every forward; all as bytes, which no cast of the model changes.
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales.view(torch.uint8), requires_grad=False)
        self.bias = linear.bias

    def swap(self, device: torch.device) -> None:
        """Leaves the codes in the CPU's memory for good; each product on `device` has a copy of its own."""
        codes = self.codes.detach().cpu()
        del self.codes  # no parameter any more: those move with the model, and DDP wants them on the device
        self.codes = codes.pin_memory() if device.type == "cuda" else codes

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override] # as the docstring says
        """The weight (q x p), unpacked, in the dtype it had; to be read, not changed."""
        return self.unpacked(self.dtype)

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (q x p) in `dtype`."""
        scales, shape = self.scales.view(torch.float32), torch.Size((self.out_features, self.in_features))
        return self.form.unpack(on_device(self.codes, scales.device), scales, shape, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`W x + b`, in the dtype of `x`, or that of autocast."""
        weight = self.unpacked(autocast_dtype(x))
        x = x.to(weight.dtype)
        if torch.compiler.is_compiling():  # it decides by itself, and checkpointing makes it unpack anew
            return F.linear(x, weight, self.bias)
        with weight_let_go(weight, self.unpacked):
            return F.linear(x, weight, self.bias)


def weight_let_go(
    weight: torch.Tensor, unpacked: Callable[[torch.dtype], torch.Tensor]
) -> AbstractContextManager[None]:
    """Runs its body so that the backward makes `weight` anew, and keeps no more than how it was looked at."""
    storage, dtype = weight.untyped_storage()._cdata, weight.dtype

    def kept(value: torch.Tensor) -> torch.Tensor | tuple:
        is_weight = value.untyped_storage()._cdata == storage
        return (value.shape, value.stride(), value.storage_offset()) if is_weight else value

    def again(value: torch.Tensor | tuple) -> torch.Tensor:
        return unpacked(dtype).as_strided(*value) if isinstance(value, tuple) else value

    return torch.autograd.graph.saved_tensors_hooks(kept, again)


def on_device(codes: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The codes where they are needed; a copy from pinned memory waits for nothing but its turn on the GPU."""
    return codes.to(device, non_blocking=True)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a product with `x` is computed; the meta device knows no autocast."""
    kind = x.device.type
    automatic = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if automatic else x.dtype


def pack(denoiser: nn.Module, precision: str, device: torch.device, blocks_to_swap: int = 0) -> None:
    """Packs the linear layers of the denoiser's repeated blocks on `device`, one by one, and leaves them there.

    Those of the first `blocks_to_swap` blocks go to the CPU's memory; with the precision "no", as they are. What
    surrounds the blocks (embeddings, the last projection), norms and convolutions stay as they are.
    """
    swapped = tuple(f"{block}." for block in blocks(denoiser)[:blocks_to_swap])
    for name, layer in list(block_layers(denoiser)):
        if precision == "no" and not name.startswith(swapped):
            continue
        packed = PackedLinear(
            layer, FORMATS.get(precision, WHOLE), layer.weight.device if precision == "no" else device
        )
        if name.startswith(swapped):
            packed.swap(device)
        denoiser.set_submodule(name, packed)


def try_format(precision: str, dtype: torch.dtype, device: torch.device) -> None:
    """Packs a small layer and runs it forward and backward; raises whatever the device, or a package, raises."""
    with torch.random.fork_rng(devices=[]):
        linear = nn.Linear(64, 64, dtype=dtype)
    layer = PackedLinear(linear.requires_grad_(False), FORMATS[precision], device).to(device)
    layer(torch.ones(1, 64, dtype=dtype, device=device, requires_grad=True)).sum().backward()


def block_layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Names and linear layers of everything that stands in an `nn.ModuleList`."""
    lists = block_lists(denoiser)
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(lists):
            yield name, module


def blocks(denoiser: nn.Module) -> list[str]:
    """Names of the denoiser's blocks: what stands in an outermost `nn.ModuleList` and has linear layers."""
    lists, found = block_lists(denoiser), {}
    for name, _ in block_layers(denoiser):
        start = min((one for one in lists if name.startswith(one)), key=len)
        found[start + name.removeprefix(start).partition(".")[0]] = True
    return list(found)


def block_lists(denoiser: nn.Module) -> tuple[str, ...]:
    """What the names of everything that stands in an `nn.ModuleList` start with."""
    return tuple(f"{name}." for name, module in denoiser.named_modules() if isinstance(module, nn.ModuleList))
