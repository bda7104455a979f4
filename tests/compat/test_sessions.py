"""Programs by that library's tutorials, with the import lines changed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim import Adam

from tests.compat.sessions import BOTH, Library

OURS = Library("torchlinop.compat.curvlinops")
PEER = importlib.util.find_spec("curvlinops") is not None


@pytest.mark.parametrize("session", BOTH, ids=lambda s: s.__name__)
def test_session(session):
    assert all(torch.isfinite(number).all() for number in session(OURS))


@pytest.mark.skipif(not PEER, reason="curvlinops is not installed")
@pytest.mark.parametrize("session", BOTH, ids=lambda s: s.__name__)
def test_same_numbers(session):
    found, expected = session(OURS), session(Library("curvlinops"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------- its main branch


def _trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    X, test = torch.randn(32, 4).double(), torch.randn(16, 4).double()

    def target(inputs):
        return inputs.sin().sum(dim=1, keepdim=True) + 0.5 * inputs[:, :1] ** 2

    y = target(X) + 0.05 * torch.randn(32, 1).double()
    y[-3:] = -3.0 * y[-3:] - 3.0
    loss = nn.MSELoss(reduction="mean")
    optimizer = Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.step()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return model, loss, params, (X, y), (test, target(test))


def test_influence_of_training_points():
    """Three wrong labels among 32 do the most harm, by an inverse of EKFAC."""
    model, loss, params, (X, y), test = _trained()
    ekfac = OURS.top.EKFACLinearOperator(
        model, loss, params, [(X, y)], fisher_type=OURS.top.FisherType.TYPE2
    )
    inverse = ekfac.inverse(damping=1e-3)

    def flat_gradient(inputs, targets):
        gradient, _ = OURS.examples.gradient_and_loss(
            model, loss, params, [(inputs, targets)]
        )
        return parameters_to_vector(gradient).detach()

    of_test = flat_gradient(*test)
    embedded = inverse @ of_test
    influences = torch.stack(
        [-(embedded @ flat_gradient(X[j : j + 1], y[j : j + 1])) for j in range(32)]
    )
    back = ekfac @ embedded + 1e-3 * embedded
    torch.testing.assert_close(back, of_test, rtol=1e-8, atol=1e-10)
    harmful = set(influences.argsort(descending=True)[:6].tolist())
    assert len(harmful & {29, 30, 31}) >= 2


def test_diagonal_fisher_averages():
    """Sums of diagonals are diagonals, which have inverses."""
    model, loss, params, (X, y), _ = _trained()
    datasets = [[(X[i::3], y[i::3])] for i in range(3)]
    diagonals = [
        OURS.top.GGNDiagonalLinearOperator(model, loss, params, d) for d in datasets
    ]
    theta = parameters_to_vector(params.values()).detach()
    rhs = sum(D @ theta for D in diagonals)
    total = diagonals[0]
    for D in diagonals[1:]:
        total = D + total
    merged = total.inverse(1e-3) @ rhs
    dense = sum(
        OURS.examples__functorch.functorch_ggn(model, loss, params, d).diagonal()
        for d in datasets
    )
    torch.testing.assert_close(merged, dense * theta / (dense + 1e-3))


def test_sampled_ggn():
    """The Fisher matrix by sampling is a GGN with mc_samples."""
    model, loss, params, (X, y), _ = _trained()
    arguments = model, loss, params, [(X, y)]
    exact = OURS.top.GGNLinearOperator(*arguments) @ torch.eye(49).double()
    errors = [
        (OURS.top.GGNLinearOperator(*arguments, mc_samples=m) @ torch.eye(49).double())
        .sub(exact)
        .norm()
        for m in (1, 400)
    ]
    assert errors[1] < 0.25 * errors[0]


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize("name", ["KFAC", "EKFAC"])
def test_preconditioned_inverses(name, backend):
    """KFAC's inverse as a preconditioner, for CG as a function, for Neumann's series."""
    model, loss, params, (X, y), _ = _trained()
    arguments = model, loss, params, [(X, y)]
    options = {
        "fisher_type": "type-2",
        "backend": backend,
        "num_data": 32,
        "num_per_example_loss_terms": 1,
        "separate_weight_and_bias": False,
    }
    K = getattr(OURS.top, f"{name}LinearOperator")(*arguments, **options)
    shapes = [p.shape for p in params.values()]
    identity = OURS.examples.IdentityLinearOperator(shapes, K.device, torch.float64)
    damped = OURS.top.GGNLinearOperator(*arguments) + 1e-2 * identity
    P = K.inverse(damping=1e-2, use_exact_damping=True)
    b = torch.ones(damped.shape[1]).double()
    solution = torch.linalg.solve(damped.to_dense(), b)
    counts = []
    for preconditioner in (None, lambda V: P @ V):
        inverse = OURS.top.CGInverseLinearOperator(
            damped, tolerance=1e-8, eps=0, preconditioner=preconditioner
        )
        torch.testing.assert_close(inverse @ b, solution, rtol=1e-5, atol=1e-5)
        counts.append(max(inverse.last_solve.iterations))
    assert counts[1] != counts[0]  # it is used; whether it pays depends on the model
    product = P.to_dense() @ damped.to_dense()
    scale = 1.9 / torch.linalg.eigvals(product).real.max().item()
    series = OURS.top.NeumannInverseLinearOperator(
        damped, num_terms=20, scale=scale, preconditioner=P
    )
    step, term = torch.eye(49).double() - scale * product, P @ b
    expected = torch.zeros_like(b)
    for _ in range(21):
        expected, term = expected + scale * term, step @ term
    torch.testing.assert_close(series @ b, expected, rtol=1e-8, atol=1e-8)


def test_matrix_functions_of_kfac():
    """trace, det, logdet and frobenius_norm are methods, as on the main branch."""
    model, loss, params, (X, y), _ = _trained()
    K = OURS.top.KFACLinearOperator(model, loss, params, [(X, y)], fisher_type="type-2")
    dense = K.to_dense()
    torch.testing.assert_close(K.trace(), dense.trace())
    torch.testing.assert_close(K.frobenius_norm(), dense.norm())
    positive = OURS.top.KFACLinearOperator(
        model, loss, {"2.bias": params["2.bias"]}, [(X, y)], fisher_type="type-2"
    )
    torch.testing.assert_close(
        positive.det(), torch.tensor(2.0).double()
    )  # mean of squares
    torch.testing.assert_close(positive.logdet(), positive.det().log())
