"""Estimators with curvlinops' arguments.

Random vectors follow ``torch.manual_seed``, as that library's do, and differ from call to
call; the numbers for a seed are others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlinop import estimate
from torchlinop._operator import TorchLinearOperator, aslinearoperator

_PROBES = {"rademacher": "rademacher", "normal": "gaussian"}


def drawn_seed() -> int:
    """Draw a seed from torch's global generator."""
    return int(torch.randint(2**31, (), device="cpu"))


def hutchinson_trace(A: Any, num_matvecs: int, distribution: str = "rademacher") -> Tensor:
    """Hutchinson's estimate of the trace."""
    return _trace(A, "hutchinson", num_matvecs, distribution, 1)


def hutchpp_trace(A: Any, num_matvecs: int, distribution: str = "rademacher") -> Tensor:
    """Hutch++ estimate of the trace; the number of products is a multiple of 3."""
    return _trace(A, "hutch++", num_matvecs, distribution, 3)


def xtrace(A: Any, num_matvecs: int, distribution: str = "rademacher") -> Tensor:
    """XTrace estimate of the trace; the number of products is even."""
    return _trace(A, "xtrace", num_matvecs, distribution, 2)


def hutchinson_diag(A: Any, num_matvecs: int, distribution: str = "rademacher") -> Tensor:
    """Hutchinson's estimate of the diagonal, shape ``(N,)``."""
    A = _checked(A, num_matvecs, 1)
    found = estimate.diagonal(
        A, num_matvecs=num_matvecs, probes=_kind(distribution), seed=drawn_seed()
    )
    return found.value


def xdiag(A: Any, num_matvecs: int) -> Tensor:
    """XDiag estimate of the diagonal, shape ``(N,)``; the number of products is even."""
    A = _checked(A, num_matvecs, 2)
    found = estimate.diagonal(A, method="xdiag", num_matvecs=num_matvecs, seed=drawn_seed())
    return found.value


def hutchinson_squared_fro(
    A: Any, num_matvecs: int, distribution: str = "rademacher"
) -> Tensor:
    """Estimate the squared Frobenius norm of a matrix of any shape."""
    A = _checked(A, num_matvecs, 1)
    found = estimate.frobenius_norm(
        A, num_matvecs=num_matvecs, probes=_kind(distribution), seed=drawn_seed()
    )
    return _number(found.value**2, A)


def _trace(
    A: Any, method: Any, num_matvecs: int, distribution: str, divisor: int
) -> Tensor:
    A = _checked(A, num_matvecs, divisor)
    found = estimate.trace(
        A,
        method=method,
        num_matvecs=num_matvecs,
        probes=_kind(distribution),
        seed=drawn_seed(),
    )
    return _number(found.value, A)


def _kind(distribution: str) -> Any:
    if distribution not in _PROBES:
        raise ValueError(
            f"distribution has to be 'rademacher' or 'normal', got {distribution!r}."
        )
    return _PROBES[distribution]


def _checked(A: Any, num_matvecs: int, divisor: int) -> TorchLinearOperator:
    """Return ``A`` as an operator; refuse numbers of products that library refuses."""
    A = aslinearoperator(A)
    if num_matvecs >= min(A.shape):
        raise ValueError(
            f"num_matvecs ({num_matvecs}) has to be less than A's size {A.shape}."
        )
    if num_matvecs % divisor:
        raise ValueError(
            f"num_matvecs has to be divisible by {divisor}, got {num_matvecs}."
        )
    return A


def _number(value: complex, A: TorchLinearOperator) -> Tensor:
    return torch.tensor(value, dtype=A.torch_dtype, device=A.device)
