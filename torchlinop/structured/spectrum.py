"""Eigendecompositions of symmetric matrices, with a second attempt in float64."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop._convergence import ConvergenceWarning, users_frame
from torchlinop.structured.base import without_noise


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of a symmetric matrix.

    Attributes
    ----------
    values : Tensor
        Shape ``(n,)``; those that are zero up to rounding are zero.
    vectors : Tensor or None
        Shape ``(n, n)``, one eigenvector a column; None for the unit vectors.
    smallest : float
        The smallest eigenvalue as it was computed.
    precision : torch.dtype
        In which it was computed: float64 where float32 has failed.
    """

    values: Tensor
    vectors: Tensor | None
    smallest: float
    precision: torch.dtype

    def matrix(self) -> Tensor:
        """Return the matrix, or its diagonal if it is diagonal."""
        if self.vectors is None:
            return self.values
        matrix = (self.vectors * self.values) @ self.vectors.mT
        return (matrix + matrix.mT) / 2

    def with_values(self, values: Tensor) -> Spectrum:
        """Return a matrix with other eigenvalues and the same eigenvectors."""
        return Spectrum(values, self.vectors, values.min().item(), self.precision)


def spectrum_of(matrix: Tensor, what: str) -> Spectrum:
    """Decompose a symmetric matrix, or a diagonal one that is given by its diagonal.

    Parameters
    ----------
    matrix
        Shape ``(n, n)``, or ``(n,)`` for a diagonal matrix.
    what
        What it is, for errors.

    Raises
    ------
    ValueError
        The matrix is not finite or not symmetric.
    torch.linalg.LinAlgError
        The decomposition fails in float64, too.

    Warns
    -----
    ConvergenceWarning
        It has failed in float32, and was made in float64.
    """
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{what} has NaN or infinite entries, and no eigenvalues.")
    if matrix.ndim == 1:
        return Spectrum(matrix, None, matrix.min().item(), matrix.dtype)
    require_symmetric(matrix, what)
    values, vectors, precision = _eigh(matrix, what)
    return Spectrum(without_noise(values), vectors, values.min().item(), precision)


def require_symmetric(matrix: Tensor, what: str) -> None:
    """Refuse a matrix that differs from its transpose by more than rounding."""
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"{what} has shape {tuple(matrix.shape)}; only square matrices have "
            "eigenvalues."
        )
    if not is_symmetric(matrix):
        difference = (matrix - matrix.mH).abs().max().item()
        raise ValueError(
            f"{what} is not symmetric: it differs from its transpose by up to "
            f"{difference:.3e}. Only symmetric matrices have this function."
        )


def is_symmetric(matrix: Tensor) -> bool:
    """Whether a square matrix is its own adjoint, up to rounding."""
    if not matrix.numel():
        return True
    rounding = 10 * len(matrix) * torch.finfo(matrix.dtype).eps * matrix.abs().max()
    return bool((matrix - matrix.mH).abs().max() <= rounding)


def _noise(matrix: Tensor) -> float:
    return len(matrix) * torch.finfo(matrix.dtype).eps


def _eigh(matrix: Tensor, what: str) -> tuple[Tensor, Tensor, torch.dtype]:
    try:
        values, vectors = torch.linalg.eigh(matrix)
        if torch.isfinite(values).all() and torch.isfinite(vectors).all():
            return values, vectors, matrix.dtype
    except torch.linalg.LinAlgError:
        pass
    wide = torch.complex128 if matrix.is_complex() else torch.float64
    if matrix.dtype != wide:
        warnings.warn(
            f"The eigendecomposition of {what} ({len(matrix)} x {len(matrix)}, largest "
            f"entry {matrix.abs().max().item():.3e}) failed in {matrix.dtype} and was made "
            f"in {wide}; its eigenvalues below about {_noise(matrix):.1e} of the largest "
            "are rounding of the matrix itself. Damp more than that, or compute the "
            "matrix in double precision.",
            ConvergenceWarning,
            stacklevel=users_frame(),
        )
    try:
        values, vectors = torch.linalg.eigh(matrix.to(wide))
    except torch.linalg.LinAlgError as error:
        raise torch.linalg.LinAlgError(
            f"The eigendecomposition of {what} ({len(matrix)} x {len(matrix)}, largest "
            f"entry {matrix.abs().max().item():.3e}) failed in {matrix.dtype} and in "
            f"{wide}: {error}"
        ) from error
    return values.to(matrix.real.dtype), vectors.to(matrix.dtype), wide
