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
from numpy.linalg import inv
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
    import os

    os.write(
        2,
        f"RATIO {defects.max() / residual:.3g} {np.abs(np.subtract.outer(values, expected)).min(axis=0).max() / sensitivity / residual:.3g} {os.environ['PYTEST_CURRENT_TEST']}\n".encode(),
    )
    assert defects.max() <= residual
    distances = np.abs(np.subtract.outer(values, expected))
    assert distances.min(axis=0).max() <= sensitivity * residual
    assert distances.min(axis=1).max() <= sensitivity * residual


def inverse(dense, dtype, sigma=0.0):
    """``(A - sigma I)^-1`` as an operator of SciPy's."""
    matrix = inv(dense - sigma * np.eye(len(dense)))
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


def nearest(spectrum, sigma, k, *, real=True):
    """Eigenvalues that ARPACK returns, which uses the real part of a real inverse."""
    transformed = 1 / (spectrum - sigma)
    if real:
        transformed = transformed + 1 / (spectrum - np.conj(sigma))
    return spectrum[np.argsort(-abs(transformed))[:k]]


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
    sensitivity = np.linalg.norm(inv(dense_mass), 2)
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
        expected = nearest(spectrum, sigma, 4, real=np.isrealobj(dense))
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
    spectrum = scipy.linalg.eigh(dense, dense_B, eigvals_only=True)
    expected = spectrum[-3:] if largest else spectrum[:3]
    # ten times the rounding of A v - lambda B v, where v has length 1 in the norm of B,
    # so that its own length is between |B|^-1/2 and |B^-1|^1/2
    size_B, size_inverse = np.linalg.norm(dense_B, 2), np.linalg.norm(inv(dense_B), 2)
    size = np.linalg.norm(dense, 2) + abs(expected).max() * size_B
    tol = 10 * unit(dense, dtype) * size * np.sqrt(size_inverse)
    values, vectors = sla.lobpcg(
        operator, X, B=B, M=M, tol=tol, maxiter=200, largest=largest
    )
    residual = 1.1 * tol * np.sqrt(size_B)
    check_pairs(values, vectors, dense, expected, residual, size_inverse, dense_B)


def test_lobpcg_of_a_large_block(dtype):
    # multiplies the identity, in integers, and solves that dense problem
    operator, dense = operators(dtype)["hessian"], references()["hessian"]
    B, dense_B = operators(dtype)["damped"], references()["damped"]
    X = np.random.RandomState(0).standard_normal((33, 8)).astype(dtype)
    with pytest.warns(UserWarning, match="too small"):
        values, vectors = sla.lobpcg(operator, X, B=B)
    expected = scipy.linalg.eigh(dense, dense_B, eigvals_only=True)[-8:]
    residual = unit(dense, dtype) * np.linalg.norm(dense, 2) * np.linalg.cond(dense_B)
    sensitivity = np.linalg.norm(inv(dense_B), 2)
    check_pairs(values, vectors, dense, expected, residual, sensitivity, dense_B)


@pytest.mark.parametrize("name", ["jacobian", "transposed"])
@pytest.mark.parametrize("solver", ["arpack", "propack", "lobpcg"])
def test_svds(solver, name, dtype):
    operator, dense = operators(dtype)[name], references()[name]
    left, expected, right = np.linalg.svd(dense)
    # residual of A.T A that lobpcg is asked for; the square is SciPy's
    tol = np.sqrt(10 * unit(dense, dtype)) * expected[0] if solver == "lobpcg" else 0
    try:
        u, s, vt = sla.svds(operator, k=3, solver=solver, tol=tol, maxiter=200)
    except ValueError as error:
        if "opt-in" not in str(error):
            raise
        pytest.skip("this SciPy has PROPACK only with SCIPY_USE_PROPACK")
    # |s^2 - s*^2| is within the residual of A.T A, s + s* at least s*
    residual = (tol**2 + 2 * unit(dense, dtype) * expected[0] ** 2) / expected[2]
    assert np.abs(np.sort(s)[::-1] - expected[:3]).max() <= residual
    if solver == "propack":  # stops when residual^2 / gap is small, gap < |A|
        residual = np.sqrt(residual * expected[0])
    assert np.linalg.norm(dense @ vt.T - u * s, axis=0).max() <= residual
    assert np.linalg.norm(dense.T @ u - vt.T * s, axis=0).max() <= residual
    assert u.dtype == s.dtype == vt.dtype == dtype or solver == "lobpcg"


# ----------------------------------------------------------------------- linear systems

