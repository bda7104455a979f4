"""Monitors: what they count, how they stop, and what is left of a run."""

from __future__ import annotations

import concurrent.futures
import functools
import json

import numpy as np
import pytest
import scipy.sparse.linalg as spla
import torch
import torchlinop
from torchlinop import (
    CGInverseLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    RunLog,
    _pairs,
    monitor,
)
from torchlinop._observers import OBSERVERS

from tests.problems import classification, regression
from tests.watching.matrices import dense_operator, with_spectrum

DECAYING = 1 / np.arange(1.0, 121) ** 1.5
V0 = np.random.default_rng(1).standard_normal(120)


@pytest.fixture(autouse=True)
def _nobody_watches():
    yield
    assert not OBSERVERS


@pytest.fixture
def A():
    return with_spectrum(DECAYING)[0]


def counted(A):
    """The operator behind one of SciPy's that counts."""
    calls = []

    def matvec(x):
        calls.append(1)
        return A @ x

    return spla.LinearOperator(A.shape, matvec, dtype=A.dtype), calls


# --------------------------------------------------------------------------- counting


def test_products_of_scipys_solver_are_counted(A):
    independent, calls = counted(A)
    expected = spla.eigsh(independent, k=4, v0=V0)[0]
    with monitor(A) as log:
        values = spla.eigsh(A, k=4, v0=V0)[0]
    np.testing.assert_allclose(values, expected)
    assert log.num_products == log.num_columns == len(calls)
    assert log.stopped == ""
    starts, seconds, columns, adjoint = zip(*log.products, strict=True)
    np.testing.assert_array_equal(log.seconds, seconds)
    assert min(seconds) > 0
    assert np.all(np.diff(starts) > 0)
    assert log.elapsed >= starts[-1] + seconds[-1]
    assert set(columns) == {1}
    assert not any(adjoint)
    assert str(log).startswith(f"{len(calls)} products in ")
    A @ V0
    assert log.num_products == len(calls)  # nothing after the end


def test_blocks_count_their_columns(A):
    with monitor(A) as log:
        A @ np.ones((120, 7))
        A.matvec(np.ones(120))
        A @ (np.ones(120) * 1j)  # by parts
    assert [columns for _, _, columns, _ in log.products] == [7, 1, 2]
    assert "3 products of 10 vectors" in str(log)


def test_products_inside_of_composites_and_inverses():
    H = HessianLinearOperator(*classification().arguments)
    shifted = H + 2.0 * np.eye(27)
    inverse = CGInverseLinearOperator(shifted, rtol=1e-10)
    with monitor(H) as of_H, monitor(shifted) as of_sum, monitor(inverse) as of_inverse:
        inverse @ np.ones(27)
        (3 * H) @ np.ones(27)
        (H @ H) @ np.ones(27)
    assert of_inverse.num_products == 1
    assert of_sum.num_columns == inverse.last_solve.num_matvecs
    assert of_H.num_columns == inverse.last_solve.num_matvecs + 3


@pytest.mark.parametrize("kind", ["jacobian", "dense"])
def test_products_with_the_adjoint(kind):
    p = regression()
    J = JacobianLinearOperator(p.model, p.params, p.data)
    if kind == "dense":
        J = dense_operator(J.to_dense().numpy())
    transposed = J.T
    with monitor(J) as log, monitor(transposed) as mirrored:
        J.rmatvec(np.ones(16))
        transposed @ np.ones(16)
        J @ np.ones(26)
        dense_operator(np.eye(16, 26)).rmatvec(np.ones(16))  # not ours
        spla.svds(J, k=2, v0=np.ones(16))
    adjoint = [adjoint for *_, adjoint in log.products]
    assert adjoint[:3] == [True, True, False]
    assert log.num_products == mirrored.num_products > 8
    assert [not adjoint for *_, adjoint in mirrored.products] == adjoint


