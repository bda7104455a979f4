"""Laplace approximations against closed forms and dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from scipy.stats import multivariate_normal
from torch import nn
from torch.func import functional_call, jacrev
from torchlinop import (
    EighLinearOperator,
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    LowRankPlusDiagonalLinearOperator,
    laplace,
)
from torchlinop.reference import dense_ggn, dense_hessian

from tests.problems import binary, classification, regression

D = torch.float64


def low_rank(risk):
    values, vectors = eigsh(GGNLinearOperator(risk), k=6)
    zeros = np.zeros(len(vectors))
    return LowRankPlusDiagonalLinearOperator(zeros, vectors, values)


def decomposed(risk):
    return EighLinearOperator(*torch.linalg.eigh(GGNLinearOperator(risk).to_dense()))


CURVATURES = {
    "ggn": GGNLinearOperator,
    "kfac": KFACLinearOperator,
    "ekfac": EKFACLinearOperator,
    "diagonal": GGNDiagonalLinearOperator,
    "low rank": low_rank,
    "eigh": decomposed,
}


# ------------------------------------------------------------------ linear regression


class Linear:
    """Three inputs, noise of variance 0.3, prior of precision 2: everything is known."""

    delta, noise = 2.0, 0.3

    def __init__(self, reduction="mean"):
        generator = torch.Generator().manual_seed(0)
        self.X = torch.randn(12, 3, generator=generator, dtype=D)
        self.y = torch.randn(12, 1, generator=generator, dtype=D) + self.X[:, :1]
        X = self.X.numpy()
        self.covariance = np.linalg.inv(X.T @ X / self.noise + self.delta * np.eye(3))
        self.model = nn.Linear(3, 1, bias=False, dtype=D)
        mean = self.covariance @ X.T @ self.y.numpy()[:, 0] / self.noise
        with torch.no_grad():
            self.model.weight.copy_(torch.from_numpy(mean))
        cut = [5, 1, 6]
        self.risk = EmpiricalRisk(
            self.model,
            nn.MSELoss(reduction=reduction),
            self.model.parameters(),
            [*zip(self.X.split(cut), self.y.split(cut), strict=True)],
        )

    def posterior(self, curvature):
        return laplace(
            self.risk,
            curvature(self.risk),
            prior_precision=self.delta,
            noise_variance=self.noise,
        )


def all_eigenvectors(risk):
    values, vectors = torch.linalg.eigh(GGNLinearOperator(risk).to_dense())
    zeros = torch.zeros_like(values)
    return LowRankPlusDiagonalLinearOperator(zeros, vectors, values)


EXACT = [
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    EKFACLinearOperator,
    decomposed,
    all_eigenvectors,
]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("curvature", EXACT, ids=lambda c: c.__name__)
def test_linear_regression(curvature, reduction):
    linear = Linear(reduction)
    posterior = linear.posterior(curvature)
    np.testing.assert_allclose(
        posterior.covariance.to_dense(), linear.covariance, rtol=1e-10
    )
    root = posterior.root.to_dense()
    np.testing.assert_allclose(root @ root, linear.covariance, rtol=1e-10, atol=1e-14)
    X = linear.X.numpy()
    evidence = multivariate_normal(
        np.zeros(12), X @ X.T / linear.delta + linear.noise * np.eye(12)
    ).logpdf(linear.y[:, 0].numpy())
    assert posterior.log_marginal_likelihood() == pytest.approx(evidence, rel=1e-12)
    new = np.array([[1.0, -2.0, 0.5], [0.0, 0.0, 3.0]])
    predictive = posterior.predictive(torch.from_numpy(new))
    variance = np.einsum("ni,ij,nj->n", new, linear.covariance, new)
    np.testing.assert_allclose(predictive.variance[:, 0], variance, rtol=1e-10)
    np.testing.assert_allclose(
        predictive.target_covariance[:, 0, 0], variance + linear.noise, rtol=1e-10
    )
    np.testing.assert_allclose(
        predictive.mean, new @ linear.model.weight.detach().numpy().T, rtol=1e-12
    )


def test_several_outputs():
    """The evidence of independent outputs is the product."""
    one, model = Linear(), nn.Linear(3, 2, bias=False, dtype=D)
    with torch.no_grad():
        model.weight.copy_(one.model.weight.expand(2, 3))
    data = [(one.X, one.y.expand(-1, 2).clone())]
    risk = EmpiricalRisk(model, nn.MSELoss(), model.parameters(), data)
    options = {"prior_precision": one.delta, "noise_variance": one.noise}
    evidence = one.posterior(GGNLinearOperator).log_marginal_likelihood()
    for curvature in (GGNLinearOperator, KFACLinearOperator):
        posterior = laplace(risk, curvature(risk), **options)
        assert posterior.log_marginal_likelihood() == pytest.approx(2 * evidence)
        covariance = posterior.predictive(one.X[:1]).covariance[0]
        x = one.X[0].numpy()
        expected = np.eye(2) * (x @ one.covariance @ x)
        np.testing.assert_allclose(covariance, expected, rtol=1e-10, atol=1e-15)


def test_tuned_linear_regression():
    """MacKay's conditions for a maximum with the mean held fixed."""
    linear = Linear()
    posterior = linear.posterior(GGNLinearOperator)
    tuned = posterior.tuned()
    assert tuned.log_marginal_likelihood() > posterior.log_marginal_likelihood()
    gamma = tuned.effective_dimension()
    squared = linear.model.weight.square().sum().item()
    assert tuned.prior_precision * squared == pytest.approx(gamma, rel=1e-3)
    error = (linear.model(linear.X) - linear.y).square().sum().item()
    assert tuned.noise_variance == pytest.approx(error / (12 - gamma), rel=1e-3)
    only = posterior.tuned(["prior_precision"])
    assert only.noise_variance == linear.noise
    gamma = only.effective_dimension()
    assert only.prior_precision * squared == pytest.approx(gamma, rel=1e-3)
    # nothing of the posterior that it was made of has changed
    assert posterior.prior_precision == linear.delta
    np.testing.assert_allclose(posterior.covariance.to_dense(), linear.covariance)


