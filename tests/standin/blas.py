"""The raw cuBLAS calls of CuPy's solvers, on host memory.

Addresses, lengths and increments are believed, as cuBLAS does: the pointer of a strided
array gives a wrong result here as it does there.
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


def _dot(dtype: np.dtype, product: Callable) -> Callable:
    def dot(handle: int, n: int, x: int, incx: int, y: int, incy: int, out: int) -> None:
        left, right = _vector(x, n, dtype, incx), _vector(y, n, dtype, incy)
        _vector(out, 1, dtype)[0] = product(left, right)

    return dot


def _nrm2(dtype: np.dtype) -> Callable:
    def nrm2(handle: int, n: int, x: int, incx: int, out: int) -> None:
        vector = _vector(x, n, dtype, incx)
        _vector(out, 1, vector.real.dtype)[0] = np.linalg.norm(vector)

    return nrm2


def _axpy(dtype: np.dtype) -> Callable:
    def axpy(handle: int, n: int, a: int, x: int, incx: int, y: int, incy: int) -> None:
        alpha = _vector(a, 1, dtype)[0]
        if alpha != 0:  # else BLAS does not read x, which eigsh has not initialized
            target = _vector(y, n, dtype, incy)
            target += alpha * _vector(x, n, dtype, incx)

    return axpy


def _gemv(dtype: np.dtype) -> Callable:
    def gemv(handle: int, op: int, m: int, n: int, a: int, *rest: int) -> None:
        matrix, lda, x, incx, b, y, incy = rest
        rows, columns = (m, n) if op == _OP_N else (n, m)
        alpha, beta = _vector(a, 1, dtype)[0], _vector(b, 1, dtype)[0]
        flat = _vector(matrix, lda * (n - 1) + m, dtype)
        strides = (dtype.itemsize, lda * dtype.itemsize)  # column after column
        A = np.lib.stride_tricks.as_strided(flat, (m, n), strides)
        A = {_OP_N: A, _OP_T: A.T, _OP_C: A.conj().T}[op]
        product = alpha * (A @ _vector(x, columns, dtype, incx))
        target = _vector(y, rows, dtype, incy)
        # with beta = 0 BLAS does not read y, which may be uninitialized
        target[...] = product if beta == 0 else product + beta * target

    return gemv


def _functions() -> dict[str, Any]:
    functions: dict[str, Any] = {
        **{"CUBLAS_OP_N": _OP_N, "CUBLAS_OP_T": _OP_T, "CUBLAS_OP_C": _OP_C},
        **{"CUBLAS_POINTER_MODE_HOST": 0, "CUBLAS_POINTER_MODE_DEVICE": 1},
        # scalars on the host and on the device are both host memory here
        "getPointerMode": lambda handle: 0,
        "setPointerMode": lambda handle, mode: None,
    }
    for letter, code, nrm2 in (
        *(("s", "f", "snrm2"), ("d", "d", "dnrm2")),
        *(("c", "F", "scnrm2"), ("z", "D", "dznrm2")),
    ):
        dtype = np.dtype(code)
        functions[nrm2] = _nrm2(dtype)
        functions[f"{letter}axpy"] = _axpy(dtype)
        functions[f"{letter}gemv"] = _gemv(dtype)
        for name in ("dotc", "dotu") if dtype.kind == "c" else ("dot",):
            product = np.vdot if name == "dotc" else np.dot
            functions[letter + name] = _dot(dtype, product)
    return functions


FUNCTIONS = _functions()
