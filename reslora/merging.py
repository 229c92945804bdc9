"""Merge methods: functions that turn a trained chain into plain LoRA factors.

A chain is a list of `Factors`, front to back, and the result a list of `Merged`, one for each block. Notation of the
paper: A (r x p), B (q x r), the frozen weight W (q x p), the norm f_n of x_n or of A_n x_n, and alpha*, the factor in
the approximation `x_{n-1} ~ alpha* x_n`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .regression import Inputs


@dataclasses.dataclass
class Factors:
    """LoRA factors and statistics of one block: the input of the merge methods."""

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    weight: Callable[[], torch.Tensor]
    """Function that returns the frozen weight (q x p), dequantized."""
    norm: float | None = None
    """f_n of Eqs. 8-9: the norm of x_n (`input`) or of A_n x_n (`middle`), averaged over forward passes."""
    moments: Moments | None = None
    """Second moments collected in calibration."""
    before: Sequence[int] = ()
    """Indices n-1, n-2, ... n-m of the earlier blocks of the chain whose terms this block adds; empty for a head."""
    parts: Sequence[torch.Tensor] = ()
    """Matrices (r x p) that multiply x_{n-1}, x_{n-2}, ...: A_n (`input`), or A_{n-1}, A_{n-2}, ... (`middle`)."""
    alpha_of_head: float = 0.0
    """alpha* of the block if it is a head: 1 if a head repeats its input (x_{n-1} := x_n), else 0."""

    def stand_in(self) -> torch.Tensor:
        """Return S, the sum of `parts` (r x p): S x are the shortcut terms if all blocks have the same input x."""
        return sum(part.to(self.a) for part in reversed(self.parts))  # type: ignore[return-value] # not of a head

    def scaled(self, alpha: float, notes: tuple[str, ...] = ()) -> Merged:
        """Return the block as plain LoRA: A_n and `B_n (1 + alpha*)` (Eq. 7)."""
        return Merged(self.a, self.b * (1 + alpha), alpha, notes)


@dataclasses.dataclass
class Merged:
    """One block as plain LoRA: the new A and B, the alphas used to compute them, and notes for the report."""

    a: torch.Tensor
    b: torch.Tensor
    alpha: float | list[float] | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(eq=False)
class Moments:
    """Second moments of one block over the calibration batches, from which fits and merge errors are computed.

    Rows are tokens: `x` (T x p) is the block's input, `own` = A_n x (T x r), and `handed` (T x r) the shortcut terms.
    `gap` = handed - S x, where `stand_in` S (r x p) estimates the shortcut terms from x. The gap is used for the fit
    and the merge error instead of `handed`: if S is exact, the gap is exactly zero, however ill-conditioned x is.
    """

    stand_in: torch.Tensor | None = None
    inputs: Inputs | None = None
    """Collects x for the regression; None if the gap of this block is not fitted."""
    fitted: torch.Tensor | None = None
    """Solution D (r x p) of the regression, set by `fit`; S + D is the C of `merge_lstsq`."""
    # 0.0 at first, and tensors after a forward pass was added.
    norm_sum: Any = 0.0
    own_own: Any = 0.0
    own_handed: Any = 0.0
    handed_handed: Any = 0.0
    gap_gap: Any = 0.0
    gap_x: Any = 0.0
    gaps: Sequence[torch.Tensor] = ()
    forwards: int = 0
    rows: int = 0
    output: float = 0.0
    miss: float = 0.0

    @classmethod
    def of(cls, block: Factors, merged: Merged | None, fits: bool) -> Moments:
        """Create the moments of a block, for a fit of the gap if `fits`, else for the error of `merged`.

        `merged` is None if the merge needs the norms that the calibration measures.
        """
        if not block.parts:
            return cls()
        if fits:
            return cls(block.stand_in())
        return cls(merged.a - block.a if merged is not None and merged.a is not block.a else None)

    def add(self, x: torch.Tensor, own: torch.Tensor, handed: torch.Tensor | None, norm: torch.Tensor) -> None:
        """Add the moments of one forward pass with the input `x` (T x p).

        `own` and `handed` are T x r; `handed` is None for a head. `norm` is the Frobenius norm in Eqs. 8-9 or 12.
        """
        self.norm_sum = self.norm_sum + norm
        self.forwards += 1
        own = _precise(own)
        self.own_own = self.own_own + own.t() @ own
        if handed is None:
            return
        handed = _precise(handed)
        self.own_handed = self.own_handed + own.t() @ handed
        self.handed_handed = self.handed_handed + handed.t() @ handed
        if self.stand_in is not None:
            gap = handed - _precise(x @ self.stand_in.to(x).t())
            self.gap_gap = self.gap_gap + gap.t() @ gap
            if self.inputs is not None:
                self.rows += len(x)
                self.gap_x = self.gap_x + gap.to(x.dtype).t() @ x
                self.gaps = [*self.gaps, gap] if self.inputs.dual else ()

    def fit(self) -> None:
        """Set `fitted` to `argmin_D |gap - D x|^2 + ridge |D|^2`.

        The residual replaces the gap, and the memory of x is released.
        """
        self.fitted = self.inputs.fit(self.gap_x, self.gaps).to(self.stand_in)
        fitted = _precise(self.fitted)
        cross = self.gap_x.to(fitted) @ fitted.t()
        self.gap_gap = self.gap_gap - cross - cross.t() + self.inputs.quadratic(fitted).to(cross)
        self.inputs, self.gap_x, self.gaps = None, 0.0, ()

    def measure(self, output: torch.Tensor, miss: torch.Tensor) -> None:
        """Add the squared norms of the unmerged output and of the merge error `miss` (tokens x q) in a forward pass."""
        self.output += float(output.double().square().sum())
        self.miss += float(miss.double().square().sum())

    @property
    def norm(self) -> float:
        """f_n: the mean norm over the calibration forward passes."""
        return float(self.norm_sum) / self.forwards

    def finite(self) -> bool:
        """Return whether all collected values are finite."""
        values = (self.norm_sum, self.own_own, self.own_handed, self.handed_handed, self.gap_gap, self.gap_x)
        return all(bool(torch.isfinite(torch.as_tensor(value)).all()) for value in values)


def _precise(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float64 (on MPS: float32), because moments of similar size are subtracted from each other."""
    return x.float() if x.device.type == "mps" else x.double()


