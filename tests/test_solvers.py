"""Every SciPy routine that takes an operator, on curvature operators of a small network.

Operators go to SciPy as they are. Answers are compared with those of the dense matrix
in float64, at the very parameter values and data that the operator has, so that all of
the difference is rounding in the operator's dtype and the solver's stopping rule.
"""

import functools
import inspect
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.linalg.interpolative as interpolative
import scipy.sparse.linalg as sla
import torch
from scipy import optimize
from torch import nn

import torchlinop
from torchlinop import (
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
)
from torchlinop.examples import (
    dense_ggn,
    dense_gradient,
    dense_hessian,
    dense_jacobian,
)

DTYPES = [np.float32, np.float64]
TORCH = {np.float32: torch.float32, np.float64: torch.float64}
SHAPES = [(5, 2), (5,), (3, 5), (3,)]  # of the network's parameters, 33 entries
SPLIT = [7, 4]  # sizes of the batches: 11 data with 3 outputs each, 33 predictions


# ------------------------------------------------------------------- what is solved


@functools.cache
def drawn():
    """Parameters, inputs and labels, in float32 so that both dtypes hold them exactly."""
    random = np.random.RandomState(2)
    theta = random.uniform(-1, 1, size=33).astype(np.float32)
    X = random.standard_normal((11, 2)).astype(np.float32)
    return theta, X, random.randint(3, size=11)


def network(dtype, device="cpu"):
    """The model, the loss and the data in two uneven batches."""
    theta, X, y = drawn()
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).to(TORCH[dtype])
    values = torch.from_numpy(theta).to(TORCH[dtype])
    nn.utils.vector_to_parameters(values, model.parameters())
    data = zip(
        torch.from_numpy(X).to(TORCH[dtype]).split(SPLIT),
        torch.from_numpy(y).split(SPLIT),
        strict=True,
    )
    return model, nn.CrossEntropyLoss(), list(data)


def build(dtype):
    """New operators."""
    model, loss, data = network(dtype)
    params = list(model.parameters())
    shifts = references()["shifts"]
    identity = IdentityLinearOperator([p.shape for p in params], "cpu", TORCH[dtype])
    hessian = HessianLinearOperator(model, loss, params, data)
    ggn = GGNLinearOperator(model, loss, params, data)
    square = JacobianLinearOperator(model, params, data)
    jacobian = JacobianLinearOperator(model, params[:2], data)
    return {
        "hessian": hessian,
        "ggn": ggn,
        "damped": ggn + shifts["damped"] * identity,
        "indefinite": hessian - shifts["indefinite"] * identity,
        "nonsymmetric": square + shifts["nonsymmetric"] * identity,
        "jacobian": jacobian,
        "transposed": jacobian.T,
    }


@functools.cache
def references():
    """Dense matrices in float64 under the names of the operators, and the shifts."""
    model, loss, data = network(np.float64)
    params = list(model.parameters())
    hessian = dense_hessian(model, loss, params, data).detach().numpy()
    ggn = dense_ggn(model, loss, params, data).detach().numpy()
    square = dense_jacobian(model, params, data).detach().numpy()
    jacobian = dense_jacobian(model, params[:2], data).detach().numpy()
    spectrum = np.linalg.eigvalsh(hessian)
    widest = np.argmax(np.diff(spectrum[5:-5])) + 5
    shifts = {
        "damped": 0.05 * np.linalg.norm(ggn, 2),  # condition number 21
        "indefinite": spectrum[widest : widest + 2].mean(),  # far from any eigenvalue
        "nonsymmetric": 1.2 * np.linalg.norm(square, 2),  # condition number below 11
    }
    eye = np.eye(33)
    return {
        "shifts": shifts,
        "hessian": hessian,
        "ggn": ggn,
        "damped": ggn + shifts["damped"] * eye,
        "indefinite": hessian - shifts["indefinite"] * eye,
        "nonsymmetric": square + shifts["nonsymmetric"] * eye,
        "jacobian": jacobian,
        "transposed": jacobian.T,
    }


