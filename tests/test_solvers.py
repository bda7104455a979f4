"""Every SciPy routine that takes an operator, on curvature operators of a small network.

Operators go to SciPy as they are. Answers are compared with those of the dense matrix
in float64, at the very parameters and data that the operator has, so that all of the
difference is rounding in the operator's dtype and the solver's stopping rule.
"""

import contextlib
import functools
import inspect

import numpy as np
import pytest
import scipy.linalg
import scipy.linalg.interpolative as interpolative
import scipy.sparse.linalg as sla
import torch
import torchlinop
from numpy.linalg import cond, inv, norm
from scipy import optimize
from torch import nn
from torch.nn.functional import cross_entropy
from torchlinop import HessianLinearOperator, JacobianLinearOperator
from torchlinop.examples import dense_ggn, dense_hessian, dense_jacobian

from tests.problems import Problem, mlp

TORCH = {np.float32: torch.float32, np.float64: torch.float64}

# ------------------------------------------------------------------- what is solved


def problem(dtype, sizes=(2, 5, 3)):
    """A network and two uneven batches; float32 and float64 hold the same numbers."""
    random, model = np.random.RandomState(2), mlp(*sizes, dtype=TORCH[dtype])
    values = random.uniform(-1, 1, size=sum(p.numel() for p in model.parameters()))
    nn.utils.vector_to_parameters(tensor(np.float32(values), dtype), model.parameters())
    X = tensor(random.standard_normal((11, 2)).astype(np.float32), dtype)
    y = torch.from_numpy(random.randint(3, size=11))
    data = list(zip(X.split([7, 4]), y.split([7, 4]), strict=True))
    return Problem(model, nn.CrossEntropyLoss(), list(model.parameters()), data)


def tensor(x, dtype):
    return torch.from_numpy(x).to(TORCH[dtype])


def family(hessian, ggn, square, jacobian, identity):
    """What is tested; the shifts are exact in float32."""
    return {
        "hessian": hessian,  # indefinite, and singular: softmax ignores constants
        "ggn": ggn,
        "damped": ggn + 0.0625 * identity,  # condition number 22
        "indefinite": hessian - 0.29296875 * identity,  # condition number 31
        "mass": hessian + 2.0 * identity,  # condition number 2.4
        "nonsymmetric": square + 8.5 * identity,
        "complex": 1.0j * (square + 8.5 * identity),
        "jacobian": jacobian,  # 33 x 15
        "transposed": jacobian.T,
    }


def identity(dtype, n=33):
    return torchlinop.IdentityLinearOperator([(n,)], "cpu", TORCH[dtype])


def build(dtype):
    """New operators."""
    model, loss, params, data = problem(dtype)
    return family(
        HessianLinearOperator(model, loss, params, data),
        torchlinop.GGNLinearOperator(model, loss, params, data),
        JacobianLinearOperator(model, params, data),
        JacobianLinearOperator(model, params[:2], data),
        identity(dtype),
    )


@functools.cache
def dense_family():
    model, loss, params, data = problem(np.float64)
    hessian = dense_hessian(model, loss, params, data).numpy(force=True)
    ggn = dense_ggn(model, loss, params, data).numpy(force=True)
    square = dense_jacobian(model, params, data).numpy(force=True)
    jacobian = dense_jacobian(model, params[:2], data).numpy(force=True)
    return family(hessian, ggn, square, jacobian, np.eye(33))


NAMES = list(dense_family())
operators = functools.cache(build)


def pair(name, dtype):
    return operators(dtype)[name], dense_family()[name]


def normal(*shape, dtype=np.float64):
    return np.random.RandomState(1).standard_normal(shape).astype(dtype)


@pytest.fixture(params=TORCH, ids=lambda dtype: dtype.__name__)
def dtype(request):
    np.random.seed(0)  # SciPy's own draws
    return request.param


# --------------------------------------------------------------- how exact it has to be


def unit(dense, dtype):
    """Relative error of a product: n eps, that of a rounded sum of n terms."""
    return max(dense.shape) * float(np.finfo(dtype).eps)