def test_adjoint_of_the_adjoint_is_the_operator():
    A = dense_operator(np.ones((2, 3))) @ dense_operator(np.ones((3, 3)))
    assert A.H.H is A


def test_nested_monitors_each_count_their_own(A):
    with monitor(A) as outer:
        A @ V0
        with monitor(A, max_products=2) as inner:
            for _ in range(5):
                A @ V0
        A @ V0
    assert (inner.num_products, inner.stopped) == (2, "max_products")
    assert (outer.num_products, outer.stopped) == (4, "")


def test_the_outer_budget_ends_both(A):
    with monitor(A, max_products=3) as outer:
        with monitor(A) as inner:
            for _ in range(5):
                A @ V0
        pytest.fail("went on behind the inner block")
    assert outer.num_products == inner.num_products == 3
    assert (outer.stopped, inner.stopped) == ("max_products", "")


def test_several_threads(A):
    with monitor(A, max_vectors=0) as log, concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: A @ V0, range(200)))
    assert log.num_products == 200


def test_a_budget_over_several_threads(A):
    with (
        monitor(A, max_products=57) as log,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        list(pool.map(lambda _: A @ V0, range(200)))
    assert (log.num_products, log.stopped) == (57, "max_products")


def test_the_products_are_the_same(A):
    expected = A @ V0
    with monitor(A):
        assert (A @ V0).tobytes() == expected.tobytes()


def test_cupyx(cupy, solvers, A):
    start = cupy.asarray(V0)
    with monitor(A) as log:
        solvers.eigsh(A, k=4)
        lanczos = log.num_products
        solvers.lobpcg(A, cupy.asarray(np.eye(120)[:, :4]), maxiter=3, largest=True)
    assert lanczos >= 20
    assert log.num_columns > log.num_products > lanczos
    with monitor(A, max_products=12) as log:
        solvers.cg(A + 1e-3 * torch.eye(120, dtype=torch.float64), start)
    assert (log.num_products, log.stopped) == (12, "max_products")


# --------------------------------------------------------------------------- stopping


def test_a_stopped_eigsh_gives_ritz_pairs_with_true_residuals(A):
    with monitor(A, max_products=21) as log:
        spla.eigsh(A, k=6, which="LA", v0=V0, tol=1e-14)
        pytest.fail("the block went on")
    assert (log.num_products, log.stopped) == (21, "max_products")
    pairs = log.eigenpairs(4, which="LA")
    values, vectors = pairs
    dense = A.dense
    residuals = torch.linalg.vector_norm(dense @ vectors - vectors * values, dim=0)
    np.testing.assert_allclose(pairs.residual_bounds, residuals, rtol=1e-6, atol=1e-13)
    # within its bound of an eigenvalue, and better than that: residuals are squared
    error = np.abs(values.numpy() - DECAYING[:4][::-1])
    assert (error <= pairs.residual_bounds + 1e-15).all()
    assert error.max() < 1e-6
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(4, dtype=torch.float64))
    low = log.eigenpairs(1, which="SA")
    assert low.eigenvalues.item() >= DECAYING[-1] - 1e-15
    assert abs(low.eigenvalues.item() - DECAYING[-1]) <= low.residual_bounds[0]


def test_merging_forgets_less_than_dropping_would():
    spectrum = np.linspace(0.01, 1, 120) ** 2
    A, _ = with_spectrum(spectrum)
    seen = []

    def matvec(x):
        seen.append(np.array(x).reshape(-1))
        return A @ x

    B = spla.LinearOperator(A.shape, matvec, dtype=A.dtype)
    with monitor(A, max_products=90, max_vectors=24) as log:
        spla.eigsh(B, k=3, which="LA", v0=V0, tol=1e-15, ncv=8)
    assert (log.num_products, log.stopped) == (90, "max_products")
    assert len(log._pairs.numbers) <= 24
    values, vectors = pairs = log.eigenpairs(3, which="LA")
    residuals = np.linalg.norm(A.dense @ vectors - vectors * values, axis=0)
    np.testing.assert_allclose(pairs.residual_bounds, residuals, rtol=1e-5, atol=1e-13)
    assert (np.abs(values.numpy() - spectrum[-3:]) <= residuals).all()
    Q, _ = np.linalg.qr(np.stack(seen[-24:], axis=1))
    dropped = np.linalg.eigvalsh(Q.T @ A.dense.numpy() @ Q)[-3:]
    error = spectrum[-3:] - values.numpy()
    assert (error < 0.1 * (spectrum[-3:] - dropped)).all()


