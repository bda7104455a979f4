"""Inverses inside SciPy's solvers."""

from __future__ import annotations

import numpy as np
import scipy.sparse.linalg as spla
import torch
from torchlinop import (
    CGInverseLinearOperator,
    CholeskyInverseLinearOperator,
    HessianLinearOperator,
    MINRESInverseLinearOperator,
    aslinearoperator,
)

from tests.problems import classification
from tests.solve.matrices import (
    positive,
    relative,
    vectors,
)


def test_shift_invert_of_a_hessian():
    """Eigenvalues next to a shift, without a dense matrix."""
    H = HessianLinearOperator(*classification().arguments)
    dense = np.linalg.eigvalsh(H.to_dense().numpy())
    for sigma in (0.03, -0.02):
        inverse = MINRESInverseLinearOperator(H, damping=-sigma, rtol=1e-12)
        values = spla.eigsh(H, k=4, sigma=sigma, OPinv=inverse, return_eigenvectors=False)
        nearest = dense[np.argsort(abs(dense - sigma))[:4]]
        np.testing.assert_allclose(np.sort(values), np.sort(nearest), rtol=1e-8, atol=1e-12)


def test_smallest_eigenvalues():
    A = positive(80, 1e3)
    inverse = CGInverseLinearOperator(A, rtol=1e-12)
    values = spla.eigsh(aslinearoperator(A), k=5, sigma=0, OPinv=inverse)[0]
    expected = np.linalg.eigvalsh(A.numpy())[:5]
    np.testing.assert_allclose(np.sort(values), expected, rtol=1e-9)


def test_inverses_inside_scipys_solvers():
    A = positive(40, 1e3)
    b = vectors(40, None, torch.float64).numpy()
    inverse = CholeskyInverseLinearOperator(A, damping=0.01)
    for solver in (spla.cg, spla.minres, spla.gmres, spla.bicgstab):
        x, info = solver(A.numpy(), b, M=inverse, **relative(solver, 1e-9))
        assert info == 0
        np.testing.assert_allclose(A.numpy() @ x, b, atol=1e-4)
    values, _ = spla.lobpcg(
        aslinearoperator(A),
        np.eye(40)[:, :4],
        M=inverse,
        largest=False,
        tol=1e-8,
        maxiter=200,
    )
    np.testing.assert_allclose(
        np.sort(values), np.linalg.eigvalsh(A.numpy())[:4], rtol=1e-6
    )
    generalized = spla.eigsh(
        np.eye(40), k=3, M=aslinearoperator(A), Minv=CGInverseLinearOperator(A, rtol=1e-13),
        return_eigenvectors=False,
    )  # fmt: skip
    expected = 1 / np.linalg.eigvalsh(A.numpy())[:3]
    np.testing.assert_allclose(np.sort(generalized), np.sort(expected), rtol=1e-8)
