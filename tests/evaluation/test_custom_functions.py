"""Derivatives that users write are compared with differences."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchlinop import (
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    WrongDerivativeError,
)

from tests.evaluation.dense import CLOSE, reference


class Kernel(torch.autograd.Function):
    """Squares whose backward pass keeps a NumPy array: right once, a constant then."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.detach().numpy().copy()
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * g * torch.from_numpy(ctx.kept)


class Detached(Kernel):
    """Not differentiable in the cotangent, so that J v is lost, too."""

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(2 * g.detach().numpy() * ctx.kept)


class Plain:
    apply = staticmethod(torch.square)


class Squares(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.head, self.function = nn.Linear(4, 3), nn.Linear(3, 3), function

    def forward(self, X):
        hidden = self.linear(X)
        return self.head(torch.tanh(hidden) + 0.3 * self.function.apply(hidden))


@pytest.mark.parametrize("cache", ["auto", False])
def test_wrong_second_derivatives_of_users_are_found(data, cache):
    model = Squares(Kernel).double()
    arguments = (model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    H = HessianLinearOperator(*arguments, cache=cache)
    with pytest.raises(WrongDerivativeError, match=r"% off .* Kernel, .*check_derivatives"):
        H @ np.ones(H.shape[0])
    G = GGNLinearOperator(*arguments, cache=cache)  # needs no second derivative of it
    v = torch.ones(G.shape[0]).double()
    plain = copy.deepcopy(model)
    plain.function = Plain
    dense = reference(plain, list(plain.parameters()), data)[1]
    torch.testing.assert_close(G @ v, dense @ v, **CLOSE)
    unchecked = HessianLinearOperator(*arguments, cache=cache, check_derivatives=False)
    unchecked @ np.ones(H.shape[0])


def test_wrong_jacobians_of_users_are_found(data):
    model = Squares(Detached).double()
    arguments = (model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    for operator in (GGNLinearOperator, FisherMCLinearOperator):
        A = operator(*arguments)
        with pytest.raises(WrongDerivativeError, match=r"The derivative .* Detached"):
            A @ np.ones(A.shape[0])
    J = JacobianLinearOperator(model, arguments[2], data)
    with pytest.raises(WrongDerivativeError, match=r"The derivative .* Detached"):
        J @ np.ones(J.shape[1])
