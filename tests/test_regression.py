"""Ridge regression in panels, in both forms, against the textbook formulas on complete matrices."""

import pytest
import torch
from core_models import assert_equal
from live_tensors import LiveTensors

from reslora import regression
from reslora.regression import Gram, Inputs


@pytest.fixture(autouse=True)
def narrow_panels(monkeypatch):
    monkeypatch.setattr(regression, "PANEL", 4)


def random(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ridge(x: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """(X^T X + rho I)^-1 X^T G, transposed; rho is a hundredth of the mean diagonal of X^T X."""
    second = x.T @ x
    rho = 1e-2 * second.diagonal().mean()
    return torch.linalg.inv(second + rho * torch.eye(len(second), dtype=second.dtype)).mm(x.T @ gap).T


def fitted(
    x: torch.Tensor, gap: torch.Tensor, sizes: list[int], dual: bool | None = None
) -> tuple[Inputs, torch.Tensor]:
    """Return D for rows in batches of these sizes; `dual` chooses the form."""
    inputs, gap_x, gaps = Inputs(x), 0.0, []
    if dual is False:
        inputs.dual, inputs.gram = False, Gram(x, x.shape[1])
    for rows, part in zip(x.split(sizes), gap.split(sizes), strict=True):
        if dual:  # however many rows there are
            inputs.count += len(rows)
            inputs.rows.append(rows)
        else:
            inputs.add(rows)
        gap_x = gap_x + part.to(rows.dtype).T @ rows
        gaps.append(part)
    assert dual is None or inputs.dual == dual
    inputs.factorise()
    return inputs, inputs.fit(gap_x, gaps if inputs.dual else [])


# --- the Gram matrix --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 11])
def test_gram_matrix_in_panels_is_the_whole_one(size):
    x, right, d = random(20, size), random(size, 3, seed=1), random(2, size, seed=2)
    second, eye = x.T @ x, torch.eye(size, dtype=torch.float64)
    gram = Gram(x, size)
    for rows in x.split(7):
        gram.add(rows)
    for first, panel in zip(range(0, size, 4), gram.panels, strict=True):
        assert_equal(panel, second[first:, first : first + 4])
    assert gram.trace() == pytest.approx(float(second.trace()))
    assert sum(panel.nbytes for panel in gram.panels) == Gram.nbytes(size, 8)
    gram.factorise(0.3)
    whole = torch.linalg.cholesky(second + 0.3 * eye)
    for first, panel in zip(range(0, size, 4), gram.panels, strict=True):
        assert_equal(panel, whole[first:, first : first + 4])
    kept = right.clone()
    assert_equal(gram.solve(right), torch.linalg.solve(second + 0.3 * eye, right))
    assert torch.equal(right, kept)
    assert_equal(gram.quadratic(d), d @ second @ d.T)


def test_gram_matrix_takes_half_and_its_factor_the_whole_of_one_in_float32(monkeypatch):
    monkeypatch.undo()
    whole = 12288**2 * 4
    assert 0.5 * whole < Gram.nbytes(12288, 4) < 0.52 * whole and whole < Gram.nbytes(12288, 8) < 1.03 * whole


def test_single_precision_is_factorised_in_double():
    x = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2**-10]])
    gram = Gram(x, 2)
    gram.add(x)
    assert {panel.dtype for panel in gram.panels} == {torch.float32}
    gram.factorise(1e-9)
    second, right = (x.T @ x).double() + 1e-9 * torch.eye(2).double(), torch.ones(2, 1).double()
    assert_equal(gram.solve(right), torch.linalg.solve(second, right))


# --- the regression ---------------------------------------------------------------------------------------------------

SIZES = [([1], 9), ([5], 9), ([2, 3], 9), ([1, 1, 4], 16), ([7, 2], 11)]


@pytest.mark.parametrize("sizes, width", SIZES)
def test_dual_form_equals_the_primal_one(sizes, width):
    x, gap = random(sum(sizes), width), random(sum(sizes), 3, seed=1)
    _, primal = fitted(x, gap, sizes, dual=False)
    _, dual = fitted(x, gap, sizes, dual=True)
    for found in (primal, dual):
        torch.testing.assert_close(found, ridge(x, gap), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(primal, dual, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dual", [True, False])
def test_both_forms_measure_what_a_fit_leaves(dual):
    x, gap, d = random(5, 12), random(5, 3, seed=1), random(3, 12, seed=2)
    inputs, _ = fitted(x, gap, [2, 3], dual)
    assert_equal(inputs.quadratic(d), (x @ d.T).T @ (x @ d.T))


@pytest.mark.parametrize("dual", [True, False])
def test_rows_that_depend_on_each_other_are_fitted_too(dual):
    x = random(5, 12)
    x[3], x[4], x[:, 7] = x[0], 0.0, x[:, 2]
    gap = random(5, 3, seed=1)
    torch.testing.assert_close(fitted(x, gap, [5], dual)[1], ridge(x, gap), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dual", [True, False])
def test_rows_of_zeros_are_fitted_by_zero(dual):
    x, gap = torch.zeros(5, 12, dtype=torch.float64), random(5, 3)
    assert torch.equal(fitted(x, gap, [5], dual)[1], torch.zeros(3, 12, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_form_changes_when_the_rows_grow_too_many(dtype):
    """Rows take less memory than their Gram matrix up to half of their width; both forms are solved in float64."""
    x, gap = random(11, 12, dtype=dtype), random(11, 2, seed=1)
    inputs, size = Inputs(x), dtype.itemsize
    for count, rows in enumerate(x.split(1), start=1):
        solving = {1: 1, 2: 4, 3: 9, 4: 16, 5: 21, 6: 28}.get(count)  # in panels of four columns
        expected = (12 * size * count, 8 * solving) if count <= 6 else (96 * size, 96 * (8 - size))
        assert inputs.nbytes(1) == expected
        inputs.add(rows)
        assert inputs.nbytes() == expected
        assert inputs.dual == (count <= 6) and len(inputs.rows) == (count if count <= 6 else 0)
        panels = inputs.gram.panels if inputs.gram else []
        assert sum(held.nbytes for held in (*inputs.rows, *panels)) == expected[0]
    tolerance = 1e-4 if size == 4 else 1e-9
    assert_equal(fitted(x, gap, [1] * 11)[1], ridge(x.double(), gap), rtol=tolerance, atol=tolerance)


def test_rows_are_copies():
    x, gap = random(5, 12), random(5, 3, seed=1)
    expected = ridge(x, gap)
    inputs = Inputs(x)
    inputs.add(x)
    x.zero_()
    inputs.factorise()
    assert_equal(inputs.fit(None, [gap]), expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rows", [[30], [90] * 10])
def test_no_more_memory_than_one_second_moment_in_float32(rows, monkeypatch):
    """The memory alive at a time; an eighth more for panels in progress and tensors of the size of the gaps."""
    monkeypatch.setattr(regression, "PANEL", 16)
    x, gap = random(sum(rows), 400, dtype=torch.float32), random(sum(rows), 2, seed=1)
    with LiveTensors() as live:
        inputs, _ = fitted(x, gap, rows)
    assert sum(inputs.nbytes()) <= live.peak < 1.125 * 400**2 * 4


def test_few_rows_need_no_matrix_as_wide_as_the_layer(monkeypatch):
    monkeypatch.setattr(regression, "PANEL", 16)
    x, gap = random(10, 400, dtype=torch.float32), random(10, 2, seed=1)
    with LiveTensors() as live:
        fitted(x, gap, [10])
    assert live.peak < 10 * 400 * 4 * 4
