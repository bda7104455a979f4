"""Whose memory a product reads and writes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torchlinop import TorchLinearOperator

from tests.cases import CASES
from tests.cupyx.checks import REAL, check_result, torch_dtype


class Spy(TorchLinearOperator):
    """Twice the identity; notes what it reads and where it writes."""

    def __init__(
        self,
        n: int,
        dtype: torch.dtype,
        product: Callable[[torch.Tensor], torch.Tensor] = lambda x: 2 * x,
    ) -> None:
        super().__init__((n, n), dtype, torch.device("cpu"))
        self.product = product
        self.read: list[torch.Tensor] = []
        self.written: list[torch.Tensor] = []

    def _apply(self, x):
        y = self.product(x)
        self.read.append(x)
        self.written.append(y)
        return y

    def _adjoint(self):
        return self


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
def test_memory_is_shared_both_ways(cupy, dtype):
    spy = Spy(6, torch_dtype(dtype))
    block = cupy.zeros((6, 4), dtype=dtype)
    long = cupy.zeros((12,), dtype=dtype)
    for x in (long[:6], long[6:], long[::2], block[:, 0], block, block[:, 1:3]):
        y = spy @ x
        assert spy.read[-1].data_ptr() == x.data.ptr
        assert spy.written[-1].data_ptr() == y.data.ptr
    by_columns = cupy.asfortranarray(block)
    spy @ by_columns
    assert spy.read[-1].data_ptr() == by_columns.data.ptr


@REAL
def test_memory_is_shared_in_products_from_the_left(cupy, dtype):
    """Of real arrays: complex ones are conjugated first."""
    spy = Spy(6, torch_dtype(dtype))
    block = cupy.zeros((4, 6), dtype=dtype)
    for x in (block, block[1:3], block[0]):
        y = x @ spy
        assert spy.read[-1].data_ptr() == x.data.ptr
    assert spy.written[-1].data_ptr() == y.data.ptr


def test_memory_is_copied_where_it_cannot_be_shared(cupy):
    spy = Spy(6, torch.float64)
    x = cupy.asarray(np.arange(6.0))
    for other in (x[::-1], x.astype("f"), x.astype("q")):
        y = spy @ other
        assert spy.read[-1].data_ptr() != other.data.ptr
        np.testing.assert_array_equal(y.get(), 2 * other.get())
    np.testing.assert_array_equal(x.get(), np.arange(6.0))


#: twice a matrix, in memory that is not plain
LAZY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "strided": lambda x: (2 * x).repeat_interleave(2, 1)[:, ::2],
    "to be conjugated": lambda x: (2 * x).conj_physical().conj(),
    "to be negated": lambda x: torch._neg_view(-2 * x),
}


@pytest.mark.parametrize("lazy", list(LAZY))
@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
def test_results_are_plain_memory_whatever_the_operator_returns(cupy, dtype, columns, lazy):
    A = Spy(6, torch_dtype(dtype), LAZY[lazy])
    host = np.arange(18).reshape(6, 3).astype(dtype)
    if np.dtype(dtype).kind == "c":
        host = host - 1j * host[::-1]
    host = host[:, 0] if columns is None else host[:, :columns]
    y = A @ cupy.asarray(host)
    check_result(cupy, y, host.shape, dtype)
    np.testing.assert_array_equal(y.get(), 2 * host)


@REAL
def test_results_share_nothing_with_inputs_and_later_results(cupy, dtype, rng):
    for case in ("identity", "ggn", "hessian", "jacobian", "cube", "damped_ggn"):
        A, _ = CASES[case](torch_dtype(dtype))
        host = rng.standard_normal(A.shape[1]).astype(dtype)
        x = cupy.asarray(host)
        expected = (A @ x).get()
        for _ in range(6):  # recorded kernels are replayed from the fourth product on
            y = A @ x
            np.testing.assert_array_equal(x.get(), host)
            np.testing.assert_allclose(y.get(), expected, rtol=1e-5, atol=1e-6)
            kept, copy = A @ x, y.get()
            y[...] = np.nan
            A @ (2 * x)
            np.testing.assert_allclose(kept.get(), copy, rtol=1e-5, atol=1e-6)
