"""Every SciPy routine that takes an operator, on curvature operators of a small network.

Answers are compared with those of the dense float64 matrix at the very parameters and
data that the operator has: what differs is rounding and the solver's stopping rule.
"""

import functools
import inspect

import numpy as np
import pytest
import scipy.linalg.interpolative
import scipy.sparse.linalg as sla
import torch
import torchlinop
from numpy.linalg import cond, inv, norm
from scipy import optimize
from torch import nn
from torchlinop import HessianLinearOperator, JacobianLinearOperator
from torchlinop.reference import dense_ggn, dense_hessian, dense_jacobian

from tests.problems import Problem, mlp

TORCH = {np.float32: torch.float32, np.float64: torch.float64}


def problem(dtype):
    """A network and two uneven batches; float32 and float64 hold the same numbers."""
    random, model = np.random.RandomState(2), mlp(2, 5, 3, dtype=TORCH[dtype])
    values = tensor(random.uniform(-1, 1, size=33).astype(np.float32), dtype)
    nn.utils.vector_to_parameters(values, model.parameters())
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


def identity(dtype):
    return torchlinop.IdentityLinearOperator([(33,)], "cpu", TORCH[dtype])


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


operators = functools.cache(build)


def pair(name, dtype):
    return operators(dtype)[name], dense_family()[name]


def normal(*shape, dtype=np.float64):
    return np.random.RandomState(1).standard_normal(shape).astype(dtype)


@pytest.fixture(params=TORCH, ids=lambda dtype: dtype.__name__)
def dtype(request):
    np.random.seed(0)  # SciPy's own draws
    return request.param


def unit(dense, dtype):
    """Relative error of a product: n eps, that of a rounded sum of n terms."""
    return max(dense.shape) * float(np.finfo(dtype).eps)


def check_pairs(values, vectors, dense, dense_B, expected, residual, sensitivity):
    """Check ``|A v - lambda B v|``; eigenvalues are then as exact up to a factor.

    It is ``|B^-1|`` for symmetric matrices (Weyl), in general the condition number of the
    eigenvectors (Bauer-Fike).
    """
    vectors = vectors / norm(vectors, axis=0)
    assert norm(dense @ vectors - dense_B @ vectors * values, axis=0).max() <= residual
    distances = np.abs(np.subtract.outer(values, expected))
    assert distances.min(axis=0).max() <= sensitivity * residual
    assert distances.min(axis=1).max() <= sensitivity * residual


def preconditioner(dtype):
    """Two terms of the Neumann series of the inverse of the damped GGN."""
    operator, dense = pair("damped", dtype)
    return (2 * identity(dtype) - operator / norm(dense, 2)) / norm(dense, 2)


ARPACK = [  # solver, operator, B, which eigenvalues, sigma, whether OPinv or Minv is given
    (sla.eigsh, "hessian", None, "LM", None, False),
    (sla.eigsh, "hessian", None, "SA", None, False),
    (sla.eigsh, "hessian", None, "LM", 0.29296875, True),
    (sla.eigsh, "hessian", "mass", "LM", None, True),
    (sla.eigsh, "hessian", "mass", "LM", 0.29296875, True),
    (sla.eigsh, "ggn", None, "LM", None, False),
    (sla.eigsh, "damped", None, "LM", 2.0, False),
    (sla.eigs, "nonsymmetric", None, "LM", None, False),
    (sla.eigs, "nonsymmetric", None, "LM", 9.5, True),
    (sla.eigs, "nonsymmetric", None, "LM", 9.5 + 1j, True),
    (sla.eigs, "nonsymmetric", None, "LM", 20.0 + 1j, False),
    (sla.eigs, "complex", None, "LM", 1 + 9.5j, True),
]


