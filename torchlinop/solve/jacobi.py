r"""The Jacobi preconditioner."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from torchlinop._interchange import as_tensor
from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Array
from torchlinop.solve.arguments import at_least_zero, count, square_operator
from torchlinop.solve.preconditioner import Preconditioner

#: columns of the identity that are multiplied at once
_BLOCK = 64


class JacobiPreconditioner(Preconditioner):
    r"""Inverse of the absolute diagonal, :math:`(|\mathrm{diag}(A)| + \delta)^{-1}`.

    Parameters
    ----------
    A
        Shape ``(N, N)``. Its diagonal is computed exactly, by ``N`` products;
        :meth:`estimated` needs fewer, :meth:`from_diagonal` none.
    damping
        :math:`\delta \ge 0`.

    Attributes
    ----------
    diagonal : torch.Tensor
        Absolute diagonal of ``A``, shape ``(N,)``.
    num_matvecs : int
        Vectors that were multiplied with ``A``.

    Raises
    ------
    ValueError
        The damping is negative, or zero while the diagonal has a zero.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import JacobiPreconditioner
    >>> M = JacobiPreconditioner(torch.diag(torch.tensor([1.0, 3.0])), damping=1.0)
    >>> M @ torch.ones(2)
    tensor([0.5000, 0.2500])
    """

    def __init__(self, A: Any, *, damping: float = 0.0) -> None:
        A = square_operator(A, "JacobiPreconditioner")
        n = A.shape[0]
        parts = [torch.zeros(0, dtype=A.torch_dtype, device=A.device)]
        for start in range(0, n, _BLOCK):
            stop = min(start + _BLOCK, n)
            unit = torch.zeros(n, stop - start, dtype=A.torch_dtype, device=A.device)
            unit[start:stop].fill_diagonal_(1)
            parts.append(A._product(unit)[start:stop].diagonal().clone())
        self._setup(torch.cat(parts), damping, n)

    @classmethod
    def estimated(
        cls, A: Any, *, num_matvecs: int, damping: float = 0.0, seed: int = 0
    ) -> Self:
        """Return the preconditioner of an estimated diagonal.

        The mean of ``z * (A z)`` over vectors ``z`` of random signs. Entries for which
        the estimate is not positive are given the mean of the others.

        Parameters
        ----------
        A
            Positive semi-definite, shape ``(N, N)``.
        num_matvecs
            Number of random vectors. The error of an entry is about the norm of the rest
            of its row divided by the root of this.
        damping, seed
            Damping, and seed of the random signs.

        References
        ----------
        Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix", Appl.
        Numer. Math. 57 (2007), https://doi.org/10.1016/j.apnum.2007.01.003
        """
        A = square_operator(A, "JacobiPreconditioner")
        num_matvecs = count("num_matvecs", num_matvecs)
        if not num_matvecs:
            raise ValueError("num_matvecs has to be at least 1.")
        generator = torch.Generator("cpu").manual_seed(seed)
        total = torch.zeros(A.shape[0], dtype=A.torch_dtype, device=A.device)
        for start in range(0, num_matvecs, _BLOCK):
            width = min(_BLOCK, num_matvecs - start)
            signs = torch.randint(2, (width, A.shape[0]), generator=generator, device="cpu")
            z = (2 * signs.T - 1).to(A.device, A.torch_dtype)
            total += (z * A._product(z)).sum(dim=1)
        diagonal = total.real / num_matvecs
        positive = diagonal > 0
        if not positive.any():
            raise ValueError(
                "No entry of the estimated diagonal is positive: A is not positive "
                "semi-definite. Give the diagonal itself to from_diagonal."
            )
        diagonal = torch.where(positive, diagonal, diagonal[positive].mean())
        return cls._made(diagonal, damping, num_matvecs)

    @classmethod
    def from_diagonal(cls, diagonal: Array, *, damping: float = 0.0) -> Self:
        """Return the preconditioner of a known diagonal, an array of shape ``(N,)``."""
        diagonal = as_tensor(diagonal).detach()
        if diagonal.ndim != 1:
            raise ValueError(
                f"The diagonal has to have shape (N,), got {tuple(diagonal.shape)}."
            )
        return cls._made(diagonal, damping, 0)

    @classmethod
    def _made(cls, diagonal: Tensor, damping: float, num_matvecs: int) -> Self:
        preconditioner = cls.__new__(cls)
        preconditioner._setup(diagonal, damping, num_matvecs)
        return preconditioner

    def _setup(self, diagonal: Tensor, damping: float, num_matvecs: int) -> None:
        n = len(diagonal)
        self.diagonal = diagonal.abs()
        super().__init__((n, n), self.diagonal.dtype, diagonal.device)
        self.damping = at_least_zero("damping", damping)
        self.num_matvecs = num_matvecs
        if not torch.isfinite(self.diagonal).all():
            raise ValueError("The diagonal has NaN or infinite entries.")
        damped = self.diagonal + self.damping
        if not (damped > 0).all():
            zeros = int((damped == 0).sum())
            raise ValueError(
                f"{zeros} of {n} entries of the diagonal are zero, so its inverse does not "
                "exist. Pass a positive damping."
            )
        self._factors = 1 / damped

    def with_damping(self, damping: float) -> Self:
        """Return the preconditioner for another damping, without products with ``A``."""
        return self._made(self.diagonal, damping, self.num_matvecs)

    def _apply(self, x: Tensor) -> Tensor:
        return self._factors.unsqueeze(1) * x

    def _adjoint(self) -> TorchLinearOperator:
        return self