def check_pairs(values, vectors, dense, dense_B, expected, residual, sensitivity):
    """Compare eigenpairs with dense matrices and the eigenvalues of those.

    ``residual`` bounds ``|A v - lambda B v|``. Eigenvalues are then as exact up to a
    factor: ``|B^-1|`` for symmetric matrices (Weyl), in general the condition number of
    the eigenvectors (Bauer-Fike).
    """
    vectors = vectors / norm(vectors, axis=0)
    assert norm(dense @ vectors - dense_B @ vectors * values, axis=0).max() <= residual
    distances = np.abs(np.subtract.outer(values, expected))
    assert distances.min(axis=0).max() <= sensitivity * residual
    assert distances.min(axis=1).max() <= sensitivity * residual


def inverse(dense, dtype):
    """A^-1 as an operator of SciPy's."""
    kind = np.result_type(dtype, np.complex64) if np.iscomplexobj(dense) else dtype
    return sla.aslinearoperator(inv(dense).astype(kind))


def preconditioner(name, dtype):
    """Two terms of the Neumann series of the inverse of a positive definite operator."""
    operator, dense = pair(name, dtype)
    return (2 * identity(dtype) - operator / norm(dense, 2)) / norm(dense, 2)


# -------------------------------------------------------------------------- eigenvalues


def symmetric_spectrum(dense, dense_B):
    factor = inv(np.linalg.cholesky(dense_B))
    return np.linalg.eigvalsh(factor @ dense @ factor.T)


def selected(spectrum, k, which, sigma, *, real=True):
    """Eigenvalues that ARPACK looks for; of a real inverse it uses the real part."""
    ranked = spectrum if sigma is None else 1 / (spectrum - sigma)
    if sigma is not None and real:
        ranked = ranked + 1 / (spectrum - np.conj(sigma))
    rank = {"LM": -abs(ranked), "LA": -ranked, "SA": ranked}[which]
    return spectrum[np.argsort(rank)[:k]]


def arpack_residual(dense, dense_B, dtype, expected, sigma):
    """Bound ``|A v - lambda B v|``; half is left by ARPACK, half the products' rounding.

    Both are units of ``|B^-1| |A|``, or with sigma of ``|(A - sigma B)^-1| |B|``, in the
    norm that belongs to B. Back to A it is ``|B|``, or ``|lambda - sigma| |A - sigma B|``.
    """
    size = norm(dense, 2) * cond(dense_B)
    if sigma is not None:
        size = abs(expected - sigma).max() * norm(dense_B, 2)
        size *= cond(dense - sigma * dense_B)
    return 2 * unit(dense, dtype) * size * np.sqrt(cond(dense_B))


ARPACK = [  # solver, operator, B, which eigenvalues, sigma
    (sla.eigsh, "hessian", None, "LM", None),
    (sla.eigsh, "hessian", None, "SA", None),
    (sla.eigsh, "hessian", None, "LM", 0.29296875),
    (sla.eigsh, "hessian", "mass", "LM", None),
    (sla.eigsh, "hessian", "mass", "LM", 0.29296875),
    (sla.eigsh, "indefinite", None, "SA", None),
    (sla.eigsh, "ggn", None, "LA", None),
    (sla.eigs, "nonsymmetric", None, "LM", None),
    (sla.eigs, "nonsymmetric", None, "LM", 9.5),
    (sla.eigs, "nonsymmetric", None, "LM", 9.5 + 1j),
    (sla.eigs, "complex", None, "LM", None),
    (sla.eigs, "complex", None, "LM", 1 + 9.5j),
]


@pytest.mark.parametrize(("solver", "name", "mass", "which", "sigma"), ARPACK)
def test_arpack(solver, name, mass, which, sigma, dtype):
    operator, dense = pair(name, dtype)
    B, dense_B = pair(mass, dtype) if mass else (None, np.eye(33))
    extra = {"Minv": inverse(dense_B, dtype)} if mass else {}
    if sigma is not None:
        extra = {"sigma": sigma, "OPinv": inverse(dense - sigma * dense_B, dtype)}
    k = 3 if sigma is None else 4  # not one of a conjugate pair
    v0 = normal(33, dtype=dtype)
    values, vectors = solver(operator, k=k, M=B, which=which, v0=v0, **extra)
    if solver is sla.eigsh:
        assert values.dtype == vectors.dtype == dtype
        spectrum, sensitivity = symmetric_spectrum(dense, dense_B), norm(inv(dense_B), 2)
    else:
        spectrum, basis = np.linalg.eig(dense)
        sensitivity = cond(basis)
    expected = selected(spectrum, k, which, sigma, real=np.isrealobj(dense))
    residual = arpack_residual(dense, dense_B, dtype, expected, sigma)
    check_pairs(values, vectors, dense, dense_B, expected, residual, sensitivity)


