"""Functions of a curvature matrix plus a multiple of the identity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from torchlinop._memory import available_memory
from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop.structured import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    EighLinearOperator,
    LowRankPlusDiagonalLinearOperator,
    StructuredLinearOperator,
    spectrum_of,
)


def structured(curvature: Any) -> StructuredLinearOperator:
    """Return a matrix as it is now, of which roots and determinants are known.

    A matrix without a structure is formed and decomposed.

    Raises
    ------
    MemoryError
        The matrix does not fit into memory.
    ValueError
        It is not symmetric.
    """
    A = aslinearoperator(curvature)
    if isinstance(A, StructuredLinearOperator):
        return A._fixed()
    n = A.shape[0]
    needed = 4 * n * n * torch.empty(0, dtype=A.torch_dtype).element_size()
    if needed > available_memory(A.device):
        raise MemoryError(
            f"A dense {n} x {n} matrix and its eigenvectors need {needed / 2**30:.0f} GiB, "
            "more than is free. Pass a KFACLinearOperator, a GGNDiagonalLinearOperator, or "
            "the largest eigenvalues as LowRankPlusDiagonalLinearOperator(zeros, "
            "eigenvectors, eigenvalues); or take the parameters of the last layer alone."
        )
    spectrum = spectrum_of(A.to_dense(), "The curvature matrix")
    assert spectrum.vectors is not None
    return EighLinearOperator(spectrum.values, spectrum.vectors)


def inverse_root(A: StructuredLinearOperator, damping: float) -> TorchLinearOperator:
    r"""Return :math:`(A + \delta I)^{-1/2}`.

    Raises
    ------
    ValueError
        The damped matrix is singular or indefinite, or has no root of its structure.
    """
    if isinstance(A, BlockDiagonalLinearOperator):
        return A.map(lambda block: inverse_root(block, damping))
    if isinstance(A, LowRankPlusDiagonalLinearOperator):
        return _shifted(A, damping).power(-0.5)
    root = A.inverse(damping=damping)
    assert isinstance(root, StructuredLinearOperator)
    return root.power(0.5)


def logdet(A: StructuredLinearOperator, damping: float) -> float:
    r"""Return :math:`\log\det(A + \delta I)`."""
    return sum(_logdets(A, damping))


def _logdets(A: StructuredLinearOperator, damping: float) -> Iterator[float]:
    if isinstance(A, BlockDiagonalLinearOperator):
        for block in A._structured():
            yield from _logdets(block, damping)
    elif isinstance(A, LowRankPlusDiagonalLinearOperator):
        yield _shifted(A, damping).logdet().item()
    else:
        inverse = A.inverse(damping=damping)
        assert isinstance(inverse, StructuredLinearOperator)
        yield -inverse.logdet().item()


def _shifted(
    A: LowRankPlusDiagonalLinearOperator, damping: float
) -> LowRankPlusDiagonalLinearOperator:
    shift = torch.full((A.shape[0],), damping, dtype=A.torch_dtype, device=A.device)
    shifted = A + DiagonalLinearOperator(shift)
    assert isinstance(shifted, LowRankPlusDiagonalLinearOperator)
    return shifted
