"""What KFAC, EKFAC and KFOC share as operators."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop._space import ParameterSpace
from torchlinop.autodiff.recording import EXCLUSIVE
from torchlinop.data import DataChangedError
from torchlinop.kronecker.settings import Settings
from torchlinop.sources import EmpiricalRisk
from torchlinop.structured import BlockDiagonalLinearOperator, StructuredLinearOperator


class BlockwiseLinearOperator(StructuredLinearOperator):
    """A block-diagonal approximation that is computed from a model and its data.

    Not to be made by users. Its matrix follows changes of parameters and data: what is
    computed belongs to one look at them.

    Attributes
    ----------
    space : ParameterSpace
        Order, names and shapes of the parameters in a vector.
    settings : Settings
        What was asked for.
    """

    def __init__(self, risk: EmpiricalRisk, settings: Settings) -> None:
        self._start(risk, risk.space, settings)
        self._current()

    def _start(
        self, risk: EmpiricalRisk | None, space: ParameterSpace, settings: Settings
    ) -> None:
        super().__init__((space.dim, space.dim), space.dtype, space.device)
        self._risk = risk
        self.space = space
        self.settings = settings
        self._known: tuple[int, BlockDiagonalLinearOperator] | None = None

    @abstractmethod
    def _computed(self, risk: EmpiricalRisk) -> BlockDiagonalLinearOperator:
        """Compute the matrix."""

    def _current(self) -> BlockDiagonalLinearOperator:
        """Return the matrix as it is now; an interrupt leaves the old one."""
        if self._risk is None:  # from a file
            assert self._known is not None
            return self._known[1]
        with EXCLUSIVE:
            if self._risk.changed():
                self._risk.survey()
            if self._known is None or self._known[0] != self._risk.looks:
                self._compute_anew(self._risk)
            assert self._known is not None
            return self._known[1]

    def _compute_anew(self, risk: EmpiricalRisk) -> None:
        try:
            matrix = self._computed(risk)
        except DataChangedError:
            risk.survey()
            matrix = self._computed(risk)
        self._known = (risk.looks, matrix)

    def refresh(self) -> None:
        """Compute everything anew, after changes that could not be noticed.

        After an error or an interrupt the matrix is what it was.
        """
        if self._risk is not None:
            with EXCLUSIVE:
                self._risk.survey()
                self._compute_anew(self._risk)

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to a look: a copy looks anew."""
        forgotten = {} if self._risk is None else {"_known": None}
        return {**vars(self), **forgotten}

    # ------------------------------------------------------------------- the matrix

    @property
    def blocks(self) -> dict[tuple[str, ...], TorchLinearOperator]:
        """The blocks by the names of their parameters."""
        matrix = self._current()
        groups = matrix.layout.groups  # type: ignore[attr-defined]
        return {g.names: b for g, b in zip(groups, matrix.blocks, strict=True)}

    def _apply(self, x: Tensor) -> Tensor:
        return self._current()._product(x)

    def _adjoint(self) -> TorchLinearOperator:
        return self

    def diagonal(self) -> Tensor:
        """Return the diagonal, shape ``(n,)``."""
        return self._current().diagonal()

    def trace(self) -> Tensor:
        """Return the sum of the diagonal."""
        return self._current().trace()

    def frobenius_norm(self) -> Tensor:
        """Return the root of the sum of all squared entries."""
        return self._current().frobenius_norm()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return the determinant's sign and the logarithm of its absolute value."""
        return self._current().slogdet()

    def power(self, exponent: float) -> BlockDiagonalLinearOperator:
        """Return a power of the matrix as it is now."""
        return self._current().power(exponent)

    def inverse(self, *, damping: float = 0.0) -> BlockDiagonalLinearOperator:
        r"""Return :math:`(A + \delta I)^{-1}` of the matrix as it is now.

        A fixed matrix, which does not follow later changes of the parameters. All
        dampings share one eigendecomposition for each factor.
        """
        return self._current().inverse(damping=damping)
