"""What a preconditioner is."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

from torchlinop._operator import TorchLinearOperator


class Preconditioner(TorchLinearOperator):
    """A positive definite operator that resembles the inverse of ``A + damping I``.

    Passed as ``M=`` to SciPy's, cupyx's and this package's solvers.

    Attributes
    ----------
    damping : float
    """

    damping: float

    @abstractmethod
    def with_damping(self, damping: float) -> Self:
        """Return the preconditioner for another damping, without products with ``A``."""
