"""Influence of training samples: dense matrices, and training without them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchlinop import (
    CGInverseLinearOperator,
    CholeskyInverseLinearOperator,
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    influence,
    self_influence,
)
from torchlinop.reference import dense_hessian

from tests.gradients.reference import dense_gradients
from tests.problems import classification

D = torch.float64


def test_dense():
    problem = classification(nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5])))
    model, _, params, data = problem.arguments
    other = [(-X, y) for X, y in data[:2]]
    train = EmpiricalRisk(*problem.arguments)
    test = EmpiricalRisk(model, nn.CrossEntropyLoss(reduction="sum"), params, other)
    H = dense_hessian(*problem.arguments) + 3 * torch.eye(27, dtype=D)
    rows = dense_gradients(*problem.arguments)
    columns = dense_gradients(model, nn.CrossEntropyLoss(reduction="sum"), params, other)
    expected = rows @ torch.linalg.solve(H, columns.T)
    exact = CGInverseLinearOperator(HessianLinearOperator(train), damping=3.0, rtol=1e-12)
    found = influence(exact, train, test)
    assert found.shape == (9, 8)
    torch.testing.assert_close(found, expected)
    own = (rows @ torch.linalg.solve(H, rows.T)).diagonal()
    torch.testing.assert_close(self_influence(exact, train), own)
    torch.testing.assert_close(influence(torch.linalg.inv(H), train, test), expected)
    approximate = EKFACLinearOperator(train).inverse(damping=3.0)
    expected = rows @ approximate.to_dense() @ columns.T
    torch.testing.assert_close(influence(approximate, train, test), expected)


class Trained:
    """Logistic regression with a weight decay, trained by Newton steps to convergence."""

    decay = 0.1

    def __init__(self):
        datasets = pytest.importorskip("sklearn.datasets")
        X, y = datasets.load_breast_cancer(return_X_y=True)
        X = torch.from_numpy((X - X.mean(0)) / X.std(0))
        y = torch.from_numpy(y).to(D).unsqueeze(1)
        self.X, self.y = X[:400], y[:400]
        self.model = nn.Linear(30, 1, dtype=D)
        self.fit(torch.ones(400, dtype=D))
        self.arguments = self.model, nn.BCEWithLogitsLoss(), list(self.model.parameters())
        self.train = EmpiricalRisk(*self.arguments, [(self.X, self.y)])
        self.test_data = [(X[400:], y[400:])]
        self.test = EmpiricalRisk(*self.arguments, self.test_data)

    def fit(self, weights):
        """Minimize the weighted sum of losses over 400, and the decay of all parameters."""
        ones = torch.ones(400, 1, dtype=D)
        A, theta = torch.cat([self.X, ones], dim=1), torch.zeros(31, 1, dtype=D)
        for _ in range(12):
            p = (A @ theta).sigmoid()
            gradient = A.T @ (weights.unsqueeze(1) * (p - self.y)) / 400
            gradient += self.decay * theta
            curvature = (weights.unsqueeze(1) * p * (1 - p)).squeeze(1)
            H = (A.T * curvature) @ A / 400 + self.decay * torch.eye(31, dtype=D)
            theta -= torch.linalg.solve(H, gradient)
        assert gradient.abs().max() < 1e-12
        with torch.no_grad():
            self.model.weight.copy_(theta[:30].T)
            self.model.bias.copy_(theta[30])

    def losses(self):
        """On the test data, and of each training sample."""
        loss = nn.BCEWithLogitsLoss()
        ((X, y),) = self.test_data
        with torch.no_grad():
            test = loss(self.model(X), y).item()
            own = nn.BCEWithLogitsLoss(reduction="none")(self.model(self.X), self.y)
        return test, own[:, 0].numpy() / 400

    def without_each(self):
        """Changes by training without one sample: of the test loss, and of its own."""
        test, own = self.losses()
        changes = []
        for n in range(400):
            weights = torch.ones(400, dtype=D)
            weights[n] = 0
            self.fit(weights)
            test_n, own_n = self.losses()
            changes.append((test_n - test, own_n[n] - own[n]))
        self.fit(torch.ones(400, dtype=D))
        return np.array(changes).T


@pytest.fixture(scope="module")
def trained():
    return Trained()


@pytest.fixture(scope="module")
def retrained(trained):
    return trained.without_each()


def _agreement(predicted, true, what):
    predicted = predicted.numpy()
    correlation = np.corrcoef(predicted, true)[0, 1]
    slope = predicted @ true / (predicted @ predicted)
    print(f"{what}: correlation {correlation:.4f}, slope {slope:.3f}")
    return correlation, slope


def test_leaving_one_out(trained, retrained):
    """The exact inverse: what is left is the second order in the sample's weight."""
    H = HessianLinearOperator(trained.train)
    inverse = CGInverseLinearOperator(H, damping=trained.decay, rtol=1e-10)
    scores = influence(inverse, trained.train, trained.test).sum(1)
    correlation, slope = _agreement(scores, retrained[0], "exact, test loss")
    assert correlation > 0.995
    assert 1 < slope < 1.06
    own = self_influence(inverse, trained.train)
    correlation, slope = _agreement(own, retrained[1], "exact, own loss")
    assert correlation > 0.98
    assert 1 < slope < 1.25


def test_leaving_one_out_by_ekfac(trained, retrained):
    inverse = EKFACLinearOperator(trained.train).inverse(damping=trained.decay)
    scores = influence(inverse, trained.train, trained.test).sum(1)
    correlation, slope = _agreement(scores, retrained[0], "EKFAC, test loss")
    assert correlation > 0.97
    assert 0.8 < slope < 1
    own = self_influence(inverse, trained.train)
    correlation, slope = _agreement(own, retrained[1], "EKFAC, own loss")
    assert correlation > 0.98
    assert 1 < slope < 1.2


def test_small_changes_of_a_weight_are_predicted_to_second_order(trained):
    """A tenth of what is taken away has a hundredth of the error."""
    inverse = CholeskyInverseLinearOperator(
        GGNLinearOperator(trained.train), damping=trained.decay
    )
    n = int(self_influence(inverse, trained.train).argmax())
    score = influence(inverse, trained.train, trained.test).sum(1)[n].item()
    before, errors = trained.losses()[0], []
    for share in (0.01, 0.001):
        weights = torch.ones(400, dtype=D)
        weights[n] = 1 - share
        trained.fit(weights)
        errors.append(abs(trained.losses()[0] - before - share * score))
    trained.fit(torch.ones(400, dtype=D))
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.1)


def test_refused(trained):
    inverse, train = torch.eye(31, dtype=D), trained.train
    with pytest.raises(TypeError, match="test has to be an EmpiricalRisk, got list"):
        influence(inverse, train, trained.test_data)
    with pytest.raises(ValueError, match=r"shape \(3, 3\), but there are 31 parameters"):
        influence(torch.eye(3), train, train)
    head = EmpiricalRisk(*trained.arguments[:2], [trained.model.bias], trained.test_data)
    with pytest.raises(
        ValueError, match="have different parameters: weight, bias and bias"
    ):
        influence(inverse, train, head)
