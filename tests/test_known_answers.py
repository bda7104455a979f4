"""Published, certified and closed-form answers, from other people's packages and tables.

Everything is float64, and all data comes in several batches of unequal size.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import optimize
from scipy.linalg import solve_triangular
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torchlinop import (
    DiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    TorchLinearOperator,
)

from tests.data import published

EPS = np.finfo(float).eps

#: Relative error in the Frobenius norm of a sum of products of float64 numbers. A sum of
#: N terms that does not cancel is off by at most N eps, 2e-13 for a thousand terms; if
#: the roundings are independent by about sqrt(N) eps, 3e-14 for the longest sums here.
ROUNDING = 1e-13

CURVATURE = pytest.mark.parametrize("operator", [HessianLinearOperator, GGNLinearOperator])


@pytest.fixture(scope="module")
def sm() -> Any:
    return pytest.importorskip("statsmodels.api", reason="needs statsmodels' data and fits")


@pytest.fixture(scope="module")
def datasets() -> Any:
    return pytest.importorskip("sklearn.datasets", reason="needs scikit-learn's data")


def tensor(array: Any) -> Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float64)


def batches(X: Any, y: Any) -> list[tuple[Tensor, Tensor]]:
    """Cut the data into four parts, the first of which is a single sample."""
    X, y = tensor(X), y if isinstance(y, Tensor) else tensor(y)
    n = len(X)
    sizes = [1, n // 5, n // 2, n - 1 - n // 5 - n // 2]
    return list(zip(X.split(sizes), y.split(sizes), strict=True))


def relative_error(actual: Any, expected: Any) -> float:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def matrix(operator: TorchLinearOperator) -> np.ndarray:
    """Return the matrix by single products, which have to agree with the block's."""
    columns = np.stack([operator @ e for e in np.eye(operator.shape[1])], axis=1)
    assert relative_error(operator.to_dense(), columns) < ROUNDING
    return columns


def linear(params: list[Tensor], X: Tensor) -> Tensor:
    return X @ params[0]


def against_class_zero(params: list[Tensor], X: Tensor) -> Tensor:
    """Logits with that of the reference class fixed at zero."""
    return torch.cat([X.new_zeros(len(X), 1), X @ params[0].T], dim=1)


# -------------------------------------------------------------------- discrete choice


class Fit(NamedTuple):
    """A model of statsmodels at its maximum likelihood estimate."""

    model: Callable
    loss: Callable
    params: np.ndarray
    X: np.ndarray
    y: Any
    standard_errors: Any = None

    def curvature(self, operator: Any) -> np.ndarray:
        """Return a matrix of the negative log-likelihood."""
        data, params = batches(self.X, self.y), [tensor(self.params)]
        return matrix(operator(self.model, self.loss, params, data, reduction="sum"))


def standard_errors(hessian: np.ndarray) -> np.ndarray:
    return np.sqrt(np.diag(np.linalg.inv(hessian)))