# -- the merges ------------------------------------------------------------------------------------------------------


def merge_none(chain: list[Factors]) -> list[Merged]:
    """Return A_n and B_n without the shortcut terms (merge_no of Table 3)."""
    return [block.scaled(0.0) for block in chain]


def merge_input(chain: list[Factors]) -> list[Merged]:
    """Return A_n and `B_n (1 + alpha*)` of each block n, with `alpha* = sum_{k=1..m} f_{n-k} / f_n` (merge_bi).

    m is the number of earlier blocks in the sum of block n; for `input` it is 1. f_n is the mean norm of x_n for
    `input` (Eqs. 6-9), and of A_n x_n for `middle` (Eq. 12). A head has `alpha_of_head` instead. A ratio with a norm of
    zero counts as 1, and alpha* is 1 if f_n is zero.
    """
    merged = []
    for block in chain:
        before = [chain[k] for k in reversed(block.before)]
        if not before:
            merged.append(block.scaled(block.alpha_of_head))
        elif block.norm == 0:
            merged.append(block.scaled(1.0, (_zero_norm(block),)))
        else:
            notes = tuple(_zero_norm(other) for other in before if other.norm == 0)
            alpha = float(sum(_ratio(other.norm, block.norm) for other in before))
            merged.append(block.scaled(alpha, notes))
    return merged


def merge_weights_input(chain: list[Factors]) -> list[Merged]:
    """Return A_n and `B_n (1 + alpha*)` of each block n, with alphas from the norms of merged weights (Eqs. 10-11)."""

    def fold(block: Factors, alphas: list[float]) -> Merged:
        return block.scaled(alphas[0] if alphas else block.alpha_of_head)

    return _front_to_back(chain, fold)


