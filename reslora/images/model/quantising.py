"""Quantize a denoiser's frozen weights to 8 or 4 bits, keep them in CPU memory, or both.

A weight is dequantized for each matrix multiplication, in the forward and in the backward pass, and freed afterwards.
The codes of swapped blocks are copied to the device for each multiplication. All adapters work on top of a quantized
layer, because PEFT finds an `nn.Linear` whose weight has the original shape and dtype.

Why not another library's layers? A weight of 1024 x 768 takes 1,572,864 bytes in bf16. diffusers' layerwise casting
(0.42) and torchao's int8 and fp8 weights (0.18) save a dequantized copy of that size for the backward pass, in addition
to the quantized weight. Such a base takes more memory than an unquantized one. As in this module, torchao's NF4 and
bitsandbytes' 4 and 8 bits (0.50) save no dequantized copy. But torchao's NF4 rounds the scales, bitsandbytes' int8 on a
GPU rounds activations, and neither library has fp8 without that copy. bitsandbytes' NF4 has the same codes and scales
as this module, but its layer has a weight of another shape, which cannot be swapped. The remaining formats would still
need this module.

diffusers' group offloading is not used, because it is made for inference. In a U-Net, and in any denoiser without
gradient checkpointing, gradients were wrong, because the weights are offloaded before the backward pass. With streams,
each offload restores the adapter's initial values (`ModuleGroup._offload_to_memory`). Only transformer blocks with
gradient checkpointing were trained correctly.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

# The values of NormalFloat codes: quantiles of the normal distribution, and zero (Dettmers et al., 2023).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_BLOCK = 64
Packed = tuple[torch.Tensor, torch.Tensor]
"""Codes (uint8) and their scales (float32)."""


@dataclass(frozen=True)
class Format:
    """A quantization format: how a weight is quantized and dequantized."""

    pack: Callable[[torch.Tensor], Packed]
    unpack: Callable[[torch.Tensor, torch.Tensor, torch.Size, torch.dtype], torch.Tensor]
    """Maps codes, scales, shape and dtype to a weight."""


def by_rows(code: torch.dtype, largest: float) -> Format:
    """Return the format for weights (q x p) with codes of dtype `code`, at most `largest`, and one scale per row."""

    def pack(weight: torch.Tensor) -> Packed:
        """Return the codes (q x p) of a weight (q x p), and the scale of each row (q x 1)."""
        weight = weight.float()
        scales = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * largest) / largest
        scaled = weight / scales
        return (scaled if code.is_floating_point else scaled.round()).to(code).view(torch.uint8), scales

    # `codes * scales`, rounded once
    return Format(pack, lambda codes, scales, shape, dtype: codes.view(code).to(dtype).mul_(scales))


def pack_nf4(weight: torch.Tensor) -> Packed:
    """Quantize a weight of any shape to 4-bit NormalFloat (Dettmers et al., 2023).

    Return codes (blocks x 32, with two values per byte) and scales (blocks x 1). A block is 64 weights.
    """
    flat = weight.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    levels = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(blocks / scales, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return (codes[:, ::2] << 4) | codes[:, 1::2], scales


def unpack_nf4(codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize the result of `pack_nf4` to a weight of `shape`."""
    blocks = F.embedding(codes.int(), nf4_pairs(dtype, codes.device)).flatten(1).mul_(scales)
    return blocks.flatten()[: shape.numel()].view(shape)