def test_samples():
    posterior = Linear().posterior(KFACLinearOperator)
    before = torch.random.get_rng_state()
    drawn = posterior.sample(100_000, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(drawn, posterior.sample(100_000, seed=3))
    assert not torch.equal(drawn, posterior.sample(100_000))
    scale = posterior.covariance.to_dense().diagonal().max().item()
    np.testing.assert_allclose(
        np.cov(drawn.T), posterior.covariance.to_dense(), rtol=0, atol=0.02 * scale
    )
    np.testing.assert_allclose(
        drawn.mean(0), posterior.mean, rtol=0, atol=5 * (scale / 1e5) ** 0.5
    )


# -------------------------------------------------------------------- whole networks


def jacobian(model, params, X):
    """Shape ``(N, C, P)``, in the order of the parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    own = {names[id(p)]: p.detach() for p in params}
    parts = jacrev(lambda p: functional_call(model, p, (X,)))(own)
    return torch.cat([parts[name].flatten(2) for name in own], dim=2)


@pytest.mark.parametrize("make", [classification, regression, binary])
@pytest.mark.parametrize("kind", CURVATURES)
def test_networks(kind, make):
    """The curvature's own dense matrix, the dense log-likelihood and Jacobian."""
    problem = make()
    risk = EmpiricalRisk(*problem.arguments)
    curvature = CURVATURES[kind](risk)
    posterior = laplace(risk, curvature, prior_precision=0.7)
    X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    total = type(problem.loss)(reduction="sum")(problem.model(X), y).item()
    count = {"classification": 9, "regression": 16, "binary": 18}[make.__name__]
    scale, likelihood = float(count), -total
    if make is regression:
        scale, likelihood = count / 2, -total / 2 - count / 2 * np.log(2 * np.pi)
    n = risk.space.dim
    precision = scale * curvature.to_dense() + 0.7 * torch.eye(n, dtype=D)
    covariance = torch.linalg.inv(precision)
    torch.testing.assert_close(posterior.covariance.to_dense(), covariance)
    root = posterior.root.to_dense()
    torch.testing.assert_close(root @ root, covariance)
    theta = torch.cat([p.detach().reshape(-1) for p in problem.params])
    assert torch.equal(posterior.mean, theta)
    evidence = likelihood + 0.5 * (
        n * np.log(0.7) - 0.7 * theta.square().sum().item() - torch.logdet(precision).item()
    )
    assert posterior.log_likelihood == pytest.approx(likelihood)
    assert posterior.log_marginal_likelihood() == pytest.approx(evidence)
    new = torch.linspace(-1, 1, 4 * X.shape[1], dtype=D).reshape(4, -1)
    J = jacobian(problem.model, problem.params, new)
    predictive = posterior.predictive(new)
    torch.testing.assert_close(predictive.covariance, J @ covariance @ J.mT)
    torch.testing.assert_close(predictive.mean, problem.model(new).detach())


def test_last_layer():
    """A generalized linear model on the features that are left as they are."""
    problem = classification()
    head = list(problem.model[-1].parameters())
    risk = EmpiricalRisk(problem.model, problem.loss, head, problem.data)
    posterior = laplace(risk, HessianLinearOperator(risk), prior_precision=0.5)
    X = torch.cat([X for X, _ in problem.data])
    phi = problem.model[:-1](X).detach()
    features = torch.cat([phi, torch.ones(9, 1, dtype=D)], dim=1)
    p = problem.model(X).softmax(-1).detach()
    middle = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
    hessian = torch.einsum("ncd,ni,nj->cidj", middle, features, features)
    precision = hessian.reshape(12, 12) + 0.5 * torch.eye(12, dtype=D)
    covariance = torch.linalg.inv(precision).reshape(3, 4, 3, 4)
    expected = torch.einsum("ni,cidj,nj->ncd", features, covariance, features)
    predictive = posterior.predictive(X)
    torch.testing.assert_close(predictive.covariance, expected)
    exact = laplace(risk, dense_hessian(*problem.arguments[:2], head, problem.data))
    np.testing.assert_allclose(
        exact.log_marginal_likelihood(),
        laplace(risk, GGNLinearOperator(risk)).log_marginal_likelihood(),
    )


def test_weighted_loss():
    """A class weight of 2 counts the samples of this class twice."""
    problem = classification()
    weight = torch.tensor([1.0, 2.0, 1.0], dtype=D)
    loss = nn.CrossEntropyLoss(weight=weight)
    risk = EmpiricalRisk(problem.model, loss, problem.params, problem.data)
    twice = [(X, y) for X, y in problem.data]
    twice += [(X[y == 1], y[y == 1]) for X, y in problem.data if (y == 1).any()]
    other = EmpiricalRisk(problem.model, problem.loss, problem.params, twice)
    a, b = (laplace(r, GGNLinearOperator(r)) for r in (risk, other))
    torch.testing.assert_close(a.covariance.to_dense(), b.covariance.to_dense())
    assert a.log_likelihood == pytest.approx(b.log_likelihood)


def test_float32():
    problem = classification(dtype=torch.float32)
    risk = EmpiricalRisk(*problem.arguments)
    G = dense_ggn(*problem.arguments).double()
    covariance = torch.linalg.inv(9 * G + 1e-2 * torch.eye(27, dtype=D))
    J = jacobian(problem.model, problem.params, problem.data[0][0]).double()
    expected = J @ covariance @ J.mT
    for curvature in (GGNLinearOperator(risk), low_rank_of_all(risk)):
        posterior = laplace(risk, curvature, prior_precision=1e-2)
        found = posterior.predictive(problem.data[0][0]).covariance
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-3)
        assert torch.isfinite(posterior.sample(3)).all()