def test_what_would_take_long_to_merge_is_forgotten(monkeypatch, A):
    monkeypatch.setattr(_pairs, "_MERGED", 1e4)
    X = np.random.default_rng(0).standard_normal((120, 50))
    with monitor(A, max_vectors=20) as log, monitor(A, b=V0) as solving:
        for x in X.T:
            A @ x
    numbers = log._pairs.numbers
    assert numbers == list(range(51 - len(numbers), 51))
    assert 10 <= len(numbers) <= 20
    _, R = torch.linalg.qr(log._pairs.matrices()[0])
    kept = X[:, -len(numbers) :]
    np.testing.assert_allclose(
        R.T @ R, kept.T @ kept / np.outer(*2 * [np.linalg.norm(kept, axis=0)]), atol=1e-12
    )
    assert len(solving._pairs.numbers) <= 32  # merged nonetheless
    assert len(solving._pairs.past_solutions) > 0


def test_our_own_solvers(A):
    with monitor(A, max_products=20) as log:
        torchlinop.estimate.eigsh(A, 5, tol=1e-12)
        pytest.fail("the block went on")
    assert (log.num_products, log.stopped) == (20, "max_products")
    assert log.eigenpairs(1).eigenvalues.item() == pytest.approx(1, abs=1e-6)
    inverse = CGInverseLinearOperator(A, damping=1e-3, rtol=1e-12)
    with monitor(A, max_products=10) as log:
        inverse @ V0
        pytest.fail("the block went on")
    assert log.num_products == 10
    assert inverse.last_solve is None


def test_a_matrix_of_zeros():
    A = dense_operator(np.zeros((20, 20)))
    with monitor(A, max_vectors=16, b=np.ones(20)) as log:
        for _ in range(30):
            A @ np.ones(20)
    assert log.solution(np.ones(20)).relative_residual == pytest.approx(1)
    assert log.eigenpairs(1).eigenvalues.item() == 0


def test_float32_and_its_bounds():
    A, _ = with_spectrum(DECAYING, torch.float32)
    with monitor(A, max_products=40) as log:
        spla.eigsh(A, k=6, v0=V0.astype(np.float32))
    pairs = log.eigenpairs(3)
    assert pairs.eigenvectors.dtype == pairs.eigenvalues.dtype == torch.float32
    np.testing.assert_allclose(pairs.eigenvalues, DECAYING[:3][::-1], rtol=1e-5)
    assert pairs.residual_bounds.max() < 1e-4


def test_hermitian_operators():
    rng = np.random.default_rng(3)
    Z = rng.standard_normal((30, 30)) + 1j * rng.standard_normal((30, 30))
    U, _ = np.linalg.qr(Z)
    A = dense_operator(U * np.arange(30.0) @ U.conj().T)
    with monitor(A, max_products=29) as log:
        spla.eigsh(A, k=2, tol=1e-14, v0=Z[:, 0])
    pairs = log.eigenpairs(2)
    assert not pairs.eigenvalues.is_complex()
    assert (np.abs(pairs.eigenvalues.numpy() - [28, 29]) <= pairs.residual_bounds).all()


