"""Checks on every rank: rank 0 solves, the others serve."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchlinop
from scipy.sparse.linalg import cg, eigsh, lsmr
from torchlinop import (
    CGInverseLinearOperator,
    DiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    JacobiPreconditioner,
    KFACLinearOperator,
    NystromPreconditioner,
    estimate,
)
from torchlinop.distributed import broadcast, driver, split_columns
from torchlinop.distributed.line import Line

from tests.distributed import checking
from tests.distributed.problems import (
    CLOSE,
    data,
    dense_ggn,
    dense_hessian,
    dense_jacobian,
    loss,
    model,
    share,
)


def shared(kind, rank, size):
    """An operator of shared data, and the arguments for all of it."""
    m = model()
    own = share(data(), rank, size)
    operator = kind(m, loss(), m.parameters(), own, process_group=dist.group.WORLD)
    return operator, (m, loss(), list(m.parameters()), data())


def close(actual, expected):
    torch.testing.assert_close(torch.as_tensor(actual), expected, **CLOSE)


def check_eigenvalues(rank, size):
    H, full = shared(HessianLinearOperator, rank, size)
    found = None
    with driver(H) as A:
        assert (A is None) == (rank != 0)
        if A is not None:
            found = eigsh(A, k=3, which="LA", return_eigenvectors=False)
            assert (A @ np.ones(A.shape[0], dtype=np.float32)).dtype == np.float64
            product = A @ (1j * np.ones(A.shape[0]))
            np.testing.assert_allclose(product, 1j * (A @ np.ones(A.shape[0])))
            assert A.space.names == H.space.names
    found = broadcast(found)
    close(found, torch.linalg.eigvalsh(dense_hessian(*full))[-3:])


def check_inverses_and_estimates(rank, size):
    G, full = shared(GGNLinearOperator, rank, size)
    dense = dense_ggn(*full)
    n = len(dense)
    damped = dense + 0.1 * torch.eye(n, dtype=torch.float64)
    b = torch.arange(n, dtype=torch.float64)
    with driver(G) as A:
        if A is not None:
            inverse = CGInverseLinearOperator(A, damping=0.1, rtol=1e-13)
            torch.testing.assert_close(inverse @ b, torch.linalg.solve(damped, b))
            shift = DiagonalLinearOperator(torch.full((n,), 0.1, dtype=torch.float64))
            for M in (
                NystromPreconditioner(A, damping=0.1, rank=5),
                JacobiPreconditioner(A, damping=0.1),
            ):
                x, info = cg(A + shift, b.numpy(), M=M, atol=1e-10)
                assert info == 0
                assert np.linalg.norm(damped.numpy() @ x - b.numpy()) < 1e-3
            trace = estimate.trace(A, rtol=1e-9)  # that is all columns
            assert abs(trace.value - dense.trace().item()) < 1e-10
            with torchlinop.monitor(A, max_products=3) as log:
                eigsh(A, k=2)
            assert log.stopped == "max_products"


def check_kronecker_factors(rank, size):
    G, full = shared(GGNLinearOperator, rank, size)
    K, _ = shared(KFACLinearOperator, rank, size)
    inverse = K.inverse(damping=0.1)  # every rank has it
    one = KFACLinearOperator(*full)
    n = one.shape[0]
    with driver(G, K) as (A, B):
        if A is not None:
            close(B.to_dense(), one.to_dense())
            close(B @ np.ones(n), one @ torch.ones(n, dtype=torch.float64))
            solve = CGInverseLinearOperator(A, damping=0.1, M=inverse, rtol=1e-12)
            b = torch.ones(n, dtype=torch.float64)
            damped = dense_ggn(*full) + 0.1 * torch.eye(n, dtype=torch.float64)
            torch.testing.assert_close(solve @ b, torch.linalg.solve(damped, b))


def check_jacobian(rank, size):
    m = model()
    own = share(data(), rank, size)
    J = JacobianLinearOperator(m, m.parameters(), own, process_group=dist.group.WORLD)
    dense = dense_jacobian(m, m.parameters(), data())
    b = np.arange(len(dense), dtype=float)
    with driver(J) as A:
        if A is not None:
            close(A.T.to_dense(), dense.T)
            x = lsmr(A, b, damp=0.5, atol=1e-14, btol=1e-14, maxiter=300)[0]
            n = dense.shape[1]
            normal = dense.T @ dense + 0.25 * torch.eye(n, dtype=torch.float64)
            best = torch.linalg.solve(normal, dense.T @ torch.from_numpy(b)).numpy()
            np.testing.assert_allclose(x, best, rtol=1e-6, atol=1e-8)


def check_composites_and_several(rank, size):
    H, full = shared(HessianLinearOperator, rank, size)
    G, _ = shared(GGNLinearOperator, rank, size)
    m = model()
    own = share(data(), rank, size)
    J = JacobianLinearOperator(m, m.parameters(), own, process_group=dist.group.WORLD)
    with driver(H @ H + 0.5 * G, J, H) as (A, B, C):
        if A is not None:
            H_, G_ = dense_hessian(*full), dense_ggn(*full)
            close(A.to_dense(), H_ @ H_ + 0.5 * G_)
            close(B.to_dense(), dense_jacobian(m, m.parameters(), data()))
            close(C.to_dense(), H_)
    # afterwards as before
    ones = torch.ones(H.shape[0], dtype=torch.float64)
    close(H @ ones, dense_hessian(*full).sum(1))


def check_bytes(rank, size):
    """One broadcast of the vector and one all-reduce of the result, nothing else."""
    H, _ = shared(HessianLinearOperator, rank, size)
    n = H.shape[0]
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        finish = Line._finish

        def counted(self, start, tensor, what):
            sent.append(tensor.numel())
            finish(self, start, tensor, what)

        patch.setattr(Line, "_finish", counted)
        with driver(H) as A:
            if A is not None:
                sent.clear()
                A @ np.ones(n)
                assert sent == [n + 3, n + 1]
                sent.clear()
                A @ np.ones((n, 4))
                assert sent == [n + 3, 3 * n, 4 * n + 1]


def check_split_columns(rank, size):
    m = model()
    whole = m, loss(), list(m.parameters()), data()
    H = split_columns(HessianLinearOperator(*whole))
    dense = dense_hessian(*whole)
    close(H.to_dense(), dense)
    multiplied = []
    inner = H._operator._apply
    H._operator._apply = lambda x: multiplied.append(x.shape[1]) or inner(x)
    with driver(H) as A:
        if A is not None:
            V = torch.randn(len(dense), 9, dtype=torch.float64)
            close(A @ V, dense @ V)
    assert multiplied == [9 * (rank + 1) // size - 9 * rank // size]
    J = split_columns(JacobianLinearOperator(m, m.parameters(), data()))
    close(J.T.to_dense(), J.to_dense().T.contiguous())
    own = share(data(), rank, size) or data()
    with pytest.raises(ValueError, match="another matrix than rank 0"):
        split_columns(HessianLinearOperator(*whole[:3], own))
    with pytest.raises(RuntimeError, match="process_group= cannot be a part"):
        split_columns(shared(HessianLinearOperator, rank, size)[0])


def check_one_driver(rank, size):
    H, _ = shared(HessianLinearOperator, rank, size)
    ones = np.ones(H.shape[0])
    with pytest.raises(RuntimeError, match="has a driver already"), driver(H), driver(H):
        pass
    with pytest.raises(RuntimeError, match="rank 0 was multiplying"), driver(H):
        H @ ones
    with driver(H) as A:
        pass
    if A is not None:
        with pytest.raises(RuntimeError, match="block is over"):
            A @ ones
    other = shared(GGNLinearOperator if rank == 1 else HessianLinearOperator, rank, size)
    with pytest.raises(ValueError, match="different operators") as caught, driver(other[0]):
        pass
    assert "on rank 1" in str(caught.value)


if __name__ == "__main__":
    checks = vars(sys.modules[__name__]).items()
    checking.run({name: check for name, check in checks if name[:6] == "check_"})
