"""Ridge regression on a layer's input, in the primal or the dual form, whichever needs less memory.

X (T x p) are the layer's inputs during calibration, one row for each token, and G (T x r) is the target:

    D = argmin |G - X D^T|^2 + rho |D|^2      with rho = RIDGE tr(X^T X) / p
      = G^T X (X^T X + rho I)^-1              the primal form: a p x p matrix for any number of rows
      = ((X X^T + rho I)^-1 G)^T X            the dual form: the rows themselves, and a T x T matrix

Both are the same D (r x p); the dual form takes less memory if there are few rows.
"""

from collections.abc import Iterator, Sequence

import torch

RIDGE = 1e-2
"""Ridge of the least-squares merge, as a fraction of the mean diagonal of X^T X."""

PANEL = 256
"""Number of columns of a Gram matrix that are computed together."""


class Gram:
    """Gram matrix (n x n), the sum of x^T x over batches, which `factorise` replaces by a Cholesky factor.

    Only the lower triangle is stored, in panels of PANEL columns that begin at the diagonal. The sum has the dtype of
    x, and the factor is float64. For float32 inputs, the sum takes half the memory of a full float32 matrix, and the
    factor as much as a full float32 matrix.
    """

    def __init__(self, like: torch.Tensor, size: int) -> None:
        """Create a zero matrix (`size` x `size`) with the dtype and device of `like`."""
        self.ridge = 0.0
        self.panels = [like.new_zeros(size - first, min(PANEL, size - first)) for first in range(0, size, PANEL)]

    @staticmethod
    def nbytes(size: int, itemsize: int) -> int:
        """Return the bytes that the panels of a `size` x `size` matrix take, with `itemsize` bytes for each value."""
        return sum(itemsize * (size - first) * min(PANEL, size - first) for first in range(0, size, PANEL))

    def add(self, x: torch.Tensor) -> None:
        """Add x^T x of the rows `x` (T x n) to the sum."""
        for columns, panel in zip(x.split(PANEL, dim=1), self.panels, strict=True):
            panel.addmm_(x[:, -len(panel) :].t(), columns)

    def trace(self) -> float:
        """Return the sum of the diagonal."""
        return sum(float(_double(panel.diagonal()).sum()) for panel in self.panels)

    def factorise(self, ridge: float) -> None:
        """Replace the sum S by its Cholesky factor L, with `S + ridge I = L L^T`."""
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
        """Return `(S + ridge I)^-1 right` for the sum S (n x n) and `right` (n x m); call `factorise` first."""
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
        """Return `D S D^T` (r x r) for D (r x n) as `D L L^T D^T - ridge D D^T`; call `factorise` first."""
        d = d.to(self.panels[0])
        product = torch.cat([d[:, -len(panel) :] @ panel for panel in self.panels], dim=1)
        return product @ product.t() - self.ridge * (d @ d.t())


def _double(x: torch.Tensor) -> torch.Tensor:
    """Return x in float64, on the CPU if the device of x is MPS, which has no float64."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def _parts(panel: torch.Tensor, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first `count` rows of a panel (default: as many as it has columns) and the other rows."""
    count = panel.shape[1] if count is None else count
    return panel[:count], panel[count:]


class Inputs:
    """The inputs X (T x p) of blocks that read the same tensor, such as q, k and v of one attention.

    While there are at most p / 2 rows, the rows themselves are stored: they take no more memory than the Gram matrix
    X^T X. With more rows, only the Gram matrix is stored.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.width, self.itemsize = like.shape[1], like.element_size()
        self.count = 0
        self.rows: list[torch.Tensor] = []
        self.gram: Gram | None = None
        self.dual = True

    def nbytes(self, more: int = 0) -> tuple[int, int]:
        """Return the bytes stored once `more` rows are added, and the additional bytes that `factorise` needs then."""
        rows = self.count + more
        if self.dual and 2 * rows <= self.width:
            return rows * self.width * self.itemsize, Gram.nbytes(rows, 8)
        return Gram.nbytes(self.width, self.itemsize), Gram.nbytes(self.width, 8 - self.itemsize)

    def add(self, x: torch.Tensor) -> None:
        """Add rows (T x p); they are copied, because the model may overwrite them in place."""
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
        """Prepare `fit` and `quadratic`; no rows can be added after this."""
        if self.dual:
            self.gram = Gram(next(self._columns()), self.count)
            for columns in self._columns():
                self.gram.add(columns.t())
        ridge = RIDGE * self.gram.trace() / self.width
        # If x is zero everywhere, there is nothing to fit and the matrix cannot be inverted.
        self.gram.factorise(ridge if ridge > 0 else 1.0)

    def fit(self, gap_x: torch.Tensor, gaps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the solution D of the ridge regression (r x p, float64).

        The primal form uses `gap_x`, which is G^T X (r x p); the dual form uses `gaps`, the batches of G (T x r).
        """
        if not self.dual:
            return self.gram.solve(gap_x.t()).t()
        weights = self.gram.solve(torch.cat(list(gaps))).t()
        return torch.cat([weights @ columns for columns in self._columns()], dim=1)

    def quadratic(self, d: torch.Tensor) -> torch.Tensor:
        """Return `D X^T X D^T` (r x r)."""
        if not self.dual:
            return self.gram.quadratic(d)
        d = d.to(self.gram.panels[0])
        product = sum(columns @ part.t() for columns, part in zip(self._columns(), d.split(PANEL, dim=1), strict=True))
        return product.t() @ product

    def _columns(self) -> Iterator[torch.Tensor]:
        """Yield X in panels of columns (T x PANEL), in float64."""
        for parts in zip(*(rows.split(PANEL, dim=1) for rows in self.rows), strict=True):
            yield _double(torch.cat(parts))
