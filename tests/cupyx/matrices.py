"""Operators by formulas, and the same formulas of dense matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torchlinop import (
    CGInverseLinearOperator,
    DiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    SubmatrixLinearOperator,
    TorchLinearOperator,
)
from torchlinop.reference import dense_ggn, dense_hessian, dense_jacobian

from tests.cupyx.checks import TORCH, torch_dtype
from tests.problems import Problem, mlp


@functools.cache
def problem(char: str) -> Problem:
    """A 4-5-3 network (43 parameters), 63 predictions in two uneven batches."""
    dtype = TORCH[char]
    torch.manual_seed(4)
    model = mlp(4, 5, 3).to(dtype)
    data = [(torch.randn(n, 4).to(dtype), torch.randn(n, 3).to(dtype)) for n in (13, 8)]
    return Problem(model, nn.MSELoss(), list(model.parameters()), data)


class Matrices(NamedTuple):
    """The GGN, the Hessian, the Jacobian, the identity: operators, or dense in float64."""

    G: Any
    H: Any
    J: Any
    I: Any  # noqa: E741


@functools.cache
def references(char: str) -> Matrices:
    """Dense matrices in float64 at the very numbers that the operators have."""
    model, loss, _, data = problem(char)
    double = mlp(4, 5, 3)
    double.load_state_dict(model.state_dict())
    params = list(double.parameters())
    data = [(X.double(), y.double()) for X, y in data]
    dense = (
        dense_ggn(double, loss, params, data),
        dense_hessian(double, loss, params, data),
        dense_jacobian(double, params, data),
    )
    G, H, J = (matrix.numpy() for matrix in dense)
    return Matrices(G, H, J, np.eye(len(G)))


def operators(char: str) -> Matrices:
    p = problem(char)
    return Matrices(
        GGNLinearOperator(*p.arguments),
        HessianLinearOperator(*p.arguments),
        JacobianLinearOperator(p.model, p.params, p.data),
        IdentityLinearOperator([t.shape for t in p.params], "cpu", TORCH[char]),
    )


def part(A: Any, size: int) -> Any:
    """The leading submatrix."""
    if isinstance(A, np.ndarray):
        return A[:size, :size]
    return SubmatrixLinearOperator(A, range(size), range(size))


def inverse(A: Any, damping: float) -> Any:
    """The damped inverse."""
    if isinstance(A, np.ndarray):
        return np.linalg.inv(A + damping * np.eye(len(A)))
    rtol = 4 * torch.finfo(A.torch_dtype).eps
    return CGInverseLinearOperator(A, damping=damping, rtol=rtol)


#: applied to operators it gives an operator, applied to dense matrices the reference
Formula = Callable[[Matrices], Any]

FORMULAS: dict[str, Formula] = {
    "G": lambda m: m.G,
    "H": lambda m: m.H,
    "J": lambda m: m.J,
    "J^T": lambda m: m.J.T,
    "G + I/100": lambda m: m.G + 1e-2 * m.I,
    "H H + I/10": lambda m: m.H @ m.H + 0.1 * m.I,
    "(J^T J + I)/63": lambda m: (m.J.T @ m.J + m.I) / 63,
    "J G - J": lambda m: m.J @ m.G - m.J,
    "G[:20, :20] + I/50": lambda m: part(m.G, 20) + 0.02 * part(m.I, 20),
    "(G + I/2)^-1": lambda m: inverse(m.G, 0.5),
    # Hermitian, since the commutator of symmetric matrices is skew
    "G + I + i[G, H]/2": lambda m: m.G + m.I + 0.5j * (m.G @ m.H - m.H @ m.G),
}
POSITIVE = [
    "G + I/100",
    "H H + I/10",
    "(J^T J + I)/63",
    "G[:20, :20] + I/50",
    "(G + I/2)^-1",
]
COMPLEX = "G + I + i[G, H]/2"


def factored_inverse(damping: float, dtype: Any) -> TorchLinearOperator:
    """KFAC's damped inverse."""
    return KFACLinearOperator(*problem(np.dtype(dtype).char).arguments).inverse(
        damping=damping
    )


def linear_model(damping: float, dtype: Any) -> tuple[TorchLinearOperator, Any]:
    """The damped GGN of a linear model and KFAC's inverse of it, which is exact."""
    dtype = torch_dtype(dtype)
    model = nn.Linear(4, 3).to(dtype)
    data = [(torch.randn(9, 4).to(dtype), torch.randn(9, 3).to(dtype))]
    arguments = model, nn.MSELoss(), list(model.parameters()), data
    G = GGNLinearOperator(*arguments)
    identity = IdentityLinearOperator([(G.shape[0],)], "cpu", dtype)
    return G + damping * identity, KFACLinearOperator(*arguments).inverse(damping=damping)


def operator_and_dense(formula: str, dtype: Any) -> tuple[TorchLinearOperator, np.ndarray]:
    char = np.dtype(dtype).char
    build = FORMULAS[formula]
    return build(operators(char)), build(references(char))


def inverse_diagonal(dense: np.ndarray, dtype: Any) -> TorchLinearOperator:
    """Jacobi's preconditioner, positive definite also for indefinite matrices."""
    diagonal = 1 / (np.abs(dense.diagonal().real) + 0.1)
    return DiagonalLinearOperator(torch.from_numpy(diagonal).to(torch_dtype(dtype)))
