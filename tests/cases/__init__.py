"""Every operator, declared once together with its dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor
from torchlinop import (
    DiagonalLinearOperator,
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    TorchLinearOperator,
    aslinearoperator,
)
from torchlinop.examples import (
    dense_empirical_fisher,
    dense_ggn,
    dense_hessian,
    dense_jacobian,
)

from tests.problems import binary, classification, regression


class Case(NamedTuple):
    operator: TorchLinearOperator
    dense: np.ndarray


#: case name -> function of the real dtype in which the operator computes
CASES: dict[str, Callable[[torch.dtype], Case]] = {}


def _case(make: Callable[[torch.dtype], tuple[TorchLinearOperator, Tensor | np.ndarray]]):
    def build(dtype: torch.dtype) -> Case:
        operator, dense = make(dtype)
        return Case(operator, np.asarray(dense))

    CASES[make.__name__] = build
    return make


def _matrix(dtype: torch.dtype, m: int = 6, n: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype)


@_case
def hessian(dtype):
    problem = classification(dtype=dtype)
    return HessianLinearOperator(*problem.arguments), dense_hessian(*_double(problem))


@_case
def hessian_of_a_function(dtype):
    x = torch.linspace(-1, 2, 5, dtype=dtype)

    def f(x):
        return (x[1:] * x[:-1].exp()).sum() + x.pow(3).sum()

    dense = torch.func.hessian(f)(x.double())
    return HessianLinearOperator.from_function(f, x), dense


@_case
def ggn(dtype):
    problem = regression(dtype=dtype)
    return GGNLinearOperator(*problem.arguments), dense_ggn(*_double(problem))


@_case
def fisher_mc(dtype):
    """The labels are drawn as documented: uniforms by datum and sample, then the CDF."""
    problem = classification(dtype=dtype)
    operator = FisherMCLinearOperator(*problem.arguments, mc_samples=3, seed=5)
    model, _, params, data = _double(problem)
    X = torch.cat([X for X, _ in data])
    p = model(X).softmax(-1).detach().numpy()
    uniform = torch.rand(
        9, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    label = (uniform.numpy()[..., None] > p.cumsum(-1)[:, None]).sum(-1)
    gradients = p[:, None] - np.eye(3)[label]
    J = dense_jacobian(model, params, data).numpy().reshape(9, 3, -1)
    rows = np.einsum("nmc,ncp->nmp", gradients, J).reshape(27, -1)
    return operator, rows.T @ rows / 27


@_case
def empirical_fisher(dtype):
    problem = binary(dtype=dtype)
    dense = dense_empirical_fisher(
        problem.model.double(),
        torch.nn.BCEWithLogitsLoss(reduction="sum"),
        problem.params,
        [(X.double(), y.double()) for X, y in problem.data],
        normalizer=18.0,
    )
    problem = binary(dtype=dtype)
    return EFLinearOperator(*problem.arguments), dense


@_case
def jacobian(dtype):
    problem = regression(dtype=dtype)
    operator = JacobianLinearOperator(problem.model, problem.params, problem.data)
    model, _, params, data = _double(problem)
    return operator, dense_jacobian(model, params, data)


@_case
def jacobian_transposed(dtype):
    operator, dense = CASES["jacobian"](dtype)
    return operator.T, dense.T


@_case
def jacobian_of_a_function(dtype):
    x = {"a": torch.linspace(0, 1, 3, dtype=dtype), "b": torch.tensor(2.0, dtype=dtype)}

    def f(x):
        return torch.outer(x["a"].sin(), x["a"]) * x["b"]

    def flat(v):
        return f({"a": v[:3], "b": v[3]}).reshape(-1)

    v = torch.cat([x["a"], x["b"].reshape(1)]).double()
    return JacobianLinearOperator.from_function(f, x), torch.func.jacrev(flat)(v)


@_case
def identity(dtype):
    return IdentityLinearOperator([(2, 2), (3,)], "cpu", dtype), np.eye(7)


@_case
def diagonal(dtype):
    d = torch.linspace(-1, 3, 5, dtype=dtype)
    return DiagonalLinearOperator(d), np.diag(d.double())


@_case
def complex_diagonal(dtype):
    d = torch.linspace(-1, 3, 5, dtype=dtype) * (1 + 2j)
    return DiagonalLinearOperator(d), np.diag(d)


@_case
def dense_matrix(dtype):
    matrix = _matrix(dtype, 4, 6)
    return aslinearoperator(matrix), matrix


@_case
def complex_matrix(dtype):
    matrix = _matrix(dtype, 6, 4) + 1j * _matrix(dtype, 6, 4).flip(0)
    return aslinearoperator(matrix), matrix


@_case
def scipy_operator(dtype):
    matrix = _matrix(dtype, 4, 6).numpy()
    return aslinearoperator(scipy.sparse.linalg.aslinearoperator(matrix)), matrix


@_case
def sparse_matrix(dtype):
    matrix = _matrix(dtype).numpy() * (_matrix(dtype).numpy() > 0)
    return aslinearoperator(scipy.sparse.csr_array(matrix)), matrix


@_case
def damped_ggn(dtype):
    operator, dense = CASES["ggn"](dtype)
    shapes = [(operator.shape[0],)]
    damping = 0.1 * IdentityLinearOperator(shapes, operator.device, dtype)
    return operator + damping, dense + 0.1 * np.eye(len(dense))


@_case
def normal_equations(dtype):
    operator, dense = CASES["jacobian"](dtype)
    return operator.T @ operator, dense.T @ dense


@_case
def mixed_sum(dtype):
    operator, dense = CASES["hessian"](dtype)
    offset = scipy.sparse.diags(np.arange(len(dense)).astype(numpy_dtype(dtype)))
    return (operator - offset) / 2, (dense - offset.toarray()) / 2


@_case
def complex_shift(dtype):
    operator, dense = CASES["hessian"](dtype)
    shapes = [(operator.shape[0],)]
    shift = (0.5 - 1j) * IdentityLinearOperator(shapes, operator.device, dtype)
    return operator + shift, dense + (0.5 - 1j) * np.eye(len(dense))


@_case
def cube(dtype):
    operator, dense = CASES["ggn"](dtype)
    return operator**3, np.linalg.matrix_power(dense, 3)


@_case
def complex_transpose(dtype):
    operator, dense = CASES["complex_matrix"](dtype)
    return operator.T, dense.T


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype


def _double(problem):
    """A copy of a problem in float64, for the reference."""
    import copy

    model = copy.deepcopy(problem.model).double()
    data = [
        (X.double(), y.double() if y.is_floating_point() else y) for X, y in problem.data
    ]
    return model, problem.loss, list(model.parameters()), data
