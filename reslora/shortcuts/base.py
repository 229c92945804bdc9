"""Base class of the shortcuts, which are LoRA variants of PEFT.

PEFT computes the frozen layer and calls the layer's *variant*, which adds the low-rank product of the paper's
equations. Notation of the paper: block n has A_n (r x p), B_n (q x r) and the scaling s_n; x_n (batch x tokens x p) is
its input.

Each equation adds m shortcut terms, which come from neighboring blocks, to a block's own term.

The product with B is scaled by s_n and added in place to the frozen layer's output, without a q-wide temporary tensor.
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn

from ..linking import Before
from ..merging import MERGES, Factors, Merge, Merged
from .shared import SharedProduct
from .state import State, Wires
from .tensors import cast, inside_checkpoint, passes, rows, version_of, whole_weight

OWN = "A x"
"""Key in `State.handed` of the tensor `A x_n` that a block passes to later blocks.

x_n is the block's input, and A is the block's own A (`middle`) or the A of the next block (`input`).
"""

_CHECKPOINTING = "call reslora.enable_gradient_checkpointing(model), and turn the trainer's gradient checkpointing off"


class CastOthers:
    """Value of PEFT's `cast_input_dtype_enabled` on a connected layer: whether PEFT casts the layer's input.

    - With only the connected adapter active: false, because the variant casts the input itself. If PEFT cast it for
      each layer, no two layers would read the same tensor.
    - With other adapters active: the previous value; under autocast false, because matrix products cast their inputs.
    """

    def __init__(self, previous: bool, layer: LoraLayer, adapter: str) -> None:
        self.previous, self.adapter = previous, adapter
        # A weak reference: the layer holds this object, and a cycle would keep a deleted model in memory.
        self.layer = weakref.ref(layer)

    def __reduce__(self) -> tuple:
        return CastOthers, (self.previous, self.layer(), self.adapter)

    def __bool__(self) -> bool:
        if self.layer().active_adapters == [self.adapter]:
            return False
        return self.previous and not any(torch.is_autocast_enabled(device) for device in ("cuda", "cpu", "xpu", "mps"))


class Shortcut(LoraVariant):
    """A connected LoRA block; subclasses implement one of the paper's equations, its connections and its merge.

    Earlier blocks are referenced by their A and B modules instead of their LoRA layers, so that copying or pickling a
    model does not recurse along a complete chain.
    """

    raises_rank: ClassVar[bool] = False
    """Whether a merge raises the rank of blocks."""
    repeats_heads: ClassVar[bool] = False
    """Whether a head can add its own input again (`ResLoraConfig.head`)."""
    merges: ClassVar[Mapping[str, Merge]] = MERGES
    """The merge methods of this shortcut, by their names in the merge report."""

    def __init__(self, wires: Wires, name: str) -> None:
        self.wires = wires
        self.name = name
        self.records = name in wires.norms.names
        self.most_rows = math.inf
        """Maximum number of rows of x for which `A x` is computed; for more rows, `block` sums B A first."""
        self.shared: SharedProduct | None = None
        """Computes `A x` of this block together with other blocks that read the same tensor; None: separately."""

    # -- connections: defined by a subclass for a complete chain -------------------------------------------------------

    @classmethod
    def wire(cls, wires: Wires, names: Sequence[str], factors: Sequence[tuple], before: Before, head: str) -> list:
        """Return one variant for each block of a chain; `factors` are the (A, B) modules of the blocks."""
        raise NotImplementedError

    def others(self) -> Sequence[nn.Linear]:
        """Return the A modules of other blocks of the chain that also multiply this block's input."""
        return ()

    def widths(self, rank: int) -> Sequence[int]:
        """Return the widths of the slices that `_products` returns: for the block's own A, then for `others`."""
        return (rank,) * (1 + len(self.others()))

    # -- merging and calibration ---------------------------------------------------------------------------------------

    @classmethod
    def parts(cls, chain: Sequence[torch.Tensor], n: int, before: Sequence[int]) -> Sequence[torch.Tensor]:
        """Return the matrices (r x p) that multiply x_{n-1}, x_{n-2}, ... in the shortcut terms of block n.

        `chain` has the A of all blocks, and `before` the indices n-1, n-2, ... Empty if no such terms exist.
        """
        return ()

    def measure(self, block: Factors, merged: Merged | None, x: Any, own: Any, handed: Any) -> None:
        """Add one forward pass to the block's moments.

        `x` is the input (tokens x p), `own` is A_n x, and `handed` are the shortcut terms (see `Wires.observer`).
        """
        block.moments.add(x, own, handed, torch.linalg.vector_norm(self.normed(x, own)))

    def normed(self, x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return the tensor whose norm is f_n: the block's input `x` (tokens x p), or `A_n x_n` (tokens x r)."""
        return x

    # -- what PEFT calls -----------------------------------------------------------------------------------------------

    def supports_lora_conversion(self) -> bool:
        """Return False: the output of a connected block also depends on other layers, so no weight update equals it."""
        return False

    def merge_safe(self, *args: object, **kwargs: object) -> Any:
        """Raise `RuntimeError` for PEFT's merging and unmerging, because a merge would drop the shortcuts."""
        raise merge_refused(self.name)

    merge_unsafe = unmerge = merge_safe

    # -- parts of a forward pass ---------------------------------------------------------------------------------------

    def _running(self) -> State:
        """Return the state of the running forward pass.

        Raises `RuntimeError` instead of computing a wrong result, for example under reentrant checkpointing.
        """
        state = self.wires.threads.slot.state
        if state is None:
            raise RuntimeError(
                f"{self.name} ran outside a forward pass of the connected model: call the complete model; "
                f"with gradient checkpointing, {_CHECKPOINTING}"
            )
        if torch.compiler.is_compiling():
            return state
        grad = torch.is_grad_enabled()
        if state.grad and not grad:
            raise RuntimeError(
                f"{self.name} ran without gradients inside a forward pass with gradients, as in reentrant gradient "
                f"checkpointing; {_CHECKPOINTING}"
            )
        if grad and not state.segments and inside_checkpoint() is not None:
            raise RuntimeError(f"{self.name} runs in a checkpoint that drops its shortcut; {_CHECKPOINTING}")
        return state

    def _products(
        self, state: State | None, module: LoraLayer, adapter: str, x: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        """Return `A x` (batch * tokens x r) for the block's own A, then for each of `others`; x is batch x tokens x p.

        One matrix product computes all these products, also for other blocks that read x (see `SharedProduct`). With
        dropout, every block has its own mask and computes its own product.
        """
        lora_a, dropout = module.lora_A[adapter], module.lora_dropout[adapter]
        if self.shared is not None and state is not None and passes(dropout):
            if self.shared.first == self.name:
                self.shared.multiply(state, x, rows(cast(x, lora_a.weight)))
            slices = self.shared.take(state, self.name, x, lora_a)
            if slices is not None:
                return slices
        return self._multiply(lora_a, rows(dropout(cast(x, lora_a.weight))))

    def _multiply(self, lora_a: nn.Linear, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Compute the result of `_products` for this block only; `x` is rows x p."""
        stack = self._stack(lora_a, self.others(), x)
        return F.linear(cast(x, stack), stack).split(self.widths(lora_a.out_features), dim=1)

    def _stack(self, own: nn.Linear, others: Sequence[nn.Linear], x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Return the A (`dim=0`) or B (`dim=1`) of several blocks as one matrix, on the device of `x`.

        The dtype is the widest of their dtypes.
        """
        shape = own.out_features, own.in_features
        weights = [whole_weight(linear, shape, x, self.name) for linear in (own, *others)]
        return torch.cat(weights, dim) if len(weights) > 1 else weights[0]

    def _take(self, state: State, source: str, x: torch.Tensor, what: str = OWN) -> torch.Tensor:
        """Return the tensor (batch * tokens x r) that `source` passed on with the key `what`, on the device of `x`.

        Raises `RuntimeError` if `source` did not run in this forward pass, or ran on another number of tokens.
        """
        handed, leading = state.handed.get((source, what), (None, None))
        if handed is None:
            raise RuntimeError(
                f"{self.name} ran before its neighbor {source}, or the neighbor's adapter is disabled: call the "
                "neighbor's enable_adapters(True), or connect again with example_inputs= that run the layers in the "
                'same order as training; if layers are skipped at random, set layerdrop to 0 or use shortcut="block"'
            )
        if leading != x.shape[:-1]:
            raise RuntimeError(
                f"{self.name} has {tuple(x.shape[:-1])} tokens where its neighbor {source} had {tuple(leading)}; "
                "connect again with example_inputs= of the sizes used in training"
            )
        return handed if handed.device == x.device else handed.to(x.device)

    def _record(self, state: State, value: torch.Tensor) -> None:
        """Store the Frobenius norm of `value` over the complete batch.

        Layers that read the same tensor share the computation.
        """
        if state.norms is None or not self.records:
            return
        latest, at, norm = state.normed
        version = version_of(value)
        if latest is not value or at != version or version is None:
            dtype = torch.promote_types(value.dtype, torch.float32)
            norm = torch.linalg.vector_norm(value.detach(), dtype=dtype)
            state.normed = value, version, norm
        state.norms[self.name] = norm

    def _observe(self, x: torch.Tensor, own: torch.Tensor, handed: torch.Tensor | None) -> None:
        if self.wires.observer is not None:
            self.wires.observer(self, x, own, handed)


def merge_refused(name: str) -> RuntimeError:
    """Return the error that PEFT's merge methods raise on a connected model."""
    return RuntimeError(
        f"{name} is connected by ResLoRA, and PEFT's own merge would drop the shortcuts: call reslora.merge first "
        "(or reslora.disconnect)"
    )
