r"""Inverses by a factorization of the dense matrix, for small problems."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from torchlinop._memory import free_memory
from torchlinop._operator import TorchLinearOperator
from torchlinop.solve.arguments import finite, square_operator
from torchlinop.solve.report import NegativeCurvatureError
from torchlinop.solve.system import random_vector

Factors: TypeAlias = tuple[Tensor, ...]


class _Factorization:
    """A factorization of a dense matrix that notices when the operator has changed.

    The operator's product with one fixed random vector is compared with what it was,
    entry by entry; a change by some rounding errors is none.
    """

    def __init__(
        self, A: TorchLinearOperator, solver: str, factorize: Callable[[Tensor], Factors]
    ) -> None:
        n = A.shape[0]
        needed = 3 * n * n * A.dtype.itemsize
        if needed > free_memory(A.device):
            raise MemoryError(
                f"{solver} of a {n} x {n} operator takes {needed / 2**30:.1f} GiB, more "
                f"than half of what is free on {A.device}. Use CGInverseLinearOperator or "
                "MINRESInverseLinearOperator, which need no dense matrix."
            )
        self._A, self._solver = A, solver
        self._factorize = factorize
        self._probe = random_vector(A, seed=0)
        self._image: Tensor | None = None
        self._factors: Factors = ()

    def refreshed(self) -> Factors:
        """Return the factors of the operator as it is now."""
        image = self._A._product(self._probe)
        tolerance = 16 * torch.finfo(image.dtype).eps
        old = self._image
        if old is None or not ((image - old).abs() <= tolerance * old.abs()).all():
            self._factors = self._factorize(self._dense())
            self._image = image
        return self._factors

    def _dense(self) -> Tensor:
        matrix = self._A.to_dense()
        if not torch.isfinite(matrix).all():
            raise ValueError(
                f"{self._solver}: the matrix has NaN or infinite entries. Look for them in "
                "parameters and data with check_finite=True."
            )
        asymmetry = (matrix - matrix.mH).norm().item()
        size = matrix.norm().item()
        if asymmetry > torch.finfo(matrix.dtype).eps ** 0.5 * size:
            raise ValueError(
                f"{self._solver} needs a Hermitian matrix, but |A - A^H| is "
                f"{asymmetry / max(size, 1e-300):.1e} times |A|. Use "
                "LSMRInverseLinearOperator."
            )
        return (matrix + matrix.mH) / 2


def _cholesky(matrix: Tensor, *, damping: float) -> Factors:
    matrix.diagonal().add_(damping)
    L, info = torch.linalg.cholesky_ex(matrix)
    if info.item():
        values, vectors = torch.linalg.eigh(matrix)
        raise NegativeCurvatureError(
            "The matrix is not positive definite: its smallest eigenvalue is "
            f"{values[0].item():.3e} (damping {damping:g} included). Increase damping, or "
            "use EighInverseLinearOperator, which takes indefinite matrices.",
            vectors[:, 0],
            values[0].item(),
        )
    return (L,)


class CholeskyInverseLinearOperator(TorchLinearOperator):
    r"""Inverse of a small positive definite matrix by Cholesky factorization.

    .. math:: (A + \delta I)^{-1}

    The dense matrix is made from ``N`` products at the first use, and again when the
    operator has changed, which one product in each use finds out.

    Parameters
    ----------
    A
        Hermitian: an operator, a matrix, a sparse matrix, shape ``(N, N)``.
    damping
        :math:`\delta`, added to the diagonal.

    Raises
    ------
    NegativeCurvatureError
        At the first use, when the damped matrix is not positive definite.
    MemoryError
        The dense matrix does not fit.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import CholeskyInverseLinearOperator
    >>> CholeskyInverseLinearOperator(torch.eye(2), damping=1.0) @ torch.ones(2)
    tensor([0.5000, 0.5000])
    """

    def __init__(self, A: Any, *, damping: float = 0.0) -> None:
        A = square_operator(A, "CholeskyInverseLinearOperator")
        super().__init__(A.shape, A.torch_dtype, A.device)
        self.A = A
        self.damping = finite("damping", damping)
        factorize = functools.partial(_cholesky, damping=self.damping)
        self._factors = _Factorization(A, "CholeskyInverseLinearOperator", factorize)

    def with_damping(self, damping: float) -> CholeskyInverseLinearOperator:
        """Return the inverse for another damping; it is factorized at its first use."""
        return CholeskyInverseLinearOperator(self.A, damping=damping)

    def _apply(self, x: Tensor) -> Tensor:
        (L,) = self._factors.refreshed()
        return torch.cholesky_solve(x, L)

    def _adjoint(self) -> TorchLinearOperator:
        return self


def _eigenpairs(matrix: Tensor) -> Factors:
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


class EighInverseLinearOperator(TorchLinearOperator):
    r"""Inverse of a small Hermitian matrix by its eigenvalues, which may be negative.

    .. math:: (A + \delta I)^{-1}

    The dense matrix is made from ``N`` products at the first use, and again when the
    operator has changed. All dampings share one eigendecomposition.

    Parameters
    ----------
    A
        Hermitian: an operator, a matrix, a sparse matrix, shape ``(N, N)``.
    damping
        :math:`\delta`, added to the eigenvalues.

    Raises
    ------
    numpy.linalg.LinAlgError
        In a product, when the damped matrix is singular to working precision.
    MemoryError
        The dense matrix does not fit.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import EighInverseLinearOperator
    >>> inverse = EighInverseLinearOperator(torch.eye(2), damping=-3.0)
    >>> inverse.with_damping(1.0) @ torch.ones(2)
    tensor([0.5000, 0.5000])
    """

    def __init__(self, A: Any, *, damping: float = 0.0) -> None:
        A = square_operator(A, "EighInverseLinearOperator")
        super().__init__(A.shape, A.torch_dtype, A.device)
        self.A = A
        self.damping = finite("damping", damping)
        self._factors = _Factorization(A, "EighInverseLinearOperator", _eigenpairs)

    def with_damping(self, damping: float) -> Self:
        """Return the inverse for another damping, at no cost."""
        inverse = copy.copy(self)
        inverse.damping = finite("damping", damping)
        return inverse

    def _apply(self, x: Tensor) -> Tensor:
        values, vectors = self._factors.refreshed()
        damped = values + self.damping
        smallest = damped.abs().min().item() if len(values) else 1.0
        scale = values.abs().max().item() if len(values) else 1.0
        if smallest <= 10 * torch.finfo(values.dtype).eps * scale:
            raise np.linalg.LinAlgError(
                f"The matrix is singular: with damping {self.damping:g} an eigenvalue is "
                f"{smallest:.1e} in size, below the rounding error of the largest, "
                f"{scale:.1e}. Choose another damping."
            )
        return vectors @ ((vectors.mH @ x) / damped.unsqueeze(1))

    def _adjoint(self) -> TorchLinearOperator:
        return self