def low_rank_of_all(risk):
    values, vectors = torch.linalg.eigh(GGNLinearOperator(risk).to_dense())
    zeros = torch.zeros_like(values)
    return LowRankPlusDiagonalLinearOperator(zeros, vectors[:, 5:], values[5:])


# ------------------------------------------------------------------------- predictive


def test_probabilities_of_bits():
    """Against Gauss-Hermite quadrature of the logistic function."""
    problem = binary()
    risk = EmpiricalRisk(*problem.arguments)
    predictive = laplace(risk, KFACLinearOperator(risk)).predictive(problem.data[0][0])
    assert predictive.variance.min() > 0.1
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    points = torch.from_numpy(nodes)
    f = predictive.mean.unsqueeze(-1) + predictive.variance.sqrt().unsqueeze(-1) * points
    exact = f.sigmoid() @ torch.from_numpy(weights / weights.sum())
    torch.testing.assert_close(predictive.probit(), exact, rtol=0, atol=0.01)
    drawn = predictive.monte_carlo(20_000, seed=1)
    torch.testing.assert_close(drawn, exact, rtol=0, atol=0.01)
    assert not torch.allclose(predictive.mean.sigmoid(), exact, rtol=0, atol=0.01)


def test_probabilities_of_classes():
    problem = classification()
    risk = EmpiricalRisk(*problem.arguments)
    predictive = laplace(risk, GGNLinearOperator(risk)).predictive(problem.data[0][0])
    scaled = predictive.mean / (1 + np.pi / 8 * predictive.variance).sqrt()
    torch.testing.assert_close(predictive.probit(), scaled.softmax(-1))
    rng = np.random.default_rng(0)
    for n in range(2):
        moments = predictive.mean[n].numpy(), predictive.covariance[n].numpy()
        f = rng.multivariate_normal(*moments, 100_000)
        p = np.exp(f) / np.exp(f).sum(1, keepdims=True)
        drawn = predictive.monte_carlo(100_000)[n]
        np.testing.assert_allclose(drawn, p.mean(0), atol=0.005)
    assert torch.equal(predictive.monte_carlo(10), predictive.monte_carlo(10))
    with pytest.raises(ValueError, match="categorical likelihood have no constant noise"):
        predictive.target_covariance


