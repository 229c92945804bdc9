"""What all shortcuts share: the state that lives for one forward, and the base of the LoRA variants.

PEFT computes the frozen layer and asks the layer's *variant* for the rest. The variants add the low-rank product of
the paper's equations; `Wires` is what the variants of one model share. Notation as in the paper: block n has A_n
(r x p), B_n (q x r) and the scaling s_n; x_n (batch x tokens x p) is its input.

The second product carries s and accumulates into the frozen layer's output, so that nothing q-wide is written twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraVariant
from torch import nn

from ..merging import MERGES, Factors, Merged, Method, Moments, neighbours, relative_error

_CHECKPOINTING = (
    "call reslora.enable_gradient_checkpointing(model), and leave gradient checkpointing of the trainer off"
)


class State:
    """What the blocks of one forward hand to each other; a forward makes a new one and drops it when it returns."""

    __slots__ = ("grad", "handed", "normed", "norms", "segments")

    def __init__(self, handed: dict | None = None, recording: bool = False, segments: int = 0) -> None:
        # Block name to the r-wide rows it hands on, and the batch and token axes they were flattened from.
        self.handed: dict[str, tuple[torch.Tensor, torch.Size]] = {} if handed is None else handed
        self.norms: dict[str, torch.Tensor] | None = {} if recording else None
        self.normed: tuple = (None, None)
        self.grad = torch.is_grad_enabled()
        self.segments = segments  # how many checkpointed segments with our context are open


class NormWindow:
    """Norms f_n of the latest `window` training forwards, a ring buffer on the device (the window of Eqs. 8-9)."""

    def __init__(self, names: list[str], window: int) -> None:
        self.names = names
        self.window = window
        self.values: torch.Tensor | None = None
        # How many forwards were recorded: a tensor, because `torch.compile` recompiles for every new value of an int.
        self.pushed: torch.Tensor | None = None

    def push(self, norms: dict[str, torch.Tensor]) -> None:
        """Writes one forward's norms over the oldest ones; a block that did not run gets NaN, which means skip."""
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
        """Starts from `values` (blocks x window), of which `count` forwards were written."""
        self.values = values
        self.pushed = torch.tensor(count, device=values.device)

    @property
    def count(self) -> int:
        """How many forwards were recorded so far."""
        return 0 if self.pushed is None else int(self.pushed)

    def means(self) -> dict[str, float]:
        """Returns f_n by block name, empty where nothing was recorded; forwards that overflowed do not count."""
        if self.values is None:
            return {}
        finite = self.values.where(self.values.isfinite(), torch.nan)
        return dict(zip(self.names, finite.nanmean(dim=1).tolist(), strict=True))

    def clear(self) -> None:
        """Forgets everything recorded."""
        self.values = self.pushed = None


