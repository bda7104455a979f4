"""The raw cuBLAS calls of CuPy's solvers, on host pointers.

Arguments are addresses, and strides, dtypes and lengths are believed, as cuBLAS does: a
strided array whose pointer is passed gives a wrong result here as it does there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

_OP_N, _OP_T, _OP_C = 0, 1, 2


def _vector(pointer: int, n: int, dtype: np.dtype, increment: int = 1) -> np.ndarray:
    if n == 0:
        return np.empty(0, dtype)
    size = ((n - 1) * increment + 1) * dtype.itemsize
    memory = (ctypes.c_char * size).from_address(pointer)
    return np.frombuffer(memory, dtype)[::increment]


def _dot(dtype: np.dtype, *, conjugate: bool) -> Callable:
    def dot(handle: int, n: int, x: int, incx: int, y: int, incy: int, out: int) -> None:
        left, right = _vector(x, n, dtype, incx), _vector(y, n, dtype, incy)
        product = np.vdot(left, right) if conjugate else np.dot(left, right)
        _vector(out, 1, dtype)[0] = product

    return dot


def _nrm2(dtype: np.dtype) -> Callable:
    def nrm2(handle: int, n: int, x: int, incx: int, out: int) -> None:
        vector = _vector(x, n, dtype, incx)
        _vector(out, 1, vector.real.dtype)[0] = np.linalg.norm(vector)

    return nrm2


def _axpy(dtype: np.dtype) -> Callable:
    def axpy(handle: int, n: int, a: int, x: int, incx: int, y: int, incy: int) -> None:
        alpha = _vector(a, 1, dtype)[0]
        if alpha != 0:  # with alpha = 0 BLAS does not read x, which eigsh relies on
            target = _vector(y, n, dtype, incy)
            target += alpha * _vector(x, n, dtype, incx)

    return axpy


def _gemv(dtype: np.dtype) -> Callable:
    def gemv(handle: int, op: int, m: int, n: int, a: int, *rest: int) -> None:
        matrix, lda, x, incx, b, y, incy = rest
        rows, columns = (m, n) if op == _OP_N else (n, m)
        alpha, beta = _vector(a, 1, dtype)[0], _vector(b, 1, dtype)[0]
        target = _vector(y, rows, dtype, incy)
        if beta == 0:  # BLAS does not read y then, which may be uninitialized
            target[...] = 0
        else:
            target *= beta
        if alpha == 0:
            return
        flat = _vector(matrix, lda * (n - 1) + m, dtype)
        strides = (dtype.itemsize, lda * dtype.itemsize)  # by columns
        A = np.lib.stride_tricks.as_strided(flat, (m, n), strides)
        A = {_OP_N: A, _OP_T: A.T, _OP_C: A.conj().T}[op]
        target += alpha * (A @ _vector(x, columns, dtype, incx))

    return gemv


def _functions() -> dict[str, Any]:
    functions: dict[str, Any] = {
        "CUBLAS_OP_N": _OP_N,
        "CUBLAS_OP_T": _OP_T,
        "CUBLAS_OP_C": _OP_C,
        "CUBLAS_POINTER_MODE_HOST": 0,
        "CUBLAS_POINTER_MODE_DEVICE": 1,
        # scalars on the host or on the device are the same addresses here
        "getPointerMode": lambda handle: 0,
        "setPointerMode": lambda handle, mode: None,
    }
    for letter in "sdcz":
        dtype = np.dtype({"s": "f", "d": "d", "c": "F", "z": "D"}[letter])
        if dtype.kind == "c":
            functions[f"{letter}dotc"] = _dot(dtype, conjugate=True)
            functions[f"{letter}dotu"] = _dot(dtype, conjugate=False)
        else:
            functions[f"{letter}dot"] = _dot(dtype, conjugate=False)
        norm = {"s": "snrm2", "d": "dnrm2", "c": "scnrm2", "z": "dznrm2"}[letter]
        functions[norm] = _nrm2(dtype)
        functions[f"{letter}axpy"] = _axpy(dtype)
        functions[f"{letter}gemv"] = _gemv(dtype)
    return functions


FUNCTIONS = _functions()
