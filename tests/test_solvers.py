"""Every SciPy routine that takes an operator, on curvature operators of a small network.

Operators go to SciPy as they are. Answers are compared with those of the dense matrix
in float64, at the very parameters and data that the operator has, so that all of the
difference is rounding in the operator's dtype and the solver's stopping rule.
"""

import functools
import inspect

import numpy as np
import pytest
import scipy.linalg
import scipy.linalg.interpolative as interpolative
import scipy.sparse.linalg as sla
import torch
from numpy.linalg import cond, norm
from scipy import optimize
from torch import nn
from torch.func import functional_call
from torchlinop import (
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
)
from torchlinop.examples import dense_ggn, dense_hessian, dense_jacobian

from tests.problems import Problem, mlp

TORCH = {np.float32: torch.float32, np.float64: torch.float64}

# ------------------------------------------------------------------- what is solved


def problem(dtype, sizes=(2, 5, 3)):
    """A network and two uneven batches; float32 and float64 hold the same numbers."""
    random = np.random.RandomState(2)
    model = mlp(*sizes, dtype=TORCH[dtype])
    params = list(model.parameters())
    drawn = [random.uniform(-1, 1, p.shape).astype(np.float32) for p in params]
    for p, values in zip(params, drawn, strict=True):
        nn.init.zeros_(p).data.add_(torch.from_numpy(values))
    X = torch.from_numpy(random.standard_normal((11, 2)).astype(np.float32))
    y = torch.from_numpy(random.randint(3, size=11))
    data = zip(X.to(TORCH[dtype]).split([7, 4]), y.split([7, 4]), strict=True)
    return Problem(model, nn.CrossEntropyLoss(), params, list(data))


def family(hessian, ggn, square, jacobian, identity):
    """What is tested; the shifts are exact in float32."""
    return {
        "hessian": hessian,  # indefinite, and singular: softmax ignores constants
        "ggn": ggn,
        "damped": ggn + 0.0625 * identity,  # condition number 22
        "indefinite": hessian - 0.29296875 * identity,  # condition number 31
        "nonsymmetric": square + 8.5 * identity,
        "jacobian": jacobian,  # 33 x 15
        "transposed": jacobian.T,
    }


def build(dtype):
    """New operators."""
    model, loss, params, data = problem(dtype)
    return family(
        HessianLinearOperator(model, loss, params, data),
        GGNLinearOperator(model, loss, params, data),
        JacobianLinearOperator(model, params, data),
        JacobianLinearOperator(model, params[:2], data),
        IdentityLinearOperator([p.shape for p in params], "cpu", TORCH[dtype]),
    )


@functools.cache
def dense_family():
    model, loss, params, data = problem(np.float64)
    matrices = (
        dense_hessian(model, loss, params, data),
        dense_ggn(model, loss, params, data),
        dense_jacobian(model, params, data),
        dense_jacobian(model, params[:2], data),
    )
    return family(*(matrix.detach().numpy() for matrix in matrices), np.eye(33))


NAMES = list(dense_family())
operators = functools.cache(build)


def pair(name, dtype):
    return operators(dtype)[name], dense_family()[name]


def normal(*shape, dtype=np.float64):
    return np.random.RandomState(1).standard_normal(shape).astype(dtype)


@pytest.fixture(autouse=True)
def seeded():
    np.random.seed(0)  # SciPy's own draws


@pytest.fixture(params=TORCH, ids=lambda dtype: dtype.__name__)
def dtype(request):
    return request.param


# --------------------------------------------------------------- how exact it has to be


def unit(dense, dtype):
    """Relative error of a product: n eps, that of a rounded sum of n terms."""
    return max(dense.shape) * float(np.finfo(dtype).eps)


def relative(x, expected):
    return norm(x - expected) / norm(expected)


