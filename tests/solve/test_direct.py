"""Inverses by factorization."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchlinop import (
    CholeskyInverseLinearOperator,
    DiagonalLinearOperator,
    EighInverseLinearOperator,
    IdentityLinearOperator,
)


def test_direct_inverses_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match=r"Hermitian matrix.*LSMR"):
        CholeskyInverseLinearOperator(torch.ones(3, 3).triu()) @ torch.ones(3)
    singular = EighInverseLinearOperator(torch.diag(torch.tensor([1.0, 0.0])))
    with pytest.raises(np.linalg.LinAlgError, match="singular"):
        singular @ torch.ones(2)
    torch.testing.assert_close(
        singular.with_damping(1.0) @ torch.ones(2), torch.tensor([0.5, 1.0])
    )
    huge = IdentityLinearOperator([(10_000_000,)], "cpu", torch.float32)
    with pytest.raises(MemoryError, match=r"GiB.*CGInverse"):
        CholeskyInverseLinearOperator(huge)


def test_direct_inverses_factorize_once():
    class Counted(DiagonalLinearOperator):
        def _apply(self, x):
            counts.append(x.shape[1])
            return super()._apply(x)

    counts: list[int] = []
    A = Counted(torch.linspace(1, 2, 8, dtype=torch.float64))
    for kind in (CholeskyInverseLinearOperator, EighInverseLinearOperator):
        counts.clear()
        inverse = kind(A)
        for _ in range(4):
            inverse @ torch.ones(8)
        assert sum(counts) == 8 + 4
    inverse.with_damping(1.0) @ torch.ones(8)
    assert sum(counts) == 8 + 4 + 1  # the eigenvalues are shared


def test_a_change_of_small_entries_is_noticed():
    for kind in (CholeskyInverseLinearOperator, EighInverseLinearOperator):
        M = torch.diag(torch.tensor([1e4, 1.0]))
        inverse = kind(M)
        inverse @ torch.ones(2)
        M[1, 1] = 2.0
        torch.testing.assert_close(inverse @ torch.ones(2), torch.tensor([1e-4, 0.5]))
