"""Columns become rows and rows columns, whatever their order in memory."""

from __future__ import annotations

import pytest
import torch
from torchlinop.autodiff import sums, transposing
from torchlinop.autodiff.columns import LinearRows
from torchlinop.autodiff.experience import Experience
from torchlinop.autodiff.sums import SummedRows, sum_of_products
from torchlinop.autodiff.transposing import as_rows, by_rows, write_columns

N, K = 50, 6
ORDERS = {
    "by rows": lambda X: X,
    "by columns": lambda X: X.T.contiguous().T,
    "some rows": lambda X: torch.cat([X, X])[: len(X)],
    "some columns": lambda X: torch.cat([X, X], 1)[:, : X.shape[1]],
    "some columns, by columns": lambda X: torch.cat([X.T, X.T])[: X.shape[1]].T,
    "every other row": lambda X: X.repeat_interleave(2, 0)[::2],
}


@pytest.fixture(params=ORDERS)
def X(request):
    X = torch.arange(1.0, 1 + N * K, dtype=torch.float64).view(N, K)
    return ORDERS[request.param](X)


@pytest.fixture(params=["short", "long", "in pieces"])
def length(request, monkeypatch):
    """As if the columns were long enough to be copied one by one."""
    if request.param != "short":
        monkeypatch.setattr(transposing, "_LONG", 7)
    if request.param == "in pieces":
        monkeypatch.setattr(transposing, "_PIECE", 11 * K * 8)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.usefixtures("length")
def test_columns_become_rows(X, given):
    memory = torch.empty(N, K, dtype=X.dtype) if given else None
    rows = as_rows(X, memory)
    assert torch.equal(rows, X.T)
    assert all(row.is_contiguous() for row in rows)
    shared = rows.untyped_storage().data_ptr() == X.untyped_storage().data_ptr()
    assert shared is (X.stride(0) == 1)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.usefixtures("length")
def test_rows_become_columns(X, add):
    rows = [torch.randn(N, dtype=X.dtype) for _ in range(K)]
    expected = torch.stack(rows, 1) + (X if add else 0)
    write_columns(rows, X, add=add)
    assert torch.equal(X, expected)


@pytest.mark.usefixtures("length")
def test_contiguous_row_by_row(X):
    assert torch.equal(by_rows(X), X)
    assert by_rows(X).is_contiguous()
    assert by_rows(X[:, :0]).shape == (N, 0)


class Products:
    """A symmetric matrix as a function of rows."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(N, N, generator=generator, dtype=torch.float64)
        self.matrix = root + root.T

    def __call__(self, v, *, batched=False):
        assert v.is_contiguous() or v.ndim == 2
        return v @ self.matrix


@pytest.mark.parametrize("limit", [1 << 20, 2 * N * 8, 1])
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.usefixtures("length")
def test_sum_of_products(X, count, limit, monkeypatch):
    """All at once, two columns at a time, and one by one."""
    monkeypatch.setattr(sums, "COPIED", limit)
    monkeypatch.setattr("torchlinop.autodiff.columns.COPIED", limit)
    functions = [Products(i) for i in range(count)]
    rows = [LinearRows(f, nbytes=0, nodes=1) for f in functions]
    before = X.clone()
    expected = sum((f.matrix @ X for f in functions), torch.zeros(N, K, dtype=X.dtype))
    whole = [SummedRows(rows)] if rows else []
    for parts in (rows, whole):
        out = sum_of_products(iter(parts), X, Experience())
        torch.testing.assert_close(out, expected)
        in_rows = X.stride(0) == 1 and X.nbytes <= limit
        assert out.T.is_contiguous() if in_rows else out.is_contiguous()
        assert torch.equal(X, before)
        out.fill_(7)  # and none of it is memory that is used again
        torch.testing.assert_close(sum_of_products(parts, X, Experience()), expected)