def merge_weights_middle(chain: list[Factors]) -> list[Merged]:
    """Return `A_n + sum_k alpha_{n-k} A_{n-k}` and B_n of each block n, with alphas from merged weights (Eq. 13).

    The alphas are those of Eq. 11, which the paper defines for the shortcut `input`. The paper's formula for `middle`
    (under Eq. 13) needs f*_n, which is known only after block n is merged.
    """

    def fold(block: Factors, alphas: list[float]) -> Merged:
        terms = [alpha * part.to(block.a) for alpha, part in zip(alphas, block.parts, strict=True)]
        return Merged(block.a + sum(terms) if terms else block.a, block.b, alphas)

    return _front_to_back(chain, fold)


def _front_to_back(chain: list[Factors], fold: Callable[[Factors, list[float]], Merged]) -> list[Merged]:
    """Merge a chain from its first block to its last, with alphas from the norms of merged weights (merge_bw).

    Let f*_j be the Frobenius norm of the *merged* weight of block j. The approximation `x_{n-k} ~ alpha_{n-k} x_n`
    uses `alpha_{n-k} = f*_{n-k-1} / f*_{n-1}` (Eqs. 10-11). If the chain has no block n-k-1, alpha_{n-k} is 1. `fold`
    returns a block as plain LoRA, given its alphas for k = 1..m; a head has no alphas.

    Raises `ValueError` for a frozen weight with NaN or infinity.
    """
    merged: list[Merged] = []
    norms: list[float] = []
    for block in chain:
        ratios = [_ratio(norms[k - 1], norms[block.before[0]]) if k > 0 else 1.0 for k in block.before]
        used = {k - 1 for k in block.before if k > 0} | {k for k in block.before[:1] if k > 0}
        result = fold(block, ratios)
        result.notes += tuple(_zero_norm(chain[j]) for j in sorted(used) if norms[j] == 0)
        merged.append(result)
        weight = block.weight()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        b, a = result.b.to(weight.device, dtype), result.a.to(weight.device, dtype)
        # f*_j, the norm of W_j + s_j B*_j A*_j
        norm = float(torch.linalg.vector_norm(torch.addmm(weight.to(dtype), b, a, alpha=block.scaling)))
        if not math.isfinite(norm):
            raise ValueError(f"{block.name} has NaN or infinity in its frozen weight: load the base model again")
        norms.append(norm)
    return merged


def merge_lstsq(chain: list[Factors]) -> list[Merged]:
    """Return `A_n + C`, where C is the least-squares estimate of the shortcut terms from x_n only (not in the paper).

    `C = argmin E|t - C x_n|^2 + ridge |C - T|^2`, where t is `A_n x_{n-1}` (`input`) or `sum_{k>=1} A_{n-k} x_{n-k}`
    (`middle`), and T is A_n or `sum_{k>=1} A_{n-k}`. If all blocks have the same input, the merge is exact.

    The ridge pulls C toward T. A block whose input is far larger than those of earlier blocks may therefore have a
    smaller error with the method `none`; such a block is merged by `none`, and a note reports it.
    """
    merged = []
    for block in chain:
        if not block.before:
            merged.append(block.scaled(block.alpha_of_head))
            continue
        kept = block.scaled(0.0)
        fitted = Merged(block.a + block.stand_in() + block.moments.fitted, kept.b)
        error, without = relative_error(block, fitted), relative_error(block, kept)
        if without < error:
            errors = f"whose error is {without:.2g}; that of 'lstsq' is {error:.2g}"
            kept.notes = (f"{block.name}: merged by 'none', {errors}",)
        merged.append(kept if without < error else fitted)
    return merged


def merge_exact(chain: list[Factors]) -> list[Merged]:
    """Return `A* = [A_n; ...; A_{n-m}]` and `B* = [B_n, ..., B_{n-m}]`, of rank (m + 1) r (Eq. 5)."""
    merged = []
    for block in chain:
        others = [chain[k] for k in block.before]
        device = block.a.device
        a = torch.cat([block.a, *(other.a.to(device) for other in others)])
        b = torch.cat([block.b, *(other.b.to(device) for other in others)], dim=1)
        merged.append(Merged(a, b))
    return merged