@pytest.mark.parametrize(
    ("solver", "sigma"), [(sla.eigsh, 0.2), (sla.eigs, 0.2), (sla.eigs, 0.2 + 0.1j)]
)
def test_arpack_without_inverse(solver, sigma, dtype):
    operator = torchlinop.GGNLinearOperator(*problem(dtype, sizes=(2, 3)).arguments)
    dense = dense_ggn(*problem(np.float64, sizes=(2, 3)).arguments).numpy(force=True)
    values, vectors = solver(operator, k=2, sigma=sigma, v0=normal(9, dtype=dtype))
    expected = selected(np.linalg.eigvalsh(dense), 2, "LM", sigma)
    # every step is a solution by gmres to 1000 sqrt(n) eps; complex for the last sigma
    residual = arpack_residual(dense, np.eye(9), dtype, expected, sigma)
    residual *= 1 + 1000 / np.sqrt(9)
    check_pairs(values, vectors, dense, np.eye(9), expected, residual, 1)


@pytest.mark.parametrize("k", [3, 8])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("extra", ["", "M", "B", "BM"])
def test_lobpcg(extra, largest, k, dtype):
    # the well separated end of the spectrum; the preconditioner is not for that end
    operator, dense = (a if largest else -a for a in pair("ggn", dtype))
    B, dense_B = pair("mass", dtype) if "B" in extra else (None, np.eye(33))
    M = preconditioner("damped", dtype) if "M" in extra else None
    spectrum = symmetric_spectrum(dense, dense_B)
    expected = spectrum[-k:] if largest else spectrum[:k]
    # ten times the rounding of A v - lambda B v, where v has length 1 in the norm of B,
    # so that its own length is between |B|^-1/2 and |B^-1|^1/2
    size_B, size_inverse = norm(dense_B, 2), norm(inv(dense_B), 2)
    size = (norm(dense, 2) + abs(expected).max() * size_B) * np.sqrt(size_inverse)
    options = {"tol": 10 * unit(dense, dtype) * size, "maxiter": 200, "largest": largest}
    # large blocks: the identity is multiplied, in integers, and that dense problem solved
    warned = pytest.warns(UserWarning, match="too small")
    with warned if 5 * k > 33 else contextlib.nullcontext():
        X = normal(33, k, dtype=dtype)
        values, vectors = sla.lobpcg(operator, X, B, M, **options)
    residual = 1.1 * options["tol"] * np.sqrt(size_B)
    check_pairs(values, vectors, dense, dense_B, expected, residual, size_inverse)


@pytest.mark.parametrize("name", ["jacobian", "transposed"])
@pytest.mark.parametrize("solver", ["arpack", "propack", "lobpcg"])
def test_svds(solver, name, dtype):
    operator, dense = pair(name, dtype)
    expected = np.linalg.svd(dense, compute_uv=False)
    # lobpcg compares the residual of A.T A with the square of tol
    tol = np.sqrt(10 * unit(dense, dtype)) * expected[0] if solver == "lobpcg" else 0
    draws = "rng" if "rng" in inspect.signature(sla.svds).parameters else "random_state"
    try:
        u, s, vt = sla.svds(operator, 3, tol=tol, maxiter=200, solver=solver, **{draws: 0})
    except ValueError as error:
        if "opt-in" not in str(error):
            raise
        pytest.skip("this SciPy has PROPACK only with SCIPY_USE_PROPACK")
    # |s^2 - s*^2| is within the residual of A.T A, s + s* at least s*
    residual = (tol**2 + 2 * unit(dense, dtype) * expected[0] ** 2) / expected[2]
    assert np.abs(np.sort(s)[::-1] - expected[:3]).max() <= residual
    if solver == "propack":  # stops when residual^2 / gap is small, gap < |A|
        residual = np.sqrt(residual * expected[0])
    assert norm(dense @ vt.T - u * s, axis=0).max() <= residual
    assert norm(dense.T @ u - vt.T * s, axis=0).max() <= residual