def check_pairs(values, vectors, dense, expected, residual, sensitivity=1.0, mass=None):
    """Compare eigenpairs with a dense matrix and its eigenvalues.

    ``residual`` bounds ``|A v - lambda v|``. Eigenvalues are then as exact up to a
    factor: 1 for symmetric matrices (Weyl), the condition number of the eigenvectors in
    general (Bauer-Fike), and ``|B^-1|`` for symmetric pencils ``A v = lambda B v``.
    """
    vectors = vectors / norm(vectors, axis=0)
    weighted = vectors if mass is None else mass @ vectors
    import os

    os.write(
        2,
        f"RATIO {norm(dense @ vectors - weighted * values, axis=0).max() / residual:.3g} {np.abs(np.subtract.outer(values, expected)).min(axis=0).max() / sensitivity / residual:.3g} {os.environ['PYTEST_CURRENT_TEST']}\n".encode(),
    )
    assert norm(dense @ vectors - weighted * values, axis=0).max() <= residual
    distances = np.abs(np.subtract.outer(values, expected))
    assert distances.min(axis=0).max() <= sensitivity * residual
    assert distances.min(axis=1).max() <= sensitivity * residual


def inverse(dense, dtype):
    """A^-1 as an operator of SciPy's."""
    kind = np.result_type(dtype, np.complex64) if np.iscomplexobj(dense) else dtype
    return sla.aslinearoperator(np.linalg.inv(dense).astype(kind))


def preconditioner(name, dtype):
    """Two terms of the Neumann series of the inverse of a positive definite operator."""
    operator, dense = pair(name, dtype)
    identity = IdentityLinearOperator([operator.shape[:1]], "cpu", TORCH[dtype])
    return (2 * identity - operator / norm(dense, 2)) / norm(dense, 2)


# -------------------------------------------------------------------------- eigenvalues


def selected(spectrum, k, which="LM", sigma=None, *, real=True):
    """Eigenvalues that ARPACK looks for; of a real inverse it uses the real part."""
    ranked = spectrum if sigma is None else 1 / (spectrum - sigma)
    if sigma is not None and real:
        ranked = ranked + 1 / (spectrum - np.conj(sigma))
    return spectrum[np.argsort({"LM": -abs(ranked), "LA": -ranked, "SA": ranked}[which])][
        :k
    ]


def eigen_residual(dense, dtype, expected, sigma=None):
    """Bound ``|A v - lambda v|``; half is left by ARPACK, half the products' rounding.

    With sigma ``|A - sigma| |lambda - sigma|`` times that of the inverse, unit |OPinv|.
    """
    if sigma is None:
        return 2 * unit(dense, dtype) * norm(dense, 2)
    shifted = dense - sigma * np.eye(len(dense))
    return 2 * unit(dense, dtype) * cond(shifted) * abs(expected - sigma).max()


@pytest.mark.parametrize(
    ("name", "which", "sigma"),
    [
        ("hessian", "LM", None),
        ("hessian", "SA", None),
        ("hessian", "LM", 0.29296875),
        ("ggn", "LA", None),
        ("indefinite", "SA", None),
    ],
)
def test_eigsh(name, which, sigma, dtype):
    operator, dense = pair(name, dtype)
    extra = {}
    if sigma is not None:
        extra = {"sigma": sigma, "OPinv": inverse(dense - sigma * np.eye(33), dtype)}
    values, vectors = sla.eigsh(operator, k=4, which=which, **extra)
    assert values.dtype == vectors.dtype == dtype
    expected = selected(np.linalg.eigvalsh(dense), 4, which, sigma)
    residual = eigen_residual(dense, dtype, expected, sigma)
    check_pairs(values, vectors, dense, expected, residual)