OPERATORS = [name for name in references() if name != "shifts"]
operators = functools.cache(build)


@pytest.fixture(autouse=True)
def seeded():
    np.random.seed(0)  # SciPy's own draws


@pytest.fixture(params=DTYPES, ids=lambda d: d.__name__)
def dtype(request):
    return request.param


# --------------------------------------------------------------- how exact it has to be


def unit(dense, dtype):
    """Relative error of a product: n eps, that of a rounded sum of n terms."""
    return max(dense.shape) * np.finfo(dtype).eps


def tolerance(solver, rtol):
    """Ask a linear solver for ``|b - A x| <= rtol |b|``; SciPy 1.11 says ``tol``."""
    known = inspect.signature(solver).parameters
    name = "rtol" if "rtol" in known else "tol"
    return {name: rtol, "atol": 0.0} if "atol" in known else {name: rtol}


def solve_error(dense, dtype, rtol):
    """Bound ``|x - x*| / |x*|`` by the residual and the rounding of the products.

    ``|x - x*| <= |A^-1| |A x - b|``, where the residual consists of what the solver
    leaves, ``rtol |b| <= rtol |A| |x*|``, and of what it does not see, ``unit |A| |x|``.
    """
    return np.linalg.cond(dense) * (rtol + unit(dense, dtype))


def relative(x, expected):
    return np.linalg.norm(x - expected) / np.linalg.norm(expected)


def check_pairs(values, vectors, dense, expected, residual, sensitivity=1.0, mass=None):
    """Compare eigenpairs with a dense matrix and its eigenvalues.

    ``residual`` bounds ``|A v - lambda v|``. Eigenvalues are then as exact up to a
    factor: 1 for symmetric matrices (Weyl), the condition number of the eigenvectors in
    general (Bauer-Fike), and ``|B^-1|`` for symmetric pencils ``A v = lambda B v``.
    """
    vectors = vectors / np.linalg.norm(vectors, axis=0)
    weighted = vectors if mass is None else mass @ vectors
    defects = np.linalg.norm(dense @ vectors - weighted * values, axis=0)
    import os; os.write(2, f"RATIO {defects.max()/residual:.3g} {np.abs(np.subtract.outer(values, expected)).min(axis=0).max()/sensitivity/residual:.3g} {os.environ['PYTEST_CURRENT_TEST']}\n".encode())
    assert defects.max() <= residual
    distances = np.abs(np.subtract.outer(values, expected))
    assert distances.min(axis=0).max() <= sensitivity * residual
    assert distances.min(axis=1).max() <= sensitivity * residual


def inverse(dense, dtype, sigma=0.0):
    """``(A - sigma I)^-1`` as an operator of SciPy's."""
    matrix = np.linalg.inv(dense - sigma * np.eye(len(dense)))
    narrow = np.result_type(dtype, np.complex64) if np.iscomplexobj(matrix) else dtype
    return sla.aslinearoperator(matrix.astype(narrow))


def preconditioner(operator, norm):
    """Two terms of the Neumann series of the inverse of a positive definite operator."""
    identity = IdentityLinearOperator([operator.shape[:1]], "cpu", operator.torch_dtype)
    return (2 * identity - operator / norm) / norm


# -------------------------------------------------------------------------- eigenvalues


@pytest.mark.parametrize(
    ("name", "which"),
    [("hessian", "LM"), ("hessian", "SA"), ("ggn", "LM"), ("indefinite", "BE")],
)
def test_eigsh(name, which, dtype):
    operator, dense = operators(dtype)[name], references()[name]
    values, vectors = sla.eigsh(operator, k=4, which=which)
    spectrum = np.linalg.eigvalsh(dense)
    order = {"LM": np.argsort(-np.abs(spectrum)), "SA": range(4), "BE": [0, 1, -2, -1]}
    assert values.dtype == vectors.dtype == dtype
    # half of it is what ARPACK leaves, half the rounding of the products
    residual = 2 * unit(dense, dtype) * np.linalg.norm(dense, 2)
    check_pairs(values, vectors, dense, spectrum[order[which][:4]], residual)