# ----------------------------------------------------------------------- linear systems

SOLVERS = {
    "damped": "cg cgs bicg bicgstab gmres lgmres gcrotmk qmr tfqmr minres",
    "indefinite": "gmres lgmres gcrotmk minres",
    "nonsymmetric": "cgs bicg bicgstab gmres lgmres gcrotmk qmr tfqmr",
}


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize(
    ("name", "solver"), [(name, s) for name in SOLVERS for s in SOLVERS[name].split()]
)
def test_linear_systems(solver, name, preconditioned, dtype):
    operator, dense = pair(name, dtype)
    solve, b = getattr(sla, solver), normal(33, dtype=dtype)
    # residuals that recurrences carry along drift from the true ones by a few units
    rtol = 10 * unit(dense, dtype)
    if solver == "minres":  # compares with the Frobenius norm, up to sqrt(n) |A|
        rtol /= np.sqrt(33)
    known = inspect.signature(solve).parameters  # SciPy 1.11 calls it tol
    options = {"rtol" if "rtol" in known else "tol": rtol}
    options |= {"atol": 0.0} if "atol" in known else {}
    if preconditioned:
        M = preconditioner("damped", dtype)
        options |= {"M1": M, "M2": identity(dtype)} if solver == "qmr" else {"M": M}
    x, info = solve(operator, b, **options)
    assert info == 0
    assert x.dtype == solve(dense.astype(dtype), b, **options)[0].dtype
    np.testing.assert_array_equal(solve(operator, b, **options)[0], x)
    # |x - x*| <= |A^-1| |A x - b|: what is left, 10 unit |b| <= 10 unit |A| |x*|, and
    # what the solver does not see, unit |A| |x|
    expected = np.linalg.solve(dense, b)
    assert norm(x - expected) <= 11 * unit(dense, dtype) * cond(dense) * norm(expected)


def least_squares_error(dense, x, b, tol):
    """Wedin: x solves a problem whose matrix and right side differ by tol."""
    misfit = norm(dense @ x - b) / norm(dense, 2)
    return 3 * cond(dense) * (norm(x) + misfit * cond(dense)) * tol


@pytest.mark.parametrize("damp", [0.0, 0.5])
@pytest.mark.parametrize("name", ["jacobian", "transposed"])
@pytest.mark.parametrize("solver", [sla.lsqr, sla.lsmr])
# lsmr starts a minimum at 1e100, which float32 does not hold
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_least_squares_systems(solver, name, damp, dtype):
    operator, dense = pair(name, dtype)
    m, n = dense.shape
    b = normal(m, dtype=dtype)
    # relative to the Frobenius norm, which both estimate, up to sqrt(15) |A|
    tol = 10 * unit(dense, dtype) / np.sqrt(15)
    limit = {"iter_lim" if solver is sla.lsqr else "maxiter": 200}
    x, reason = solver(operator, b, damp, atol=tol, btol=tol, conlim=0, **limit)[:2]
    assert reason in (1, 2)
    extended = np.vstack([dense, damp * np.eye(n)]) if damp else dense
    target = np.r_[b, np.zeros(len(extended) - m)]
    expected = np.linalg.pinv(extended) @ target
    error = least_squares_error(extended, expected, target, 11 * unit(dense, dtype))
    assert norm(x - expected) <= error


# ----------------------------------------------------- functions, norms, decompositions


@pytest.mark.parametrize("factor", [1.0, -1.0j])
@pytest.mark.parametrize("columns", [(), (3,)])
def test_expm_multiply(columns, factor, dtype):
    operator, dense = (factor * a for a in pair("hessian", dtype))
    B = normal(33, *columns, dtype=dtype)
    trace = np.trace(dense)
    once = sla.expm_multiply(operator, B, traceA=trace)
    steps = sla.expm_multiply(operator, B, start=0, stop=1, num=3, traceA=trace)
    # Taylor's sum of rounded products: sum_j j unit |A|^j / j! = unit |A| e^|A|
    size = norm(dense, 2)
    error = unit(dense, dtype) * (1 + size) * np.exp(size) * norm(B)
    assert norm(once - scipy.linalg.expm(dense) @ B) <= error
    for t, step in zip([0, 0.5, 1], steps, strict=True):
        assert norm(step - scipy.linalg.expm(t * dense) @ B) <= error


