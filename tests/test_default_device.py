"""Curvature matrices on the CPU, whatever torch's default device is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchlinop import (
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    gradient_and_loss,
)
from torchlinop._interchange import import_array
from torchlinop.autodiff.replay import record

from tests.problems import classification, regression

SMOOTH = regression(nn.HuberLoss())
LABELS = classification()


class Cube(torch.autograd.Function):
    """A Function of a user's own, whose derivative is compared with differences."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


def _cubes(params, X):
    return Cube.apply(X @ params[0])


WEIGHTS = [torch.ones(3, 2, dtype=torch.float64)]
MADE = {
    "Hessian": lambda: HessianLinearOperator(*SMOOTH.arguments),
    "Hessian, differences": lambda: HessianLinearOperator(
        _cubes, nn.MSELoss(), WEIGHTS, SMOOTH.data
    ),
    "GGN": lambda: GGNLinearOperator(*SMOOTH.arguments),
    "GGN, differences": lambda: GGNLinearOperator(
        _cubes, nn.MSELoss(), WEIGHTS, SMOOTH.data
    ),
    "sampled Fisher": lambda: FisherMCLinearOperator(*LABELS.arguments, mc_samples=2),
    "empirical Fisher": lambda: EFLinearOperator(*SMOOTH.arguments),
    "Jacobian": lambda: JacobianLinearOperator(SMOOTH.model, SMOOTH.params, SMOOTH.data),
}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_operators(make):
    A = make()
    for B in (A, A.T):
        x = np.ones(B.shape[1])
        first = B @ x
        for _ in range(4):  # recorded, then replayed
            np.testing.assert_allclose(B @ x, first, rtol=1e-12, atol=1e-13)
    assert A.to_dense().device.type == "cpu"


@pytest.mark.usefixtures("elsewhere")
def test_gradient():
    gradient, loss = gradient_and_loss(*SMOOTH.arguments)
    assert {t.device.type for t in (*gradient, loss)} == {"cpu"}


@pytest.mark.usefixtures("elsewhere")
def test_replay_of_numbers():
    _, replay = record(lambda x: x * 2.0 * 3.0, torch.ones(2, device="cpu"))
    assert replay is not None
    assert replay.run(torch.ones(2, device="cpu")).tolist() == [6, 6]


def test_large_vectors_for_a_device_that_is_no_cuda_device():
    x = np.ones(1 << 14)
    imported = import_array(x, torch.device("meta"), torch.float64)
    assert imported.tensor.device.type == "meta"