@pytest.mark.parametrize(("solver", "name", "mass", "which", "sigma", "given"), ARPACK)
def test_arpack(solver, name, mass, which, sigma, given, dtype):
    operator, dense = pair(name, dtype)
    B, dense_B = pair(mass, dtype) if mass else (None, np.eye(33))
    shifted = dense - sigma * dense_B if sigma else dense_B
    k = 4 if sigma else 3  # not one of a conjugate pair
    options = {"which": which, "sigma": sigma, "v0": normal(33, dtype=dtype)}
    if given:
        options["OPinv" if sigma else "Minv"] = sla.aslinearoperator(inv(shifted))
    values, vectors = solver(operator, k=k, M=B, **options)
    if solver is sla.eigsh:
        assert values.dtype == vectors.dtype == dtype
        spectrum, sensitivity = scipy.linalg.eigh(dense, dense_B)[0], norm(inv(dense_B), 2)
    else:
        spectrum, basis = np.linalg.eig(dense)
        sensitivity = cond(basis)
    ranked = 1 / (spectrum - sigma) if sigma else spectrum
    if sigma and np.isrealobj(dense):  # of a real inverse ARPACK uses the real part
        ranked = ranked + 1 / (spectrum - np.conj(sigma))
    expected = spectrum[np.argsort(ranked if which == "SA" else -abs(ranked))[:k]]
    # ARPACK leaves a unit of |B^-1| |A| or |(A - sigma B)^-1| |B| in the norm that belongs
    # to B, and so does rounding; for A it is |B| or |lambda - sigma| |A - sigma B| of that
    size = cond(dense_B) * norm(dense, 2)
    if sigma:
        size = cond(shifted) * norm(dense_B, 2) * abs(expected - sigma).max()
    residual = 2 * unit(dense, dtype) * size * np.sqrt(cond(dense_B))
    if sigma and not given:  # SciPy solves by gmres to 1000 sqrt(n) eps
        residual *= 1 + 1000 / np.sqrt(33)
    check_pairs(values, vectors, dense, dense_B, expected, residual, sensitivity)


@pytest.mark.parametrize("k", [3, 8])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("extra", ["", "M", "B", "BM"])
# a block of 8 is too large: SciPy multiplies the identity, in integers, and goes dense
@pytest.mark.filterwarnings("ignore:The problem size 33 minus:UserWarning")
def test_lobpcg(extra, largest, k, dtype):
    # the well separated end of the spectrum; the preconditioner is not for that end
    operator, dense = (a if largest else -a for a in pair("ggn", dtype))
    B, dense_B = pair("mass", dtype) if "B" in extra else (None, np.eye(33))
    M = preconditioner(dtype) if "M" in extra else None
    spectrum = scipy.linalg.eigh(dense, dense_B)[0]
    expected = spectrum[-k:] if largest else spectrum[:k]
    # ten times the rounding of A v - lambda B v; v has length 1 in B's norm, hence cond(B)
    tol = norm(dense, 2) + abs(expected).max() * norm(dense_B, 2)
    tol *= 10 * unit(dense, dtype)
    options = {"tol": tol, "maxiter": 200, "largest": largest}
    values, vectors = sla.lobpcg(operator, normal(33, k, dtype=dtype), B, M, **options)
    residual = 1.1 * tol * cond(dense_B)
    check_pairs(values, vectors, dense, dense_B, expected, residual, norm(inv(dense_B), 2))


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


SYSTEMS = [  # matrix, preconditioned, solvers; preconditioned tfqmr needs M A = A M
    ("damped", False, "cg cgs bicg bicgstab gmres lgmres gcrotmk qmr tfqmr minres"),
    ("damped", True, "cg cgs bicg bicgstab gmres lgmres gcrotmk qmr tfqmr minres"),
    ("indefinite", False, "gmres lgmres gcrotmk minres"),
    ("nonsymmetric", False, "cgs bicg bicgstab gmres lgmres gcrotmk qmr tfqmr"),
    ("nonsymmetric", True, "cgs bicg bicgstab gmres lgmres gcrotmk qmr"),
]


