"""What users pass: conversions and checks."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlinop._interchange import as_tensor
from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop._typing import Array


def square_operator(A: Any, what: str) -> TorchLinearOperator:
    """Return ``A`` as one of our operators; refuse rectangular and empty ones."""
    A = aslinearoperator(A)
    if A.shape[0] != A.shape[1]:
        raise ValueError(
            f"{what} is for square matrices, got {A.shape[0]} x {A.shape[1]}. For a "
            "rectangular one take A.H @ A, or frobenius_norm(A)."
        )
    return not_empty(A, what)


def not_empty(A: TorchLinearOperator, what: str) -> TorchLinearOperator:
    """Refuse a matrix without entries."""
    if 0 in A.shape:
        raise ValueError(f"{what}: the matrix has no entries, shape {A.shape}.")
    return A


def positive_count(name: str, value: int) -> int:
    """Return an integer that is at least 1."""
    try:
        number = int(value)
        good = not isinstance(value, bool) and number == value and number >= 1
    except (TypeError, ValueError, OverflowError):  # text, a list, NaN, infinity
        good = False
    if not good:
        raise ValueError(f"{name} has to be an integer of at least 1, got {value!r}.")
    return number


def integer_seed(seed: int) -> int:
    """Return the seed of a generator."""
    try:
        return operator.index(seed)
    except TypeError:
        raise TypeError(f"seed has to be an integer, got {seed!r}.") from None


def at_least_zero(name: str, value: float) -> float:
    """Return a real number that is not negative."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} has to be a finite number >= 0, got {value!r}.")
    return number


def target(rtol: float | None) -> float | None:
    """Return a relative error to stop at, between 0 and 1."""
    if rtol is not None and not 0 < float(rtol) < 1:
        raise ValueError(
            f"rtol has to be between 0 and 1 (0.01 is one per cent), got {rtol!r}."
        )
    return None if rtol is None else float(rtol)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return one of several names."""
    if value not in choices:
        raise ValueError(f"{name} has to be one of {', '.join(choices)}, got {value!r}.")
    return value


def require_finite(x: Tensor, what: str) -> None:
    """Refuse NaN and infinity in a product."""
    if not torch.isfinite(x).all():
        raise np.linalg.LinAlgError(
            f"{what}: a product with the matrix has NaN or infinite entries. For a "
            "curvature matrix look for NaN in parameters and data with check_finite=True."
        )


def require_squares(x: Tensor, what: str) -> None:
    """Refuse products of which the squares are beyond the range of the dtype."""
    largest, info = float(x.abs().max()), torch.finfo(x.dtype)
    low, high = 100 * math.sqrt(info.tiny), 0.01 * math.sqrt(info.max / x.numel())
    if math.isfinite(largest) and largest and not low < largest < high:
        raise np.linalg.LinAlgError(
            f"{what}: entries of products are about {largest:.1e}, and squares of such "
            f"numbers are beyond the range of {x.dtype}. Take {0.1 / largest:.0e} * A, "
            "or float64."
        )


def require_symmetric(defect: float, norm: float, eps: float) -> None:
    """Refuse a matrix of which ``Q^H A Q`` differs from its adjoint by this much."""
    if defect > 4 * math.sqrt(eps) * norm:
        raise ValueError(
            "The matrix is not symmetric, or not the same in each product: entries of "
            f"Q^H A Q that should agree differ by {defect:.2e}, where the norm of A is "
            f"about {norm:.2e}. Hessian, GGN and Fisher matrices are symmetric; "
            "for others take (A + A.H) / 2 or A.H @ A."
        )


def evaluated(f: Callable[[np.ndarray], Any], x: np.ndarray) -> np.ndarray:
    """Return ``f(x)``; say what ``f`` gets if it does not take that."""
    try:
        return np.asarray(f(x))
    except TypeError as error:
        raise TypeError(
            "f gets a NumPy array: pass np.exp, for instance, in place of torch.exp. It "
            f"failed with: {error}"
        ) from error


def start_vector(v0: Array, A: TorchLinearOperator) -> Tensor:
    """Return a vector of shape ``(N,)`` or ``(N, 1)`` as a fresh ``(N,)`` tensor."""
    start = as_tensor(v0, A.device)
    if start.shape not in ((A.shape[1],), (A.shape[1], 1)):
        raise ValueError(
            f"v0 has to have shape (N,) with N = {A.shape[1]}, got {tuple(start.shape)}."
        )
    if start.dtype.is_complex and not A.torch_dtype.is_complex:
        raise TypeError(f"v0 is complex, but A is real ({A.dtype}).")
    start = start.detach().to(A.torch_dtype, copy=True).reshape(-1)
    size = float(torch.linalg.vector_norm(start.abs().double()))
    if not (np.isfinite(size) and size > 0):
        raise ValueError(f"v0 has to be finite and not zero, its norm is {size}.")
    return start