@pytest.mark.parametrize("solver", ["cg", "minres"])
def test_a_stopped_solve_gives_the_best_iterate(solver):
    A, _ = with_spectrum(np.linspace(0.01, 1, 120) ** 2)
    b = V0
    iterates = [np.zeros(120)]
    solve = functools.partial(getattr(spla, solver), A, b, maxiter=1000)
    if solver == "cg":
        solve = functools.partial(solve, atol=0.0)  # which older versions ask for
    with monitor(A, max_products=30) as log, monitor(A, b=b, max_vectors=16) as merging:
        solve(callback=lambda x: iterates.append(x.copy()))
    assert log.stopped == "max_products"
    dense = A.dense.numpy()
    own = min(np.linalg.norm(b - dense @ x) for x in iterates)
    for run in (log, merging):
        best = run.solution(b)
        residual = np.linalg.norm(b - dense @ best.x)
        assert best.residual_norm == pytest.approx(residual, rel=1e-8)
        expected = pytest.approx(residual / np.linalg.norm(b), rel=1e-8)
        assert best.relative_residual == expected
        assert residual <= own * (1 + 1e-8)
        assert residual < 0.5 * np.linalg.norm(b)
        curve = run.convergence(b=b)
        assert (np.diff(curve.residual_norms[:, 0]) <= 1e-12).all()
        last = curve.residual_norms[-1, 0]
        assert last == pytest.approx(best.relative_residual, rel=1e-6)
    # merging loses nothing
    relative = merging.solution(b).residual_norm / log.solution(b).residual_norm
    assert relative == pytest.approx(1, abs=1e-4)


def test_vectors_that_have_come_to_depend_on_each_other(A):
    """After convergence a solver multiplies what was seen before, with rounding errors."""
    with monitor(A) as log:
        spla.eigsh(A, k=3, which="LA", v0=V0, tol=1e-15, ncv=8)
        for power in range(1, 40):
            A @ (A @ (V0 / power))
    pairs = log.eigenpairs(4, which="LA")
    np.testing.assert_allclose(pairs.eigenvalues, DECAYING[:4][::-1], rtol=1e-8)
    gram = pairs.eigenvectors.T @ pairs.eigenvectors
    torch.testing.assert_close(gram, torch.eye(4, dtype=torch.float64), atol=1e-5, rtol=0)


def test_kinds_of_right_hand_sides():
    A, _ = with_spectrum(np.linspace(1, 2, 120))
    with monitor(A, max_products=20) as log:
        torchlinop.CGInverseLinearOperator(A, rtol=1e-14) @ torch.from_numpy(V0)
    assert isinstance(log.solution(V0).x, np.ndarray)
    x = log.solution(torch.from_numpy(V0)).x
    assert isinstance(x, torch.Tensor)
    assert torch.linalg.vector_norm(A @ x - torch.from_numpy(V0)) < 1e-5
    z = log.solution(V0 * (1 + 2j)).x
    np.testing.assert_allclose(z, (1 + 2j) * log.solution(V0).x, atol=1e-10)


def test_least_squares_of_rectangular_operators():
    B = dense_operator(np.random.default_rng(0).standard_normal((40, 12)))
    b = np.ones(40)
    with monitor(B, max_products=40) as log:
        spla.lsmr(B, b, atol=1e-14, btol=1e-14, conlim=0, maxiter=1000)
    exact, square, *_ = np.linalg.lstsq(B.to_dense().numpy(), b, rcond=None)
    np.testing.assert_allclose(log.solution(b).x, exact, atol=1e-8)
    assert log.solution(b).residual_norm == pytest.approx(square[0] ** 0.5)
    with pytest.raises(ValueError, match="40 x 12 operator has no eigenvalues"):
        log.eigenpairs()


