"""One of cupyx's own operators, as its code sees it."""

from __future__ import annotations

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from torchlinop import (
    CGInverseLinearOperator,
    DiagonalLinearOperator,
    GGNLinearOperator,
    NystromPreconditioner,
    TorchLinearOperator,
    aslinearoperator,
    verify,
)

from tests.cupyx.checks import REAL, check_result
from tests.cupyx.matrices import operator_and_dense


def test_an_operator_is_one_of_cupyx_while_cupyx_is_there(solvers, cupy):
    A, _ = operator_and_dense("G", np.float64)
    assert isinstance(A, solvers.LinearOperator)
    assert solvers.aslinearoperator(A) is A
    assert type(A) is GGNLinearOperator
    assert isinstance(A, GGNLinearOperator)
    assert A.__class__.__name__ == "GGNLinearOperator"
    assert not isinstance(3 * A, GGNLinearOperator)


@pytest.mark.parametrize("protocol", range(6))
def test_operators_are_copied_and_pickled_while_cupyx_is_there(solvers, cupy, protocol):
    A, _ = operator_and_dense("(G + I/2)^-1", np.float64)
    B = 2 * A + A
    x = np.linspace(0, 1, A.shape[1])
    for again in (
        pickle.loads(pickle.dumps(B, protocol)),
        copy.copy(B),
        copy.deepcopy(B),
    ):
        assert type(again) is type(B)
        np.testing.assert_allclose(again @ x, B @ x, rtol=1e-12)


def test_a_class_that_cannot_have_another_base(solvers, cupy):
    class Choosy(DiagonalLinearOperator):
        def __init_subclass__(cls, *, key):
            super().__init_subclass__()

    A = Choosy(torch.ones(3))
    assert not isinstance(A, dict)
    np.testing.assert_array_equal((A @ cupy.asarray(np.ones(3, "f"))).get(), np.ones(3))


def test_an_operator_of_cupyx_without_an_adjoint(solvers, cupy):
    H, _ = operator_and_dense("H", np.float64)
    C = solvers.LinearOperator(H.shape, lambda x: x, dtype=np.float64)
    with pytest.raises(NotImplementedError, match="rmatvec="):
        (H + C).T @ np.ones(H.shape[0])


def test_an_operator_is_not_one_of_cupyx_where_nobody_uses_it():
    A, _ = operator_and_dense("G", np.float64)
    if "cupyx.scipy.sparse.linalg" not in sys.modules:
        assert A.__class__ is GGNLinearOperator


def test_lobpcg_multiplies_blocks(solvers, cupy, rng):
    """Of a wrapper that cupyx makes itself it would ask for one column after another."""
    A, dense = operator_and_dense("G + I/100", np.float64)
    widths = []

    class Counted(TorchLinearOperator):
        def _apply(self, x):
            widths.append(x.shape[1])
            return A._product(x)

        def _adjoint(self):
            return self

    counted = Counted(A.shape, A.torch_dtype, A.device)
    X = cupy.asarray(rng.standard_normal((len(dense), 3)))
    M = NystromPreconditioner(A, 0.01)
    values, _ = solvers.lobpcg(counted, X, M=M, maxiter=100, tol=1e-6)
    np.testing.assert_allclose(
        values.get(), np.linalg.eigvalsh(dense)[::-1][:3], rtol=0, atol=1e-6
    )
    assert widths[0] == 3
    assert sum(width == 3 for width in widths) > len(widths) / 2


CUPYX_EXPRESSIONS = {
    "C + A": lambda A, C: C + A,
    "A + C": lambda A, C: A + C,
    "C - A": lambda A, C: C - A,
    "A - C": lambda A, C: A - C,
    "C @ A": lambda A, C: C @ A,
    "A @ C": lambda A, C: A @ C,
    "A @ C + A": lambda A, C: A @ C + A,
}


@REAL
@pytest.mark.parametrize("expression", CUPYX_EXPRESSIONS)
@pytest.mark.parametrize("made", ["matrix", "functions"])
def test_operators_of_cupyx_in_expressions(solvers, cupy, expression, made, dtype, rng):
    A, dense = operator_and_dense("H", dtype)
    host = rng.standard_normal(A.shape).astype(dtype)
    matrix = cupy.asarray(host)
    C = solvers.aslinearoperator(matrix)
    if made == "functions":
        C = solvers.LinearOperator(
            A.shape, lambda x: matrix @ x, rmatvec=lambda x: matrix.T @ x, dtype=dtype
        )
    B = CUPYX_EXPRESSIONS[expression](A, C)
    expected = CUPYX_EXPRESSIONS[expression](dense, host)
    x = rng.standard_normal((A.shape[1], 3)).astype(dtype)
    for given in (x[:, 0], x):
        y = B @ cupy.asarray(np.ascontiguousarray(given))
        check_result(cupy, y, given.shape, dtype)
        np.testing.assert_allclose(
            y.get(), expected @ given, rtol=0, atol=3e3 * np.finfo(dtype).eps
        )
    if expression.startswith("A"):  # ours: any kind of array, and an adjoint
        assert isinstance(B, TorchLinearOperator)
        np.testing.assert_allclose(
            B.H @ x, expected.T @ x, rtol=0, atol=3e3 * np.finfo(dtype).eps
        )


def test_aslinearoperator_of_a_cupyx_operator(solvers, cupy, rng):
    host = rng.standard_normal((5, 3))
    C = solvers.aslinearoperator(cupy.asarray(host))
    A = aslinearoperator(C)
    assert isinstance(A, TorchLinearOperator)
    assert A.shape == (5, 3)
    np.testing.assert_allclose(A @ np.eye(3), host)
    np.testing.assert_allclose(A.T @ np.eye(5), host.T)
    kept = A @ cupy.asarray(np.ones(3))
    kept[...] = 0
    np.testing.assert_allclose((A @ cupy.asarray(np.ones(3))).get(), host.sum(axis=1))


@REAL
def test_our_inverses_take_cupy_vectors_and_preconditioners(solvers, cupy, dtype, rng):
    A, dense = operator_and_dense("G", dtype)
    damped = dense + 0.1 * np.eye(len(dense))
    M = solvers.aslinearoperator(cupy.asarray(np.linalg.inv(damped).astype(dtype)))
    rhs = rng.standard_normal((len(dense), 3)).astype(dtype)
    inverse = CGInverseLinearOperator(A, damping=0.1, M=M, rtol=1e-5)
    x = inverse @ cupy.asarray(rhs)
    check_result(cupy, x, rhs.shape, dtype)
    np.testing.assert_allclose(damped @ x.get(), rhs, rtol=0, atol=1e-3)
    assert inverse.last_solve.iterations.max() <= 3


def test_an_unconverged_cupyx_eigsh_is_found_out(solvers, cupy):
    """It returns in silence what it has when its iterations are used up."""
    A, _ = operator_and_dense("H", np.float64)
    good = solvers.eigsh(A, k=3)
    assert verify.eigenpairs(A, *good)
    early = solvers.eigsh(A, k=3, ncv=6, maxiter=6, tol=1e-12)
    report = verify.eigenpairs(A, *early, rtol=1e-8)
    assert not report
    assert "not converged" in str(report)
