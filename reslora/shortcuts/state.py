"""The state that lives for one forward, and the norms that outlive it."""

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
    """What the blocks of one forward hand to each other; a forward makes a new one and drops it when it returns."""

    __slots__ = ("frame", "grad", "handed", "normed", "norms", "outer", "parts", "segments", "shared")

    def __init__(
        self,
        handed: dict | None = None,
        recording: bool = False,
        segments: int = 0,
        outer: State | None = None,
        frame: FrameType | None = None,
    ) -> None:
        # Block name and what it hands on: r-wide rows, and the batch and token axes they were flattened from; or a sum
        # of B A, and whether it was made with gradients.
        self.handed: dict[tuple[str, str], tuple[torch.Tensor, Any]] = {} if handed is None else handed
        self.norms: dict[str, torch.Tensor] | None = {} if recording else None
        self.normed: tuple = (None, None)
        self.shared: tuple | None = None  # the latest product for several blocks: `SharedProduct` knows what it holds
        self.grad = torch.is_grad_enabled()
        self.segments = segments  # how many checkpointed segments with our context are open
        self.parts = 0  # how many parts of the model run inside this forward, which could have run alone
        self.outer = outer  # the state of the forward that this one interrupts
        self.frame = frame  # the call this state belongs to; None where its end is certain


class _Slot:
    """Where one thread keeps the state of its running forward."""

    def __init__(self) -> None:
        self.state: State | None = None
        # What blocks that need no state share within a checkpoint that knows of none, and which one that is: weakly,
        # since it holds the activations it began with.
        self.apart: State | None = None
        self.checkpoint: Callable[[], object] = lambda: None


class _Threads(threading.local):
    """Every thread's slot. A copy starts with empty ones.

    The state is not an attribute of this object itself, because `torch.compile` loses sight of what is written to a
    `threading.local` in one place and read in another.
    """

    def __init__(self) -> None:
        self.slot = _Slot()

    def __reduce__(self) -> tuple:
        return _Threads, ()


class NormWindow:
    """Norms f_n of the latest `window` training forwards, a ring buffer on the device (the window of Eqs. 8-9)."""

    def __init__(self, names: list[str], window: int) -> None:
        self.names = names
        self.window = window
        self.values: torch.Tensor | None = None
        # How many forwards were recorded: a tensor, because `torch.compile` recompiles for every new value of an int.
        self.pushed: torch.Tensor | None = None

    def push(self, norms: dict[str, torch.Tensor]) -> None:
        """Write one forward's norms over the oldest ones; a block that did not run gets NaN, which means skip."""
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
        """Start from `values` (blocks x window), of which `count` forwards were written."""
        self.values = values
        self.pushed = torch.tensor(count, device=values.device)

    @property
    def count(self) -> int:
        """How many forwards were recorded so far."""
        return 0 if self.pushed is None else int(self.pushed)

    def means(self) -> dict[str, float]:
        """Return f_n by block name, empty where nothing was recorded; forwards that overflowed do not count."""
        if self.values is None:
            return {}
        finite = self.values.where(self.values.isfinite(), torch.nan)
        return dict(zip(self.names, finite.nanmean(dim=1).tolist(), strict=True))

    def clear(self) -> None:
        """Forget everything recorded."""
        self.values = self.pushed = None


class Wires:
    """What the wired blocks of one model share: the states of the running forwards, and the recorded norms.

    A forward runs on one thread, so every thread has a state of its own. The recomputation of a checkpointed segment
    brings what it needs along: CUDA runs the backward, and the recomputation with it, on a thread of its own.
    """

    def __init__(self, names: list[str], window: int) -> None:
        self.threads = _Threads()
        self.norms = NormWindow(names, window)
        self.observer: Any = None  # called as observer(variant, x, own, handed) while merging calibrates

    def begin(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the base model: a fresh state, inside another forward of the same model too."""
        refuse_replica(module)
        recording = self.norms.window > 0 and bool(self.norms.names) and module.training and torch.is_grad_enabled()
        frame = None if torch.compiler.is_compiling() else sys._getframe(1)
        slot = self.threads.slot
        slot.state = State(recording=recording, outer=_unfinished(slot.state), frame=frame)

    def end(self, module: nn.Module, args: tuple, output: object) -> None:
        """Forward hook of the base model, called after an exception too (`output` is None then): drops the state."""
        slot = self.threads.slot
        state = slot.state
        if state is None:
            return
        slot.state = state.outer
        if state.norms and output is not None:
            self.norms.push(state.norms)

    def begin_part(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of a part that holds whole chains: a fresh state if it runs alone, as in `generate`."""
        slot = self.threads.slot
        state = slot.state = _unfinished(slot.state)
        if state is None:
            self.begin(module, args)
        else:
            state.parts += 1

    def end_part(self, module: nn.Module, args: tuple, output: object) -> None:
        """Forward hook of such a part."""
        state = self.threads.slot.state
        if state is not None and state.parts:
            state.parts -= 1
        else:
            self.end(module, args, output)

    def contexts(self) -> tuple:
        """`context_fn` for non-reentrant checkpointing: a segment's recomputation sees what its forward saw.

        Each segment keeps what was handed on *before* it began. Keeping the whole state would close a reference cycle
        through the autograd graph, which is never collected if the backward does not run.
        """
        state = self.threads.slot.state
        if state is None:
            return nullcontext(), nullcontext()
        return _segment(state), _Recompute(self.threads, dict(state.handed))


@contextmanager
def _segment(state: State) -> Iterator[None]:
    """Mark that the layers run inside a checkpointed segment that has our context.

    It takes no product from before: the recomputation has to multiply as often as the forward did.
    """
    state.shared = None
    state.segments += 1
    try:
        yield
    finally:
        state.segments -= 1


class _Recompute:
    """Puts a segment's own state in place while the segment is recomputed, without recording norms again.

    The thread that recomputes may be in the middle of a forward of its own, which goes on undisturbed.
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
    """Return the innermost state whose forward still runs: Ctrl-C, unlike an error, skips forward hooks."""
    if state is None or torch.compiler.is_compiling():
        return state
    running = {frame for frame, _ in traceback.walk_stack(None)}
    while state is not None and state.frame is not None and state.frame not in running:
        state = state.outer
    return state


def refuse_replica(module: nn.Module) -> None:
    """Raise `RuntimeError` for a copy that nn.DataParallel has made of a module."""
    if "_former_parameters" in vars(module):
        raise RuntimeError(
            "nn.DataParallel runs copies of the layers, whose neighbours are not copied: use DistributedDataParallel, "
            "for instance through `accelerate launch`"
        )