SOLVERS = {
    "damped": "cg cgs bicg bicgstab gmres lgmres gcrotmk qmr tfqmr minres",
    "indefinite": "gmres lgmres gcrotmk minres",
    "nonsymmetric": "cgs bicg bicgstab gmres lgmres gcrotmk qmr tfqmr",
}
SYSTEMS = [
    (solver, name, preconditioned)
    for name, solvers in SOLVERS.items()
    for solver in solvers.split()
    for preconditioned in ([False, True] if name == "damped" else [False])
]


@pytest.mark.parametrize(("solver", "name", "preconditioned"), SYSTEMS)
def test_linear_systems(solver, name, preconditioned, dtype):
    operator, dense = operators(dtype)[name], references()[name]
    b = np.random.RandomState(1).standard_normal(33).astype(dtype)
    solve = getattr(sla, solver)
    # the residuals that the recurrences carry along drift from the true one
    # by a few units
    rtol = 10 * unit(dense, dtype)
    # minres compares with an estimate of the Frobenius norm, up to sqrt(n) |A|
    options = tolerance(solve, rtol / (np.sqrt(33) if solver == "minres" else 1))
    if preconditioned:
        M = preconditioner(operator, np.linalg.norm(dense, 2))
        identity = IdentityLinearOperator([(33,)], "cpu", TORCH[dtype])
        options |= {"M1": M, "M2": identity} if solver == "qmr" else {"M": M}
    x, info = solve(operator, b, **options)
    assert info == 0
    assert x.dtype == solve(dense.astype(dtype), b, **options)[0].dtype
    print(
        "RATIO2",
        relative(x, np.linalg.solve(dense, b)) / solve_error(dense, dtype, rtol),
        rtol,
    )
    assert relative(x, np.linalg.solve(dense, b)) <= solve_error(dense, dtype, rtol)


@pytest.mark.parametrize("damp", [0.0, 0.5])
@pytest.mark.parametrize("name", ["jacobian", "transposed"])
@pytest.mark.parametrize("solver", [sla.lsqr, sla.lsmr], ids=["lsqr", "lsmr"])
# lsmr starts a minimum at 1e100, which float32 does not hold
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_least_squares_systems(solver, name, damp, dtype):
    operator, dense = operators(dtype)[name], references()[name]
    m, n = dense.shape
    b = np.random.RandomState(1).standard_normal(m).astype(dtype)
    # of the Frobenius norm, which both estimate, up to sqrt(15) |A|
    tol = 10 * unit(dense, dtype)
    limit = {"iter_lim" if solver is sla.lsqr else "maxiter": 200}
    asked = tol / np.sqrt(15)
    x, reason = solver(operator, b, damp, atol=asked, btol=asked, conlim=0, **limit)[:2]
    assert reason in (1, 2)
    extended = np.vstack([dense, damp * np.eye(n)]) if damp else dense
    target = np.r_[b, np.zeros(len(extended) - m)]
    expected = np.linalg.pinv(extended) @ target
    # Wedin: x solves a problem whose matrix and right side differ by that much
    misfit = np.linalg.norm(extended @ expected - target)
    misfit /= np.linalg.norm(extended, 2) * np.linalg.norm(expected)
    condition = np.linalg.cond(extended)
    error = 3 * condition * (1 + misfit * condition) * (tol + unit(dense, dtype))
    assert relative(x, expected) <= error


# ----------------------------------------------------- functions, norms, decompositions


@pytest.mark.parametrize("factor", [1.0, -1.0j])
@pytest.mark.parametrize("columns", [(), (3,)])
def test_expm_multiply(columns, factor, dtype):
    operator, dense = factor * operators(dtype)["hessian"], references()["hessian"]
    B = np.random.RandomState(0).standard_normal((33, *columns)).astype(dtype)
    result = sla.expm_multiply(operator, B, traceA=factor * np.trace(dense))
    steps = sla.expm_multiply(
        operator, B, start=0, stop=1, num=3, endpoint=True, traceA=factor * np.trace(dense)
    )
    # Taylor's sum of rounded products: sum_j j unit |A|^j / j! = unit |A| e^|A|
    size = np.linalg.norm(dense, 2)
    error = unit(dense, dtype) * (1 + size) * np.exp(size) * np.linalg.norm(B)
    half, full = (scipy.linalg.expm(t * factor * dense) @ B for t in (0.5, 1))
    print(
        "RATIO4",
        np.linalg.norm(result - full) / error,
        [np.linalg.norm(steps[i] - e) / error for i, e in enumerate((B, half, full))],
        result.dtype,
    )
    assert np.linalg.norm(result - full) <= error
    for step, expected in zip(steps, (B, half, full), strict=True):
        assert np.linalg.norm(step - expected) <= error