def shift_invert_residual(dense, dtype, sigma, expected):
    """``|A - sigma| |lambda - sigma|`` times the residual of the inverse, unit |OPinv|."""
    shifted = dense - sigma * np.eye(len(dense))
    return 2 * unit(dense, dtype) * np.linalg.cond(shifted) * abs(expected - sigma).max()


def nearest(spectrum, sigma, k):
    return spectrum[np.argsort(abs(spectrum - sigma))[:k]]


def test_eigsh_shift_invert(dtype):
    operator, dense = operators(dtype)["hessian"], references()["hessian"]
    sigma = references()["shifts"]["indefinite"]
    values, vectors = sla.eigsh(
        operator, k=4, sigma=sigma, OPinv=inverse(dense, dtype, sigma)
    )
    expected = nearest(np.linalg.eigvalsh(dense), sigma, 4)
    residual = shift_invert_residual(dense, dtype, sigma, expected)
    check_pairs(values, vectors, dense, expected, residual)


@pytest.mark.parametrize("sigma", [None, 0.25])
def test_eigsh_generalized(sigma, dtype):
    operator, dense = operators(dtype)["hessian"], references()["hessian"]
    mass, dense_mass = operators(dtype)["damped"], references()["damped"]
    spectrum = scipy.linalg.eigh(dense, dense_mass, eigvals_only=True)
    if sigma is None:
        extra = {"Minv": inverse(dense_mass, dtype)}
        expected = spectrum[np.argsort(-abs(spectrum))[:3]]
        residual = np.linalg.cond(dense_mass) * np.linalg.norm(dense, 2)
    else:
        shifted = dense - sigma * dense_mass
        extra = {"sigma": sigma, "OPinv": inverse(shifted, dtype)}
        expected = nearest(spectrum, sigma, 3)
        residual = np.linalg.cond(shifted) * abs(expected - sigma).max()
        residual *= np.linalg.norm(dense_mass, 2)
    values, vectors = sla.eigsh(operator, k=3, M=mass, **extra)
    # as in the tests above and below, but left in the norm that belongs to B
    residual *= 2 * unit(dense, dtype) * np.sqrt(np.linalg.cond(dense_mass))
    sensitivity = np.linalg.norm(np.linalg.inv(dense_mass), 2)
    check_pairs(values, vectors, dense, expected, residual, sensitivity, dense_mass)


@pytest.mark.parametrize("solver", [sla.eigsh, sla.eigs], ids=["eigsh", "eigs"])
def test_sigma_alone(solver, dtype):
    # without OPinv every step is a solution by gmres
    theta, X, y = drawn()

    def problem(dtype):
        model = nn.Linear(2, 3).to(TORCH[dtype])
        values = torch.from_numpy(theta[:9]).to(TORCH[dtype])
        nn.utils.vector_to_parameters(values, model.parameters())
        data = [(torch.from_numpy(X).to(TORCH[dtype]), torch.from_numpy(y))]
        return model, nn.CrossEntropyLoss(), list(model.parameters()), data

    operator = GGNLinearOperator(*problem(dtype))
    dense = dense_ggn(*problem(np.float64)).numpy()
    sigma = 0.2 if solver is sla.eigsh else 0.2 + 0.1j  # complex products
    values, vectors = solver(operator, k=2, sigma=sigma)
    expected = nearest(np.linalg.eigvalsh(dense), sigma, 2)
    # SciPy solves to 1000 sqrt(n) eps
    residual = shift_invert_residual(dense, dtype, sigma, expected)
    residual *= 1 + 1000 / np.sqrt(len(dense))
    check_pairs(values, vectors, dense, expected, residual)