# -- functions that the merges use -----------------------------------------------------------------------------------


def cut(block: Factors, merged: Merged, rank: int) -> Merged:
    """Return `merged` truncated to `rank`, with a note of the loss; return a block with unchanged A unchanged."""
    if merged.a is block.a or merged.a.shape[0] <= rank:
        return merged
    a, b, loss = truncate(merged.a, merged.b, rank)
    note = f"{block.name}: rank {merged.a.shape[0]} truncated to {rank} loses {loss:.3%} of the norm"
    return Merged(a, b, merged.alpha, (*merged.notes, note))


def truncate(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the best rank-`rank` approximation of `B A` as A and B, and the fraction of the Frobenius norm lost.

    A is r x p and B is q x r. Uses the SVD of the small core of two QR decompositions: `B A = Q_b (R_b R_a^T) Q_a^T`.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().t())
    u, s, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    root = s[:rank].sqrt()
    lost, whole = torch.linalg.vector_norm(s[rank:]), torch.linalg.vector_norm(s)
    loss = float(lost / whole) if whole > 0 else 0.0
    return (root[:, None] * (v[:rank] @ q_a.t())).to(a), ((q_b @ u[:, :rank]) * root).to(b), loss


def relative_error(block: Factors, merged: Merged) -> float:
    """Return `|merged - unmerged| / |unmerged LoRA output|` on the calibration batches, from the block's moments.

    Both outputs are B times a vector of r numbers, so each squared norm is the trace of moments times the Gram matrix
    of B. `Moments.measure` measures the outputs themselves for a merge with another rank.
    """
    moments = block.moments
    if moments.output:
        return (moments.miss / moments.output) ** 0.5
    if isinstance(moments.handed_handed, float):
        return 0.0  # no shortcut term is added here, or the merge is exact
    b = _precise(block.b)
    gram = b.t() @ b
    cross = moments.own_handed + moments.own_handed.t()
    output = _trace(moments.own_own + cross + moments.handed_handed, gram)
    if isinstance(merged.alpha, float):  # A is unchanged, and the shortcut terms are not estimated
        miss = merged.alpha**2 * moments.own_own - merged.alpha * cross + moments.handed_handed
    else:
        miss = moments.gap_gap
    error = max(_trace(miss, gram), 0.0)
    return (error / output) ** 0.5 if output > 0 else 0.0


def _trace(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left * right.t()).sum())


def _ratio(numerator: float, denominator: float) -> float:
    """Return the ratio of two norms, or 1 if one of them is zero."""
    return numerator / denominator if numerator > 0 and denominator > 0 else 1.0


def _zero_norm(block: Factors) -> str:
    return f"{block.name}: zero norm, alpha* = 1"


# -- registry ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge method: its function and the statistics that it needs."""

    function: Callable[[list[Factors]], list[Merged]]
    """Function of the blocks of a chain, which returns a `Merged` for each."""
    needs_norms: bool = False
    """Whether the method needs the norm f_n of every block."""
    needs_moments: bool = False
    """Whether the method needs calibration, with the second moments of every block's input."""
    max_rank: int | None = None
    """Maximum rank of merged blocks; None: no limit."""

    def __call__(self, chain: list[Factors]) -> list[Merged]:
        """Return the merged blocks of a chain, front to back."""
        results = self.function(chain)
        if self.max_rank is None:
            return results
        return [cut(block, result, self.max_rank) for block, result in zip(chain, results, strict=True)]


MERGES = {
    "none": Merge(merge_none),
    "input": Merge(merge_input, needs_norms=True),
    "weights": Merge(merge_weights_input),
    "lstsq": Merge(merge_lstsq, needs_moments=True),
}
"""Merge methods by name; a shortcut may define others (`reslora.shortcuts`)."""
