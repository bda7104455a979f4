"""Runs that are killed go on from their checkpoint, to the answer of an undisturbed one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchlinop import (
    CGInverseLinearOperator,
    Checkpoint,
    MINRESInverseLinearOperator,
    estimate,
)

from tests.surviving.runs import EIGENVALUES, KILLED, RUNS, Counted, dense, right_hand_sides

pytest.importorskip("safetensors", reason="safetensors is not installed")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with what runs have left that were killed, and how they ended."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.surviving.runs", str(folder)]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=root,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder, dict(line.split(": ") for line in done.stdout.splitlines())


def expected(name):
    """The answer, by NumPy where that has one."""
    if "eigsh" in name:
        return EIGENVALUES[-5:]
    if "density" in name or "layers" in name:
        return RUNS[name](Counted(), None)
    B = right_hand_sides(3 if name in ("block cg", "minres") else 1)
    X = np.linalg.solve(dense(), B)
    return X if X.shape[1] > 1 else X[:, 0]


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_goes_on(killed, name):
    folder, ends = killed
    assert ends[name] == "9"
    path = folder / name
    whole, rest = Counted(), Counted()
    RUNS[name](whole, None)
    answer = RUNS[name](rest, Checkpoint(path))
    # SciPy 1.11 has no rtol, the newest one no tol: theirs is 1e-5 of b
    atol = 1e-2 if name == "scipy cg" else 1e-8
    np.testing.assert_allclose(answer, expected(name), rtol=1e-6, atol=atol)
    # one product tells that the matrix is the same, one was lost, a few end a solve;
    # SciPy's methods begin anew, from a better vector
    saved = 5 if "scipy" in name else KILLED - 5
    if name == "block cg":  # looks at the true residuals anew: an iteration or two of three
        saved -= 6
    assert rest.count <= whole.count - saved
    # the answer is in the file
    again = Counted()
    if "scipy" not in name:
        np.testing.assert_array_equal(RUNS[name](again, Checkpoint(path)), answer)
        assert again.count <= 3


def test_a_run_that_is_killed_while_it_writes_goes_on(killed):
    folder, ends = killed
    assert ends["writing"] == "9"
    assert (folder / "writing.partial").exists()
    rest = Counted()
    answer = RUNS["eigsh"](rest, Checkpoint(folder / "writing"))
    np.testing.assert_allclose(answer, EIGENVALUES[-5:], rtol=1e-6)
    assert not (folder / "writing.partial").exists()
    whole = Counted()
    RUNS["eigsh"](whole, None)
    assert rest.count <= whole.count - KILLED + 3


def test_a_run_goes_on_as_if_nothing_had_been(tmp_path):
    """Number by number, through many restarts of the Krylov space."""
    path = tmp_path / "run"
    undisturbed = estimate.eigsh(Counted(), k=5, tol=1e-10, ncv=12)
    for last in (20, 5, 12, 14):

        def stop():
            raise InterruptedError

        file = Checkpoint(path, seconds=0)
        with pytest.raises(InterruptedError):
            estimate.eigsh(Counted(last, stop), k=5, tol=1e-10, ncv=12, checkpoint=file)
    rest = Counted()
    resumed = estimate.eigsh(rest, k=5, tol=1e-10, ncv=12, checkpoint=path)
    assert resumed.num_matvecs == undisturbed.num_matvecs
    # a fingerprint each time, and the product that was lost
    assert rest.count + 20 + 5 + 12 + 14 == undisturbed.num_matvecs + 5 + 4
    torch.testing.assert_close(resumed.eigenvalues, undisturbed.eigenvalues)
    signs = (resumed.eigenvectors * undisturbed.eigenvectors).sum(0).sign()  # LAPACK's
    torch.testing.assert_close(resumed.eigenvectors * signs, undisturbed.eigenvectors)
    bounds = resumed.residual_bounds, undisturbed.residual_bounds
    np.testing.assert_allclose(*bounds, rtol=1e-4, atol=1e-14)  # some are rounding alone


@pytest.mark.parametrize("kind", [CGInverseLinearOperator, MINRESInverseLinearOperator])
def test_more_iterations_may_be_allowed_later(tmp_path, kind):
    B = right_hand_sides(3)
    file = Checkpoint(tmp_path / "run", seconds=0)
    options = {"rtol": 1e-9, "checkpoint": file}
    with pytest.warns(UserWarning, match="after 20 iterations"):
        kind(Counted(), maxiter=20, **options) @ B
    rest, whole = kind(Counted(), **options), kind(Counted(), rtol=1e-9)
    # residuals are 1e-9 of b, the smallest eigenvalue is 1e-2
    np.testing.assert_allclose(rest @ B, whole @ B, rtol=1e-6, atol=1e-6)
    # rounding may add a few; to begin anew from x0 would take as many as before
    more = rest.last_solve.iterations.max() - whole.last_solve.iterations.max()
    assert abs(more) <= 4
    assert rest.A.count <= whole.A.count - 20 + 6


def test_more_products_may_be_allowed_later(tmp_path):
    path = tmp_path / "run"
    with pytest.warns(UserWarning, match="have not converged after 30 products"):
        estimate.eigsh(Counted(), k=5, tol=1e-8, max_matvecs=30, checkpoint=path)
    rest = Counted()
    pairs = estimate.eigsh(rest, k=5, tol=1e-8, checkpoint=path)
    assert pairs.converged.all()
    assert rest.count == pairs.num_matvecs - 30 + 1
