"""Lists of tensors as vectors and matrices of compat.curvlinops."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torchlinop
from torch import nn
from torchlinop.compat import curvlinops as ours
from torchlinop.compat.curvlinops.examples import (
    IdentityLinearOperator,
    OuterProductLinearOperator,
    TensorLinearOperator,
)

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
PARAMS = list(MODEL.parameters())
SHAPES = [tuple(p.shape) for p in PARAMS]
DATA = [(torch.rand(n, 3).double(), torch.rand(n, 2).double()) for n in (3, 2)]
ARGUMENTS = MODEL, nn.MSELoss(), PARAMS, DATA
IDENTITY = IdentityLinearOperator(SHAPES, "cpu", torch.float64)
GGN = ours.GGNLinearOperator(*ARGUMENTS)
DAMPED = GGN + 0.1 * IDENTITY
KFAC = ours.KFACLinearOperator(*ARGUMENTS, fisher_type="type-2")
DIAGONAL = ours.DiagonalLinearOperator([torch.rand(s).double() + 1 for s in SHAPES])

OPERATORS = {
    "Hessian": ours.HessianLinearOperator(*ARGUMENTS),
    "blocks": ours.HessianLinearOperator(*ARGUMENTS, block_sizes=[1, 3]),
    "GGN": GGN,
    "empirical Fisher": ours.EFLinearOperator(*ARGUMENTS),
    "sampled Fisher": ours.GGNLinearOperator(*ARGUMENTS, mc_samples=2),
    "KFAC": KFAC,
    "EKFAC": ours.EKFACLinearOperator(*ARGUMENTS),
    "GGN diagonal": ours.GGNDiagonalLinearOperator(*ARGUMENTS),
    "sum": DAMPED,
    "difference": GGN - 2 * KFAC,
    "product": GGN @ DIAGONAL,
    "product of three": GGN @ KFAC @ GGN,
    "quotient": KFAC / 3,
    "power": GGN**2,
    "KFAC and a diagonal": KFAC + DIAGONAL,
    "inverse KFAC": KFAC.inverse(0.1),
    "multiple of an inverse": 2 * KFAC.inverse(0.1, use_exact_damping=True),
    "inverse diagonal": (DIAGONAL + (DIAGONAL + DIAGONAL)).inverse(0.1),
    "CG": ours.CGInverseLinearOperator(DAMPED, tolerance=1e-12),
    "LSMR": ours.LSMRInverseLinearOperator(DAMPED, atol=1e-13, btol=1e-13),
    "Neumann": ours.NeumannInverseLinearOperator(DAMPED, num_terms=3, scale=0.1),
}


def _list_of(flat, shapes, *, columns_last):
    """Cut a vector or matrix up, entry by entry."""
    parts, start = [], 0
    for shape in shapes:
        stop = start + int(np.prod(shape))
        if columns_last:
            parts.append(flat[start:stop].reshape(*shape, *flat.shape[1:]))
        else:
            parts.append(flat[..., start:stop].reshape(*flat.shape[:-1], *shape))
        start = stop
    assert start == flat.shape[0 if columns_last else -1]
    return parts


def _check(A, rows, columns):
    dense = A.to_dense()
    assert dense.norm() > 0
    m, n = dense.shape
    for count in ((), (3,)):
        x, y = torch.randn(n, *count).double(), torch.randn(*count, m).double()
        found = A @ _list_of(x, columns, columns_last=True)
        expected = _list_of(dense @ x, rows, columns_last=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        found = _list_of(y, rows, columns_last=False) @ A
        expected = _list_of(y @ dense, columns, columns_last=False)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_lists(name):
    A = OPERATORS[name]
    _check(A, SHAPES, SHAPES)
    assert (A @ [p.detach() for p in PARAMS])[0].shape == (2, 3)
    x = np.linspace(0, 1, A.shape[0])  # and all else as before
    np.testing.assert_allclose(A @ x, A.to_dense().numpy() @ x, atol=1e-8)


def test_jacobians():
    J = ours.JacobianLinearOperator(MODEL, PARAMS, DATA)
    _check(J, [(5, 2)], SHAPES)
    _check(J.T, SHAPES, [(5, 2)])
    _check(ours.TransposedJacobianLinearOperator(MODEL, PARAMS, DATA), SHAPES, [(5, 2)])
    assert J.T.T is J
    _check(J.T @ J, SHAPES, SHAPES)
    _check(J @ GGN, [(5, 2)], SHAPES)
    assert list(J.output_shapes) == [(3, 2), (2, 2)]


def test_structure_is_kept():
    total = DIAGONAL + (DIAGONAL + DIAGONAL)
    torch.testing.assert_close(total.trace(), 3 * DIAGONAL.diagonal().sum())
    scaled = 2 * KFAC
    torch.testing.assert_close(scaled.trace(), 2 * KFAC.trace())
    torch.testing.assert_close(scaled.logdet(), torch.logdet(scaled.to_dense()))
    torch.testing.assert_close(scaled.frobenius_norm(), scaled.to_dense().norm())
    root = scaled.power(0.5).to_dense()
    torch.testing.assert_close(root @ root, scaled.to_dense())
    torch.testing.assert_close(scaled.diagonal(), scaled.to_dense().diagonal())
    again = pickle.loads(pickle.dumps(scaled))
    _check(again, SHAPES, SHAPES)


@pytest.mark.parametrize(
    "wrong",
    [
        [torch.zeros(2, 3)],
        [torch.zeros(s[::-1]) for s in SHAPES],
        [torch.zeros(*s, i + 1) for i, s in enumerate(SHAPES)],
        [torch.zeros(3, *s) for s in SHAPES],
    ],
    ids=["too few", "transposed", "numbers of columns", "columns first"],
)
def test_lists_that_do_not_fit(wrong):
    with pytest.raises(ValueError, match="Expected 4 tensors of the shapes"):
        GGN @ wrong


def test_lists_of_one_vector():
    T = TensorLinearOperator(torch.randn(4, 3).double())
    U = OuterProductLinearOperator(torch.ones(2).double(), torch.randn(4, 2).double())
    _check(T, [(4,)], [(3,)])
    _check(U, [(4,)], [(4,)])
    _check(U @ T, [(4,)], [(3,)])
    _check(ours.SubmatrixLinearOperator(GGN, [0, 3], [1]), [(2,)], [(1,)])


@pytest.mark.parametrize("name", ["GGN", "blocks", "sampled Fisher", "KFAC", "sum", "CG"])
def test_pickled(name):
    again = pickle.loads(pickle.dumps(OPERATORS[name]))
    _check(again, SHAPES, SHAPES)
    torch.testing.assert_close(again.to_dense(), OPERATORS[name].to_dense())


def test_the_package_says_how_to_flatten():
    plain = torchlinop.GGNLinearOperator(*ARGUMENTS)
    with pytest.raises(TypeError, match="to_vector"):
        plain @ PARAMS


def test_to_scipy():
    assert GGN.to_scipy() is GGN
    single = GGN.to_scipy(dtype=np.float32)
    x = np.ones(single.shape[0], np.float32)
    dense = GGN.to_dense().numpy()
    for product in (single @ x, single.rmatvec(x), single.matmat(x[:, None])[:, 0]):
        assert product.dtype == np.float32
        np.testing.assert_allclose(product, dense @ x, rtol=1e-5, atol=1e-6)
