"""Operators share a risk, and look again when something has changed."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn
from torchlinop import (
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)

from tests.evaluation.dense import CLOSE, jacobian
from tests.problems import classification, mlp


def test_operators_share_a_risk():
    problem = classification()
    risk = EmpiricalRisk(*problem.arguments)
    H, G = HessianLinearOperator(risk), GGNLinearOperator(risk)
    F = FisherMCLinearOperator(risk, mc_samples=2)
    J = JacobianLinearOperator(risk)
    assert H.space is G.space is risk.space
    v = np.ones(27)
    for A in (H, G, F, J):
        A @ v
    with torch.no_grad():
        problem.params[0].mul_(1.5)
    looks = risk.looks
    fresh = [
        HessianLinearOperator(*problem.arguments),
        GGNLinearOperator(*problem.arguments),
        FisherMCLinearOperator(*problem.arguments, mc_samples=2),
        JacobianLinearOperator(problem.model, problem.params, problem.data),
    ]
    for _ in range(2):
        for A, B in zip((H, G, F, J), fresh, strict=True):
            np.testing.assert_allclose(A @ v, B @ v, rtol=1e-10, atol=1e-12)
    assert risk.looks == looks + 1  # one of them looked, for all


def test_a_jacobian_of_a_risk_whose_data_has_grown(data):
    model = mlp(4, 3, 3)
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), model.parameters(), data)
    data.append(data[0])
    J = JacobianLinearOperator(risk)
    dense = jacobian(
        model(torch.cat([X for X, _ in data])).reshape(-1), list(model.parameters())
    )
    torch.testing.assert_close(J.to_dense(), dense, **CLOSE)


class Orderly:
    """Data that begins to shuffle."""

    def __init__(self, batches):
        self.batches, self.shuffles = batches, False

    def __iter__(self):
        n = len(self.batches)
        order = torch.randperm(n).tolist() if self.shuffles else range(n)
        return (self.batches[i] for i in order)


@pytest.mark.parametrize("shared", [False, True])
def test_order_is_required_after_every_look(data, shared):
    many = Orderly([(X + i, y) for i in range(6) for X, y in data[:1]])
    model = mlp(4, 3, 3)
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), model.parameters(), many)
    J = JacobianLinearOperator(risk)
    v = np.ones(J.shape[1])
    J @ v
    many.shuffles = True
    if shared:
        HessianLinearOperator(risk).refresh()
    else:
        with pytest.raises(ValueError, match="shuffle=False"):
            J.refresh()
    for _ in range(2):
        with pytest.raises(ValueError, match="shuffle=False"):
            J @ v


def test_a_risk_and_its_parts_are_refused(data):
    problem = classification()
    risk = EmpiricalRisk(*problem.arguments)
    with pytest.raises(TypeError, match="has its own data"):
        HessianLinearOperator(risk, data=data)
    with pytest.raises(TypeError, match="has its own cache"):
        GGNLinearOperator(risk, cache=False)
    with pytest.raises(TypeError, match="Missing params, data"):
        GGNLinearOperator(problem.model, problem.loss)
    with pytest.raises(TypeError, match=r"'cahce'\. The options are batch_size, cac"):
        GGNLinearOperator(*problem.arguments, cahce=True)


def test_refresh_while_others_multiply():
    problem = classification()
    H = HessianLinearOperator(*problem.arguments)
    v, stop, errors = np.ones(27), threading.Event(), []
    expected = H @ v

    def multiply():
        try:
            while not stop.is_set():
                np.testing.assert_allclose(H @ v, expected, rtol=1e-10, atol=1e-13)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=multiply) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        H.refresh()
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_refresh_that_fails_changes_nothing():
    problem = classification()
    H = HessianLinearOperator(*problem.arguments)
    v = np.ones(27)
    expected, nbytes = H @ v, H._maps.nbytes
    problem.data.append("nonsense")
    with pytest.raises(TypeError, match="has to be a pair"):
        H.refresh()
    problem.data.pop()
    assert H._maps.nbytes == nbytes > 0
    np.testing.assert_allclose(H @ v, expected, rtol=1e-10, atol=1e-13)
