"""The system of equations, as functions of blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop.solve.columns import column_norms


def random_vector(A: TorchLinearOperator, *, seed: int) -> Tensor:
    """Return a normal vector ``(N, 1)`` for ``A``, the same on every device."""
    return random_rows(1, A, torch.Generator("cpu").manual_seed(seed)).T


def random_rows(count: int, A: TorchLinearOperator, generator: torch.Generator) -> Tensor:
    """Draw normal vectors for ``A``, shape ``(count, N)``."""
    draws = torch.randn(
        count, A.shape[1], generator=generator, dtype=torch.float64, device="cpu"
    )
    return draws.to(A.device, A.torch_dtype)


class System:
    """``A + damping I`` and a preconditioner, as functions of ``(N, K)`` blocks."""

    def __init__(
        self,
        A: TorchLinearOperator,
        damping: float = 0.0,
        M: TorchLinearOperator | None = None,
    ) -> None:
        self._A, self._damping, self._M = A, damping, M
        self.num_matvecs = 0
        self.eps = torch.finfo(A.torch_dtype).eps

    def product(self, X: Tensor) -> Tensor:
        """``(A + damping I) X``."""
        self.num_matvecs += X.shape[1]
        Y = self._A._product(X)
        return Y.add_(X, alpha=self._damping) if self._damping else Y

    @property
    def preconditioned(self) -> bool:
        """Whether there is a preconditioner."""
        return self._M is not None

    def norm(self) -> float:
        """Estimate the norm of the matrix."""
        return self._norm(self.product)

    def precondition(self, X: Tensor) -> Tensor:
        """``M X``, or ``X`` itself where there is no preconditioner."""
        return X if self._M is None else self._M._product(X).to(X.dtype)

    def preconditioner_norm(self) -> float:
        """Estimate the norm of the preconditioner."""
        return self._norm(self.precondition)

    def _norm(self, product: Callable[[Tensor], Tensor]) -> float:
        """Take a few steps of the power method."""
        v = random_vector(self._A, seed=0)
        size = float(column_norms(v)[0])
        for _ in range(5):
            v = product(v / size)
            size = float(column_norms(v)[0])
            if not 0 < size < np.inf:
                break
        return size