@pytest.mark.parametrize("sigma", [None, 0.25])
def test_eigsh_generalized(sigma, dtype):
    operator, dense = pair("hessian", dtype)
    B, dense_B = pair("damped", dtype)
    spectrum = scipy.linalg.eigh(dense, dense_B, eigvals_only=True)
    expected = selected(spectrum, 3, "LM", sigma)
    if sigma is None:
        extra = {"Minv": inverse(dense_B, dtype)}
        residual = cond(dense_B) * norm(dense, 2)
    else:
        shifted = dense - sigma * dense_B
        extra = {"sigma": sigma, "OPinv": inverse(shifted, dtype)}
        residual = cond(shifted) * abs(expected - sigma).max() * norm(dense_B, 2)
    values, vectors = sla.eigsh(operator, k=3, M=B, **extra)
    # as above for B^-1 A or (A - sigma B)^-1 B, but in the norm that belongs to B
    residual *= 2 * unit(dense, dtype) * np.sqrt(cond(dense_B))
    sensitivity = norm(np.linalg.inv(dense_B), 2)
    check_pairs(values, vectors, dense, expected, residual, sensitivity, dense_B)


@pytest.mark.parametrize(
    ("solver", "sigma"), [(sla.eigsh, 0.2), (sla.eigs, 0.2), (sla.eigs, 0.2 + 0.1j)]
)
def test_sigma_without_inverse(solver, sigma, dtype):
    operator = GGNLinearOperator(*problem(dtype, sizes=(2, 3)).arguments)
    dense = dense_ggn(*problem(np.float64, sizes=(2, 3)).arguments).detach().numpy()
    values, vectors = solver(operator, k=2, sigma=sigma)
    expected = selected(np.linalg.eigvalsh(dense), 2, "LM", sigma)
    # every step is a solution by gmres to 1000 sqrt(n) eps; complex for the last sigma
    residual = eigen_residual(dense, dtype, expected, sigma) * (1 + 1000 / np.sqrt(9))
    check_pairs(values, vectors, dense, expected, residual)


@pytest.mark.parametrize("factor", [1.0, 1.0j])
@pytest.mark.parametrize("sigma", [None, 9.5, 9.5 + 1j])
def test_eigs(factor, sigma, dtype):
    operator, dense = (factor * a for a in pair("nonsymmetric", dtype))
    spectrum, basis = np.linalg.eig(dense)
    extra = {}
    if sigma is not None:
        sigma *= factor
        extra = {"sigma": sigma, "OPinv": inverse(dense - sigma * np.eye(33), dtype)}
    values, vectors = sla.eigs(operator, k=3 if sigma is None else 4, **extra)
    real = np.isrealobj(dense)
    expected = selected(spectrum, len(values), "LM", sigma, real=real)
    residual = eigen_residual(dense, dtype, expected, sigma)
    check_pairs(values, vectors, dense, expected, residual, cond(basis))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("extra", ["", "M", "B", "BM"])
def test_lobpcg(extra, largest, dtype):
    operator, dense = pair("indefinite", dtype)
    B, dense_B = pair("damped", dtype) if "B" in extra else (None, np.eye(33))
    M = preconditioner("damped", dtype) if "M" in extra else None
    spectrum = scipy.linalg.eigh(dense, dense_B, eigvals_only=True)
    expected = spectrum[-3:] if largest else spectrum[:3]
    # ten times the rounding of A v - lambda B v, where v has length 1 in the norm of B,
    # so that its own length is between |B|^-1/2 and |B^-1|^1/2
    size_B, size_inverse = norm(dense_B, 2), norm(np.linalg.inv(dense_B), 2)
    size = (norm(dense, 2) + abs(expected).max() * size_B) * np.sqrt(size_inverse)
    options = {"tol": 10 * unit(dense, dtype) * size, "maxiter": 200, "largest": largest}
    values, vectors = sla.lobpcg(operator, normal(33, 3, dtype=dtype), B=B, M=M, **options)
    residual = 1.1 * options["tol"] * np.sqrt(size_B)
    check_pairs(values, vectors, dense, expected, residual, size_inverse, dense_B)