@pytest.mark.parametrize(
    ("solver", "name", "preconditioned"),
    [(solver, *row[:2]) for row in SYSTEMS for solver in row[2].split()],
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
        M = preconditioner(dtype)
        options |= {"M1": M, "M2": identity(dtype)} if solver == "qmr" else {"M": M}
    x, info = solve(operator, b, **options)
    assert info == 0
    assert x.dtype == solve(dense.astype(dtype), b, **options)[0].dtype
    # |x - x*| <= |A^-1| |A x - b|: what is left, 10 unit |b| <= 10 unit |A| |x*|, and
    # what the solver does not see, unit |A| |x|; again when products are replayed
    expected = np.linalg.solve(dense, b)
    for found in (x, solve(operator, b, **options)[0]):
        error = norm(found - expected)
        assert error <= 11 * unit(dense, dtype) * cond(dense) * norm(expected)


@pytest.mark.parametrize("name", ["jacobian", "transposed"])
@pytest.mark.parametrize("solver", [sla.lsqr, sla.lsmr])
# lsmr starts a minimum at 1e100, which float32 does not hold
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_least_squares_systems(solver, name, dtype):
    operator, dense = pair(name, dtype)
    b = normal(len(dense), dtype=dtype)
    # relative to the Frobenius norm, which both estimate, up to sqrt(15) |A|
    tol = 10 * unit(dense, dtype) / np.sqrt(15)
    x, reason = solver(operator, b, 0.0, tol, tol, 0.0, 200)[:2]
    assert reason in (1, 2)
    # Wedin: x solves a problem whose matrix and right side differ by 11 units
    expected = np.linalg.pinv(dense) @ b
    misfit = cond(dense) * norm(dense @ expected - b) / norm(dense, 2)
    error = 3 * cond(dense) * (norm(expected) + misfit) * 11 * unit(dense, dtype)
    assert norm(x - expected) <= error


@pytest.mark.parametrize("factor", [1.0, -1.0j])
@pytest.mark.parametrize("columns", [(), (3,)])
def test_expm_multiply(columns, factor, dtype):
    operator, dense = (factor * a for a in pair("hessian", dtype))
    B, trace = normal(33, *columns, dtype=dtype), np.trace(dense)
    once = sla.expm_multiply(operator, B, traceA=trace)
    steps = sla.expm_multiply(operator, B, start=0, stop=1, num=3, traceA=trace)
    # Taylor's sum of rounded products: sum_j j unit |A|^j / j! = unit |A| e^|A|
    size = (1 + norm(dense, 2)) * np.exp(norm(dense, 2)) * norm(B)
    for t, y in [(1, once), *zip([0, 0.5, 1], steps, strict=True)]:
        assert norm(y - scipy.linalg.expm(t * dense) @ B) <= unit(dense, dtype) * size


@pytest.mark.skipif(not hasattr(sla, "funm_multiply_krylov"), reason="needs SciPy 1.16")
@pytest.mark.parametrize("structure", ["general", "hermitian"])
def test_funm_multiply_krylov(structure, dtype):
    operator, dense = pair("damped", dtype)
    b, rtol = normal(33, dtype=dtype), 10 * unit(dense, dtype)
    options = {"assume_a": structure, "t": -1.0, "rtol": rtol}
    y = sla.funm_multiply_krylov(scipy.linalg.expm, operator, b, **options)
    # |exp(-A)| <= 1, and the last of steps that shrink fast is rtol |b|
    assert norm(y - scipy.linalg.expm(-dense) @ b) <= 1.1 * rtol * norm(b)


@pytest.mark.parametrize("name", ["hessian", "nonsymmetric"])
@pytest.mark.parametrize("t", [2, 33])
def test_onenormest(t, name, dtype):
    operator, dense = pair(name, dtype)
    estimate, v, w = sla.onenormest(operator, t=t, compute_v=True, compute_w=True)
    rounding = unit(dense, dtype) * norm(dense, 1)
    assert norm(v, 1) == 1
    assert norm(w - dense @ v, 1) <= rounding
    assert abs(estimate - norm(w, 1)) <= rounding
    assert abs(estimate - norm(dense, 1)) <= rounding or t < 33  # all columns are seen


@pytest.mark.parametrize("rank", [33, 1e-10])
def test_interpolative_svd(rank):
    # float64 only, and square: SciPy 1.15 to 1.17 fail on others (scipy/scipy#22451)
    operator, dense = pair("nonsymmetric", np.float64)
    u, s, v = scipy.linalg.interpolative.svd(operator, rank)
    # nothing is cut off from a matrix of full rank; its columns are solved for
    error = unit(dense, np.float64) * cond(dense) * norm(dense, 2)
    assert np.abs(s - np.linalg.svd(dense, compute_uv=False)).max() <= error
    assert norm(u * s @ v.T - dense, 2) <= error


# In optimization functions and gradients are float64, so that tolerances can be tight; the
# curvature has either dtype, which changes the steps and not where they lead.

X, LABELS = (torch.cat(parts) for parts in zip(*problem(np.float64).data, strict=True))
START = nn.utils.parameters_to_vector(problem(np.float64).params).numpy(force=True)


def predict(t):
    """The network on all data as a function of its parameters, in their dtype."""
    W, b, V, c = t.split([10, 5, 15, 3])
    return (X.to(t.dtype) @ W.view(5, 2).T + b).tanh() @ V.view(3, 5).T + c


def objective(t):
    return nn.functional.cross_entropy(predict(t), LABELS) + 0.05 * t.dot(t)


def value(x):
    return objective(torch.from_numpy(x)).item()


def slope(x):
    return torch.func.grad(objective)(torch.from_numpy(x)).numpy()


def newton_step(x):
    """Distance from a stationary point and eigenvalues, by the dense Hessian."""
    dense = torch.func.hessian(objective)(torch.from_numpy(x)).numpy()
    return norm(np.linalg.solve(dense, slope(x))), np.linalg.eigvalsh(dense)


@pytest.mark.parametrize(
    ("method", "argument"),
    [("Newton-CG", "hess"), ("trust-constr", "hess")]
    + [(method, "hessp") for method in ("trust-constr", "trust-ncg", "trust-krylov")],
)
def test_minimize(method, argument, dtype):
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
    # entries of the gradient up to gtol; or those of Newton-CG's step s up to xtol on
    # average, where H s = -g is solved to half of |g|: |g| <= 2 |H| |s|
    gradient = 33 * 1e-6 * max(1, 2 * spectrum.max())
    assert distance <= gradient / spectrum.min()


def test_newton_krylov(dtype):
    x = optimize.newton_krylov(slope, START, f_tol=1e-8, inner_M=preconditioner(dtype))
    distance, spectrum = newton_step(x)
    assert distance <= 1e-8 * np.sqrt(33) / np.abs(spectrum).min()


@pytest.mark.parametrize("method", ["trf", "dogbox"])
def test_least_squares(method, dtype):
    solution = torch.from_numpy(START)

    def residuals(t):
        misfit = predict(t) - predict(solution).to(t.dtype)
        return torch.cat([misfit.reshape(-1), t - solution.to(t.dtype)])

    def jac(x):
        return JacobianLinearOperator.from_function(residuals, tensor(x, dtype))

    def fun(x):
        return residuals(torch.from_numpy(x)).numpy()

    options = {"tr_solver": "lsmr", "gtol": 1e-8, "xtol": None, "ftol": None}
    x0 = START + 0.1 * normal(33)
    result = optimize.least_squares(fun, x0, jac, method=method, **options)
    assert result.status == 1
    # the gradient, at most gtol, is J.T J (x - solution) up to second order
    dense = torch.func.jacrev(residuals)(solution).numpy()
    assert norm(result.x - START) <= 1.1e-8 * np.sqrt(33) / norm(dense, -2) ** 2


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # lsmr
def test_lsq_linear(dtype):
    operator, dense = pair("jacobian", dtype)
    b, tol = normal(33, dtype=dtype), 30 * unit(dense, dtype)
    options = {"lsq_solver": "lsmr", "lsmr_tol": tol / 30, "lsmr_maxiter": 200}
    result = optimize.lsq_linear(operator, b, (-0.1, 0.1), tol=tol, **options)
    assert result.success
    expected = optimize.lsq_linear(dense, b, (-0.1, 0.1), method="bvls", tol=1e-15).x
    # the largest |entry of the gradient| * distance from the bound it points to
    optimality = result.optimality + 0.2 * unit(dense, dtype) * norm(dense, 2) * norm(b)
    gradient, free = dense.T @ (dense @ expected - b), np.abs(expected) < 0.1 - 1e-9
    others = norm(1 / gradient[~free])
    slope = norm(1 / (0.1 - np.abs(expected[free]))) + norm(dense, 2) ** 2 * others
    error = optimality * (others + slope / norm(dense[:, free], -2) ** 2)
    assert norm(result.x - expected) <= 1.5 * error  # which is to first order


@pytest.mark.parametrize("name", dense_family())
@pytest.mark.parametrize("product", ["matvec", "rmatvec", "matmat", "rmatmat"])
def test_products_share_no_memory(product, name, dtype):
    operator, dense = build(dtype)[name], dense_family()[name]  # new: nothing is kept yet
    assert isinstance(operator, sla.LinearOperator)
    assert sla.aslinearoperator(operator) is operator
    assert isinstance(operator.dtype, np.dtype)
    assert operator.dtype == (np.result_type(dtype, "F") if name == "complex" else dtype)
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
        assert y.flags.carray  # contiguous and writable
        y[...] = np.nan
    for x, y in zip(inputs, copies, strict=True):
        rounding = unit(dense, dtype) * norm(dense, 2) * norm(x)
        assert norm(y - matrix @ x) <= rounding
        # and again after all that: what was handed out and overwritten is not used
        assert norm(getattr(operator, product)(x) - matrix @ x) <= rounding
