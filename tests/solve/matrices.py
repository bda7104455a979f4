"""Matrices with a spectrum of our choice."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torchlinop import CGInverseLinearOperator, MINRESInverseLinearOperator


def with_spectrum(values: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A Hermitian matrix with these eigenvalues and random eigenvectors."""
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float64)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=wide))
    matrix = (Q * values.to(torch.float64)) @ Q.mH
    return ((matrix + matrix.mH) / 2).to(dtype)


def positive(n: int, condition: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Positive definite: eigenvalues spread evenly on a logarithmic scale, largest 1."""
    exponents = torch.linspace(0, 1, n, dtype=torch.float64)
    return with_spectrum(condition**-exponents, dtype)


def indefinite(n: int, condition: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same with every third eigenvalue negative."""
    exponents = torch.linspace(0, 1, n, dtype=torch.float64)
    signs = torch.where(torch.arange(n) % 3 == 1, -1.0, 1.0)
    return with_spectrum(signs * condition**-exponents, dtype)


def vectors(n: int, columns: int | None, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Random right-hand sides."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float64)
    shape = (n,) if columns is None else (n, columns)
    return torch.randn(*shape, generator=generator, dtype=wide).to(dtype)


def relative(solver: Callable, rtol: float) -> dict[str, float]:
    """Options of one of SciPy's solvers: ``tol`` up to 1.11, ``rtol`` since 1.12."""
    names = inspect.signature(solver).parameters
    options = {"rtol" if "rtol" in names else "tol": rtol}
    return options | ({"atol": 0.0} if "atol" in names else {})


KRYLOV = {"CG": CGInverseLinearOperator, "MINRES": MINRESInverseLinearOperator}


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def residuals(A: Tensor, x: Tensor, b: Tensor) -> Tensor:
    """Norms of the columns of ``b - A x``, in double precision."""
    wide = torch.promote_types(A.dtype, torch.float64)
    return torch.linalg.vector_norm(A.to(wide) @ x.to(wide) - b.to(wide), dim=0).reshape(-1)