def test_lobpcg_of_a_large_block(dtype):
    # multiplies the identity, in integers, and solves that dense problem
    operator, dense = pair("hessian", dtype)
    B, dense_B = pair("damped", dtype)
    with pytest.warns(UserWarning, match="too small"):
        values, vectors = sla.lobpcg(operator, normal(33, 8, dtype=dtype), B=B)
    expected = scipy.linalg.eigh(dense, dense_B, eigvals_only=True)[-8:]
    residual = unit(dense, dtype) * norm(dense, 2) * cond(dense_B)
    sensitivity = norm(np.linalg.inv(dense_B), 2)
    check_pairs(values, vectors, dense, expected, residual, sensitivity, dense_B)


@pytest.mark.parametrize("name", ["jacobian", "transposed"])
@pytest.mark.parametrize("solver", ["arpack", "propack", "lobpcg"])
def test_svds(solver, name, dtype):
    operator, dense = pair(name, dtype)
    expected = np.linalg.svd(dense, compute_uv=False)
    # lobpcg compares the residual of A.T A with the square of tol
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
    assert norm(dense @ vt.T - u * s, axis=0).max() <= residual
    assert norm(dense.T @ u - vt.T * s, axis=0).max() <= residual


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
        M = preconditioner(name, dtype)
        identity = IdentityLinearOperator([(33,)], "cpu", TORCH[dtype])
        options |= {"M1": M, "M2": identity} if solver == "qmr" else {"M": M}
    x, info = solve(operator, b, **options)
    assert info == 0
    assert x.dtype == solve(dense.astype(dtype), b, **options)[0].dtype
    # |x - x*| <= |A^-1| |A x - b|: what is left, 10 unit |b| <= 10 unit |A| |x*|, and
    # what the solver does not see, unit |A| |x|
    error = 11 * unit(dense, dtype) * cond(dense)
    print("RATIO2", relative(x, np.linalg.solve(dense, b)) / error)
    assert relative(x, np.linalg.solve(dense, b)) <= error


def least_squares_error(dense, x, b, tol):
    """Wedin: x solves a problem whose matrix and right side differ by tol."""
    misfit = norm(dense @ x - b) / (norm(dense, 2) * norm(x))
    return 3 * cond(dense) * (1 + misfit * cond(dense)) * tol


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
    print("RATIO3", relative(x, expected) / error)
    assert relative(x, expected) <= error


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

PENALTY = 0.1


def outputs(dtype):
    """The predictions on all data as a function of one vector."""
    model, _, params, data = problem(dtype)
    X = torch.cat([X for X, _ in data])

    def predict(t):
        parts = t.split([p.numel() for p in params])
        named = zip(model.named_parameters(), parts, strict=True)
        return functional_call(model, {n: v.view(p.shape) for (n, p), v in named}, (X,))

    return predict


def objective(dtype):
    predict, loss = outputs(dtype), nn.CrossEntropyLoss()
    y = torch.cat([y for _, y in problem(dtype).data])
    return lambda t: loss(predict(t), y) + PENALTY / 2 * t.dot(t)


def start():
    return nn.utils.parameters_to_vector(problem(np.float64).params).detach().numpy()


def value(x):
    return objective(np.float64)(torch.from_numpy(x)).item()


def slope(x):
    return torch.func.grad(objective(np.float64))(torch.from_numpy(x)).numpy()


def newton_step(x):
    """Distance to the stationary point by the dense Hessian, and its spectrum."""
    dense = torch.func.hessian(objective(np.float64))(torch.from_numpy(x)).numpy()
    return norm(np.linalg.solve(dense, slope(x))), np.linalg.eigvalsh(dense)


