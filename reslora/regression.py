"""Ridge regression on what enters a layer, in as little memory as its shape allows.

X (T x p) are the rows that entered a layer while calibrating, one for each token, and G (T x r) is to be made of them:

    D = argmin |G - X D^T|^2 + rho |D|^2      with rho = RIDGE tr(X^T X) / p
      = G^T X (X^T X + rho I)^-1              the primal form: a p x p matrix, however many rows there are
      = ((X X^T + rho I)^-1 G)^T X            the dual form: the rows themselves, and a T x T matrix

Both are the same D (r x p); the dual form takes less memory where there are few rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

RIDGE = 1e-2
"""Ridge of the least-squares merge, as a share of the mean diagonal of X^T X."""

PANEL = 256
"""Columns of a Gram matrix that are computed together."""


class Gram:
    """A sum of x^T x (n x n), then its Cholesky factor: the lower triangle, as panels of PANEL columns.

    A panel begins at the diagonal. The sum is of the dtype of x, the factor of float64: in float32 one takes as much as
    half the matrix, the other as all of it.
    """

    def __init__(self, like: torch.Tensor, size: int) -> None:
        """Zeros, of the dtype and on the device of `like`."""
        self.ridge = 0.0
        self.panels = [like.new_zeros(size - first, min(PANEL, size - first)) for first in range(0, size, PANEL)]

    @staticmethod
    def nbytes(size: int, itemsize: int) -> int:
        """What one of `size` x `size` takes."""
        return sum(itemsize * (size - first) * min(PANEL, size - first) for first in range(0, size, PANEL))

    def add(self, x: torch.Tensor) -> None:
        """Add the rows of `x` (T x n)."""
        for columns, panel in zip(x.split(PANEL, dim=1), self.panels, strict=True):
            panel.addmm_(x[:, -len(panel) :].t(), columns)

    def trace(self) -> float:
        """Return the sum of the diagonal."""
        return sum(float(_double(panel.diagonal()).sum()) for panel in self.panels)

    def factorise(self, ridge: float) -> None:
        """Write L over the sum S, with `S + ridge I = L L^T`."""
        self.ridge = ridge
        for k, panel in enumerate(self.panels):
            panel = self.panels[k] = _double(panel)
            panel.diagonal().add_(ridge)
            for left in self.panels[:k]:
                rows = left[-len(panel) :]
                panel.addmm_(rows, rows[: panel.shape[1]].t(), alpha=-1)
            top, below = _parts(panel)
            top.copy_(torch.linalg.cholesky(top))
            below.copy_(torch.linalg.solve_triangular(top.t(), below, upper=True, left=False))

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """`(S + ridge I)^-1 right` for (n x m), once S is factorised."""
        right = right.to(self.panels[0], copy=True)
        for panel in self.panels:
            top, below = _parts(panel)
            now, later = _parts(right[-len(panel) :], len(top))
            now.copy_(torch.linalg.solve_triangular(top, now, upper=False))
            later.addmm_(below, now, alpha=-1)
        for panel in reversed(self.panels):
            top, below = _parts(panel)
            now, later = _parts(right[-len(panel) :], len(top))
            now.addmm_(below.t(), later, alpha=-1)
            now.copy_(torch.linalg.solve_triangular(top.t(), now, upper=True))
        return right

    def quadratic(self, d: torch.Tensor) -> torch.Tensor:
        """`D S D^T` (r x r) for D (r x n), once S is factorised: `D L L^T D^T - ridge D D^T`."""
        d = d.to(self.panels[0])
        product = torch.cat([d[:, -len(panel) :] @ panel for panel in self.panels], dim=1)
        return product @ product.t() - self.ridge * (d @ d.t())


def _double(x: torch.Tensor) -> torch.Tensor:
    """float64, which MPS does not have."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def _parts(panel: torch.Tensor, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first rows, as many as there are columns unless `count` says so, and the rest."""
    count = panel.shape[1] if count is None else count
    return panel[:count], panel[count:]


class Inputs:
    """X, for the blocks that read one tensor (q, k and v of an attention).

    Rows are kept while they are at most half as many as they are wide, for then they take no more than their sum, and
    are summed up from then on.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.width, self.itemsize = like.shape[1], like.element_size()
        self.count = 0
        self.rows: list[torch.Tensor] = []
        self.gram: Gram | None = None
        self.dual = True

    def nbytes(self, more: int = 0) -> tuple[int, int]:
        """What is held once `more` rows are added, and what it takes on top to solve it, or to sum up the rows."""
        rows = self.count + more
        if self.dual and 2 * rows <= self.width:
            return rows * self.width * self.itemsize, Gram.nbytes(rows, 8)
        return Gram.nbytes(self.width, self.itemsize), Gram.nbytes(self.width, 8 - self.itemsize)

    def add(self, x: torch.Tensor) -> None:
        """Add rows (T x p); they are copied, for the model may go on to overwrite them."""
        self.count += len(x)
        if self.dual and 2 * self.count > self.width:
            self.dual, self.gram = False, Gram(x, self.width)
            while self.rows:
                self.gram.add(self.rows.pop())
        if self.dual:
            self.rows.append(x.clone())
        else:
            self.gram.add(x)

    def factorise(self) -> None:
        """Make `fit` and `quadratic` possible; no rows can be added any more."""
        if self.dual:
            self.gram = Gram(next(self._columns()), self.count)
            for columns in self._columns():
                self.gram.add(columns.t())
        ridge = RIDGE * self.gram.trace() / self.width
        # Where x is zero throughout there is nothing to fit, and nothing to invert.
        self.gram.factorise(ridge if ridge > 0 else 1.0)

    def fit(self, gap_x: torch.Tensor, gaps: Sequence[torch.Tensor]) -> torch.Tensor:
        """D (r x p, float64) from `G^T X` (r x p), or where it is `dual` from G (T x r)."""
        if not self.dual:
            return self.gram.solve(gap_x.t()).t()
        weights = self.gram.solve(torch.cat(list(gaps))).t()
        return torch.cat([weights @ columns for columns in self._columns()], dim=1)

    def quadratic(self, d: torch.Tensor) -> torch.Tensor:
        """`D X^T X D^T` (r x r)."""
        if not self.dual:
            return self.gram.quadratic(d)
        d = d.to(self.gram.panels[0])
        product = sum(columns @ part.t() for columns, part in zip(self._columns(), d.split(PANEL, dim=1), strict=True))
        return product.t() @ product

    def _columns(self) -> Iterator[torch.Tensor]:
        """X in panels of columns (T x PANEL), float64."""
        for parts in zip(*(rows.split(PANEL, dim=1) for rows in self.rows), strict=True):
            yield _double(torch.cat(parts))