@pytest.mark.skipif(not hasattr(sla, "funm_multiply_krylov"), reason="needs SciPy 1.16")
@pytest.mark.parametrize("structure", ["general", "hermitian"])
def test_funm_multiply_krylov(structure, dtype):
    operator, dense = pair("damped", dtype)
    b, rtol = normal(33, dtype=dtype), 10 * unit(dense, dtype)
    options = {"assume_a": structure, "t": -1.0, "rtol": rtol}
    y = sla.funm_multiply_krylov(scipy.linalg.expm, operator, b, **options)
    # |exp(-A)| <= 1, and the last of steps that shrink fast is rtol |b|
    error = (rtol + unit(dense, dtype)) * norm(b)
    assert norm(y - scipy.linalg.expm(-dense) @ b) <= error


@pytest.mark.parametrize("name", ["hessian", "nonsymmetric"])
@pytest.mark.parametrize("t", [2, 33])
def test_onenormest(t, name, dtype):
    operator, dense = pair(name, dtype)
    estimate, v, w = sla.onenormest(operator, t=t, compute_v=True, compute_w=True)
    exact = norm(dense, 1)
    rounding = unit(dense, dtype) * exact
    assert norm(v, 1) == 1
    assert norm(w - dense @ v, 1) <= rounding
    assert abs(estimate - norm(w, 1)) <= rounding
    assert estimate <= exact + rounding
    assert estimate >= exact - rounding or t < 33  # all columns are looked at


@pytest.mark.parametrize("rank", [33, 1e-10])
def test_interpolative_svd(rank):
    # square: SciPy 1.15 to 1.17 fail on other operators (scipy/scipy#22451)
    operator, dense = pair("nonsymmetric", np.float64)
    u, s, v = interpolative.svd(operator, rank)
    # nothing is cut off from a matrix of full rank; its columns are solved for
    error = unit(dense, np.float64) * cond(dense) * norm(dense, 2)
    assert np.abs(s - np.linalg.svd(dense, compute_uv=False)).max() <= error
    assert norm(u * s @ v.T - dense, 2) <= error


# ------------------------------------------------------------------------- optimization
#
# Functions and gradients are float64, so that solvers converge to tight tolerances; the
# curvature has either dtype, which changes the steps and not where they lead.


X, LABELS = (torch.cat(parts) for parts in zip(*problem(np.float64).data, strict=True))
START = nn.utils.parameters_to_vector(problem(np.float64).params).numpy(force=True)


def predict(t):
    """The network on all data as a function of its parameters, in their dtype."""
    W, b, V, c = t.split([10, 5, 15, 3])
    return (X.to(t.dtype) @ W.view(5, 2).T + b).tanh() @ V.view(3, 5).T + c


def objective(t):
    return cross_entropy(predict(t), LABELS) + 0.05 * t.dot(t)


def value(x):
    return objective(torch.from_numpy(x)).item()


def slope(x):
    return torch.func.grad(objective)(torch.from_numpy(x)).numpy()


def newton_step(x):
    """Distance from a stationary point and eigenvalues, by the dense Hessian."""
    dense = torch.func.hessian(objective)(torch.from_numpy(x)).numpy()
    return norm(np.linalg.solve(dense, slope(x))), np.linalg.eigvalsh(dense)


@pytest.mark.parametrize(
    ("argument", "method"),
    [("hess", "Newton-CG"), ("hess", "trust-constr")]
    + [("hessp", method) for method in ("trust-constr", "trust-ncg", "trust-krylov")],
)
def test_minimize(argument, method, dtype):
    point = tensor(START, dtype)
    following = HessianLinearOperator.from_function(objective, point)

    def hess(x):
        return HessianLinearOperator.from_function(objective, tensor(x, dtype))

    def hessp(x, p):
        point.copy_(torch.from_numpy(x))
        return following.matvec(p)

    arguments = {"jac": slope, argument: hess if argument == "hess" else hessp}
    # gradients below 1e-8 change the value by less than its rounding
    options = {"xtol": 1e-6} if method == "Newton-CG" else {"gtol": 1e-6}
    options |= {"xtol": 0} if method == "trust-constr" else {}
    result = optimize.minimize(value, START, method=method, options=options, **arguments)
    assert result.success, result.message
    distance, spectrum = newton_step(result.x)
    assert spectrum.min() > 0
    gradient = 1e-6 * np.sqrt(33)
    if method == "Newton-CG":
        # steps of mean size up to xtol solve H s = -g to half of |g|: |g| <= 2 |H| |s|
        gradient = 2 * spectrum.max() * 1e-6 * 33
    assert distance <= gradient / spectrum.min()


