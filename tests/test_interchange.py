"""Arrays however they lie in memory, and tensors of every make."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided
from scipy.sparse.linalg import svds
from torchlinop import aslinearoperator
from torchlinop._interchange import import_array

from tests.conftest import array_api_strict


def _field(shape):
    return np.zeros(shape, [("value", "f8"), ("flag", "?")])["value"]


#: NumPy calls some of these contiguous and aligned; torch refuses all but the last
AWKWARD = {
    "reversed single column": np.ones((3, 1))[:, ::-1],
    "reversed single row": np.ones((1, 3))[::-1],
    "reversed single entry": np.ones(1)[::-1],
    "reversed nothing": np.ones(0)[::-1],
    "no reversed columns": np.ones((3, 0))[:, ::-1],
    "one record": _field(1),
    "a column of one record": _field((1, 1)),
    "no records": _field((0, 2)),
    "stride 0": as_strided(np.ones(1), (3,), (0,)),
}


@pytest.mark.parametrize("x", AWKWARD.values(), ids=AWKWARD)
def test_strides_that_numpy_passes_over(x, rng):
    matrix = rng.standard_normal((4, x.shape[0]))
    y = aslinearoperator(matrix) @ x
    np.testing.assert_allclose(y, matrix @ x)
    if x.ndim == 2:
        np.testing.assert_array_equal(aslinearoperator(x).to_dense(), x)
    assert not np.shares_memory(y, x)


def test_svds_hands_on_a_reversed_column(rng):
    """Of a matrix with less than five columns, on which lobpcg calls eigh."""
    matrix = rng.standard_normal((20, 4))
    A = aslinearoperator(matrix)
    with pytest.warns(UserWarning, match="problem size 4"):
        U, s, Vh = svds(A, k=1, solver="lobpcg", v0=rng.standard_normal(4))
    np.testing.assert_allclose(s, np.linalg.norm(matrix, 2), rtol=1e-6)
    np.testing.assert_allclose(matrix.T @ U, Vh.T * s, atol=1e-3)


def _random_array(rng, shape):
    """Any dtype, byte order, alignment, order, strides and flags."""
    dtype = np.dtype(rng.choice(list("?bBhHiIqQefdgFDG")))
    dtype = dtype.newbyteorder(rng.choice(["<", ">"]))
    steps = rng.choice([1, 1, 2, -1, -3], len(shape))
    whole = tuple(abs(steps) * shape)
    order = rng.choice(["C", "F"])
    where = rng.integers(3)
    if where == 0:
        array = np.zeros(whole, dtype, order)
    elif where == 1:
        pad = int(rng.integers(1, 2 * dtype.itemsize))
        array = np.zeros(whole, [("value", dtype), ("pad", f"V{pad}")], order)["value"]
    else:
        memory = np.zeros(np.prod(whole, dtype=int) * dtype.itemsize + 1, "u1")
        array = memory[1:].view(dtype).reshape(whole, order=order)
    array = array[tuple(slice(None, None, step) for step in steps)]
    array[...] = rng.integers(0, 2 if dtype.kind == "b" else 4, shape)
    if dtype.kind == "c":
        array *= 1 - 2j
    if rng.random() < 0.1:  # a dimension that is not there may have any stride
        strides = [
            s if n > 1 and array.size else int(rng.integers(-20, 20))
            for n, s in zip(shape, array.strides, strict=True)
        ]
        array = as_strided(array, shape, strides)
    if rng.random() < 0.1 and array.size:
        array = as_strided(array, shape, (0, *array.strides[1:]))
    if rng.random() < 0.3:
        array.flags.writeable = False
    return array


def test_random_arrays(rng):
    """Small integers, so that products are exact in every dtype."""
    for _ in range(1500):
        m, n, k = rng.integers(0, 4, 3)
        matrix = rng.integers(-3, 4, (m, n)).astype(rng.choice(list("fdFD")))
        x = _random_array(rng, (n,) if rng.random() < 0.4 else (n, k))
        before = x.copy()
        about = f"{x.shape} {x.strides} {x.dtype} {x.flags}"
        A = aslinearoperator(matrix)
        y, left = A @ x, x.T @ A.T
        expected = matrix.astype("D") @ before.astype("D")
        assert y.dtype == left.dtype == np.result_type(matrix, x), about
        np.testing.assert_array_equal(y, expected, about)
        np.testing.assert_array_equal(left, expected.T, about)
        np.testing.assert_array_equal(x, before, about)
        assert not np.shares_memory(y, x), about


def test_matrices_of_another_byte_order():
    for char in "fdFD":
        matrix = np.arange(6).reshape(2, 3).astype(char)
        A = aslinearoperator(matrix.astype(matrix.dtype.newbyteorder()))
        assert A.dtype == matrix.dtype
        np.testing.assert_array_equal(A.to_dense(), matrix)


@pytest.mark.parametrize("shape", [(1,), (3, 1), (1, 3), (3, 0)])
def test_reversed_short_dimensions_of_another_library(shape, rng):
    strict = array_api_strict()
    matrix, host = rng.standard_normal((2, shape[0])), rng.standard_normal(shape)
    x = strict.asarray(host)
    x = x[::-1] if len(shape) == 1 else x[::-1, ::-1]
    y = aslinearoperator(matrix) @ x
    np.testing.assert_allclose(np.from_dlpack(y), matrix @ np.flip(host))


class Marked(torch.Tensor):
    """A subclass without behaviour."""


def _inference(t):
    with torch.inference_mode():
        return t.clone()


TENSORS = {
    "conjugated": lambda t: t.conj_physical().conj(),
    "negated": lambda t: torch._neg_view(-t),
    "with gradient": lambda t: t.clone().requires_grad_(),
    "part of a graph": lambda t: t.clone().requires_grad_() * 1,
    "of inference mode": _inference,
    "transposed": lambda t: t.mT.contiguous().mT,
    "strided": lambda t: t.repeat_interleave(2, 0)[::2],
    "expanded": lambda t: t[:1].expand(t.shape),
    "subclass": lambda t: t.as_subclass(Marked),
    "parameter": torch.nn.Parameter,
    "empty": lambda t: t[:, :0],
}


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128], ids=str)
def test_tensors_of_every_make(make, dtype):
    matrix = torch.randn(3, 4, dtype=torch.float64)
    x = make(torch.randn(4, 2, dtype=dtype))
    plain = x.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().clone()
    y = aslinearoperator(matrix) @ x
    assert not y.requires_grad
    expected = matrix.to(plain.dtype.to_complex()) @ plain.to(plain.dtype.to_complex())
    assert y.dtype == torch.promote_types(dtype, torch.float64)
    torch.testing.assert_close(
        y.as_subclass(torch.Tensor).to(expected.dtype), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("operator_dtype", ["f", "D"])
@pytest.mark.parametrize(
    "dtype",
    [torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.bfloat16]
    + [torch.float8_e4m3fn, torch.complex32],
    ids=str,
)
def test_tensors_of_narrow_dtypes(dtype, operator_dtype):
    """Torch itself promotes some of these with nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex32 is experimental
        x = torch.tensor([0.0, 1.0, 1.0]).to(dtype)
    A = aslinearoperator(np.arange(6).reshape(2, 3).astype(operator_dtype))
    y = A @ x
    assert y.tolist() == [3, 9]
    assert y.is_complex() == (dtype.is_complex or operator_dtype == "D")
    assert y.real.dtype == (torch.float32 if operator_dtype == "f" else torch.float64)


