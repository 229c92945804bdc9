"""The merge methods: from a trained chain to plain LoRA factors, as functions of tensors.

A chain comes as a list of `Factors`, front to back, and leaves as a list of `Merged`, one for each block. Notation as
in the paper: A (r x p), B (q x r), the frozen W (q x p), f_n a norm, alpha* the factor with `x_{n-1} ~ alpha* x_n`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

METHODS = ("auto", "none", "input", "weights", "lstsq")

RIDGE = 1e-2
"""Ridge of the least-squares merge, as a share of the mean diagonal of E[x x^T]."""


@dataclasses.dataclass
class Factors:
    """What a merge needs to know of one block."""

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    weight: Callable[[], torch.Tensor]
    """The frozen weight (q x p), dequantised when called."""
    norm: float | None = None
    """f_n of Eqs. 8-9 (`input`: of x_n; `middle`: of A_n x_n), averaged over the window."""
    moments: Moments | None = None
    """What calibration has seen of the block."""


@dataclasses.dataclass
class Merged:
    """One block as plain LoRA: the new A and B, and how they came about."""

    a: torch.Tensor
    b: torch.Tensor
    alpha: float | list[float] | None = None
    notes: tuple[str, ...] = ()
    fitted: torch.Tensor | None = None
    """Least squares only: C minus the neighbours' A (r x p)."""


class Moments:
    """Second moments of one block over the calibration batches, from which fits and errors follow.

    Rows are tokens: `x` (T x p) the block's input, `own` = A_n x (T x r), `handed` (T x r) what its neighbours add to
    it, and `gap` = handed - guess x for a `guess` (r x p) of the neighbours' sum made from x alone. The gap, not
    `handed`, is fitted and measured: where the guess is exact it is zero to the last digit, however x is conditioned.
    """

    def __init__(self, guess: torch.Tensor | None = None, second: Second | None = None) -> None:
        self.guess = guess
        self.second = second
        self.norm_sum, self.forwards = 0.0, 0
        self.own_own = self.own_handed = self.handed_handed = self.gap_gap = self.gap_x = 0.0
        self.output, self.miss = 0.0, 0.0

    def add(self, x: torch.Tensor, own: torch.Tensor, handed: torch.Tensor | None, norm: torch.Tensor) -> None:
        """Adds one forward; `norm` is the Frobenius norm that Eqs. 8-9 or 12 take of it."""
        self.norm_sum = self.norm_sum + norm
        self.forwards += 1
        own = _precise(own)
        self.own_own = self.own_own + own.t() @ own
        if handed is None:
            return
        handed = _precise(handed)
        self.own_handed = self.own_handed + own.t() @ handed
        self.handed_handed = self.handed_handed + handed.t() @ handed
        if self.guess is not None:
            gap = handed - _precise(x @ self.guess.to(x).t())
            self.gap_gap = self.gap_gap + gap.t() @ gap
            if self.second is not None:
                self.gap_x = self.gap_x + gap.to(x.dtype).t() @ x

    def measure(self, output: torch.Tensor, miss: torch.Tensor) -> None:
        """Adds one forward's squared norms of the unmerged output and of what a known merge misses of it."""
        self.output += float(output.double().square().sum())
        self.miss += float(miss.double().square().sum())

    @property
    def norm(self) -> float:
        """f_n: the mean norm over the calibration forwards."""
        return float(self.norm_sum) / self.forwards

    def finite(self) -> bool:
        """Whether everything seen was finite."""
        values = (self.norm_sum, self.own_own, self.own_handed, self.handed_handed, self.gap_gap, self.gap_x)
        return all(bool(torch.isfinite(torch.as_tensor(value)).all()) for value in values)


class Second:
    """E[x x^T] up to its count (p x p), shared by the blocks that read the same tensor (q, k and v of an attention)."""

    def __init__(self) -> None:
        self.value: torch.Tensor | float = 0.0
        self._factor: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        """Adds the rows of `x` (T x p)."""
        self.value = self.value + x.t() @ x

    def factor(self) -> torch.Tensor:
        """The Cholesky factor of the sum plus the ridge (p x p, float64 on the CPU), computed once."""
        if self._factor is None:
            second = self.value.to("cpu", torch.float64, copy=True)
            ridge = RIDGE * float(second.diagonal().mean())
            # Where x is zero throughout there is nothing to fit, and nothing to invert.
            second.diagonal().add_(ridge if ridge > 0 else 1.0)
            self._factor = torch.linalg.cholesky(second)
        return self._factor


