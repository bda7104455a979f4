"""The Neumann series."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchlinop import (
    DiagonalLinearOperator,
    JacobiPreconditioner,
    NeumannInverseLinearOperator,
    aslinearoperator,
    neumann_scale,
)

from tests.solve.matrices import (
    indefinite,
    positive,
    vectors,
)


@pytest.mark.parametrize("num_terms", [0, 1, 7])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_neumann_sums_the_series(num_terms, preconditioned):
    A = positive(12, 20.0)
    P = torch.diag(torch.linspace(0.5, 1, 12)).double() if preconditioned else None
    dense_P = torch.eye(12, dtype=torch.float64) if P is None else P
    step = torch.eye(12, dtype=torch.float64) - 0.9 * dense_P @ A
    series = 0.9 * sum(torch.matrix_power(step, k) for k in range(num_terms + 1)) @ dense_P
    inverse = NeumannInverseLinearOperator(A, num_terms, scale=0.9, preconditioner=P)
    torch.testing.assert_close(inverse.to_dense(), series)
    assert inverse.last_solve.num_matvecs == 12 * num_terms
    torch.testing.assert_close(inverse.H.to_dense(), series.T)


@pytest.mark.parametrize("columns", [None, 3])
def test_a_diverging_series_is_found_out(columns):
    A = aslinearoperator(torch.diag(torch.linspace(0.1, 1, 10)).double())
    b = vectors(10, columns, torch.float64)
    self_adjoint = DiagonalLinearOperator(torch.linspace(0.1, 1, 10, dtype=torch.float64))
    for matrix in (A, self_adjoint):
        with pytest.raises(np.linalg.LinAlgError, match=r"diverges.*neumann_scale"):
            NeumannInverseLinearOperator(matrix, 60, scale=2.2) @ b
        with pytest.raises(np.linalg.LinAlgError, match="damping"):
            NeumannInverseLinearOperator(-1 * matrix, 60, scale=1.0) @ b
    with pytest.raises(np.linalg.LinAlgError, match="diverges"):
        NeumannInverseLinearOperator(A, 5000, scale=1e9) @ b


def test_neumann_scales():
    A = positive(80, 1e3)
    largest = torch.linalg.eigvalsh(A)[-1].item()
    assert 0.9 / largest <= neumann_scale(A) <= 1.0001 / largest
    P = JacobiPreconditioner(A)
    largest = torch.linalg.eigvals(P.to_dense() @ A).real.max().item()
    assert 0.85 / largest <= neumann_scale(A, preconditioner=P) <= 1.0001 / largest
    shifted = neumann_scale(A, damping=2.0)
    assert shifted == pytest.approx(1 / 3, rel=0.05)
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
        neumann_scale(indefinite(30, 10.0))
    with pytest.raises(ValueError, match="between 0 and 2 / lambda_max"):
        NeumannInverseLinearOperator(A, scale=0.0)
    assert NeumannInverseLinearOperator(A).scale == neumann_scale(A)
