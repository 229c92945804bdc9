"""A forward on the meta device, where there are shapes and no numbers, in half the time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class OneOfEach(TorchDispatchMode):
    """Within it, what an operator returns on the meta device is worked out once for arguments of one kind.

    PyTorch works it out in Python, from shapes, strides and dtypes alone, and layers that repeat ask for the same over
    and over. Operators that return or change one of their arguments are left alone.
    """

    supports_higher_order_operators = True  # left alone too

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[tuple, object] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not _makes_new(func):
            return func(*args, **kwargs)
        try:
            key = func, _kind(args), _kind(tuple(kwargs.items()))
            known = key in self.results
        except TypeError:  # arguments that have numbers, or cannot be compared
            return func(*args, **kwargs)
        if known:
            return tree_map(_tensor, self.results[key], is_leaf=_is_kind)
        result = func(*args, **kwargs)
        with contextlib.suppress(TypeError):
            self.results[key] = tree_map(_kind_of_tensor, result)
        return result


class _Kind(NamedTuple):
    """All that counts of a tensor on the meta device."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@cache
def _makes_new(func: Any) -> bool:
    """Whether an operator neither returns nor changes any of its arguments."""
    if getattr(func, "namespace", "") != "aten":
        return False
    return not any(value.alias_info for value in (*func._schema.arguments, *func._schema.returns))


def _kind(value: Any) -> Any:
    """What is equal for equal arguments of an operator, 1 and 1.0 being two; `TypeError` for tensors with numbers."""
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, nn.Parameter) or not value.is_meta or value.layout != torch.strided:
            raise TypeError(value.device)
        return _Kind(value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(map(_kind, value))
    return type(value), value


def _kind_of_tensor(value: object) -> object:
    return _kind(value) if isinstance(value, torch.Tensor) else value


def _is_kind(value: object) -> bool:
    return isinstance(value, _Kind)


def _tensor(value: Any) -> Any:
    if not _is_kind(value):
        return value
    return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