def _precise(x: torch.Tensor) -> torch.Tensor:
    """float64 for the r-wide vectors, whose moments are differences of close numbers; MPS has none."""
    return x.float() if x.device.type == "mps" else x.double()


# -- the methods -----------------------------------------------------------------------------------------------------


def merge_none(chain: list[Factors]) -> list[Merged]:
    """Keeps A and B, and with them drops the residual paths (Table 3, merge_no)."""
    return [Merged(block.a, block.b, alpha=0.0) for block in chain]


def merge_input(chain: list[Factors], reach: int | None, head: float) -> list[Merged]:
    """merge_bi: `B_n (1 + alpha*)` with `alpha* = sum_{k=1..m} f_{n-k} / f_n` (Eqs. 6-9; Eq. 12 for `middle`).

    `head` is the alpha* of the first block: 1 where x_{n-1} := x_n, else 0.
    """
    merged = []
    for n, block in enumerate(chain):
        before = chain[_first(n, reach) : n]
        if n == 0:
            alpha, notes = head, ()
        elif block.norm == 0:
            alpha, notes = 1.0, (f"{block.name}: zero norm, alpha* = 1",)
        else:
            ratios = [_ratio(other.norm, block.norm) for other in before]
            alpha = float(sum(ratios))
            notes = tuple(f"{other.name}: zero norm, alpha* = 1" for other in before if other.norm == 0)
        merged.append(Merged(block.a, block.b * (1 + alpha), alpha, notes))
    return merged


def merge_weights(chain: list[Factors], reach: int | None, head: float, middle: bool) -> list[Merged]:
    """merge_bw, walking the chain front to back with f*_j, the Frobenius norm of the *merged* weight of block j.

    `input`: `B_n (1 + alpha*)`, `alpha* = f*_{n-2} / f*_{n-1}` (Eqs. 10-11).
    `middle`: `A_n + sum_k alpha_{n-k} A_{n-k}` (Eq. 13) with `alpha_{n-k} = f*_{n-k-1} / f*_{n-1}`: Eq. 11 carried over
    index by index, because what is printed under Eq. 13 needs the f*_n that is being computed.
    Where an index runs off the chain, alpha is 1.
    """
    merged: list[Merged] = []
    norms: list[float] = []
    for n, block in enumerate(chain):
        if n == 0:
            result = Merged(block.a, block.b * (1 + head), [] if middle else head)
        else:
            previous = range(n - 1, _first(n, reach) - 1, -1)  # n-1, n-2, ... n-m
            alphas = [_ratio(norms[k - 1], norms[n - 1]) if k > 0 else 1.0 for k in previous]
            used = {k - 1 for k in previous if k > 0} | ({n - 1} if max(previous) > 0 else set())
            notes = tuple(f"{chain[j].name}: zero norm, alpha* = 1" for j in sorted(used) if norms[j] == 0)
            if middle:
                total = sum(alpha * chain[k].a.to(block.a) for alpha, k in zip(alphas, previous, strict=True))
                result = Merged(block.a + total, block.b, alphas, notes)
            else:
                result = Merged(block.a, block.b * (1 + alphas[0]), alphas[0], notes)
        merged.append(result)
        norm = merged_norm(block.weight(), result.a, result.b, block.scaling)
        if not math.isfinite(norm):
            raise ValueError(f"{block.name} has NaN or infinity in its frozen weight: load the base model again")
        norms.append(norm)
    return merged


def merge_lstsq(chain: list[Factors], reach: int | None, head: float, middle: bool) -> list[Merged]:
    """Ours: `A_n + C`, C the least-squares stand-in for what the neighbours add, made from x_n alone.

    `C = argmin E|t - C x_n|^2 + ridge |C - T|^2`, where t is `A_n x_{n-1}` (`input`) or `sum_{k>=1} A_{n-k} x_{n-k}`
    (`middle`) and T is A_n or `sum_{k>=1} A_{n-k}`: equal inputs merge exactly.
    """
    merged = []
    for n, block in enumerate(chain):
        if n == 0:
            merged.append(Merged(block.a, block.b * (1 + head), head))
            continue
        guess = neighbour_sum(chain, n, reach, middle)
        fitted = fit(block.moments.gap_x, block.moments.second).to(block.a)
        merged.append(Merged(block.a + guess + fitted, block.b, None, fitted=fitted))
    return merged


