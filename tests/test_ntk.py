"""The neural tangent kernel against torch.func."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import cg, eigsh, svds
from torch import nn
from torch.func import functional_call, jacrev
from torchlinop import EmpiricalRisk, JacobianLinearOperator, NTKLinearOperator

from tests.problems import classification

D = torch.float64


def _jacobian(model, X):
    """Shape ``(N, C, P)``."""
    parts = jacrev(lambda p: functional_call(model, p, (X,)))(
        dict(model.named_parameters())
    )
    return torch.cat([part.flatten(2) for part in parts.values()], dim=2).detach()


@pytest.fixture
def problem():
    return classification()


@pytest.fixture
def test_data():
    torch.manual_seed(4)
    return [(torch.randn(n, 4, dtype=D), None) for n in (2, 4)]


def _inputs(data):
    return torch.cat([X for X, _ in data])


def test_sums_over_classes(problem):
    J = _jacobian(problem.model, _inputs(problem.data))
    K = NTKLinearOperator(problem.model, iter(problem.params), problem.data)
    expected = torch.einsum("ncp,mcp->nm", J, J)
    torch.testing.assert_close(K.to_dense(), expected)
    assert K.T is K
    values = eigsh(K, k=3, return_eigenvectors=False)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(expected)[-3:])


def test_one_class(problem):
    J = _jacobian(problem.model, _inputs(problem.data))
    for c in (0, 2, -1):
        K = NTKLinearOperator(problem.model, problem.params, problem.data, outputs=c)
        torch.testing.assert_close(K.to_dense(), J[:, c] @ J[:, c].T)


def test_all_predictions(problem):
    J = _jacobian(problem.model, _inputs(problem.data)).flatten(0, 1)
    K = NTKLinearOperator(EmpiricalRisk(*problem.arguments), outputs="all")
    torch.testing.assert_close(K.to_dense(), J @ J.T)
    operator = JacobianLinearOperator(problem.model, problem.params, problem.data)
    torch.testing.assert_close((operator @ operator.T).to_dense(), J @ J.T)


@pytest.mark.parametrize("outputs", ["sum", "all", 1])
def test_between_two_data_sets(problem, test_data, outputs):
    train, test = (
        _jacobian(problem.model, _inputs(data)) for data in (problem.data, test_data)
    )
    if outputs == "all":
        expected = test.flatten(0, 1) @ train.flatten(0, 1).T
    else:
        chosen = slice(None) if outputs == "sum" else slice(1, 2)
        expected = torch.einsum("ncp,mcp->nm", test[:, chosen], train[:, chosen])
    K = NTKLinearOperator(
        problem.model, problem.params, test_data, columns=problem.data, outputs=outputs
    )
    torch.testing.assert_close(K.to_dense(), expected)
    torch.testing.assert_close(K.T.to_dense(), expected.T)
    largest = svds(K, k=1, return_singular_vectors=False)[0]
    assert largest == pytest.approx(torch.linalg.svdvals(expected)[0].item())


def test_regression_with_the_kernel_is_that_with_the_linearized_model(problem, test_data):
    """Kernel ridge regression by CG on samples against a solve on parameters."""
    K = NTKLinearOperator(problem.model, problem.params, problem.data, outputs=0)
    cross = NTKLinearOperator(
        problem.model, problem.params, test_data, columns=problem.data, outputs=0
    )
    y = np.linspace(-1, 1, 9)
    dual, info = cg(K + 0.1 * np.eye(9), y, atol=1e-12)
    assert info == 0
    train, test = (
        _jacobian(problem.model, _inputs(data))[:, 0].numpy()
        for data in (problem.data, test_data)
    )
    weights = np.linalg.solve(train.T @ train + 0.1 * np.eye(27), train.T @ y)
    np.testing.assert_allclose(cross @ dual, test @ weights, rtol=1e-4)


def test_follows_the_model_and_shapes(problem):
    K = NTKLinearOperator(problem.model, problem.params, problem.data)
    K @ torch.ones(9)
    with torch.no_grad():
        problem.params[0].mul_(2)
    J = _jacobian(problem.model, _inputs(problem.data))
    torch.testing.assert_close(K.to_dense(), torch.einsum("ncp,mcp->nm", J, J))
    flat = nn.Sequential(problem.model, nn.Linear(3, 1, dtype=D), nn.Flatten(0))
    K = NTKLinearOperator(flat, flat.parameters(), problem.data)
    J = _jacobian(nn.Sequential(flat[0], flat[1]), _inputs(problem.data))[:, 0]
    torch.testing.assert_close(K.to_dense(), J @ J.T)


def test_refused(problem):
    arguments = problem.model, problem.params, problem.data
    for wrong in ("mean", 3, -4, 1.0, True, None):
        with pytest.raises(ValueError, match="'sum', 'all' or a number below 3"):
            NTKLinearOperator(*arguments, outputs=wrong)
    with pytest.raises(TypeError, match=r"pass \(model, params, data, columns"):
        NTKLinearOperator(EmpiricalRisk(*problem.arguments), columns=problem.data)
    first = nn.Sequential(problem.model, nn.Flatten(0))
    data = [(torch.randn(n, 4, dtype=D), None) for n in (2, 2)]
    assert NTKLinearOperator(first, first.parameters(), data).shape == (12, 12)
    other = lambda p, X: (X @ p[0])[:, : 1 + len(X) % 2]  # noqa: E731
    with pytest.raises(ValueError, match="have to be the same for all batches"):
        NTKLinearOperator(other, [torch.ones(4, 3, dtype=D)], problem.data[1:] + data)
