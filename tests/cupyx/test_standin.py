"""The stand-in refuses what CuPy refuses, and leaves no trace."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from tests import standin


def test_the_stand_in_refuses_what_cupy_refuses(cupy):
    x = cupy.asarray(np.ones(3))
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(x)
    with pytest.raises(TypeError, match="Unsupported type"):
        x + np.ones(3)
    with pytest.raises(TypeError, match="Unsupported type"):
        np.ones(3) @ x
    with pytest.raises(TypeError, match="Unsupported type"):
        cupy.dot(x, np.ones(3))
    with pytest.raises(TypeError, match="no implementation found"):
        np.dot(x, x)
    with pytest.raises(BufferError, match="negative strides"):
        torch.from_dlpack(x[::-1])
    assert not hasattr(x, "__array_interface__")
    assert not hasattr(x.flags, "writeable")


def test_the_stand_in_gives_views_for_integers_and_0d_arrays_for_scalars(cupy):
    x = cupy.asarray(np.ones((2, 3)))
    x[1, 2][...] = 5.0
    assert x.get()[1, 2] == 5.0
    assert isinstance(x.sum(), cupy.ndarray)
    assert x.sum().shape == ()
    assert isinstance(np.float64(2.0) * x, cupy.ndarray)


def test_the_stand_in_is_taken_out_again():
    mine = ModuleType("cupy")
    before = {name: m for name, m in sys.modules.items() if name.startswith("cupy")}
    sys.modules["cupy"] = mine
    try:
        with standin.installed() as cupy:
            assert sys.modules["cupy"] is cupy is not mine
        assert sys.modules["cupy"] is mine
    finally:
        del sys.modules["cupy"]
        sys.modules.update(before)
    assert before == {n: m for n, m in sys.modules.items() if n.startswith("cupy")}


def test_blas_leaves_alone_what_a_zero_scalar_makes_irrelevant(cupy):
    raw = sys.modules["cupy_backends.cuda.libs.cublas"]
    garbage, y = cupy.empty(2), cupy.asarray(np.ones(2))
    matrix, zero, one = cupy.eye(2), np.array(0.0), np.array(1.0)
    raw.daxpy(0, 2, zero.ctypes.data, garbage.data.ptr, 1, y.data.ptr, 1)
    np.testing.assert_array_equal(y.get(), [1, 1])
    scalars = one.ctypes.data, zero.ctypes.data
    raw.dgemv(
        *(0, raw.CUBLAS_OP_N, 2, 2, scalars[0], matrix.data.ptr, 2, y.data.ptr, 1),
        *(scalars[1], garbage.data.ptr, 1),
    )
    np.testing.assert_array_equal(garbage.get(), [1, 1])
