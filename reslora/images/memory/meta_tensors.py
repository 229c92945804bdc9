"""Run modules on fake tensors, which have no storage, and count the memory that real tensors would take."""

import functools
import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..model.quantising import nf4_pairs

CONVOLUTION, ITS_BACKWARD = torch.ops.aten.convolution, torch.ops.aten.convolution_backward
LANES = 16  # float32 values in a vector register


class Live(TorchDispatchMode):
    """Counts the bytes of live tensors that were created inside this context: `now` and `peak`.

    Storages are counted, not tensors, because autograd keeps a tensor's complete storage alive. Storages of `known`
    tensors, such as weights, are not counted, so that views of them are free. The temporary memory of kernels is not
    visible; only for convolutions, an estimate is added.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operation, and count the storages of the tensors that it returns."""
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and (storage := value.untyped_storage())._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._dies, storage._cdata)
        self.peak = max(self.peak, self.now + copied(getattr(function, "overloadpacket", function), args, result))
        return result

    def _dies(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def forget(self, tensor: torch.Tensor) -> None:
        """Stop counting a tensor that is counted elsewhere."""
        key = tensor.untyped_storage()._cdata
        self.now -= self.sizes.get(key, 0)
        self.sizes[key] = 0


def copied(function: Any, args: tuple, result: Any) -> int:
    """Return the temporary bytes of a convolution, as measured with oneDNN on a CPU.

    oneDNN copies tensors to a layout with channels padded to multiples of LANES, but not inputs with fewer channels
    than LANES. oneDNN frees the copy of the inputs before it copies the output back.
    """
    if function is CONVOLUTION and args[1].shape[2:].numel() > 1:
        return _beside(args[0], args[1], result)
    if function is ITS_BACKWARD and args[2].shape[2:].numel() > 1:
        (output, inputs, weight), (of_inputs, of_weight) = args[:3], result[:2]
        if of_weight is not None:
            return output.nbytes + inputs.nbytes
        return _beside(output, weight, of_inputs) if of_inputs is not None else 0
    return 0


def _beside(read: torch.Tensor, weight: torch.Tensor, written: torch.Tensor) -> int:
    whole = _in_lanes(written, 1)
    reading = _in_lanes(read, 1) + _in_lanes(weight, 2) if read.shape[1] >= LANES else 0
    return max(reading + whole - written.nbytes, whole)


def _in_lanes(tensor: torch.Tensor, dimensions: int) -> int:
    """Return the bytes of a tensor with its channels padded to multiples of LANES.

    `dimensions`: 1 if only dimension 1 has channels, 2 if dimensions 0 and 1 have (the weight of a convolution).
    """
    channels = tensor.shape[1:2] if dimensions == 1 else tensor.shape[:2]
    return int(tensor.nbytes * math.prod(math.ceil(count / LANES) * LANES / count for count in channels))


class Stage:
    """A device for fake tensors. Fake tensors have shapes and dtypes, but no storage."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.mode = device, FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def __call__(self, *modules: nn.Module) -> Iterator[Live]:
        """Run the body of this context on fake tensors, and count the memory of the tensors that it creates.

        Tensors of `modules` are not counted.
        """
        nf4_pairs.cache_clear()
        try:
            with self.mode, Live(tensors_of(*modules)) as live:
                yield live
        finally:
            nf4_pairs.cache_clear()  # the cache holds fake tensors

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return a fake tensor."""
        with self.mode:
            return torch.empty(shape, dtype=dtype, device=self.device)

    def place(self, module: nn.Module) -> nn.Module:
        """Replace a module's parameters, buffers and other tensor attributes by fake tensors, and return the module."""

        @functools.cache  # a shared tensor stays shared
        def fake(value: torch.Tensor) -> torch.Tensor:
            """Return a fake tensor, or a parameter, with the shape and dtype of `value`."""
            empty = self.empty(*value.shape, dtype=value.dtype)
            parameter = isinstance(value, nn.Parameter)
            return nn.Parameter(empty, requires_grad=value.requires_grad) if parameter else empty

        for owner in module.modules():
            for named in (owner._parameters, owner._buffers, vars(owner)):
                for name, value in named.items():
                    if isinstance(value, torch.Tensor):
                        named[name] = fake(value)
        return module


def tensors_of(*modules: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the modules' parameters, buffers, and tensors that are plain attributes."""
    for module in modules:
        for owner in module.modules():
            for named in (owner._parameters, owner._buffers, vars(owner)):
                yield from (value for value in named.values() if isinstance(value, torch.Tensor))


def tensor_bytes(*modules: nn.Module, trained: bool | None = None) -> int:
    """Return the bytes of the modules' tensors on the device.

    `trained`: count only trainable tensors if True, only frozen ones if False, and both if None.
    """
    every = (module for part in modules for module in part.modules())
    swapped = {id(module.codes) for module in every if "codes" in vars(module)}  # swapped weights stay in CPU memory
    found = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in tensors_of(*modules)
        if (trained is None or tensor.requires_grad == trained)
        and (tensor.device.type == "cpu" or id(tensor) not in swapped)
    }
    return sum(found.values())