# ---------------------------------------------------------------------------- refused


def test_a_changed_model_is_refused():
    linear = Linear()
    posterior = linear.posterior(GGNLinearOperator)
    mean = posterior.mean.clone()
    with torch.no_grad():
        linear.model.weight.add_(1)
    assert torch.equal(posterior.mean, mean)
    with pytest.raises(RuntimeError, match="has changed since the posterior was made"):
        posterior.predictive(linear.X)
    posterior = linear.posterior(GGNLinearOperator)
    assert torch.isfinite(posterior.predictive(linear.X).mean).all()


def test_refused():
    linear, problem = Linear(), classification()
    risk = EmpiricalRisk(*problem.arguments)
    with pytest.raises(TypeError, match="Expected an EmpiricalRisk, got Linear"):
        laplace(linear.model, GGNLinearOperator(linear.risk))
    with pytest.raises(ValueError, match=r"27 parameters .* got one of shape \(3, 3\)"):
        laplace(risk, GGNLinearOperator(linear.risk))
    for wrong in (0, -1.0, float("nan"), "strong", None):
        with pytest.raises(ValueError, match="prior_precision has to be a number above"):
            laplace(risk, GGNLinearOperator(risk), prior_precision=wrong)
    with pytest.raises(ValueError, match=r"CrossEntropyLoss.* has no noise variance"):
        laplace(risk, GGNLinearOperator(risk), noise_variance=2.0)
    posterior = laplace(risk, GGNLinearOperator(risk))
    with pytest.raises(ValueError, match="num_samples has to be a positive integer"):
        posterior.sample(0)
    with pytest.raises(ValueError, match="a list of names among"):
        posterior.tuned(["damping"])
    with pytest.raises(ValueError, match="has no noise variance"):
        posterior.tuned(["noise_variance"])
    indefinite = laplace(risk, -1 * GGNLinearOperator(risk), prior_precision=1e-3)
    for use in (
        lambda: indefinite.sample(1),
        lambda: indefinite.covariance,
        indefinite.log_marginal_likelihood,
    ):
        with pytest.raises(ValueError, match="Take a larger prior precision"):
            use()
    with pytest.raises(ValueError, match="gaussian likelihood are not classes"):
        linear.posterior(GGNLinearOperator).predictive(linear.X).probit()
    with torch.no_grad():
        linear.model.weight.zero_()
    with pytest.raises(ValueError, match="All parameters are zero"):
        linear.posterior(GGNLinearOperator).tuned()


def test_several_vectors_of_predictions_are_refused():
    model = nn.Linear(3, 2, dtype=D)
    data = [(torch.randn(4, 5, 3, dtype=D), torch.randn(4, 5, 2, dtype=D))]
    risk = EmpiricalRisk(model, nn.MSELoss(), model.parameters(), data)
    with pytest.raises(ValueError, match="5 vectors of predictions for each sample"):
        laplace(risk, KFACLinearOperator(risk)).predictive(data[0][0])
