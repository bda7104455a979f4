"""Inverses: strategies of damping, one decomposition, preconditioners."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn
from torchlinop import (
    BlockDiagonalLinearOperator,
    CGInverseLinearOperator,
    ConvergenceWarning,
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    IdentityLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)

from tests.kronecker.zoo import ZOO

FAMILY = [
    KFACLinearOperator,
    EKFACLinearOperator,
    KFOCLinearOperator,
    GGNDiagonalLinearOperator,
]


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("name", ["mlp", "convolutions", "tokens"])
def test_functions_of_the_matrix(kind, name):
    A = kind(*ZOO[name]().arguments)
    dense = A.to_dense()
    torch.testing.assert_close(A.trace(), dense.trace())
    torch.testing.assert_close(A.diagonal(), dense.diagonal())
    torch.testing.assert_close(A.frobenius_norm(), dense.norm())
    inverse = A.inverse(damping=0.1)
    damped = dense + 0.1 * torch.eye(len(dense))
    torch.testing.assert_close(inverse.to_dense(), torch.linalg.inv(damped))
    torch.testing.assert_close(inverse.logdet(), -torch.linalg.slogdet(damped)[1])
    torch.testing.assert_close(inverse.trace(), torch.linalg.inv(damped).trace())
    root = inverse.power(0.5)
    torch.testing.assert_close((root @ root).to_dense(), inverse.to_dense())
    torch.testing.assert_close((A.power(0.5) @ A.power(0.5)).to_dense(), dense)


@pytest.mark.parametrize("kind", FAMILY)
def test_expressions_keep_the_blocks(kind):
    problem = ZOO["tokens"]()
    A = kind(*problem.arguments)
    dense = A.to_dense()
    other, fixed = kind(*problem.arguments, fisher_type="mc"), A.matrix
    expressions = [
        (A + other, dense + other.to_dense()),
        (A - other, dense - other.to_dense()),
        (2 * A, 2 * dense),
        (-A / 4, -dense / 4),
        (A @ other, dense @ other.to_dense()),
        (A**3, dense @ dense @ dense),
        (A + fixed, 2 * dense),
        (fixed - A / 2, dense / 2),
        (fixed @ A, dense @ dense),
        (2 * A + A, 3 * dense),
        (A.inverse(damping=0.1) @ A, torch.linalg.inv(dense + 0.1 * _eye(dense)) @ dense),
    ]
    with torch.no_grad():
        problem.params[0].mul_(2)  # the results are fixed matrices
    for result, expected in expressions:
        assert isinstance(result, BlockDiagonalLinearOperator)
        assert len(result.blocks) == len(fixed.blocks)
        torch.testing.assert_close(result.to_dense(), expected)
    assert not torch.allclose(A.to_dense(), dense)


def test_expressions_with_other_matrices_follow_the_model():
    problem = ZOO["mlp"]()
    K = KFACLinearOperator(*problem.arguments)
    n = len(K.to_dense())
    separate = KFACLinearOperator(*problem.arguments, joint_bias=False)  # other blocks
    results = [
        (
            K + IdentityLinearOperator([(n,)], K.device, K.torch_dtype),
            lambda k, s: k + _eye(k),
        ),
        (K + separate, lambda k, s: k + s),
        (K @ separate, lambda k, s: k @ s),
    ]
    with torch.no_grad():
        problem.params[0].mul_(2)
    for result, expected in results:
        assert not isinstance(result, BlockDiagonalLinearOperator)
        torch.testing.assert_close(
            result.to_dense(), expected(K.to_dense(), separate.to_dense())
        )


def _eye(matrix):
    return torch.eye(len(matrix), dtype=matrix.dtype)


def test_strategies():
    problem = ZOO["mlp"]()
    K = KFACLinearOperator(*problem.arguments, joint_bias=False)
    B, A = K.blocks["0.weight",].factors
    n = (slice(0, 12), slice(0, 12))
    eye = torch.eye(3).double()
    plain = K.inverse(damping=0.1, strategy="plain").to_dense()[n]
    inverses = [torch.linalg.inv(M + 0.1 * torch.eye(len(M))) for M in (B, A)]
    torch.testing.assert_close(plain, torch.kron(*inverses))
    pi = ((A.trace() / 3) / (B.trace() / 4)).sqrt()
    left = torch.linalg.inv(B + 0.1**0.5 / pi * torch.eye(4).double())
    right = torch.linalg.inv(A + 0.1**0.5 * pi * eye)
    heuristic = K.inverse(damping=0.1, strategy="heuristic")
    torch.testing.assert_close(heuristic.to_dense()[n], torch.kron(left, right))
    floored = K.inverse(damping=0.1, strategy="heuristic", min_damping=10.0)
    left, right = (torch.linalg.inv(M + 10 * torch.eye(len(M))) for M in (B, A))
    torch.testing.assert_close(floored.to_dense()[n], torch.kron(left, right))
    torch.testing.assert_close(heuristic.det(), torch.linalg.det(heuristic.to_dense()))


@pytest.mark.parametrize("strategy", ["plain", "heuristic", "exact"])
def test_a_bias_alone_is_no_product(strategy):
    """The number that is its other factor is not damped."""
    K = KFACLinearOperator(*ZOO["mlp"]().arguments, joint_bias=False)
    damped = K.to_dense()[12:16, 12:16] + 0.1 * torch.eye(4).double()
    inverse = K.inverse(damping=0.1, strategy=strategy).to_dense()[12:16, 12:16]
    torch.testing.assert_close(inverse, torch.linalg.inv(damped))


def test_decomposed_once(monkeypatch):
    K = KFACLinearOperator(*ZOO["mlp"]().arguments)
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: calls.append(1) or eigh(A))
    for strategy in ("exact", "plain", "heuristic"):
        for damping in (1e-3, 0.1):
            inverse = K.inverse(damping=damping, strategy=strategy)
            inverse.power(0.5).logdet()
    assert len(calls) == 4


def test_decomposition_that_fails_in_single_precision(monkeypatch):
    """It is made in float64, which is said, and the inverse is right."""
    problem = ZOO["mlp"]()
    problem.model.float()
    data = [(X.float(), y) for X, y in problem.data]
    K = KFACLinearOperator(problem.model, problem.loss, problem.model.parameters(), data)
    eigh = torch.linalg.eigh

    def fails(A):
        if A.dtype == torch.float32 and len(A) == 3:
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(A)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert set(K.precisions.values()) == {()}
    match = r"Factor 0 of the Kronecker product \(3 x 3, .*\) failed in torch.float32 and"
    with pytest.warns(ConvergenceWarning, match=match) as caught:
        inverse = K.inverse(damping=0.1)
    assert [w.filename for w in caught] == [__file__]
    assert K.precisions == {
        ("0.weight", "0.bias"): (torch.float32, torch.float32),
        ("2.weight",): (torch.float64, torch.float32),
    }
    K.inverse(damping=0.2)  # no second decomposition, no second warning
    expected = torch.linalg.inv(K.to_dense() + 0.1 * torch.eye(K.shape[0]))
    torch.testing.assert_close(inverse.to_dense(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {},
            r"In the block of 0.weight, 0.bias: Factor 0 .* smallest eigenvalue is ",
        ),
        (
            {"strategy": "plain"},
            r"0.weight, 0.bias: Factor 0 with damping 0.000e\+00 is sing",
        ),
        ({"damping": -1.0}, r"damping has to be a number >= 0, got -1.0"),
        ({"damping": float("nan")}, r"damping has to be a number >= 0, got nan"),
        ({"strategy": "exakt"}, "strategy has to be one of 'exact', 'plain', 'heuristic'"),
    ],
)
def test_refused(options, match):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = [(torch.randn(1, 3).double(), torch.tensor([1]))]
    K = KFACLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)
    with pytest.raises(ValueError, match=match):
        K.inverse(**options)


def _products_of_cg(A, b, M, rtol):
    count = []
    x, info = scipy.sparse.linalg.cg(
        A, b, rtol=rtol, atol=0, M=M, maxiter=20_000, callback=lambda _: count.append(1)
    )
    assert info == 0
    assert np.linalg.norm(A @ x - b) <= 1.5 * rtol * np.linalg.norm(b)
    return len(count)


@pytest.mark.skipif(
    np.lib.NumpyVersion(scipy.__version__) < "1.12.0", reason="cg has no rtol before"
)
def test_preconditioners_on_digits():
    """Half the products of plain CG, in SciPy's and in our solver."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    X, y = torch.tensor(images[:900] / 16), torch.tensor(labels[:900])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.step()
    params = list(model.parameters())
    arguments = model, loss, params, [(X[:500], y[:500]), (X[500:], y[500:])]
    damping, rtol = 1e-5, 1e-3
    G = GGNLinearOperator(*arguments)
    A = G + damping * IdentityLinearOperator([(G.shape[0],)], "cpu", torch.float64)
    parts = torch.autograd.grad(loss(model(X[:50]), y[:50]), params)
    b = torch.cat([part.reshape(-1) for part in parts]).numpy()
    plain = _products_of_cg(A, b, None, rtol)
    own = CGInverseLinearOperator(G, damping=damping, rtol=rtol)
    own @ b
    plain_own = own.last_solve.num_matvecs
    for kind in (KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator):
        M = kind(*arguments).inverse(damping=damping)
        assert 2 * _products_of_cg(A, b, M, rtol) <= plain
        own = CGInverseLinearOperator(G, damping=damping, rtol=rtol, M=M)
        own @ b
        assert 2 * own.last_solve.num_matvecs <= plain_own
