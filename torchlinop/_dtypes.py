"""Dtypes in which operators compute, by the names of NumPy and torch; numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

NUMPY_TO_TORCH: dict[np.dtype, torch.dtype] = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.complex64): torch.complex64,
    np.dtype(np.complex128): torch.complex128,
}
TORCH_TO_NUMPY: dict[torch.dtype, np.dtype] = {t: n for n, t in NUMPY_TO_TORCH.items()}


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """NumPy's name for an operator's dtype (float32/64, complex64/128)."""
    try:
        return TORCH_TO_NUMPY[dtype]
    except KeyError:
        raise TypeError(
            "An operator computes in torch.float32 or float64, complex64 or complex128, "
            f"got {dtype!r}."
        ) from None


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """Torch's name for a NumPy dtype in which operators can compute.

    Integers and booleans become float64, half precision float32; byte order is no
    precision.
    """
    dtype = np.dtype(dtype).newbyteorder("=")
    if dtype in NUMPY_TO_TORCH:
        return NUMPY_TO_TORCH[dtype]
    if dtype.kind == "c":
        return torch.complex128
    return torch.float32 if dtype == np.float16 else torch.float64


def promoted(dtype: torch.dtype, other: torch.dtype) -> torch.dtype:
    """Return the dtype of a product of an operator of ``dtype`` with a tensor."""
    if other in TORCH_TO_NUMPY:
        return torch.promote_types(dtype, other)
    # what is no wider than float32 changes nothing; torch refuses to promote some of it
    return dtype.to_complex() if other.is_complex else dtype


def is_scalar(x: Any) -> bool:
    """Whether ``x`` is a number: Python, NumPy, or a 0-dimensional array of any kind."""
    if np.isscalar(x):
        return not isinstance(x, (str, bytes))
    return getattr(x, "shape", None) == () and (
        hasattr(x, "__float__") or hasattr(x, "__complex__")
    )


def as_number(x: Any) -> float | complex:
    """Return a scalar as a Python number."""
    value = x.item() if hasattr(x, "item") else x
    try:
        return float(value)
    except TypeError:
        return complex(value)
