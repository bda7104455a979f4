"""What users pass: conversions and checks."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
from torch import Tensor

from torchlinop._interchange import as_tensor
from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop._typing import Array
from torchlinop.solve.report import OnFailure


def square_operator(A: Any, solver: str) -> TorchLinearOperator:
    """Return ``A`` as one of our operators, and refuse rectangular ones."""
    A = aslinearoperator(A)
    if A.shape[0] != A.shape[1]:
        raise ValueError(
            f"{solver} inverts square matrices, got {A.shape[0]} x {A.shape[1]}. For the "
            "least-squares solution use LSMRInverseLinearOperator."
        )
    return A


def starting_vectors(x0: Array, A: TorchLinearOperator) -> Tensor:
    """Return ``x0`` as a fresh ``(N, K)`` tensor that fits ``A``."""
    start = as_tensor(x0, A.device)
    if start.ndim not in (1, 2) or start.shape[0] != A.shape[1]:
        raise ValueError(
            f"x0 has to have shape (N,) or (N, K) with N = {A.shape[1]}, got "
            f"{tuple(start.shape)}."
        )
    if start.dtype.is_complex and not A.torch_dtype.is_complex:
        raise TypeError(f"x0 is complex, but A is real ({A.dtype}).")
    start = start.detach().to(A.torch_dtype, copy=True)
    return start.unsqueeze(1) if start.ndim == 1 else start


def one_for_each_column(start: Tensor, B: Tensor) -> Tensor:
    """Return the starting vectors ``(N, 1)`` or ``(N, K)`` as a view ``(N, K)``."""
    if start.shape[1] not in (1, B.shape[1]):
        raise ValueError(
            f"x0 has {start.shape[1]} columns, the right-hand side {B.shape[1]}."
        )
    return start.expand(-1, B.shape[1])


def finite(name: str, value: float) -> float:
    """Return a real number."""
    number = float(value)
    if not np.isfinite(number):
        raise ValueError(f"{name} has to be a finite number, got {value!r}.")
    return number


def at_least_zero(name: str, value: float) -> float:
    """Return a real number that is not negative."""
    if not finite(name, value) >= 0:
        raise ValueError(f"{name} has to be at least 0, got {value!r}.")
    return float(value)


def count(name: str, value: int) -> int:
    """Return an integer that is not negative."""
    if int(value) != value or value < 0:
        raise ValueError(f"{name} has to be an integer >= 0, got {value!r}.")
    return int(value)


def one_of_failures(value: str) -> Any:
    """Return what to do about columns that do not converge."""
    if value not in get_args(OnFailure):
        raise ValueError(
            f"on_failure has to be 'warn', 'raise' or 'ignore', got {value!r}."
        )
    return value