def test_time(A):
    clock = []

    def slow(x):
        clock.append(1)
        threading_sleep(0.02)
        return A @ x

    import time

    threading_sleep = time.sleep
    B = torchlinop.aslinearoperator(spla.LinearOperator(A.shape, slow, dtype=A.dtype))
    with monitor(B, max_seconds=0.1) as log:
        spla.eigsh(B, k=6, v0=V0)
    assert log.stopped == "max_seconds"
    assert log.num_products == len(clock) <= 6
    assert log.elapsed < 1
    assert log.eigenpairs(1).eigenvalues.item() > 0


def test_ctrl_c(A):
    def interrupted(x):
        if log.num_products == 20:
            raise KeyboardInterrupt
        return 0 * x

    B = A + torchlinop.aslinearoperator(
        spla.LinearOperator(A.shape, interrupted, dtype=A.dtype)
    )
    with monitor(A) as log:
        spla.eigsh(B, k=6, v0=V0, tol=1e-15)
    assert log.stopped == "interrupt"
    assert log.eigenpairs(1).eigenvalues.item() == pytest.approx(1, abs=1e-3)


def test_other_errors_pass_through(A):
    with pytest.raises(ZeroDivisionError), monitor(A):
        1 / 0
    watch = monitor(A, max_products=1)
    log = watch.__enter__()
    A @ V0
    with pytest.raises(BaseException, match="stopped by max_products"):
        A @ V0
    assert log.stopped
    assert not watch.__exit__(ZeroDivisionError, ZeroDivisionError(), None)


def test_what_a_solver_makes_of_the_stop_is_swallowed(A):
    with monitor(A, max_products=1) as log:
        try:
            for _ in range(2):
                A @ V0
        except BaseException as error:
            raise RuntimeError("callback failed") from error
    assert log.stopped == "max_products"


# --------------------------------------------------------- convergence, files, the bar


def test_convergence_of_ritz_values(A):
    with monitor(A, max_products=40) as log:
        spla.eigsh(A, k=6, which="LA", v0=V0, tol=1e-14, ncv=40)
    curve = log.convergence(3, which="LA")
    assert curve.what == "eigenvalues"
    assert curve.products[-1] == 40
    assert curve.values.shape == curve.residual_norms.shape == (len(curve.products), 3)
    # after j products: those of the Krylov space, which bound the eigenvalues from below
    j = int(np.flatnonzero(curve.products == 10)[0])
    dense = A.dense.numpy()
    Q = V0[:, None] / np.linalg.norm(V0)
    for _ in range(9):
        w = dense @ Q[:, -1]
        w -= Q @ (Q.T @ w)
        w -= Q @ (Q.T @ w)
        Q = np.column_stack([Q, w / np.linalg.norm(w)])
    theta, S = np.linalg.eigh(Q.T @ dense @ Q)
    np.testing.assert_allclose(curve.values[j], theta[-3:], atol=1e-10)
    residuals = np.linalg.norm(dense @ (Q @ S) - (Q @ S) * theta, axis=0)[-3:]
    np.testing.assert_allclose(curve.residual_norms[j], residuals, atol=1e-9)
    assert (curve.values[:, 2][:-1] <= curve.values[:, 2][1:] + 1e-12).all()
    last = log.eigenpairs(3, which="LA")
    np.testing.assert_allclose(curve.residual_norms[-1], last.residual_bounds, atol=1e-11)


def test_a_log_is_saved_and_read(A, tmp_path):
    with monitor(A, max_products=10) as log:
        spla.eigsh(A, k=3, v0=V0)
    path = tmp_path / "run.json"
    log.save(path, k=2)
    record = json.loads(path.read_text())
    assert record["stopped"] == "max_products"
    assert record["shape"] == [120, 120]
    again = RunLog.load(path)
    assert again.products == log.products
    assert str(again) == str(log)
    curve, saved = log.convergence(2), again.convergence()
    np.testing.assert_array_equal(curve.values, saved.values)
    np.testing.assert_array_equal(curve.residual_norms, saved.residual_norms)
    with pytest.raises(ValueError, match="read from a file"):
        again.eigenpairs()
    with pytest.raises(ValueError, match="which has to be"):
        log.save(path, which="BE")
    with monitor(A, max_vectors=0) as bare:
        A @ V0
    bare.save(path)
    with pytest.raises(ValueError, match="has no vectors"):
        RunLog.load(path).convergence()