@cache
def nf4_pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the two NF4 values that each byte encodes (256 x 2)."""
    levels = torch.tensor(NF4, dtype=dtype)
    return torch.cartesian_prod(levels, levels).to(device)


FORMATS = {
    "fp8": by_rows(torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max),
    "int8": by_rows(torch.int8, 127.0),
    "nf4": Format(pack_nf4, unpack_nf4),
}
WHOLE = Format(
    lambda weight: (weight, torch.ones(1, device=weight.device)), lambda codes, scales, shape, dtype: codes.to(dtype)
)
"""The format of a weight that is swapped to CPU memory without quantization."""


class PackedLinear(nn.Linear):
    """A frozen linear layer with a quantized weight, made from an unquantized one."""

    codes: torch.Tensor

    def __init__(self, linear: nn.Linear, form: Format, device: torch.device) -> None:
        nn.Module.__init__(self)  # nn.Linear's own __init__ would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.form, self.dtype = form, linear.weight.dtype
        codes, scales = form.pack(linear.weight.detach().to(device))
        # Stored as parameters, because DDP broadcasts buffers in every forward pass. Stored as bytes, because dtype
        # casts leave bytes unchanged.
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales.view(torch.uint8), requires_grad=False)
        self.bias = linear.bias

    def swap(self, device: torch.device) -> None:
        """Move the codes to CPU memory; each matrix multiplication copies them to `device`."""
        codes = self.codes.detach()
        codes = codes if codes.is_meta else codes.cpu()  # meta tensors of the memory estimate stay as they are
        del self.codes  # parameters move with the model, and DDP requires them on the device
        self.codes = codes.pin_memory() if device.type == "cuda" else codes

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override] # a property instead of a parameter
        """The dequantized weight (q x p) in its original dtype; read-only."""
        return self.unpacked(self.dtype)

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dequantized weight (q x p) in `dtype`."""
        scales, shape = self.scales.view(torch.float32), torch.Size((self.out_features, self.in_features))
        return self.form.unpack(on_device(self.codes, scales.device), scales, shape, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `W x + b` (... x q) for `x` (... x p), in the dtype of autocast or, without autocast, of `x`."""
        weight = self.unpacked(autocast_dtype(x))
        x = x.to(weight.dtype)
        if torch.compiler.is_compiling():  # the compiler selects what to save, and checkpointing recomputes
            return F.linear(x, weight, self.bias)
        with weight_let_go(weight, self.unpacked):
            return F.linear(x, weight, self.bias)


def weight_let_go(
    weight: torch.Tensor, unpacked: Callable[[torch.dtype], torch.Tensor]
) -> AbstractContextManager[None]:
    """Return a context in which autograd saves no copy of `weight`; the backward pass dequantizes the weight again.

    Autograd saves only the weight's shape, strides and offset.
    """
    storage, dtype = weight.untyped_storage()._cdata, weight.dtype

    def replace_weight(value: torch.Tensor) -> torch.Tensor | tuple:
        """Return the shape, strides and offset of a view of the weight; other tensors unchanged."""
        is_weight = value.untyped_storage()._cdata == storage
        return (value.shape, value.stride(), value.storage_offset()) if is_weight else value

    def restore_weight(value: torch.Tensor | tuple) -> torch.Tensor:
        """Return the tensor that `replace_weight` was called with."""
        return unpacked(dtype).as_strided(*value) if isinstance(value, tuple) else value

    return torch.autograd.graph.saved_tensors_hooks(replace_weight, restore_weight)


def on_device(codes: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the codes on `device`; a copy from page-locked memory does not block the CPU."""
    return codes.to(device, non_blocking=True)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of a matrix multiplication with `x`: autocast's, or that of `x` without autocast.

    The meta device has no autocast.
    """
    kind = x.device.type
    automatic = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if automatic else x.dtype


def pack(denoiser: nn.Module, precision: str, device: torch.device, blocks_to_swap: int = 0) -> None:
    """Quantize the linear layers of the denoiser's blocks on `device`, one by one, and leave the result there.

    The layers of the first `blocks_to_swap` blocks are moved to CPU memory instead. With the precision "no", they are
    moved without quantization, and all other layers are unchanged. Everything outside the blocks (embeddings, the last
    projection), norms and convolutions are always unchanged.
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
    """Quantize a small layer, and run its forward and backward pass, to test whether the device supports the format.

    Errors of the device or of a package are not caught.
    """
    with torch.random.fork_rng(devices=[]):
        linear = nn.Linear(64, 64, dtype=dtype)
    layer = PackedLinear(linear.requires_grad_(False), FORMATS[precision], device).to(device)
    layer(torch.ones(1, 64, dtype=dtype, device=device, requires_grad=True)).sum().backward()


def block_layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield names and modules of all linear layers that are inside an `nn.ModuleList`."""
    lists = block_lists(denoiser)
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(lists):
            yield name, module


def blocks(denoiser: nn.Module) -> list[str]:
    """Return the names of the denoiser's blocks: items of an outermost `nn.ModuleList` that have linear layers."""
    lists, found = block_lists(denoiser), {}
    for name, _ in block_layers(denoiser):
        start = min((one for one in lists if name.startswith(one)), key=len)
        found[start + name.removeprefix(start).partition(".")[0]] = True
    return list(found)


def block_lists(denoiser: nn.Module) -> tuple[str, ...]:
    """Return the name prefixes of all modules that are inside an `nn.ModuleList`."""
    return tuple(f"{name}." for name, module in denoiser.named_modules() if isinstance(module, nn.ModuleList))
