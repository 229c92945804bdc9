"""State of one forward pass, and the norms recorded in the latest forward passes."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import nn


class State:
    """The tensors that blocks pass to each other in one forward pass; the state exists until the pass returns."""

    __slots__ = ("frame", "grad", "handed", "normed", "norms", "outer", "parts", "segments", "shared")

    def __init__(
        self,
        handed: dict | None = None,
        recording: bool = False,
        segments: int = 0,
        outer: State | None = None,
        frame: FrameType | None = None,
    ) -> None:
        # (block, key) -> (rows (batch * tokens x r), their batch and token axes before flattening). With the shortcut
        # `block`: -> (sum of B A, whether it was computed with gradients).
        self.handed: dict[tuple[str, str], tuple[torch.Tensor, Any]] = {} if handed is None else handed
        self.norms: dict[str, torch.Tensor] | None = {} if recording else None
        self.normed: tuple = (None, None, None)  # the latest tensor, its version and its norm; see `Shortcut._record`
        self.shared: tuple | None = None  # the latest product for several blocks; see `SharedProduct`
        self.grad = torch.is_grad_enabled()
        self.segments = segments  # number of checkpointed segments, with contexts of `Wires.contexts`, that now run
        self.parts = 0  # number of running modules that could also run separately (see `wiring._parts`)
        self.outer = outer  # the state of the forward pass that this one interrupts
        self.frame = frame  # stack frame that runs the forward pass; None if the state is certain to be removed


class _Slot:
    """Holds the state of one thread's running forward pass."""

    def __init__(self) -> None:
        self.state: State | None = None
        # For blocks inside a checkpoint without the contexts of `Wires.contexts`: a separate state, and a reference to
        # that checkpoint. The reference is weak, because a checkpoint keeps its input activations in memory.
        self.apart: State | None = None
        self.checkpoint: Callable[[], object] = lambda: None


class _Threads(threading.local):
    """One `_Slot` for each thread; a copy of this object starts with empty slots.

    The state is an attribute of the slot and not of this `threading.local`: if one function writes to a
    `threading.local` and another one reads it, `torch.compile` misses the write.
    """

    def __init__(self) -> None:
        self.slot = _Slot()

    def __reduce__(self) -> tuple:
        return _Threads, ()


class NormWindow:
    """Norms f_n of the latest `window` training forward passes, in a ring buffer on the device (Eqs. 8-9)."""

    def __init__(self, names: list[str], window: int) -> None:
        self.names = names
        self.window = window
        self.values: torch.Tensor | None = None
        # Number of recorded passes, as a tensor because `torch.compile` recompiles for every new value of an int.
        self.pushed: torch.Tensor | None = None

    def push(self, norms: dict[str, torch.Tensor]) -> None:
        """Replace the oldest norms by those of one pass, a scalar for each block by name.

        A block that did not run gets NaN, which `means` skips.
        """
        first = next(iter(norms.values()))
        missing = torch.full_like(first, torch.nan)
        column = torch.stack([norms.get(name, missing).to(first) for name in self.names])
        if self.values is None:
            self.restore(column.new_full((len(column), self.window), torch.nan), 0)
        elif self.values.device != column.device:
            self.values, self.pushed = self.values.to(column.device), self.pushed.to(column.device)
        slot = (self.pushed % self.window).view(1)
        self.values.index_copy_(1, slot, column[:, None].to(self.values.dtype))
        self.pushed += 1

    def restore(self, values: torch.Tensor, count: int) -> None:
        """Replace the recorded norms by `values` (blocks x window), which were recorded in `count` forward passes."""
        self.values = values
        self.pushed = torch.tensor(count, device=values.device)

    @property
    def count(self) -> int:
        """Number of recorded forward passes."""
        return 0 if self.pushed is None else int(self.pushed)

    def means(self) -> dict[str, float]:
        """Return the mean norm f_n by block name, without non-finite values; empty if nothing was recorded."""
        if self.values is None:
            return {}
        finite = self.values.where(self.values.isfinite(), torch.nan)
        return dict(zip(self.names, finite.nanmean(dim=1).tolist(), strict=True))

    def clear(self) -> None:
        """Discard all recorded norms."""
        self.values = self.pushed = None