@pytest.mark.parametrize("text", ["{}", "[]", "", "no JSON", '{"convergence": null}'])
def test_files_that_are_no_logs(text, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run.json is no log of a run.*RunLog.save"):
        RunLog.load(path)


def test_the_bar(A, capsys):
    with monitor(A, max_products=30, progress=True):
        for _ in range(20):
            A @ V0
    shown = capsys.readouterr().err
    assert "Symmetric: 20 of 30 products" in shown
    assert "s/product" in shown
    assert "left" in shown
    with monitor(A, progress=True):
        A @ V0
    assert "1 products" in capsys.readouterr().err


# --------------------------------------------------------------------------- bad input


def test_bad_input(A):
    with pytest.raises(TypeError, match="aslinearoperator"):
        monitor(np.eye(3))
    for count in (0, 2.5):
        with pytest.raises(ValueError, match="max_products has to be an integer of at"):
            monitor(A, max_products=count)
    with pytest.raises(ValueError, match="max_seconds has to be positive, got -1"):
        monitor(A, max_seconds=-1)
    with pytest.raises(ValueError, match="max_vectors has to be 0 or at least 16, got 3"):
        monitor(A, max_vectors=3)
    with pytest.raises(ValueError, match=r"b has to have shape \(120,\)"):
        monitor(A, b=np.ones(3))
    with pytest.raises(ValueError, match="b has NaN"):
        monitor(A, b=np.full(120, np.nan))
    watch = monitor(A)
    with watch as log:
        A @ V0
    with pytest.raises(RuntimeError, match="was used before"), watch:
        pass
    with pytest.raises(ValueError, match="which has to be"):
        log.eigenpairs(which="BE")
    with pytest.raises(ValueError, match="k has to be at least 1"):
        log.eigenpairs(0)
    with pytest.raises(ValueError, match="b has to have shape"):
        log.solution(np.ones(3))
    with monitor(A) as log:
        pass
    with pytest.raises(ValueError, match="has no vectors"):
        log.eigenpairs()


def test_ritz_pairs_need_a_hermitian_operator():
    A = dense_operator(np.triu(np.ones((20, 20))))
    with monitor(A) as log:
        spla.eigs(A, k=2, v0=np.ones(20))
    with pytest.raises(ValueError, match="need a Hermitian matrix"):
        log.eigenpairs()


def test_products_that_are_not_finite():
    A = dense_operator(np.diag([1.0, np.nan]))
    with monitor(A) as log:
        A @ np.ones(2)
    with pytest.raises(ValueError, match="NaN or infinite"):
        log.eigenpairs()


def test_nothing_is_merged_during_the_run(monkeypatch):
    """Merging takes longer than products: it waits, unless too many bytes do."""
    A = torchlinop.DiagonalLinearOperator(torch.arange(1.0, 301.0, dtype=torch.float64))
    merge, merged = _pairs.Pairs._merge, []
    monkeypatch.setattr(
        _pairs.Pairs, "_merge", lambda self: merged.append(len(log.products)) or merge(self)
    )
    found = []
    for waiting in (1 << 26, 0):
        monkeypatch.setattr(_pairs, "_WAITING", waiting)
        merged.clear()
        with torchlinop.monitor(A, max_vectors=32) as log:
            spla.eigsh(A, k=4, ncv=12, tol=1e-9, v0=np.ones(300))
        assert len(log.products) > 64
        assert bool(merged) is (waiting == 0)
        found.append(log.eigenpairs(3).eigenvalues)
        assert min(merged) == (33 if waiting == 0 else len(log.products))
    torch.testing.assert_close(found[1], found[0])