class Wires:
    """What the wired blocks of one model share: the state of the running forward, and the recorded norms.

    Not thread-local: CUDA runs the backward, and with it a checkpoint's recomputation, on a thread of its own.
    """

    def __init__(self, names: list[str], window: int) -> None:
        self.state: State | None = None
        self.norms = NormWindow(names, window)
        self.observer = None  # called as observer(variant, x, own, handed) while merging calibrates

    def begin(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the base model: a fresh state."""
        refuse_replica(module)
        recording = self.norms.window > 0 and bool(self.norms.names) and module.training and torch.is_grad_enabled()
        self.state = State(recording=recording)

    def end(self, module: nn.Module, args: tuple, output: object) -> None:
        """Forward hook of the base model, called after an exception too (`output` is None then): drops the state."""
        state, self.state = self.state, None
        if state is not None and state.norms and output is not None:
            self.norms.push(state.norms)

    def contexts(self):
        """`context_fn` for non-reentrant checkpointing: a segment's recomputation sees what its forward saw.

        Each segment keeps what was handed on *before* it began. Keeping the whole state would close a reference cycle
        through the autograd graph, which is never collected if the backward does not run.
        """
        if self.state is None:
            return nullcontext(), nullcontext()
        return _Segment(self), _Recompute(self, dict(self.state.handed))


class _Segment:
    """Marks that the layers run inside a checkpointed segment that has our context."""

    def __init__(self, wires: Wires) -> None:
        self.wires = wires

    def __enter__(self) -> None:
        self.wires.state.segments += 1

    def __exit__(self, *error: object) -> None:
        if self.wires.state is not None:
            self.wires.state.segments -= 1


class _Recompute:
    """Puts a segment's own state in place while the segment is recomputed, without recording norms again."""

    def __init__(self, wires: Wires, handed: dict) -> None:
        self.wires, self.handed = wires, handed
        self.interrupted: list[State | None] = []

    def __enter__(self) -> None:
        self.interrupted.append(self.wires.state)
        self.wires.state = State(dict(self.handed), segments=1)

    def __exit__(self, *error: object) -> None:
        self.wires.state = self.interrupted.pop()


class CastUnlessAutocast:
    """Truth value for PEFT's `cast_input_dtype_enabled`: under autocast the product converts its input anyway."""

    def __init__(self, previous: bool) -> None:
        self.previous = previous

    def __bool__(self) -> bool:
        return self.previous and not any(torch.is_autocast_enabled(device) for device in ("cuda", "cpu", "xpu", "mps"))


class Shortcut(LoraVariant):
    """A wired block; subclasses compute one of the paper's equations, and say how it is wired and merged.

    Neighbours are held as their A and B modules rather than as LoRA layers: those are leaves, so copying or pickling a
    model does not walk along a whole chain.
    """

    carries: ClassVar[bool] = True
    """Whether blocks hand activations on, which needs a state for each forward, and norms of them for merges."""
    raises_rank: ClassVar[bool] = False
    """Whether a merge changes ranks."""
    merges: ClassVar[Mapping[str, Method]] = MERGES
    """The merges it has, by the name that the report shows."""

    def __init__(self, wires: Wires, name: str) -> None:
        self.wires = wires
        self.name = name
        self.records = name in wires.norms.names

    # -- wiring: what a subclass says of a whole chain -----------------------------------------------------------------

    @classmethod
    def reach(cls, pre_num: int) -> int | None:
        """Blocks before the current one that take part (the m of the equations before clipping); None: all of them."""
        return None if pre_num == -1 else pre_num

    @classmethod
    def wire(cls, wires: Wires, names: Sequence[str], factors: Sequence[tuple], reach: int | None, head: str) -> list:
        """One variant for each block of a chain, whose A and B modules are `factors`."""
        raise NotImplementedError

    # -- merging: what the methods of `reslora.merging` need to know ---------------------------------------------------

    @classmethod
    def resolve(cls, method: str, calibrated: bool, recorded: bool) -> str:
        """The name of the merge that `method` (any but `none`) means, given calibration or recorded norms."""
        if method == "auto":
            return "lstsq" if calibrated else "input" if recorded else "weights"
        return method

    @classmethod
    def relate(cls, chain: list[Factors], reach: int | None, head: str) -> None:
        """Tells every block of a chain which blocks before it take part, and what it multiplies their inputs by."""
        for n, block in enumerate(chain):
            block.before = neighbours(n, reach)
            block.fold = cls.fold

    @classmethod
    def fold(cls, block: Factors, alphas: list[float]) -> Merged:
        """`block` as plain LoRA where `x_{n-k} ~ alphas[k-1] x_n` (Eqs. 10-11, 13); no alphas for a head."""
        raise NotImplementedError

    @classmethod
    def moments(cls, block: Factors, merged: Merged | None, fits: bool) -> Moments:
        """Empty moments; `merged` is the block's merge where that needs no calibration."""
        if fits and block.before:
            return Moments(block.guess())
        changed = merged is not None and merged.a is not block.a
        return Moments(merged.a - block.a if changed else None)

    def measure(self, block: Factors, merged: Merged | None, x, own, handed) -> None:
        """Adds one calibration forward: `x` (tokens x p), and what the forward gave `_observe`."""
        block.moments.add(x, own, handed, torch.linalg.vector_norm(self.normed(x, own)))

    def normed(self, x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Of what f_n is the norm: the block's input, or its own `A_n x_n`."""
        return x

    @classmethod
    def error(cls, block: Factors, merged: Merged) -> float:
        """`|merged - unmerged| / |unmerged LoRA output|` on the calibration batches."""
        return relative_error(block, merged)

    # -- what PEFT calls -----------------------------------------------------------------------------------------------

    def supports_lora_conversion(self) -> bool:
        """A wired block is no weight update of its own layer."""
        return False

    def merge_safe(self, module: nn.Module, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """PEFT's merge would drop the residual paths: raises `RuntimeError`."""
        raise merge_refused(self.name)

    def merge_unsafe(self, module: nn.Module, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """PEFT's merge would drop the residual paths: raises `RuntimeError`."""
        raise merge_refused(self.name)

    def unmerge(self, module: nn.Module, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """There is nothing PEFT could have merged: raises `RuntimeError`."""
        raise merge_refused(self.name)

    # -- parts of a forward --------------------------------------------------------------------------------------------

    def _running(self) -> State:
        """The state of the running forward; raises rather than computing something wrong."""
        state = self.wires.state
        if state is None:
            raise RuntimeError(
                f"{self.name} ran outside a forward of the connected model, which must be called as a whole; "
                f"if this is gradient checkpointing, {_CHECKPOINTING}"
            )
        if torch.compiler.is_compiling():
            return state
        grad = torch.is_grad_enabled()
        if state.grad and not grad:
            raise RuntimeError(
                f"{self.name} ran without gradients inside a forward with gradients, as reentrant gradient "
                f"checkpointing does; {_CHECKPOINTING}"
            )
        if grad and not state.segments and _inside_checkpoint():
            raise RuntimeError(f"{self.name} is in a checkpoint that would lose its shortcut; {_CHECKPOINTING}")
        return state

    def _take(self, state: State, source: str, x: torch.Tensor) -> torch.Tensor:
        """What `source` handed on (batch * tokens x r), on the device of `x` (batch x tokens x p)."""
        handed, leading = state.handed.get(source, (None, None))
        if handed is None:
            raise RuntimeError(
                f"{self.name} ran before its neighbour {source}; connect again with example_inputs= that run the "
                "layers in the order of training"
            )
        if leading != x.shape[:-1]:
            raise RuntimeError(
                f"{self.name} has {tuple(x.shape[:-1])} tokens where its neighbour {source} had {tuple(leading)}; "
                "connect again with example_inputs= of the sizes trained on"
            )
        return handed.to(x.device)

    def _record(self, state: State, value: torch.Tensor) -> None:
        """Keeps the Frobenius norm of `value`, whole batch; layers that read the same tensor share one computation."""
        if state.norms is None or not self.records:
            return
        seen, norm = state.normed
        if seen is not value:
            dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
            norm = torch.linalg.vector_norm(value.detach(), dtype=dtype)
            state.normed = (value, norm)
        state.norms[self.name] = norm

    def _observe(self, x: torch.Tensor, own: torch.Tensor, handed: torch.Tensor | None) -> None:
        if self.wires.observer is not None:
            self.wires.observer(self, x, own, handed)


def cast(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` in the adapter's dtype, as PEFT does it; left alone under autocast, where the product converts its input."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)


def whole_weight(linear: nn.Linear, shape: tuple[int, int], x: torch.Tensor, name: str) -> torch.Tensor:
    """An A or B of `shape` on the device of `x`; `RuntimeError` where it is sharded or offloaded away.

    Offloaded weights are on the meta device, and a product with them is garbage rather than an error.
    """
    weight = linear.weight
    if weight.shape != shape or hasattr(weight, "_local_tensor") or weight.is_meta != x.is_meta:
        raise RuntimeError(
            f"{name} cannot read a LoRA weight of shape {tuple(weight.shape)} (wanted {tuple(shape)}): it is sharded "
            'or offloaded away; use DDP or ZeRO-2 without offloading the adapter, or shortcut="middle", which needs no '
            "neighbour's weight"
        )
    return weight if weight.device == x.device else weight.to(x.device)


def rows(x: torch.Tensor) -> torch.Tensor:
    """(… x p) as (rows x p): one view here saves one around every product."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def add_product(result: torch.Tensor, hidden: torch.Tensor, lora_b: nn.Linear, scaling: float) -> torch.Tensor:
    """`result + scaling * hidden B^T`; by way of the module where its weight is only whole inside its own forward."""
    weight = lora_b.weight
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.is_meta != hidden.is_meta:
        return result + lora_b(hidden * scaling).view(result.shape)
    return add_scaled(result, hidden, weight, scaling)


def add_scaled(result: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, scaling: float) -> torch.Tensor:
    """`result + scaling * hidden weight^T` for (… x q), (rows x r) and (q x r), without a q-wide temporary."""
    if result.dtype != hidden.dtype:
        # A half-precision frozen layer under a float32 adapter, or the reverse: keep the wider one, as PEFT does.
        return result + F.linear(hidden * scaling, weight).view(result.shape)
    return torch.addmm(rows(result), hidden, weight.t(), alpha=scaling).view(result.shape)


def merge_refused(name: str) -> RuntimeError:
    """The error of PEFT's merge verbs on a connected model."""
    return RuntimeError(
        f"{name} is wired by ResLoRA, and PEFT's own merge would drop the residual paths: call reslora.merge first "
        "(or reslora.disconnect)"
    )


def refuse_replica(module: nn.Module) -> None:
    if "_former_parameters" in vars(module):
        raise RuntimeError(
            "nn.DataParallel runs copies of the layers, whose neighbours are not copied: use DistributedDataParallel, "
            "for instance through `accelerate launch`"
        )


def _inside_checkpoint() -> bool:
    """Whether a non-reentrant checkpoint of PyTorch is open: it works through saved-tensor hooks of its own module."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