def test_tensors_without_numbers_to_multiply():
    A = aslinearoperator(np.eye(3))
    with pytest.raises(ValueError, match="The tensor is on meta and the operator computes"):
        A @ torch.ones(3, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated
        x = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"qint8. Pass x.dequantize\(\)"):
        A @ x


def test_sequences_of_numbers():
    A = aslinearoperator(np.eye(3))
    for x in (
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        range(1, 4),
        [torch.tensor(i) for i in (1, 2, 3)],
    ):
        np.testing.assert_array_equal(A @ x, [1, 2, 3])
    np.testing.assert_array_equal(A @ [[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 4], [5, 6]])


def _unaligned(n):
    return np.zeros(8 * n + 1, "u1")[1:].view("f8")


@pytest.mark.parametrize(
    ("x", "shared"),
    [
        (np.ones(4), True),
        (np.ones((4, 3))[::2, 1:], True),
        (np.ones((3, 4)).T, True),
        (AWKWARD["stride 0"], True),
        (_unaligned(4), False),
        (np.broadcast_to(np.ones(1), 4), False),
        (np.ones(4)[::-1], False),
        (np.ones(4, ">f8"), False),
        (np.ones(4, "f4"), False),
    ],
    ids=lambda x: str(getattr(x, "dtype", x)),
)
def test_memory_is_shared_where_torch_may_look(x, shared):
    tensor = import_array(x, torch.device("cpu"), torch.float64).tensor
    assert (tensor.data_ptr() == x.ctypes.data) == shared
    assert tensor.data_ptr() % 8 == 0