def test_newton_krylov(dtype):
    M = preconditioner("damped", dtype)
    x = optimize.newton_krylov(slope, START, f_tol=1e-8, inner_M=M)
    distance, spectrum = newton_step(x)
    assert distance <= 1e-8 * np.sqrt(33) / np.abs(spectrum).min()


@pytest.mark.parametrize("method", ["trf", "dogbox"])
def test_least_squares(method, dtype):
    solution = torch.from_numpy(START)

    def residuals(t):
        misfit = predict(t) - predict(solution).to(t.dtype)
        return torch.cat([misfit.reshape(-1), t - solution.to(t.dtype)])

    def fun(x):
        return residuals(torch.from_numpy(x)).numpy()

    def jac(x):
        return JacobianLinearOperator.from_function(residuals, tensor(x, dtype))

    options = {"method": method, "gtol": 1e-8, "xtol": None, "ftol": None}
    x0 = START + 0.1 * normal(33)
    result = optimize.least_squares(fun, x0, jac, tr_solver="lsmr", **options)
    assert result.status == 1
    # the gradient, at most gtol, is J.T J (x - solution) up to second order
    dense = torch.func.jacrev(residuals)(solution).numpy()
    error = 1.1 * 1e-8 * np.sqrt(33) / norm(dense, -2) ** 2
    assert norm(result.x - START) <= error


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # lsmr
def test_lsq_linear(dtype):
    operator, dense = pair("jacobian", dtype)
    b, tol = normal(33, dtype=dtype), 10 * unit(dense, dtype)
    options = {"lsq_solver": "lsmr", "lsmr_tol": tol / np.sqrt(15), "lsmr_maxiter": 200}
    free = optimize.lsq_linear(operator, b, **options)
    expected = np.linalg.pinv(dense) @ b
    error = least_squares_error(dense, expected, b, 1.1 * tol)
    assert norm(free.x - expected) <= error

    for bound in (0.1, 0.05, 0.03, 0.02, 0.01, 0.005):
        bounded = optimize.lsq_linear(operator, b, (-bound, bound), tol=tol, **options)
        expected = optimize.lsq_linear(
            dense, b, (-bound, bound), method="bvls", tol=1e-15
        ).x
        gradient = dense.T @ (dense @ expected - b)
        print(
            "LSQ",
            bound,
            bounded.status,
            bounded.optimality,
            sum(abs(expected) >= bound * (1 - 1e-9)),
            abs(gradient).min(),
            norm(bounded.x - expected),
            bounded.optimality * norm(1 / gradient),
        )


# ------------------------------------------------------------- what solvers rely on


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("product", ["matvec", "rmatvec", "matmat", "rmatmat"])
def test_products_share_no_memory(product, name, dtype):
    operator, dense = build(dtype)[name], dense_family()[name]  # new: nothing is kept yet
    assert isinstance(operator, sla.LinearOperator)
    assert sla.aslinearoperator(operator) is operator
    assert isinstance(operator.dtype, np.dtype)
    assert operator.dtype == dtype if name != "complex" else np.result_type(dtype, "F")
    matrix = dense.conj().T if product.startswith("r") else dense
    inputs = normal(6, matrix.shape[1], *([] if "vec" in product else [3]), dtype=dtype)
    work, outputs = np.empty_like(inputs[0]), []
    for x in inputs:  # all in one array, as ARPACK does
        work[...] = x
        outputs.append(getattr(operator, product)(work))
        work[...] = np.nan
    copies = np.copy(outputs)
    for y in outputs:
        assert y.dtype == operator.dtype
        assert y.flags.writeable
        assert y.flags.c_contiguous
        y[...] = np.nan
    for x, y in zip(inputs, copies, strict=True):
        assert norm(y - matrix @ x) <= unit(dense, dtype) * norm(dense, 2) * norm(x)
        # the same bits, from the first product on
        np.testing.assert_array_equal(getattr(operator, product)(x), y)
