"""Operators on the CPU, whatever torch's default device is."""

from __future__ import annotations

import pytest
import torch
from torchlinop import (
    CGInverseLinearOperator,
    CholeskyInverseLinearOperator,
    DiagonalLinearOperator,
    EighInverseLinearOperator,
    IdentityLinearOperator,
    JacobiPreconditioner,
    LSMRInverseLinearOperator,
    MINRESInverseLinearOperator,
    NeumannInverseLinearOperator,
    NystromPreconditioner,
    SubmatrixLinearOperator,
    multishift_cg,
    neumann_scale,
    verify,
)

from tests.solve.matrices import positive, vectors

A = positive(12, 10.0)
B = vectors(12, 3, torch.float64)
SINGULAR = torch.zeros(12, 12, dtype=torch.float64)
SINGULAR[0, 0] = 1


MADE = {
    "CG": lambda: CGInverseLinearOperator(A, M=JacobiPreconditioner(A)),
    "CG from x0": lambda: CGInverseLinearOperator(A, x0=B[:, 0], callback=lambda x: None),
    "singular": lambda: CGInverseLinearOperator(SINGULAR, on_failure="ignore"),
    "MINRES": lambda: MINRESInverseLinearOperator(A, M=NystromPreconditioner(A, 0.1)),
    "LSMR": lambda: LSMRInverseLinearOperator(A[:, :7], damp=0.1, x0=B[:7, 0]),
    "Neumann": lambda: NeumannInverseLinearOperator(A),
    "Cholesky": lambda: CholeskyInverseLinearOperator(A),
    "Eigh": lambda: EighInverseLinearOperator(A),
    "Jacobi": lambda: JacobiPreconditioner(A, damping=0.1),
    "Jacobi, estimated": lambda: JacobiPreconditioner.estimated(A, num_matvecs=50),
    "Nystrom": lambda: NystromPreconditioner(A, 0.1),
    "Nystrom, rank": lambda: NystromPreconditioner(A, 0.0, rank=5),
    "diagonal": lambda: DiagonalLinearOperator(A.diagonal()),
    "diagonal of a list": lambda: DiagonalLinearOperator(A.diagonal().numpy()),
    "identity": lambda: IdentityLinearOperator([(12,)], "cpu", torch.float64),
    "submatrix": lambda: SubmatrixLinearOperator(A, [3, 1], range(12)),
}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_operators(make):
    operator = make()
    for x in (B, B[:, 0], torch.cat([B, B], dim=1)):
        y = operator @ x
        assert y.device.type == "cpu"
        assert torch.isfinite(y).all()
        back = operator.H @ y.numpy()
        assert back.shape == tuple(x.shape)
    assert operator.to_dense().device.type == "cpu"


@pytest.mark.usefixtures("elsewhere")
def test_functions():
    X, report = multishift_cg(A, B, [0.1, 1.0])
    assert report.converged.all()
    assert X.device.type == "cpu"
    assert neumann_scale(A) > 0
    values, V = torch.linalg.eigh(A)
    assert verify.eigenpairs(A, values, V)
    assert verify.eigenpairs(A, values.numpy(), V.numpy(), M=torch.eye(12, device="cpu"))
    U, s, Vh = torch.linalg.svd(A)
    assert verify.singular_triplets(A, U.numpy(), s.numpy(), Vh.numpy())
    assert verify.solution(A, torch.linalg.solve(A, B).numpy(), B.numpy())