@pytest.mark.parametrize("factor", [1.0, 1.0j])
@pytest.mark.parametrize("sigma", [None, 9.5, 9.5 + 1j])
def test_eigs(factor, sigma, dtype):
    operator = factor * operators(dtype)["nonsymmetric"]
    dense = factor * references()["nonsymmetric"]
    spectrum, basis = np.linalg.eig(dense)
    if sigma is None:
        values, vectors = sla.eigs(operator, k=3)
        expected = spectrum[np.argsort(-abs(spectrum))[:3]]
        residual = 2 * unit(dense, dtype) * np.linalg.norm(dense, 2)
    else:
        sigma *= factor
        extra = {"sigma": sigma, "OPinv": inverse(dense, dtype, sigma)}
        values, vectors = sla.eigs(operator, k=4, **extra)
        transformed = 1 / (spectrum - sigma)
        if np.isrealobj(dense):  # documented: the real part of the inverse counts
            transformed = transformed + 1 / (spectrum - np.conj(sigma))
        expected = spectrum[np.argsort(-abs(transformed))[:4]]
        residual = shift_invert_residual(dense, dtype, sigma, expected)
    check_pairs(values, vectors, dense, expected, residual, np.linalg.cond(basis))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("extra", ["", "M", "B", "BM"])
def test_lobpcg(extra, largest, dtype):
    operator, dense = operators(dtype)["indefinite"], references()["indefinite"]
    damped, dense_damped = operators(dtype)["damped"], references()["damped"]
    M = preconditioner(damped, np.linalg.norm(dense_damped, 2)) if "M" in extra else None
    B, dense_B = (damped, dense_damped) if "B" in extra else (None, np.eye(33))
    X = np.random.RandomState(0).standard_normal((33, 3)).astype(dtype)
    # ten times what rounding leaves
    tol = 10 * unit(dense, dtype) * np.linalg.norm(dense, 2)
    values, vectors = sla.lobpcg(
        operator, X, B=B, M=M, tol=tol, maxiter=200, largest=largest
    )
    spectrum = scipy.linalg.eigh(dense, dense_B, eigvals_only=True)
    expected = spectrum[-3:] if largest else spectrum[:3]
    # tol is for vectors of length 1 in the norm of B, whose others are no longer
    lengths = np.linalg.norm(dense_B, 2)
    sensitivity = np.linalg.norm(np.linalg.inv(dense_B), 2)
    residual = 1.1 * tol * np.sqrt(lengths)
    check_pairs(values, vectors, dense, expected, residual, sensitivity, dense_B)


def test_lobpcg_of_a_large_block(dtype):
    # multiplies the identity, in integers, and solves that dense problem
    operator, dense = operators(dtype)["hessian"], references()["hessian"]
    B, dense_B = operators(dtype)["damped"], references()["damped"]
    X = np.random.RandomState(0).standard_normal((33, 8)).astype(dtype)
    with pytest.warns(UserWarning, match="too small"):
        values, vectors = sla.lobpcg(operator, X, B=B)
    expected = scipy.linalg.eigh(dense, dense_B, eigvals_only=True)[-8:]
    residual = unit(dense, dtype) * np.linalg.norm(dense, 2) * np.linalg.cond(dense_B)
    sensitivity = np.linalg.norm(np.linalg.inv(dense_B), 2)
    check_pairs(values, vectors, dense, expected, residual, sensitivity, dense_B)


@pytest.mark.parametrize("name", ["jacobian", "transposed"])
@pytest.mark.parametrize("solver", ["arpack", "propack", "lobpcg"])
def test_svds(solver, name, dtype):
    operator, dense = operators(dtype)[name], references()[name]
    left, expected, right = np.linalg.svd(dense)
    # residual of A.T A that lobpcg is asked for; the square is SciPy's
    tol = np.sqrt(10 * unit(dense, dtype)) * expected[0] if solver == "lobpcg" else 0
    u, s, vt = sla.svds(operator, k=3, solver=solver, tol=tol, maxiter=200)
    # |s^2 - s*^2| is within the residual of A.T A, s + s* at least s*
    residual = (tol**2 + 2 * unit(dense, dtype) * expected[0] ** 2) / expected[2]
    assert np.abs(np.sort(s)[::-1] - expected[:3]).max() <= residual
    assert np.linalg.norm(dense @ vt.T - u * s, axis=0).max() <= residual
    assert np.linalg.norm(dense.T @ u - vt.T * s, axis=0).max() <= residual
