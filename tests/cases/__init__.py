"""Every operator, declared once together with its dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor
from torchlinop import (
    BlockDiagonalLinearOperator,
    CGInverseLinearOperator,
    CholeskyInverseLinearOperator,
    DiagonalLinearOperator,
    EFLinearOperator,
    EighInverseLinearOperator,
    EighLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    GradientSecondMomentLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    JacobiPreconditioner,
    KroneckerLinearOperator,
    LowRankPlusDiagonalLinearOperator,
    LSMRInverseLinearOperator,
    MINRESInverseLinearOperator,
    NeumannInverseLinearOperator,
    NTKLinearOperator,
    NystromPreconditioner,
    SubmatrixLinearOperator,
    TorchLinearOperator,
    aslinearoperator,
)
from torchlinop.reference import (
    dense_empirical_fisher,
    dense_ggn,
    dense_hessian,
    dense_jacobian,
)

from tests.gradients.reference import dense_gradients, dense_moment
from tests.problems import binary, classification, regression
from tests.solve.matrices import indefinite, positive


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
        lambda f, y: torch.nn.BCEWithLogitsLoss(reduction="none")(f, y).sum(-1),
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
def neural_tangent_kernel(dtype):
    problem = regression(dtype=dtype)
    K = NTKLinearOperator(problem.model, problem.params, problem.data)
    model, _, params, data = _double(problem)
    J = dense_jacobian(model, params, data).reshape(8, 2, -1)
    return K, torch.einsum("ncp,mcp->nm", J, J)


@_case
def neural_tangent_kernel_of_two_data_sets(dtype):
    problem = regression(dtype=dtype)
    other = [(-X, y) for X, y in problem.data[:2]]
    K = NTKLinearOperator(problem.model, problem.params, other, columns=problem.data)
    model, _, params, data = _double(problem)
    columns = dense_jacobian(model, params, data).reshape(8, 2, -1)
    other = [(-X, y) for X, y in data[:2]]
    rows = dense_jacobian(model, params, other).reshape(5, 2, -1)
    return K, torch.einsum("ncp,mcp->nm", rows, columns)


@_case
def gradient_second_moment(dtype):
    """Of a block of 24 parameters the gradients are kept, of one of 2 the matrix."""
    problem = regression(dtype=dtype)
    groups = {"first": ["0.weight", "0.bias", "2.weight"], "last": ["2.bias"]}
    M = GradientSecondMomentLinearOperator(*problem.arguments, groups=groups)
    dense = dense_moment(dense_gradients(*_double(problem)), centred=False)
    dense[:24, 24:] = dense[24:, :24] = 0
    return M, dense


@_case
def gradient_covariance(dtype):
    problem = binary(dtype=dtype)
    C = GradientCovarianceLinearOperator(*problem.arguments)
    dense = dense_moment(dense_gradients(*_double(problem)), centred=True)
    dense[:16, 16:] = dense[16:, :16] = 0
    return C, dense


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


@_case
def submatrix(dtype):
    operator, dense = CASES["jacobian"](dtype)
    rows, columns = [3, 0, -1], range(2, 20, 3)
    return SubmatrixLinearOperator(operator, rows, columns), dense[rows][:, columns]


@_case
def principal_submatrix(dtype):
    operator, dense = CASES["hessian"](dtype)
    indices = np.arange(4, 15)
    return SubmatrixLinearOperator(operator, indices, indices), dense[4:15, 4:15]


@_case
def kronecker(dtype):
    factors = _matrix(dtype, 3, 2), _matrix(dtype, 2, 4)
    return KroneckerLinearOperator(*factors), np.kron(*(_array(f) for f in factors))


@_case
def blocks_of_structured_matrices(dtype):
    values, vectors = torch.linalg.eigh(positive(6, 10, dtype))
    low = LowRankPlusDiagonalLinearOperator(_matrix(dtype)[0], _matrix(dtype, 6, 2))
    blocks = [EighLinearOperator(values, vectors), low, _matrix(dtype)]
    dense = [_array(positive(6, 10, dtype)), _array(low.to_dense()), _array(_matrix(dtype))]
    return BlockDiagonalLinearOperator(blocks), scipy.linalg.block_diag(*dense)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def _tight(dtype: torch.dtype) -> float:
    """A relative tolerance near the rounding error."""
    return 4 * torch.finfo(dtype).eps


# Inverses take many products: those of small matrices are cheap. That an inverse takes an
# operator that records and replays is the case natural_gradient_projection.


@_case
def cg_inverse(dtype):
    matrix = positive(6, 5.0, dtype)
    inverse = CGInverseLinearOperator(matrix, damping=1.0, rtol=_tight(dtype))
    return inverse, np.linalg.inv(matrix.double().numpy() + np.eye(6))


@_case
def minres_inverse(dtype):
    matrix = indefinite(6, 3.0, dtype)
    inverse = MINRESInverseLinearOperator(matrix, damping=-0.1, rtol=_tight(dtype))
    return inverse, np.linalg.inv(matrix.double().numpy() - 0.1 * np.eye(6))


@_case
def lsmr_inverse(dtype):
    matrix = _matrix(dtype, 4, 6)
    accuracy = {"atol": _tight(dtype), "btol": _tight(dtype)}
    inverse = LSMRInverseLinearOperator(matrix, damp=2.0, **accuracy)
    dense = matrix.double().numpy()
    return inverse, np.linalg.solve(dense.T @ dense + 4 * np.eye(6), dense.T)


@_case
def neumann_inverse(dtype):
    matrix = positive(6, 5.0, dtype)
    inverse = NeumannInverseLinearOperator(matrix, 3, scale=0.2, damping=1.0)
    step = np.eye(6) - 0.2 * (matrix.double().numpy() + np.eye(6))
    return inverse, 0.2 * sum(np.linalg.matrix_power(step, k) for k in range(4))


@_case
def complex_neumann_inverse(dtype):
    matrix = (_matrix(dtype) + 1j * _matrix(dtype).flip(0)) / 10
    inverse = NeumannInverseLinearOperator(matrix, 4, scale=0.3, damping=1.0)
    step = np.eye(6) - 0.3 * (matrix.numpy() + np.eye(6))
    return inverse, 0.3 * sum(np.linalg.matrix_power(step, k) for k in range(5))


@_case
def cholesky_inverse(dtype):
    matrix = positive(6, 5.0, dtype)
    inverse = CholeskyInverseLinearOperator(matrix, damping=1.0)
    return inverse, np.linalg.inv(matrix.double().numpy() + np.eye(6))


@_case
def eigh_inverse(dtype):
    matrix = indefinite(6, 3.0, dtype)
    inverse = EighInverseLinearOperator(matrix, damping=-0.1)
    return inverse, np.linalg.inv(matrix.double().numpy() - 0.1 * np.eye(6))


@_case
def complex_cg_inverse(dtype):
    matrix = _matrix(dtype) + 1j * _matrix(dtype).flip(0)
    matrix = matrix @ matrix.mH / 10
    inverse = CGInverseLinearOperator(matrix, damping=2.0, rtol=_tight(dtype))
    return inverse, np.linalg.inv(matrix.numpy() + 2 * np.eye(6))


@_case
def natural_gradient_projection(dtype):
    """An inverse inside an expression."""
    operator, dense = CASES["ggn"](dtype)
    inverse = CGInverseLinearOperator(operator, damping=1.0, rtol=_tight(dtype))
    return inverse @ operator, np.linalg.solve(dense + np.eye(len(dense)), dense)


@_case
def jacobi_preconditioner(dtype):
    operator, dense = CASES["hessian"](dtype)
    damped = np.abs(np.diag(dense)) + 0.5
    return JacobiPreconditioner(operator, damping=0.5), np.diag(1 / damped)


@_case
def nystrom_preconditioner(dtype):
    """Of a matrix whose rank is that of the sketch, where it is known exactly."""
    factor = _matrix(dtype, 6, 3)
    matrix = (factor @ factor.T).double().numpy()
    values, vectors = np.linalg.eigh(matrix)
    U = vectors[:, 3:]
    dense = (values[3] + 0.5) * (U / (values[3:] + 0.5)) @ U.T + np.eye(6) - U @ U.T
    return NystromPreconditioner(factor @ factor.T, 0.5, rank=3), dense


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