@pytest.mark.skipif(not hasattr(sla, "funm_multiply_krylov"), reason="SciPy 1.16")
@pytest.mark.parametrize("structure", ["general", "hermitian"])
def test_funm_multiply_krylov(structure, dtype):
    operator, dense = operators(dtype)["damped"], references()["damped"]
    b = np.random.RandomState(0).standard_normal(33).astype(dtype)
    rtol = 10 * unit(dense, dtype)
    y = sla.funm_multiply_krylov(
        scipy.linalg.expm, operator, b, assume_a=structure, t=-1.0, rtol=rtol
    )
    # |exp(-A)| <= 1, and the last of steps that shrink fast is rtol |b|
    error = (rtol + unit(dense, dtype)) * np.linalg.norm(b)
    print("RATIO5", np.linalg.norm(y - scipy.linalg.expm(-dense) @ b) / error)
    assert np.linalg.norm(y - scipy.linalg.expm(-dense) @ b) <= error


@pytest.mark.parametrize("name", ["hessian", "nonsymmetric"])
@pytest.mark.parametrize("t", [2, 33])
def test_onenormest(t, name, dtype):
    operator, dense = operators(dtype)[name], references()[name]
    estimate, v, w = sla.onenormest(operator, t=t, compute_v=True, compute_w=True)
    exact = np.linalg.norm(dense, 1)
    rounding = unit(dense, dtype) * exact
    assert np.linalg.norm(v, 1) == 1
    assert np.linalg.norm(w - dense @ v, 1) <= rounding
    assert abs(estimate - np.linalg.norm(w, 1)) <= rounding
    assert estimate <= exact + rounding
    if t == 33:  # every column is looked at
        assert estimate >= exact - rounding


@pytest.mark.parametrize("rank", [33, 1e-10])
def test_interpolative_svd(rank):
    # square: SciPy 1.15 to 1.17 fail on other operators (scipy/scipy#22451)
    operator, dense = operators(np.float64)["nonsymmetric"], references()["nonsymmetric"]
    u, s, v = interpolative.svd(operator, rank)
    # nothing is cut off from a matrix of full rank; its columns are solved for
    error = unit(dense, np.float64) * np.linalg.cond(dense) * np.linalg.norm(dense, 2)
    assert np.abs(s - np.linalg.svd(dense, compute_uv=False)).max() <= error
    assert np.linalg.norm(u * s @ v.T - dense, 2) <= error


# ------------------------------------------------------------------------- optimization
#
# Functions and gradients are float64, so that solvers converge to tight tolerances; the
# curvature has either dtype, which changes the steps and not where they lead.

PENALTY = 0.1


def predict(params, X):
    """The network as a function of one vector."""
    sizes = [int(np.prod(shape)) for shape in SHAPES]
    parts = params[0].split(sizes)
    W, b, V, c = (part.view(shape) for part, shape in zip(parts, SHAPES, strict=True))
    return (X @ W.T + b).tanh() @ V.T + c


def squared_error(f, y):
    return 0.5 * (f - nn.functional.one_hot(y, 3)).square().sum()


def everything(dtype):
    _, X, y = drawn()
    return torch.from_numpy(X).to(TORCH[dtype]), torch.from_numpy(y)


def penalized(loss, dtype=np.float64):
    """The objective as a torch function."""
    X, y = everything(dtype)
    return lambda t: loss(predict([t], X), y) + PENALTY / 2 * t.dot(t)


def gradient(loss, x):
    data = [everything(np.float64)]
    return dense_gradient(predict, loss, [torch.from_numpy(x)], data).numpy() + PENALTY * x


def distance_to_minimum(loss, x):
    """Length of the dense Newton step, and the smallest eigenvalue of the Hessian."""
    data = [everything(np.float64)]
    dense = dense_hessian(predict, loss, [torch.from_numpy(x)], data).numpy()
    dense = dense + PENALTY * np.eye(33)
    step = np.linalg.norm(np.linalg.solve(dense, gradient(loss, x)))
    return step, np.linalg.eigvalsh(dense)[0]


def start():
    return drawn()[0].astype(np.float64)


def value(x):
    return penalized(nn.CrossEntropyLoss())(torch.from_numpy(x)).item()


def slope(x):
    return gradient(nn.CrossEntropyLoss(), x)


