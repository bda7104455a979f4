"""CuPy's solvers on operators whose model is on the GPU."""

from __future__ import annotations

import functools
import inspect

import numpy as np
import pytest
import torch
from torchlinop import (
    CGInverseLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    NystromPreconditioner,
    verify,
)
from torchlinop.reference import dense_ggn, dense_hessian, dense_jacobian

from tests.gpu.conftest import doubled, on
from tests.problems import regression

LINEAR = ["cg", "cgs", "bicgstab", "gmres", "minres"]


@functools.cache
def dense(dtype=torch.float64):
    p = doubled(regression(dtype=dtype))
    arguments = p.model, p.loss, p.params, p.data
    J = dense_jacobian(p.model, p.params, p.data)
    return dense_ggn(*arguments).numpy(), dense_hessian(*arguments).numpy(), J.numpy()


def operators(dtype):
    p = on("cuda", regression(dtype=dtype))
    identity = IdentityLinearOperator([t.shape for t in p.params], "cuda", dtype)
    G, H = GGNLinearOperator(*p.arguments), HessianLinearOperator(*p.arguments)
    return G, H, JacobianLinearOperator(p.model, p.params, p.data), identity


REAL = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@REAL
@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
def test_eigsh(solvers, cupy, dtype, which):
    _, H, _, _ = operators(dtype)
    values, vectors = solvers.eigsh(H, k=4, which=which)
    spectrum = np.linalg.eigvalsh(dense(dtype)[1])
    order = {"LM": -np.abs(spectrum), "LA": -spectrum, "SA": spectrum}[which]
    expected = np.sort(spectrum[np.argsort(order)[:4]])
    atol = 1e3 * torch.finfo(dtype).eps * np.abs(spectrum).max()
    assert isinstance(values, cupy.ndarray)
    np.testing.assert_allclose(np.sort(values.get()), expected, rtol=0, atol=atol)
    assert verify.eigenpairs(H, values, vectors, rtol=1e3 * torch.finfo(dtype).eps)


@REAL
def test_svds(solvers, cupy, dtype):
    _, _, J, _ = operators(dtype)
    U, s, Vh = solvers.svds(J, k=3)
    report = verify.singular_triplets(J, U, s, Vh, rtol=1e3 * torch.finfo(dtype).eps ** 0.9)
    assert report, report


@REAL
@pytest.mark.parametrize("preconditioner", ["none", "Nystrom", "KFAC"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_solvers(solvers, cupy, name, preconditioner, dtype, rng):
    if not hasattr(solvers, name):
        pytest.skip(f"this version of CuPy has no {name}")
    solver = getattr(solvers, name)
    G, _, _, identity = operators(dtype)
    A = G + 0.1 * identity
    M = None
    if preconditioner == "Nystrom":
        M = NystromPreconditioner(G, 0.1)
    elif preconditioner == "KFAC":
        p = on("cuda", regression(dtype=dtype))
        M = KFACLinearOperator(*p.arguments).inverse(damping=0.1)
        assert M.device.type == "cuda"
    b = cupy.asarray(rng.standard_normal(26).astype(A.dtype))
    option = "rtol" if "rtol" in inspect.signature(solver).parameters else "tol"
    x, info = solver(A, b, M=M, **{option: 1e-5})
    assert info == 0
    assert isinstance(x, cupy.ndarray)
    assert verify.solution(A, x, b, rtol=1e-3)


@REAL
def test_lsmr(solvers, cupy, dtype, rng):
    _, _, J, _ = operators(dtype)
    b = rng.standard_normal(16)
    x = solvers.lsmr(J, cupy.asarray(b.astype(J.dtype)), damp=0.5)[0]
    D = dense(dtype)[2]
    expected = np.linalg.solve(D.T @ D + 0.25 * np.eye(26), D.T @ b)
    np.testing.assert_allclose(x.get(), expected, rtol=0, atol=1e-3)


@REAL
@pytest.mark.parametrize("preconditioned", [False, True])
def test_lobpcg(solvers, cupy, preconditioned, dtype, rng):
    G, H, _, identity = operators(dtype)
    X = cupy.asarray(rng.standard_normal((26, 3)).astype(H.dtype))
    M = None
    if preconditioned:
        M = CGInverseLinearOperator(G, damping=1.0, rtol=1e-6)
    tol = 1e-3 if dtype == torch.float32 else 1e-7
    values, _ = solvers.lobpcg(
        G + 0.1 * identity, X, M=M, largest=True, maxiter=300, tol=tol
    )
    expected = np.linalg.eigvalsh(dense(dtype)[0])[::-1][:3] + 0.1
    np.testing.assert_allclose(values.get(), expected, rtol=0, atol=10 * tol)


@REAL
@pytest.mark.parametrize("name", ["eigsh", "cg"])
def test_an_inverse_inside(solvers, cupy, name, dtype):
    _, H, _, _ = operators(dtype)
    inverse = CGInverseLinearOperator(H, damping=3.0, rtol=1e-6)
    if name == "eigsh":
        values = solvers.eigsh(inverse, k=2, which="SA", return_eigenvectors=False)
        expected = 1 / (np.linalg.eigvalsh(dense(dtype)[1])[-2:] + 3)
        np.testing.assert_allclose(np.sort(values.get()), np.sort(expected), atol=1e-4)
    else:
        b = cupy.ones(26, inverse.dtype)
        x, info = solvers.cg(inverse, b)
        assert info == 0
        np.testing.assert_allclose(
            x.get(), dense(dtype)[1] @ np.ones(26) + 3, rtol=0, atol=1e-2
        )


def test_operators_of_cupyx_in_expressions(solvers, cupy, rng):
    _, H, _, _ = operators(torch.float64)
    host = rng.standard_normal((26, 26))
    C = solvers.aslinearoperator(cupy.asarray(host))
    x = cupy.asarray(rng.standard_normal((26, 2)))
    D = dense()[1]
    for B, expected in (
        (C + H, host + D),
        (H + C, host + D),
        (C @ H, host @ D),
        (H @ C, D @ host),
    ):
        np.testing.assert_allclose((B @ x).get(), expected @ x.get(), atol=1e-10)


def test_an_operator_on_the_cpu_and_one_of_cupyx(solvers, cupy, rng):
    H = HessianLinearOperator(*regression().arguments)
    host = rng.standard_normal((26, 26))
    C = solvers.aslinearoperator(cupy.asarray(host))
    x = rng.standard_normal(26)
    expected = dense()[1] @ x + host @ x
    np.testing.assert_allclose((H + C) @ x, expected, atol=1e-10)
    np.testing.assert_allclose(((H + C) @ cupy.asarray(x)).get(), expected, atol=1e-10)


def test_arrays_and_scalars_of_cupy(cupy, rng):
    _, H, J, _ = operators(torch.float64)
    U = rng.standard_normal((2, 16))
    np.testing.assert_allclose(
        (cupy.asarray(U) @ J).get(), U @ dense()[2], rtol=0, atol=1e-12
    )
    twice = cupy.asarray(2.0) * H
    np.testing.assert_allclose((twice @ cupy.eye(26)).get(), 2 * dense()[1], atol=1e-12)
    assert twice.dtype == np.float64