@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("Newton-CG", "hess"),
        ("trust-constr", "hess"),
        ("trust-constr", "hessp"),
        ("trust-ncg", "hessp"),
        ("trust-krylov", "hessp"),
    ],
)
def test_minimize(method, argument, dtype):
    f, point = objective(dtype), torch.from_numpy(start()).to(TORCH[dtype])
    following = HessianLinearOperator.from_function(f, point)

    def hess(x):
        return HessianLinearOperator.from_function(f, torch.from_numpy(x).to(TORCH[dtype]))

    def hessp(x, p):
        point.copy_(torch.from_numpy(x))
        return following.matvec(p)

    curvature = {"hess": hess} if argument == "hess" else {"hessp": hessp}
    options = {
        "Newton-CG": {"xtol": 1e-9},
        "trust-constr": {"gtol": 1e-9, "xtol": 0},
    }.get(method, {"gtol": 1e-9})
    result = optimize.minimize(
        value, start(), jac=slope, method=method, options=options, **curvature
    )
    assert result.success, result.message
    distance, spectrum = newton_step(result.x)
    assert spectrum[0] > 0
    # entries of the gradient up to gtol. Newton-CG: steps of mean size up to xtol that
    # solve H s = -g to half of |g|, hence |g| <= 2 |H| |s|
    error = np.sqrt(33) * 1e-9 / spectrum[0]
    if method == "Newton-CG":
        error = 2 * 33 * 1e-9 * spectrum[-1] / spectrum[0]
    print("RATIO8", distance / error, error, result.nit)
    assert distance <= error


def test_newton_krylov(dtype):
    x = optimize.newton_krylov(
        slope, start(), f_tol=1e-9, inner_M=preconditioner("damped", dtype)
    )
    distance, spectrum = newton_step(x)
    print("RATIO10", distance)
    assert distance <= np.sqrt(33) * 1e-9 / np.abs(spectrum).min()


@pytest.mark.parametrize("method", ["trf", "dogbox"])
def test_least_squares(method, dtype):
    solution = start()
    predict, targets = outputs(np.float64), outputs(np.float64)(torch.from_numpy(solution))

    def residuals(x, predict=predict):
        x = torch.from_numpy(x)
        return torch.cat(
            [(predict(x) - targets).reshape(-1), x - torch.from_numpy(solution)]
        )

    def jacobian(x, dtype=dtype):
        predict = outputs(dtype)
        x = torch.from_numpy(x).to(TORCH[dtype])
        return JacobianLinearOperator.from_function(
            lambda x: torch.cat([predict(x).reshape(-1), x]), x
        )

    x0 = solution + 0.1 * normal(33)
    result = optimize.least_squares(
        lambda x: residuals(x).detach().numpy(),
        x0,
        jac=jacobian,
        method=method,
        tr_solver="lsmr",
        gtol=1e-8,
        xtol=None,
        ftol=None,
    )
    assert result.status == 1
    print("RATIO11", norm(result.x - solution), result.nfev)
    dense = jacobian(solution, np.float64).to_dense().numpy()
    assert norm(result.x - solution) <= 1.1 * np.sqrt(33) * 1e-8 / norm(dense, -2) ** 2


@pytest.mark.parametrize("bound", [np.inf, 0.1])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_lsq_linear(bound, dtype):
    operator, dense = pair("jacobian", dtype)
    b, tol = normal(33, dtype=dtype), 10 * unit(dense, dtype)
    if bound == np.inf:
        tol /= np.sqrt(15)
    limits = {"bounds": (-bound, bound)}
    options = {"lsq_solver": "lsmr", "tol": tol, "lsmr_tol": tol, "lsmr_maxiter": 200}
    result = optimize.lsq_linear(operator, b, **limits, **options)
    expected = optimize.lsq_linear(dense, b, **limits, method="bvls", tol=1e-15).x
    assert result.success
    error = least_squares_error(dense, expected, b, 11 * unit(dense, dtype))
    print(
        "RATIO12",
        result.status,
        result.nit,
        result.optimality,
        relative(result.x, expected),
        error,
        result.message,
        sum(abs(expected) == bound),
    )
