"""Inverses on a trained classifier of handwritten digits (1,210 parameters)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torchlinop import (
    CGInverseLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    MINRESInverseLinearOperator,
    NystromPreconditioner,
    verify,
)


class Digits(NamedTuple):
    G: GGNLinearOperator
    H: HessianLinearOperator
    #: gradients of single samples, one per column
    gradients: Tensor


@pytest.fixture(scope="module")
def digits() -> Digits:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    X, y = torch.tensor(images / 16), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(X[:900]), y[:900])
        value.backward()
        return value

    optimizer.step(closure)
    params = list(model.parameters())
    data = [(X[:500], y[:500]), (X[500:900], y[500:900])]
    G = GGNLinearOperator(model, loss, params, data)
    H = HessianLinearOperator(model, loss, params, data)
    columns = []
    for i in range(32):
        parts = torch.autograd.grad(loss(model(X[i : i + 1]), y[i : i + 1]), params)
        columns.append(torch.cat([p.reshape(-1) for p in parts]))
    return Digits(G, H, torch.stack(columns, dim=1))


@pytest.fixture(scope="module")
def spectrum(digits) -> np.ndarray:
    return np.linalg.eigvalsh(digits.H.to_dense().numpy())


def test_nystrom_needs_a_third_of_the_products(digits):
    damping = 1e-5
    # a constant added to all classes changes no prediction: the smallest eigenvalue is 0
    constant = np.zeros(digits.G.shape[0])
    constant[-10:] = 1
    assert np.abs(digits.G @ constant).max() < 1e-15
    (largest,) = eigsh(digits.G, k=1, return_eigenvectors=False)
    assert (largest + damping) / damping > 1e4
    M = NystromPreconditioner(digits.G, damping)
    b = digits.gradients[:, 0].contiguous()
    plain = CGInverseLinearOperator(digits.G, damping=damping, rtol=1e-6)
    helped = CGInverseLinearOperator(digits.G, damping=damping, rtol=1e-6, M=M)
    assert verify.solution(digits.G, helped @ b, b, damping=damping, rtol=1.01e-6)
    plain @ b
    assert 3 * helped.last_solve.num_matvecs <= plain.last_solve.num_matvecs


def test_many_gradients_in_one_krylov_space(digits):
    inverse = CGInverseLinearOperator(digits.G, damping=1e-3, rtol=1e-6)
    X = inverse @ digits.gradients
    together = inverse.last_solve
    report = verify.solution(digits.G, X, digits.gradients, damping=1e-3, rtol=1.01e-6)
    assert report, report
    inverse @ digits.gradients[:, 0]
    assert together.num_matvecs < 32 * inverse.last_solve.num_matvecs / 4


@pytest.mark.parametrize("place", ["interior", "smallest"])
def test_shift_invert_of_the_hessian(digits, spectrum, place):
    w = spectrum
    sigma = (w[-10] + w[-11]) / 2 if place == "interior" else 1.05 * w[0]
    inverse = MINRESInverseLinearOperator(digits.H, damping=-sigma, rtol=1e-9)
    values, vectors = eigsh(digits.H, k=5, sigma=sigma, OPinv=inverse)
    nearest = w[np.argsort(abs(w - sigma))[:5]]
    np.testing.assert_allclose(np.sort(values), np.sort(nearest), rtol=1e-6)
    report = verify.eigenpairs(digits.H, values, vectors, rtol=1e-6)
    assert report, report
