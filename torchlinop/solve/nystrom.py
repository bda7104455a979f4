r"""The randomized Nyström preconditioner."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop.solve.arguments import at_least_zero, count, square_operator
from torchlinop.solve.preconditioner import Preconditioner
from torchlinop.solve.report import NegativeCurvatureError
from torchlinop.solve.system import random_rows

#: rank with which the search for a rank begins
_FIRST_RANK = 10
#: largest eigenvalue, in dampings, that may be left to conjugate gradients
_TAIL = 10.0


class NystromPreconditioner(Preconditioner):
    r"""Inverse of a damped positive semi-definite matrix, from a random sketch of it.

    With :math:`U \Lambda U^H` the Nyström approximation of rank :math:`\ell` of ``A``, this
    is

    .. math:: (\lambda_\ell + \delta) \, U (\Lambda + \delta I)^{-1} U^H + I - U U^H ,

    which leaves a condition number of about :math:`1 + \lambda_\ell / \delta`.

    Parameters
    ----------
    A
        Positive semi-definite (GGN, Fisher), without the damping; shape ``(N, N)``.
    damping
        :math:`\delta`, that of the system to be solved.
    rank
        Number :math:`\ell` of sketched vectors, which are multiplied with ``A`` at once.
        By default it is doubled, from 10 on, until the smallest eigenvalue that is found
        is at most ``10 damping``.
    max_rank
        Most vectors when the rank is searched for; by default ``min(N, 1000)``.
    seed
        Of the random sketch, which is the same on every device.

    Attributes
    ----------
    eigenvalues : torch.Tensor
        Of the approximation, shape ``(rank,)``, largest first.
    eigenvectors : torch.Tensor
        Shape ``(N, rank)``.
    rank : int
    num_matvecs : int
        Vectors that were multiplied with ``A``.

    Raises
    ------
    ValueError
        The damping is negative; or it is zero and no rank is given, or the matrix is
        singular.
    NegativeCurvatureError
        ``A`` is not positive semi-definite.

    References
    ----------
    Frangella, Tropp and Udell, "Randomized Nyström preconditioning", SIAM J. Matrix Anal.
    Appl. 44 (2023), https://doi.org/10.1137/21M1466244: algorithm 2.1 and section 5.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import NystromPreconditioner
    >>> A = torch.diag(torch.tensor([100.0, 1.0, 1.0, 1.0]))
    >>> M = NystromPreconditioner(A, damping=0.5)
    >>> M.rank
    4
    >>> M @ torch.ones(4)
    tensor([0.0149, 1.0000, 1.0000, 1.0000])
    """

    def __init__(
        self,
        A: Any,
        damping: float,
        *,
        rank: int | None = None,
        max_rank: int | None = None,
        seed: int = 0,
    ) -> None:
        A = square_operator(A, "NystromPreconditioner")
        n = A.shape[0]
        super().__init__(A.shape, A.torch_dtype, A.device)
        self.damping = at_least_zero("damping", damping)
        if rank is None and not self.damping:
            raise ValueError(
                "The rank is searched for by comparing eigenvalues with the damping: give "
                "a positive damping, or a rank."
            )
        if not n or max_rank == 0:
            raise ValueError(
                f"A sketch needs at least one vector, but A is {n} x {n} and max_rank "
                f"{max_rank}."
            )
        sketch = _Sketch(A, seed)
        if rank is not None:
            if not 1 <= count("rank", rank) <= n:
                raise ValueError(f"rank has to be between 1 and N = {n}, got {rank}.")
            sketch.grow(int(rank))
        else:
            limit = (
                min(n, 1000) if max_rank is None else min(n, count("max_rank", max_rank))
            )
            width = min(_FIRST_RANK, limit)
            sketch.grow(width)
            while (
                sketch.eigenpairs()[0][-1].item() > _TAIL * self.damping and width < limit
            ):
                width = min(2 * width, limit)
                sketch.grow(width)
        self.eigenvalues, self.eigenvectors = sketch.eigenpairs()
        self.rank = len(self.eigenvalues)
        self.num_matvecs = self.rank
        self._set_factors()

    def _set_factors(self) -> None:
        damped = self.eigenvalues + self.damping
        if not damped[-1] > 0:
            raise ValueError(
                f"The matrix is singular (its rank is below {self.rank}) and the damping "
                "is zero, so there is no inverse. Pass a positive damping."
            )
        self._factors = (damped[-1] / damped - 1).unsqueeze(1)

    def with_damping(self, damping: float) -> Self:
        """Return the preconditioner for another damping, from the same sketch."""
        preconditioner = copy.copy(self)
        preconditioner.damping = at_least_zero("damping", damping)
        preconditioner._set_factors()
        return preconditioner

    def _apply(self, x: Tensor) -> Tensor:
        U = self.eigenvectors
        return torch.addmm(x, U, self._factors * (U.mH @ x))

    def _adjoint(self) -> TorchLinearOperator:
        return self


class _Sketch:
    """``Y = A Omega`` for an orthonormal random ``Omega`` that can grow."""

    def __init__(self, A: TorchLinearOperator, seed: int) -> None:
        self._A = A
        self._generator = torch.Generator("cpu").manual_seed(seed)
        n = A.shape[0]
        self._omega = torch.zeros(n, 0, dtype=A.torch_dtype, device=A.device)
        self._image = self._omega.clone()
        self._pairs: tuple[Tensor, Tensor] | None = None

    def grow(self, width: int) -> None:
        """Multiply as many vectors as are missing."""
        A, omega = self._A, self._omega
        added = width - omega.shape[1]
        new = random_rows(added, A, self._generator).T
        for _ in range(2):
            new = torch.linalg.qr(new - omega @ (omega.mH @ new))[0]
        self._omega = torch.cat([omega, new], dim=1)
        self._image = torch.cat([self._image, A._product(new)], dim=1)
        self._pairs = None

    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues, largest first, and eigenvectors of the approximation."""
        if self._pairs is None:
            self._pairs = self._compute()
        return self._pairs

    def _compute(self) -> tuple[Tensor, Tensor]:
        omega, image = self._omega, self._image
        size = torch.linalg.matrix_norm(image).item()
        if not torch.isfinite(image).all():
            raise ValueError("The products of A with random vectors are not finite.")
        if size == 0:
            return image.new_zeros(image.shape[1], dtype=image.real.dtype), omega
        shift = image.shape[0] ** 0.5 * torch.finfo(image.dtype).eps * size
        shifted = image + shift * omega
        core = omega.mH @ shifted
        core = ((core + core.mH) / 2).to(torch.promote_types(core.dtype, torch.float64))
        L, info = torch.linalg.cholesky_ex(core)
        if info.item():
            values, vectors = torch.linalg.eigh(core)
            direction = omega @ vectors[:, 0].to(omega.dtype)
            raise NegativeCurvatureError(
                "The matrix is not positive semi-definite: along one direction p of length "
                f"1, p^H A p = {values[0].item():.3e}. The Nyström preconditioner is for "
                "positive semi-definite matrices: the GGN or a Fisher matrix, not the "
                "Hessian; pass A without a negative shift.",
                direction,
                values[0].item(),
            )
        B = torch.linalg.solve_triangular(
            L, shifted.mH.to(core.dtype), upper=False
        ).mH.contiguous()
        U, S, _ = torch.linalg.svd(B, full_matrices=False)
        values = (S**2 - shift).clamp(min=0)
        return values.to(image.real.dtype), U.to(image.dtype)