@pytest.mark.parametrize("method", ["Newton-CG", "trust-constr"])
def test_minimize_with_operators(method, dtype):
    f = penalized(nn.CrossEntropyLoss(), dtype)

    def hessian(x):
        x = torch.from_numpy(x).to(TORCH[dtype])
        return HessianLinearOperator.from_function(f, x)

    asked = {"xtol": 1e-8} if method == "Newton-CG" else {"gtol": 1e-8, "xtol": 0}
    result = optimize.minimize(
        value, start(), jac=slope, hess=hessian, method=method, options=asked
    )
    assert result.success, result.message
    step, curvature = distance_to_minimum(nn.CrossEntropyLoss(), result.x)
    # Newton-CG stops at a mean change of xtol, the next step is shorter still;
    # trust-constr at entries of the gradient of gtol
    print("RATIO8", step, curvature, result.nit)
    assert curvature > 0
    assert step <= (33 * 1e-8 if method == "Newton-CG" else 33**0.5 * 1e-8 / curvature)


@pytest.mark.parametrize(
    "method", ["Newton-CG", "trust-constr", "trust-ncg", "trust-krylov"]
)
def test_minimize_with_products(method, dtype):
    # one operator that follows its point
    point = torch.from_numpy(start()).to(TORCH[dtype])
    f = penalized(nn.CrossEntropyLoss(), dtype)
    operator = HessianLinearOperator.from_function(f, point)

    def product(x, p):
        point.copy_(torch.from_numpy(x))
        return operator.matvec(p)

    if method == "Newton-CG":
        asked = {"xtol": 1e-8}
    elif method == "trust-constr":
        asked = {"gtol": 1e-8, "xtol": 0}
    else:
        asked = {"gtol": 1e-8}
    result = optimize.minimize(
        value, start(), jac=slope, hessp=product, method=method, options=asked
    )
    assert result.success, result.message
    step, curvature = distance_to_minimum(nn.CrossEntropyLoss(), result.x)
    print("RATIO9", step, curvature, result.nit)
    assert curvature > 0
    assert step <= (33 * 1e-8 if method == "Newton-CG" else 33**0.5 * 1e-8 / curvature)


def test_newton_krylov(dtype):
    operator = operators(dtype)["ggn"] + PENALTY * IdentityLinearOperator(
        [(33,)], "cpu", TORCH[dtype]
    )
    norm = np.linalg.norm(references()["ggn"], 2) + PENALTY
    x = optimize.newton_krylov(
        slope, start(), f_tol=1e-8, inner_M=preconditioner(operator, norm)
    )
    step, curvature = distance_to_minimum(nn.CrossEntropyLoss(), x)
    print("RATIO10", step, curvature)
    assert step <= 33**0.5 * 1e-8 / abs(curvature)


@pytest.mark.parametrize("method", ["trf", "dogbox"])
def test_least_squares(method, dtype):
    X, y = everything(dtype)

    def residuals(t, X=X):
        misfit = predict([t], X) - nn.functional.one_hot(y, 3)
        return torch.cat([misfit.reshape(-1), PENALTY**0.5 * t])

    def jacobian(x):
        x = torch.from_numpy(x).to(TORCH[dtype])
        return JacobianLinearOperator.from_function(residuals, x)

    def fun(x):
        return residuals(torch.from_numpy(x), X.double()).numpy()

    J = jacobian(start())
    # of the rounding of J.T @ r
    gtol = (
        10
        * 66
        * np.finfo(dtype).eps
        * np.linalg.norm(fun(start()))
        * torch.linalg.matrix_norm(J.to_dense(), 2).item()
    )
    result = optimize.least_squares(
        fun,
        start(),
        jac=jacobian,
        method=method,
        tr_solver="lsmr",
        gtol=gtol,
        ftol=None,
        xtol=None,
        max_nfev=200,
    )
    step, curvature = distance_to_minimum(squared_error, result.x)
    print(
        "RATIO11",
        result.status,
        result.nfev,
        gtol,
        step,
        curvature,
        np.linalg.norm(gradient(squared_error, result.x)) / gtol,
    )
    assert result.status == 1
    assert step <= 1.1 * gtol * 33**0.5 / curvature


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("bound", [np.inf, 0.1])
def test_lsq_linear(bound, dtype):
    operator, dense = operators(dtype)["jacobian"], references()["jacobian"]
    b = np.random.RandomState(1).standard_normal(33).astype(dtype)
    rounding = unit(dense, dtype)
    tol = 10 * rounding
    result = optimize.lsq_linear(
        operator,
        b,
        bounds=(-bound, bound),
        tol=tol,
        lsq_solver="lsmr",
        lsmr_tol=tol,
        max_iter=1000,
    )
    expected = optimize.lsq_linear(
        dense, b, bounds=(-bound, bound), method="bvls", tol=1e-15
    ).x
    print(
        "RATIO12",
        result.status,
        result.nit,
        result.optimality,
        relative(result.x, expected),
        result.message,
        sum(abs(expected) == bound),
    )
    assert result.success
