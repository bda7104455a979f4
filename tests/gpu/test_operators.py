"""Operators on the GPU against themselves on the CPU, where other tests check them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse.linalg as spla
import torch
from torchlinop import (
    CGInverseLinearOperator,
    CholeskyInverseLinearOperator,
    EFLinearOperator,
    EighInverseLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    JacobiPreconditioner,
    LSMRInverseLinearOperator,
    MINRESInverseLinearOperator,
    NeumannInverseLinearOperator,
    NystromPreconditioner,
    SubmatrixLinearOperator,
    TorchLinearOperator,
    multishift_cg,
)

from tests.gpu.conftest import doubled, on
from tests.problems import Problem, classification
from tests.solve.matrices import relative


def _identity(p: Problem) -> TorchLinearOperator:
    shapes = [t.shape for t in p.params]
    return IdentityLinearOperator(shapes, p.params[0].device, p.params[0].dtype)


def _jacobian(p: Problem) -> JacobianLinearOperator:
    return JacobianLinearOperator(p.model, p.params, p.data)


def _tight(p: Problem) -> float:
    return 4 * torch.finfo(p.params[0].dtype).eps


BUILD: dict[str, Callable[[Problem], TorchLinearOperator]] = {
    "Hessian": lambda p: HessianLinearOperator(*p.arguments),
    "GGN": lambda p: GGNLinearOperator(*p.arguments),
    "MC Fisher": lambda p: FisherMCLinearOperator(*p.arguments, mc_samples=2, seed=3),
    "empirical Fisher": lambda p: EFLinearOperator(*p.arguments),
    "Jacobian": _jacobian,
    "Jacobian transposed": lambda p: _jacobian(p).T,
    "damped": lambda p: GGNLinearOperator(*p.arguments) + 0.1 * _identity(p),
    "normal equations": lambda p: _jacobian(p).T @ _jacobian(p),
    "submatrix": lambda p: SubmatrixLinearOperator(
        HessianLinearOperator(*p.arguments), [3, 1], range(5)
    ),
    "CG": lambda p: CGInverseLinearOperator(
        GGNLinearOperator(*p.arguments), damping=1.0, rtol=_tight(p)
    ),
    "MINRES": lambda p: MINRESInverseLinearOperator(
        HessianLinearOperator(*p.arguments), damping=1.0, rtol=_tight(p)
    ),
    "LSMR": lambda p: LSMRInverseLinearOperator(
        _jacobian(p), damp=2.0, atol=_tight(p), btol=_tight(p)
    ),
    "Neumann": lambda p: NeumannInverseLinearOperator(
        GGNLinearOperator(*p.arguments), 3, scale=0.2, damping=1.0
    ),
    "Cholesky": lambda p: CholeskyInverseLinearOperator(
        GGNLinearOperator(*p.arguments), damping=1.0
    ),
    "eigenvalues": lambda p: EighInverseLinearOperator(
        HessianLinearOperator(*p.arguments), damping=-2.0
    ),
    "Jacobi": lambda p: JacobiPreconditioner(GGNLinearOperator(*p.arguments), damping=0.5),
    "Nyström": lambda p: NystromPreconditioner(
        GGNLinearOperator(*p.arguments), 0.5, rank=27
    ),
}

KINDS = ["numpy", "torch, cpu", "torch, cuda", "cupy"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [None, 1, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUILD)
def test_products(cupy, name, kind, columns, dtype, rng):
    problem = classification(dtype=dtype)
    dense = BUILD[name](doubled(problem)).to_dense().numpy()
    A = BUILD[name](on("cuda", problem))
    assert A.device.type == "cuda"
    shape = A.shape[1] if columns is None else (A.shape[1], columns)
    host = rng.standard_normal(shape).astype(A.dtype)
    make, read = {
        "numpy": (np.copy, lambda y: y),
        "torch, cpu": (torch.tensor, torch.Tensor.numpy),
        "torch, cuda": (
            lambda a: torch.tensor(a, device="cuda"),
            lambda y: y.cpu().numpy(),
        ),
        "cupy": (cupy.asarray, lambda y: y.get()),
    }[kind]
    x = make(host)
    tolerance = 200 * torch.finfo(dtype).eps * np.abs(dense).sum(axis=1).max()
    for _ in range(6):  # replayed from the fourth product on
        y = A @ x
        assert type(y) is type(x)
        if kind.startswith("torch"):
            assert y.device == x.device
        np.testing.assert_allclose(
            read(y), dense @ host, rtol=0, atol=tolerance * max(1, np.abs(host).max())
        )
    np.testing.assert_array_equal(read(x), host)


def test_half_precision(cupy):
    half = on("cuda", classification(dtype=torch.bfloat16))
    exact = GGNLinearOperator(*doubled(half).arguments).to_dense()
    A = GGNLinearOperator(*half.arguments)
    assert A.dtype == np.float32
    y = A @ cupy.eye(27, dtype="f")
    assert y.dtype == np.float32
    assert np.abs(y.get() - exact.cpu().numpy()).max() < 0.1 * exact.abs().max().item()


def test_scipys_solvers_take_an_operator_on_the_gpu(cupy):
    p = classification()
    H = HessianLinearOperator(*on("cuda", p).arguments)
    dense = HessianLinearOperator(*p.arguments).to_dense().numpy()
    values = spla.eigsh(H, k=4, return_eigenvectors=False)
    by_size = np.argsort(-np.abs(np.linalg.eigvalsh(dense)))[:4]
    expected = np.linalg.eigvalsh(dense)[by_size]
    np.testing.assert_allclose(np.sort(values), np.sort(expected), atol=1e-10)
    b = np.linspace(-1, 1, 27)
    x, info = spla.minres(H + 0.5 * np.eye(27), b, **relative(spla.minres, 1e-10))
    assert info == 0
    np.testing.assert_allclose(dense @ x + 0.5 * x, b, atol=1e-8)


def test_multishift_stays_on_the_gpu(cupy):
    p = on("cuda", classification())
    G = GGNLinearOperator(*p.arguments)
    X, report = multishift_cg(G, cupy.ones(27), [0.1, 1.0], rtol=1e-10)
    assert isinstance(X, cupy.ndarray)
    assert report.converged.all()


def test_an_optimizer_step_is_noticed(cupy):
    p = on("cuda", classification())
    H = HessianLinearOperator(*p.arguments)
    x = cupy.ones(27)
    for _ in range(5):
        H @ x
    with torch.no_grad():
        for t in p.params:
            t.mul_(1.5)
    fresh = HessianLinearOperator(*p.arguments)
    np.testing.assert_allclose((H @ x).get(), (fresh @ x).get(), atol=1e-12)