class Wires:
    """Data that the connected blocks of one model share: states of running forward passes, and recorded norms.

    Every thread has its own state. On CUDA the backward pass, and with it the recomputation of a checkpointed segment,
    runs on another thread. Therefore the recomputation gets its state from `contexts`.
    """

    def __init__(self, names: list[str], window: int) -> None:
        self.threads = _Threads()
        self.norms = NormWindow(names, window)
        # Called during calibration as observer(variant, x, own, handed): x is the input of the block, own is A_n x_n
        # (batch * tokens x r), and handed has the shortcut terms, None without any. B multiplies `own + handed`; with
        # the shortcut `block`, handed has the A_{n-k} x_n next to each other, and the stacked B multiply both.
        self.observer: Any = None

    def begin(self, module: nn.Module, args: tuple) -> None:
        """Create a state for a forward pass, which may be a nested one; a forward pre-hook of the base model."""
        refuse_replica(module)
        recording = self.norms.window > 0 and bool(self.norms.names) and module.training and torch.is_grad_enabled()
        frame = None
        if not torch.compiler.is_compiling():
            frame = sys._getframe(1)
            # Inside a transform, such as `torch.func.grad`, norms cannot be written to the window.
            recording = recording and torch._C._functorch.peek_interpreter_stack() is None
        slot = self.threads.slot
        slot.state = State(recording=recording, outer=_unfinished(slot.state), frame=frame)

    def end(self, module: nn.Module, args: tuple, output: object) -> None:
        """Drop the state of a forward pass; a forward hook of the base model.

        The hook is also called after an error; `output` is then None.
        """
        slot = self.threads.slot
        state = slot.state
        if state is None:
            return
        slot.state = state.outer
        if state.norms and output is not None:
            self.norms.push(state.norms)

    def begin_part(self, module: nn.Module, args: tuple) -> None:
        """Create a state if a module with complete chains runs outside the model, as in `generate`; a pre-hook."""
        slot = self.threads.slot
        state = slot.state = _unfinished(slot.state)
        if state is None:
            self.begin(module, args)
        else:
            state.parts += 1

    def end_part(self, module: nn.Module, args: tuple, output: object) -> None:
        """Drop the state that `begin_part` created, if there is one; a forward hook."""
        state = self.threads.slot.state
        if state is not None and state.parts:
            state.parts -= 1
        else:
            self.end(module, args, output)

    def contexts(self) -> tuple:
        """Return the contexts of one checkpointed segment (`context_fn`): for its forward pass and its recomputation.

        The context for the recomputation stores the tensors that blocks passed on *before* the segment began. Storing
        the state itself would create a reference cycle through the autograd graph; such a cycle is never freed if the
        backward pass does not run.
        """
        state = self.threads.slot.state
        if state is None:
            return nullcontext(), nullcontext()
        return _segment(state), _Recompute(self.threads, dict(state.handed))


@contextmanager
def _segment(state: State) -> Iterator[None]:
    """Mark that layers run inside a segment of activation checkpointing.

    On entry, the product `A x` that several blocks share is dropped. The product would be missing when the segment is
    recomputed, and the recomputation must compute as many products as the forward pass.
    """
    state.shared = None
    state.segments += 1
    try:
        yield
    finally:
        state.segments -= 1


class _Recompute:
    """Install a segment's own state while the segment is recomputed, without recording norms again.

    The thread that recomputes may be in the middle of another forward pass, whose state is restored afterwards.
    """

    def __init__(self, threads: _Threads, handed: dict) -> None:
        self.threads, self.handed = threads, handed
        self.interrupted: list[State | None] = []

    def __enter__(self) -> None:
        slot = self.threads.slot
        self.interrupted.append(slot.state)
        slot.state = State(dict(self.handed), segments=1)

    def __exit__(self, *error: object) -> None:
        self.threads.slot.state = self.interrupted.pop()


def _unfinished(state: State | None) -> State | None:
    """Return the innermost state whose forward pass still runs.

    States of ended forward passes are left over after Ctrl-C, which skips the forward hooks that run after errors.
    """
    if state is None or torch.compiler.is_compiling():
        return state
    running = {frame for frame, _ in traceback.walk_stack(None)}
    while state is not None and state.frame is not None and state.frame not in running:
        state = state.outer
    return state


def refuse_replica(module: nn.Module) -> None:
    """Raise `RuntimeError` for a replica that `nn.DataParallel` made of a module."""
    if "_former_parameters" in vars(module):
        raise RuntimeError(
            "nn.DataParallel runs copies of the layers, whose neighbors are not copied: use DistributedDataParallel, "
            "for instance through `accelerate launch`"
        )
