"""Eigenpairs at the ends of spectra that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torchlinop import (
    ConvergenceWarning,
    GGNLinearOperator,
    IdentityLinearOperator,
    aslinearoperator,
    estimate,
)
from torchlinop.estimate.basis import Basis

from tests.estimate.matrices import Counted, Failing, decaying, with_spectrum
from tests.problems import classification

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]

N = 200
UNIFORM = torch.linspace(-0.3, 1, N, dtype=torch.float64)
FIVEFOLD = torch.cat([UNIFORM[:-5], torch.full((5,), 2.0, dtype=torch.float64)])
CLUSTER = torch.cat([UNIFORM[:-5], 2 + 1e-9 * torch.arange(5, dtype=torch.float64)])
ZEROS = torch.cat([torch.zeros(150, dtype=torch.float64), UNIFORM[-50:]])
DECAYING = 10.0 ** -torch.linspace(0, 8, N, dtype=torch.float64)


def wanted(values, k, which):
    values = np.sort(values.numpy())
    if which == "LA":
        return values[-k:]
    if which == "SA":
        return values[:k]
    if which == "LM":
        return np.sort(values[np.argsort(-np.abs(values))[:k]])
    return np.sort(np.concatenate([values[: k // 2], values[-(k - k // 2) :]]))


def check(matrix, values, k, which="LA", tol=1e-5, **options):
    """Values, true residuals against the bounds, orthonormality."""
    found = estimate.eigsh(matrix, k, which=which, tol=tol, **options)
    eigenvalues, V = found
    eps = torch.finfo(matrix.dtype).eps
    norm = values.abs().max().item()
    error = np.abs(eigenvalues.numpy() - wanted(values, k, which)).max()
    assert error <= max(tol, 20 * eps) * max(norm, eps)
    wide = torch.promote_types(V.dtype, torch.float64)
    V = V.to(wide)
    defect = matrix.to(wide) @ V - V * eigenvalues.double()
    assert (torch.linalg.vector_norm(defect, dim=0).numpy() <= found.residual_bounds).all()
    assert (found.residual_bounds <= (tol + 50 * eps) * max(norm, eps)).all()
    assert (V.mH @ V - torch.eye(k)).abs().max() < 50 * eps
    assert found.converged.all()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_ends_of_a_spectrum(which, dtype):
    found = check(with_spectrum(UNIFORM, dtype), UNIFORM, 5, which)
    assert found.eigenvalues.dtype == dtype.to_real()
    assert found.eigenvectors.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("values", "k", "which"),
    [
        (FIVEFOLD, 8, "LA"),
        (FIVEFOLD, 3, "LM"),
        (CLUSTER, 7, "LA"),
        (CLUSTER, 3, "LA"),
        (ZEROS, 8, "SA"),
        (-FIVEFOLD, 6, "SA"),
        (DECAYING, 10, "LA"),
        (torch.ones(N, dtype=torch.float64), 10, "LA"),
        (torch.zeros(N, dtype=torch.float64), 4, "LM"),
    ],
    ids=["fivefold", "three of five", "cluster", "three of it", "zeros", "negative"]
    + ["decaying", "identity", "zero"],
)
def test_repeated_and_clustered_eigenvalues(values, k, which, dtype):
    check(with_spectrum(values, dtype), values, k, which)


def test_identity_itself():
    found = estimate.eigsh(IdentityLinearOperator([(50,)], "cpu", torch.float32), 12)
    assert (found.eigenvalues - 1).abs().max() < 1e-6


def test_three_hundred():
    values = torch.randn(600, generator=torch.Generator().manual_seed(4)).double()
    check(with_spectrum(values, torch.float32), values, 300)


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_all_of_a_small_matrix(n):
    values = UNIFORM[:: N // n][:n]
    for k in range(1, n + 1):
        check(with_spectrum(values), values, k, tol=0)


@pytest.mark.parametrize("seed", range(4))
def test_the_slower_end_overtakes(seed):
    """The largest in size is negative, in a dense part that converges after the others."""
    few = torch.tensor([1.2, 1.5, 2.0], dtype=torch.float64)
    values = torch.cat([torch.linspace(-1.201, 0.5, 297, dtype=torch.float64), few])
    check(with_spectrum(values), values, 3, "LM", seed=seed)
    check(with_spectrum(-values), -values, 3, "LM", seed=seed)


def test_to_rounding():
    found = check(with_spectrum(DECAYING), DECAYING, 6, tol=0)
    assert found.residual_bounds.max() < 1e-13


def test_starting_vector_saves_products():
    A = Counted(with_spectrum(UNIFORM))
    first = estimate.eigsh(A, 3)
    assert first.num_matvecs == A.columns
    start = first.eigenvectors.sum(dim=1)
    kept = start.clone()
    again = estimate.eigsh(A, 3, v0=start)
    assert torch.equal(start, kept)
    assert again.num_matvecs < first.num_matvecs / 2
    torch.testing.assert_close(again.eigenvalues, first.eigenvalues)
    of_numpy = estimate.eigsh(A, 3, v0=start.numpy()[:, None])
    assert torch.equal(of_numpy.eigenvalues, again.eigenvalues)


def test_same_seed_same_answer():
    A = with_spectrum(UNIFORM)
    first, second = (estimate.eigsh(A, 3, seed=5) for _ in range(2))
    assert torch.equal(first.eigenvectors, second.eigenvectors)
    assert not torch.equal(first.eigenvectors, estimate.eigsh(A, 3, seed=6).eigenvectors)


def test_agrees_with_scipy_and_dense_on_a_ggn():
    problem = classification(torch.nn.CrossEntropyLoss())
    G = GGNLinearOperator(*problem.arguments)
    dense = torch.linalg.eigvalsh(G.to_dense())
    values, vectors = estimate.eigsh(G, 4, tol=1e-8)
    torch.testing.assert_close(values, dense[-4:], rtol=1e-8, atol=1e-10)
    theirs = scipy_eigsh(G, 4, which="LA")[0]
    np.testing.assert_allclose(values.numpy(), np.sort(theirs), rtol=1e-8, atol=1e-10)
    assert vectors.shape == (G.shape[0], 4)


@pytest.mark.parametrize("budget", [0, 8 * N * 7, 8 * N * 1000])
def test_basis_beyond_the_budget_is_on_the_host(budget):
    """On a CPU both are the same memory, and the parts are told apart nonetheless."""
    A = with_spectrum(UNIFORM)
    found = check(A, UNIFORM, 4, ncv=20, memory_budget=budget)
    whole = estimate.eigsh(A, 4, ncv=20)
    torch.testing.assert_close(found.eigenvalues, whole.eigenvalues)


def test_small_budget_makes_a_small_basis():
    check(with_spectrum(UNIFORM), UNIFORM, 4, memory_budget=8 * N * 12)


def test_split_basis():
    rows = torch.randn(9, 70, dtype=torch.complex128)
    w = torch.randn(70, dtype=torch.complex128)
    S = torch.randn(9, 4, dtype=torch.complex128)
    for split in (0, 3, 9):
        basis = Basis(9, rows[0], split)
        for i, row in enumerate(rows):
            basis[i] = row
        assert torch.equal(basis[5], rows[5])
        torch.testing.assert_close(basis.dots(9, w), rows.conj() @ w)
        rest = w.clone()
        c = basis.orthogonalize(5, rest)
        torch.testing.assert_close(rest, w - c @ rows[:5])
        torch.testing.assert_close(basis.combinations(S), rows.T @ S)
        basis.combine(S)
        torch.testing.assert_close(basis[3], S[:, 3] @ rows)


def test_unconverged_says_so_and_its_bounds_hold():
    A = with_spectrum(UNIFORM)
    with pytest.warns(
        ConvergenceWarning, match="of 5 eigenpairs have not converged after 12"
    ):
        found = estimate.eigsh(A, 5, max_matvecs=12)
    assert found.num_matvecs == 12
    assert not found.converged.all()
    values, V = found
    residuals = torch.linalg.vector_norm(A @ V - V * values, dim=0).numpy()
    assert (residuals <= found.residual_bounds).all()
    # there is an eigenvalue within each bound
    distances = np.abs(UNIFORM.numpy() - values.numpy()[:, None]).min(axis=1)
    assert (distances <= found.residual_bounds).all()
    assert "eigenpairs converged (12 products)" in str(found)


def test_interrupt_keeps_what_there_is():
    A = Failing(with_spectrum(UNIFORM), 20, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as caught:
        estimate.eigsh(A, 3)
    assert isinstance(caught.value, estimate.Interrupted)
    values, V = caught.value.result
    residuals = torch.linalg.vector_norm(A.matrix @ V - V * values, dim=0).numpy()
    assert (residuals <= caught.value.result.residual_bounds).all()
    early = Failing(with_spectrum(UNIFORM), 0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as caught:
        estimate.eigsh(early, 3)
    assert not isinstance(caught.value, estimate.Interrupted)


def test_non_symmetric_and_random_matrices():
    general = torch.randn(60, 60, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="not symmetric, or not the same in each product"):
        estimate.eigsh(general, 3)
    slightly = with_spectrum(UNIFORM)
    slightly[0, 1] += 1e-3
    with pytest.raises(ValueError, match=r"take \(A \+ A\.H\) / 2"):
        estimate.eigsh(slightly, 3)

    class Noisy(Counted):
        def _apply(self, x):
            return super()._apply(x) + 1e-4 * torch.randn(x.shape, dtype=x.dtype)

    with pytest.raises(ValueError, match="not the same in each product"):
        estimate.eigsh(Noisy(with_spectrum(UNIFORM)), 3)


def test_small_bases_that_the_search_for_the_missed_fills():
    """Copies turn up when the basis is full; then it is restarted before it goes on."""
    top = torch.cat([torch.full((20,), 2 - 1e-7), torch.full((40,), 2.0)]).double()
    values = torch.cat([torch.linspace(-0.3, 1, 740, dtype=torch.float64), top])
    A = with_spectrum(values)
    for options in ({"ncv": 22}, {"memory_budget": 22 * 800 * 8}):
        found = estimate.eigsh(A, 20, **options)
        assert found.converged.all()
        assert (found.eigenvalues - 2).abs().max() < 2e-5
        V = found.eigenvectors
        # each of about a hundred restarts rounds once more
        assert (V.mH @ V - torch.eye(20)).abs().max() < 1e-13
    few = torch.cat([torch.linspace(0, 1, 20), torch.full((4,), 2.0)]).double()
    B = with_spectrum(few)
    for ncv in (4, 5, 6):
        check(B, few, 2, ncv=ncv, seed=5)


BAD = {
    "k=0": ({"k": 0}, "k has to be an integer of at least 1"),
    "k large": ({"k": 61}, "k has to be at most N = 60, got 61"),
    "which": ({"which": "SM"}, "which has to be one of LA, SA, LM, BE, got 'SM'"),
    "tol": ({"tol": -1}, "tol has to be a finite number >= 0"),
    "ncv": ({"ncv": 4}, r"ncv has to be between k \+ 2 = 5 and N = 60, got 4"),
    "v0": ({"v0": np.ones(7)}, r"v0 has to have shape \(N,\) with N = 60, got \(7,\)"),
    "zero v0": ({"v0": np.zeros(60)}, "v0 has to be finite and not zero"),
    "budget": ({"memory_budget": -1}, "memory_budget has to be a finite number >= 0"),
    "no budget": ({"memory_budget": np.nan}, "memory_budget has to be a finite number"),
    "few": ({"max_matvecs": 2}, "max_matvecs has to be at least k = 3, got 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        estimate.eigsh(decaying(), **{"k": 3, **options})


def test_other_bad_input():
    with pytest.raises(ValueError, match="eigsh is for square matrices, got 3 x 4"):
        estimate.eigsh(torch.ones(3, 4), 1)
    with pytest.raises(TypeError, match="v0 is complex, but A is real"):
        estimate.eigsh(decaying(), 1, v0=np.ones(60) * 1j)
    broken = decaying()
    broken[3, 3] = torch.nan
    with pytest.raises(np.linalg.LinAlgError, match="Product 1 with the matrix has NaN"):
        estimate.eigsh(broken, 1)


def test_numpy_matrix_and_progress(capsys):
    found = estimate.eigsh(aslinearoperator(decaying().numpy()), 2, progress=True)
    assert found.eigenvalues[-1] == pytest.approx(1)
    assert "product" in capsys.readouterr().err