def merge_block(chain: list[Factors], reach: int | None, max_rank: int | None = None) -> list[Merged]:
    """Exact: `A* = [A_n; ...; A_{n-m}]`, `B* = [B_n, ..., B_{n-m}]` (Eq. 5), of rank (m + 1) r, cut to `max_rank`."""
    merged = []
    for n in range(len(chain)):
        stacked = [chain[k] for k in range(n, _first(n, reach) - 1, -1)]
        device = stacked[0].a.device
        a = torch.cat([block.a.to(device) for block in stacked])
        b = torch.cat([block.b.to(device) for block in stacked], dim=1)
        notes: tuple[str, ...] = ()
        if max_rank is not None and a.shape[0] > max_rank:
            a, b, loss = truncate(a, b, max_rank)
            notes = (f"{chain[n].name}: rank {len(stacked) * chain[n].a.shape[0]} cut to {max_rank} loses {loss:.3%}",)
        merged.append(Merged(a, b, None, notes))
    return merged


# -- their parts -----------------------------------------------------------------------------------------------------


def neighbour_sum(chain: list[Factors], n: int, reach: int | None, middle: bool) -> torch.Tensor:
    """What block n's neighbours would add if all inputs were equal: A_n (`input`), `sum_{k>=1} A_{n-k}` (`middle`)."""
    a = chain[n].a
    return sum(chain[k].a.to(a) for k in range(_first(n, reach), n)) if middle else a


def fit(gap_x: torch.Tensor, second: Second) -> torch.Tensor:
    """`argmin_D |gap - D x|^2 + ridge |D|^2` (r x p) from the moments `gap^T x` (r x p) and `x^T x` (p x p)."""
    return torch.cholesky_solve(gap_x.to("cpu", torch.float64).t(), second.factor()).t()


def merged_norm(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> float:
    """f*_j, the Frobenius norm of `W_j + s_j B*_j A*_j`, in at least float32 (Eqs. 10-11)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    b, a = b.to(weight.device, dtype), a.to(weight.device, dtype)
    return float(torch.linalg.vector_norm(torch.addmm(weight.to(dtype), b, a, alpha=scaling)))


def truncate(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best rank-`rank` approximation of `B A` as new factors, and the share of its Frobenius norm that is lost.

    Through the small cores of two QR decompositions: `B A = Q_b (R_b R_a^T) Q_a^T`.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().t())
    u, s, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    root = s[:rank].sqrt()
    lost, whole = torch.linalg.vector_norm(s[rank:]), torch.linalg.vector_norm(s)
    loss = float(lost / whole) if whole > 0 else 0.0
    return (root[:, None] * (v[:rank] @ q_a.t())).to(a), ((q_b @ u[:, :rank]) * root).to(b), loss


def relative_error(block: Factors, merged: Merged) -> float:
    """`|merged - unmerged| / |unmerged LoRA output|` on the calibration batches, from the block's moments.

    Both outputs are B times an r-wide vector, so the norms are traces against the Gram matrix of B.
    """
    moments = block.moments
    if moments.output > 0:
        return (moments.miss / moments.output) ** 0.5
    if isinstance(moments.handed_handed, float):
        return 0.0  # nothing is handed to this block, or it merges exactly
    b = _precise(block.b)
    gram = b.t() @ b
    cross = moments.own_handed + moments.own_handed.t()
    output = _trace(moments.own_own + cross + moments.handed_handed, gram)
    if moments.guess is None:
        miss = merged.alpha**2 * moments.own_own - merged.alpha * cross + moments.handed_handed
    elif merged.fitted is None:
        miss = moments.gap_gap
    else:
        fitted = merged.fitted.to(gram)
        gap_x = moments.gap_x.to(gram) @ fitted.t()
        miss = moments.gap_gap - gap_x - gap_x.t() + fitted @ moments.second.value.to(gram) @ fitted.t()
    error = max(_trace(miss, gram), 0.0)
    return (error / output) ** 0.5 if output > 0 else 0.0


def _trace(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left * right.t()).sum())


def _ratio(numerator: float, denominator: float) -> float:
    """numerator / denominator, and 1 where a zero norm leaves the ratio without meaning."""
    return numerator / denominator if numerator > 0 and denominator > 0 else 1.0


def _first(n: int, reach: int | None) -> int:
    """Index of the first block that takes part in block n."""
    return 0 if reach is None else max(0, n - reach)