def load(sm: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    data = getattr(sm.datasets, name).load_pandas()
    X = np.column_stack([np.asarray(data.exog, float), np.ones(len(data.exog))])
    return X, np.asarray(data.endog, float)


def logit(sm: Any) -> Fit:
    X, y = load(sm, "spector")
    result = sm.Logit(y, X).fit(disp=0)
    loss = nn.BCEWithLogitsLoss(reduction="sum")
    return Fit(linear, loss, result.params, X, y, result.bse)


def negative_log_probit(z: Tensor, y: Tensor) -> Tensor:
    return -torch.special.log_ndtr((2 * y - 1) * z).sum()


def probit(sm: Any) -> Fit:
    X, y = load(sm, "spector")
    result = sm.Probit(y, X).fit(disp=0)
    return Fit(linear, negative_log_probit, result.params, X, y, result.bse)


def negative_log_poisson(z: Tensor, y: Tensor) -> Tensor:
    return (z.exp() - y * z).sum()


def poisson(sm: Any) -> Fit:
    X, y = load(sm, "randhie")
    result = sm.Poisson(y, X).fit(disp=0)
    return Fit(linear, negative_log_poisson, result.params, X, y, result.bse)


def poisson_module(sm: Any) -> Fit:
    return poisson(sm)._replace(loss=nn.PoissonNLLLoss(reduction="sum"))


def multinomial_logit(sm: Any) -> Fit:
    X, y = load(sm, "anes96")
    result = sm.MNLogit(y, X).fit(disp=0)
    loss = nn.CrossEntropyLoss(reduction="sum")
    params, errors = result.params.T, result.bse.T.ravel()  # a row for each class
    return Fit(against_class_zero, loss, params, X, tensor(y).long(), errors)


@CURVATURE
@pytest.mark.parametrize(
    ("problem", "table"),
    [
        (logit, "spector logit"),
        (probit, "spector probit"),
        (poisson, "randhie poisson"),
        (poisson_module, "randhie poisson"),
        (multinomial_logit, "anes96 multinomial logit"),
    ],
)
def test_standard_errors(sm, problem, table, operator):
    fit = problem(sm)
    hessian = fit.curvature(operator)
    errors = standard_errors(hessian)
    # Two float64 Hessians differ by some eps, and their inverses by the condition number
    # (1e4 to 1e6) times that.
    assert_allclose(errors, fit.standard_errors, rtol=EPS * np.linalg.cond(hessian))
    # Stata stopped at parameters that are right to about seven digits.
    assert_allclose(errors, published.STATA[table], rtol=1e-6)


def probit_as_logit(params: list[Tensor], X: Tensor) -> Tensor:
    """Return the log odds of a probit model, so that its loss is the logistic one."""
    z = X @ params[0]
    return torch.special.log_ndtr(z) - torch.special.log_ndtr(-z)


def test_observed_and_expected_information(sm):
    """For a link that is not canonical Hessian and GGN are two matrices, both known."""
    X, y = load(sm, "spector")
    model = sm.GLM(y, X, sm.families.Binomial(sm.families.links.Probit()))
    params = model.fit().params
    fit = Fit(probit_as_logit, nn.BCEWithLogitsLoss(reduction="sum"), params, X, y)
    observed = -sm.Probit(y, X).hessian(params)
    expected = -model.hessian(params, scale=1.0, observed=False)
    assert relative_error(fit.curvature(HessianLinearOperator), observed) < ROUNDING
    assert relative_error(fit.curvature(GGNLinearOperator), expected) < ROUNDING
    assert relative_error(observed, expected) > 1e-3


@CURVATURE
def test_class_weight_is_frequency(sm, operator):
    X, y = load(sm, "spector")
    result = sm.GLM(y, X, sm.families.Binomial(), freq_weights=1 + y).fit(tol=1e-14)
    loss = nn.CrossEntropyLoss(weight=tensor([1.0, 2.0]), reduction="sum")
    fit = Fit(against_class_zero, loss, result.params[None], X, tensor(y).long())
    hessian = fit.curvature(operator)
    # as in test_standard_errors; fitted until the deviance was constant to all digits
    tolerance = EPS * np.linalg.cond(hessian)
    assert_allclose(standard_errors(hessian), result.bse, rtol=tolerance)


@CURVATURE
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("hidden", [0, 5])
def test_class_weight_is_replication(operator, reduction, hidden):
    X, y = torch.randn(40, 3).double(), torch.randint(2, (40,))
    twice = torch.arange(40).repeat_interleave(1 + y)
    assert len(twice) > 50
    network = [nn.Linear(3, hidden), nn.Tanh()] if hidden else []
    model = nn.Sequential(*network, nn.Linear(hidden or 3, 2)).double()
    weighted = nn.CrossEntropyLoss(weight=tensor([1.0, 2.0]), reduction=reduction)
    plain = nn.CrossEntropyLoss(reduction=reduction)
    A = operator(model, weighted, model.parameters(), batches(X, y))
    B = operator(model, plain, model.parameters(), batches(X[twice], y[twice]))
    assert relative_error(matrix(A), matrix(B)) < ROUNDING


def test_logistic_regression(datasets):
    """Curvature where scikit-learn puts the optimum for breast_cancer."""
    from sklearn.linear_model import LogisticRegression

    X, y = datasets.load_breast_cancer(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    fit = LogisticRegression(C=10.0, solver="newton-cholesky", tol=1e-10).fit(X, y)
    theta = np.append(fit.coef_, fit.intercept_)
    X = np.column_stack([X, np.ones(len(X))])
    penalty = np.append(np.full(30, 0.1), 0.0)
    p = 1 / (1 + np.exp(-X @ theta))
    loss = nn.BCEWithLogitsLoss(reduction="sum")
    H = HessianLinearOperator(linear, loss, [tensor(theta)], batches(X, y))
    gradient = X.T @ (p - y) + penalty * theta
    step = np.linalg.solve(matrix(H) + np.diag(penalty), gradient)
    # The last iteration had a gradient of 1e-10 N, and Newton's method squares it.
    assert np.linalg.norm(step) < ROUNDING * np.linalg.norm(theta)

    closed_form = (X.T * (p * (1 - p))) @ X
    D = DiagonalLinearOperator(tensor(penalty))
    for operator, dense in ((H, closed_form), (H + D, closed_form + np.diag(penalty))):
        assert relative_error(matrix(operator), dense) < ROUNDING
        largest, smallest = (
            eigsh(operator, k=1, which=end, v0=np.ones(31), return_eigenvectors=False)
            for end in ("LA", "SA")
        )
        # The smallest eigenvalue is uncertain by a few eps times the largest.
        condition = np.linalg.cond(dense)
        assert_allclose(largest / smallest, condition, rtol=10 * EPS * condition)


# ---------------------------------------------------------------------- least squares


def test_diabetes(datasets):
    """Least squares with scikit-learn's diabetes data in its original units."""
    X, y = datasets.load_diabetes(return_X_y=True, scaled=False)
    data = batches(X, y[:, None])
    model = nn.Linear(10, 1, bias=False, dtype=torch.float64)
    J = JacobianLinearOperator(model, model.parameters(), data)
    assert np.array_equal(J.to_dense(), X)  # entries of X times 1 and 0: no rounding
    assert np.array_equal(J.T.to_dense(), X.T)
    gram = X.T @ X
    assert relative_error(matrix(J.T @ J), gram) < ROUNDING
    for operator in (HessianLinearOperator, GGNLinearOperator):
        mean = operator(model, nn.MSELoss(), model.parameters(), data)
        assert relative_error(matrix(mean), 2 / len(X) * gram) < ROUNDING
        total = operator(model, nn.MSELoss(reduction="sum"), model.parameters(), data)
        assert relative_error(matrix(total), 2 * gram) < ROUNDING


@CURVATURE
def test_longley_gram_matrix(sm, operator):
    """X^T X in rational arithmetic, although its condition number is 2e19."""
    X, y = load(sm, "longley")
    assert np.linalg.cond(X) > 4e9
    exact = np.vectorize(Fraction, otypes=[object])(X)
    expected = (exact.T @ exact / Fraction(8)).astype(float)
    H = operator(linear, nn.MSELoss(), [torch.zeros(7).double()], batches(X, y))
    # Sixteen positive products in an entry: 16 roundings of the sum, a few of the factors.
    assert_allclose(matrix(H), expected, rtol=20 * EPS)


def standard_deviations(J: np.ndarray, residuals: np.ndarray) -> tuple[float, np.ndarray]:
    """Of the residuals, and of the estimates: by QR, which does not square J."""
    m, n = J.shape
    s = np.linalg.norm(residuals) / np.sqrt(m - n)
    inverse = solve_triangular(np.linalg.qr(J, mode="r"), np.eye(n))
    return s, s * np.linalg.norm(inverse, axis=1)


def test_longley_standard_errors(sm):
    X, y = load(sm, "longley")
    estimates = np.array(published.LONGLEY_ESTIMATES)
    J = JacobianLinearOperator(linear, [tensor(estimates)], batches(X, y))
    s, deviations = standard_deviations(J.to_dense().numpy(), y - J @ estimates)
    # With its columns scaled, which QR does not notice, X has condition number 43275:
    # eps times that is 1e-11.
    assert_allclose(s, published.LONGLEY_RESIDUAL_DEVIATION, rtol=1e-11)
    assert_allclose(deviations, published.LONGLEY_DEVIATIONS, rtol=1e-11)


NIST_MODELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Misra1a": lambda b, x: b[0] * (1 - torch.exp(-b[1] * x)),
    "Rat43": lambda b, x: b[0] / (1 + torch.exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
}


@pytest.mark.parametrize("name", NIST_MODELS)
def test_nist_nonlinear_regression(name):
    problem, f = published.NONLINEAR[name], NIST_MODELS[name]
    x, y, b = tensor(problem.x), tensor(problem.y), tensor(problem.start)

    def model(params: list[Tensor], x: Tensor) -> Tensor:
        return f(params[0], x)

    def residuals(estimates: np.ndarray) -> np.ndarray:
        b.copy_(torch.from_numpy(estimates))  # which the operators follow
        return (f(b, x) - y).numpy()

    J = JacobianLinearOperator(model, [b], batches(x, y))
    H = HessianLinearOperator(model, nn.MSELoss(reduction="sum"), [b], batches(x, y))

    def jacobian(_: np.ndarray) -> np.ndarray:
        return J.to_dense().numpy()

    options = {"jac": jacobian, "method": "lm", "x_scale": "jac"}
    estimates = optimize.least_squares(residuals, problem.start, **options).x
    for _ in range(2):  # Newton squares the error, if H has the residuals' curvature too
        gradient = 2 * (J.T @ residuals(estimates))
        D = DiagonalLinearOperator(tensor(estimates))
        estimates = estimates - D @ np.linalg.solve(matrix(D @ H @ D), D @ gradient)
    # The tables have eleven digits.
    assert_allclose(estimates, problem.estimates, rtol=1e-10)
    at_optimum = residuals(estimates)
    alone = JacobianLinearOperator.from_function(lambda b: f(b, x), b)
    for dense in (jacobian(estimates), matrix(alone)):
        s, deviations = standard_deviations(dense, at_optimum)
        assert_allclose(s, problem.residual_deviation, rtol=1e-10)
        assert_allclose(deviations, problem.deviations, rtol=1e-10)


# ------------------------------------------------------------------------- functions


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@pytest.mark.parametrize("n", [2, 10, 1000])
def test_rosenbrock(n, rng):
    x, v = rng.normal(size=(2, n))
    H = HessianLinearOperator.from_function(rosenbrock, tensor(x))
    # a handful of operations for an entry of the Hessian, three entries in a row
    assert relative_error(H @ v, optimize.rosen_hess_prod(x, v)) < 10 * EPS
    assert relative_error(H.to_dense(), optimize.rosen_hess(x)) < 10 * EPS


@pytest.mark.parametrize("n", [2, 10, 1000])
def test_newton_cg_minimizes_rosenbrock(n):
    position = tensor(start := np.full(n, 0.5))
    H = HessianLinearOperator.from_function(rosenbrock, position)

    def hessian(x: np.ndarray) -> TorchLinearOperator:
        position.copy_(torch.from_numpy(x))
        return H

    options = {"jac": optimize.rosen_der, "hess": hessian, "options": {"xtol": 1e-10}}
    result = optimize.minimize(optimize.rosen, start, method="Newton-CG", **options)
    assert result.success
    # The last step was 1e-10 on average (xtol), and steps shrink superlinearly.
    assert_allclose(result.x, 1, rtol=0, atol=1e-8)


def test_chosen_spectrum(rng):
    """A quadratic form in three tensors: eigsh finds the eigenvalues that went in."""
    chosen = np.concatenate([[-5, -3, -3 + 1e-6], np.linspace(-1, 1, 94), [10, 20, 30]])
    Q, _ = np.linalg.qr(rng.normal(size=(100, 100)))
    A = tensor((Q * chosen) @ Q.T)

    def form(x: dict[str, Tensor]) -> Tensor:
        flat = torch.cat([part.reshape(-1) for part in x.values()])
        return flat @ (A @ flat) / 2

    shapes = {"a": (5, 8), "b": (59,), "c": (1,)}
    x = {name: tensor(rng.normal(size=shape)) for name, shape in shapes.items()}
    H = HessianLinearOperator.from_function(form, x)
    assert relative_error(matrix(H), A) < ROUNDING
    v0 = rng.normal(size=100)
    top = eigsh(H, k=3, which="LA", v0=v0, return_eigenvectors=False)
    bottom, vectors = eigsh(H, k=3, which="SA", v0=v0)
    # Eigenvalues of symmetric matrices move no more than the matrix does: n eps |A|.
    tolerance = 100 * EPS * 30
    assert_allclose(np.sort(top), chosen[-3:], rtol=0, atol=tolerance)
    assert_allclose(np.sort(bottom), chosen[:3], rtol=0, atol=tolerance)
    # the direction of the eigenvalue that is alone, up to its sign
    assert abs(vectors[:, np.argmin(bottom)] @ Q[:, 0]) > 1 - ROUNDING
