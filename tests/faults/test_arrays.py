"""Products with arrays of any shape, stride, order, dtype, byte order and flag."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import standin
from tests.cases import CASES, Case
from tests.conftest import array_api_strict
from tests.faults.operands import numpy_arrays, shapes, tensors

#: one of each way in which products are computed
NAMES = [
    *("hessian_of_a_function", "jacobian_transposed", "ggn", "dense_matrix", "identity"),
    *("complex_matrix", "complex_diagonal", "scipy_operator", "submatrix", "kronecker"),
    *("natural_gradient_projection", "complex_shift", "cholesky_inverse"),
]
case_names = st.sampled_from(NAMES)
dtypes = st.sampled_from([torch.float32, torch.float64])


@functools.cache
def _case(name: str, dtype: torch.dtype) -> Case:
    return CASES[name](dtype)


def _check(A: Any, dense: np.ndarray, y: np.ndarray, x: np.ndarray) -> None:
    """Some hundreds of ulps of the largest possible entry; ``x`` in double precision."""
    scale = np.abs(dense).sum(axis=1).max() * max(np.abs(x).max(initial=0), 1)
    atol = 200 * np.finfo(A.dtype).eps * scale
    np.testing.assert_allclose(np.asarray(y), dense @ x, rtol=0, atol=atol)


def _as_double(x: np.ndarray) -> np.ndarray:
    return np.array(x, dtype="c16" if x.dtype.kind == "c" else "f8", subok=False)


@given(st.data(), case_names, dtypes)
def test_numpy(data: st.DataObject, name: str, dtype: torch.dtype) -> None:
    A, dense = _case(name, dtype)
    x = data.draw(numpy_arrays(data.draw(shapes(A.shape[1]))))
    values, flags, where = x.copy(), str(x.flags), (x.ctypes.data, x.strides)
    for y in (A @ x, A.dot(x)):
        assert isinstance(y, type(x))
        assert y.shape == (A.shape[0], *x.shape[1:])
        assert y.dtype == np.result_type(A.dtype, x.dtype)
        assert y.flags.writeable
        assert y.flags.c_contiguous
        assert not np.shares_memory(y, x)
        _check(A, dense, y, _as_double(x))
        y[...] = 7
    np.testing.assert_array_equal(x, values)
    assert (str(x.flags), (x.ctypes.data, x.strides)) == (flags, where)


@given(st.data(), case_names, dtypes)
def test_numpy_on_the_left(data: st.DataObject, name: str, dtype: torch.dtype) -> None:
    A, dense = _case(name, dtype)
    x = data.draw(numpy_arrays(data.draw(shapes(A.shape[0]))))
    y = x.T @ A
    assert y.dtype == np.result_type(A.dtype, x.dtype)
    assert y.shape == (*x.T.shape[:-1], A.shape[1])
    _check(A, dense.T, np.asarray(y).T, _as_double(x))
    z = A.rmatvec(x) if x.ndim == 1 else A.rmatmat(x)
    _check(A, dense.conj().T, z, _as_double(x))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@given(st.data(), case_names, dtypes)
def test_torch(data: st.DataObject, name: str, dtype: torch.dtype) -> None:
    A, dense = _case(name, dtype)
    x = data.draw(tensors(data.draw(shapes(A.shape[1]))))
    version = None if x.is_inference() else x._version
    wide = torch.complex128 if x.is_complex() else torch.float64
    values = x.detach().to(wide, copy=True).numpy()
    y = A @ x
    assert type(y) is torch.Tensor
    assert y.shape == (A.shape[0], *x.shape[1:])
    widens = x.dtype in (torch.float32, torch.float64) or (
        x.is_complex() and x.dtype != torch.complex32
    )
    own = A.torch_dtype.to_complex() if x.is_complex() else A.torch_dtype
    assert y.dtype == (torch.promote_types(own, x.dtype) if widens else own)
    assert not y.requires_grad
    assert not y.is_inference()
    assert y.is_contiguous()
    _check(A, dense, y.numpy(), values)
    y.fill_(7)
    assert np.array_equal(x.detach().to(wide, copy=True).numpy(), values)
    assert version is None or x._version == version


@given(st.data(), case_names, dtypes)
def test_cupy_standin(data: st.DataObject, name: str, dtype: torch.dtype) -> None:
    A, dense = _case(name, dtype)
    host = data.draw(numpy_arrays(data.draw(shapes(A.shape[1]))))
    # CuPy has neither foreign bytes nor long doubles, read-only nor unaligned memory
    known = host.dtype.isnative and host.dtype.char not in "gG" and host.flags.behaved
    if not known or type(host) is np.matrix:
        host = np.array(host, {"g": "f8", "G": "c16"}.get(host.dtype.char, host.dtype.char))
    values = host.copy()
    with standin.installed() as cupy:
        y = A @ cupy.ndarray(host)
        assert type(y) is cupy.ndarray
        y = y.get()
    assert y.dtype == np.result_type(A.dtype, host.dtype)
    _check(A, dense, y, _as_double(host))
    np.testing.assert_array_equal(host, values)


@given(st.data(), case_names, dtypes)
def test_array_api_strict(data: st.DataObject, name: str, dtype: torch.dtype) -> None:
    strict = array_api_strict()
    A, dense = _case(name, dtype)
    host = np.array(data.draw(numpy_arrays(data.draw(shapes(A.shape[1])))), subok=False)
    wide = {"g": "f8", "G": "c16", "e": "f4", "q": "i8", "Q": "u8"}
    host = host.astype(wide.get(host.dtype.char, host.dtype.char))
    step = data.draw(st.sampled_from([1, -1]))
    x = strict.asarray(host)[::step, ...]
    y = A @ x
    assert type(y) is type(x)
    _check(A, dense, np.from_dlpack(y), _as_double(host[::step]))
