"""What is called converged is, and what is not is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from torchlinop import (
    CGInverseLinearOperator,
    ConvergenceError,
    ConvergenceWarning,
    LSMRInverseLinearOperator,
    NystromPreconditioner,
    multishift_cg,
)

from tests.solve.matrices import (
    KRYLOV,
    indefinite,
    positive,
    residuals,
    vectors,
    with_spectrum,
)


def test_claimed_residuals_are_true_in_float32():
    """The recurrences go on to shrink where the true residual does not."""
    A = positive(200, 1e6, torch.float32)
    b = vectors(200, None, torch.float32)
    for kind in KRYLOV.values():
        inverse = kind(A, rtol=1e-7, on_failure="ignore", maxiter=3000)
        x = inverse @ b
        report = inverse.last_solve
        assert report.residual_norms[0] == pytest.approx(residuals(A, x, b).item(), rel=0.3)
        assert not report.converged[0]


@pytest.mark.parametrize("solver", KRYLOV)
def test_not_converging(solver):
    A, B = positive(60, 1e5), vectors(60, 3, torch.float64)
    inverse = KRYLOV[solver](A, rtol=1e-10, maxiter=4)
    with pytest.warns(
        ConvergenceWarning, match=rf"{solver} did not .* Raise maxiter"
    ) as got:
        inverse @ B
    assert got[0].filename == __file__
    report = inverse.last_solve
    assert report.reason == "maxiter"
    assert not report.converged.any()
    assert (report.iterations == 4).all()
    assert "0 of 3 columns converged (stopped by maxiter)" in str(report)
    strict = KRYLOV[solver](A, rtol=1e-10, maxiter=4, on_failure="raise")
    with pytest.raises(ConvergenceError, match="Raise maxiter") as error:
        strict @ B
    assert error.value.report is strict.last_solve
    assert error.value.solution.shape == B.shape
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KRYLOV[solver](A, rtol=1e-10, maxiter=4, on_failure="ignore") @ B


def test_the_true_residual_of_one_column_is_in_the_warning():
    A = positive(60, 1e5)
    b = vectors(60, None, torch.float64)
    inverse = CGInverseLinearOperator(A, rtol=1e-10, maxiter=4)
    with pytest.warns(ConvergenceWarning) as got:
        x = inverse @ b
    assert f"{residuals(A, x, b).item():.2e}" in str(got[0].message)


def test_report_prints():
    inverse = CGInverseLinearOperator(torch.eye(4))
    assert inverse.last_solve is None
    inverse @ torch.ones(4, 2)
    lines = str(inverse.last_solve).splitlines()
    assert lines[0] == "CG: 2 of 2 columns converged"
    assert lines[2].split() == ["products", "2"]  # the second column is the first
    inverse @ torch.ones(4, 0)
    assert str(inverse.last_solve) == "CG: no columns"


def test_singular_matrices():
    """In the range a solution, outside of it a word."""
    values = torch.cat([torch.zeros(5), torch.linspace(1, 3, 15)])
    A = with_spectrum(values, torch.float64)
    inside = A @ vectors(20, 2, torch.float64)
    outside = vectors(20, 2, torch.float64)
    for kind in KRYLOV.values():
        x = kind(A, rtol=1e-10) @ inside
        torch.testing.assert_close(A @ x, inside)
        for b in (outside, outside[:, 0]):
            inverse = kind(A, rtol=1e-10, maxiter=200)
            with pytest.warns(ConvergenceWarning, match="damping"):
                inverse @ b
            assert not inverse.last_solve.converged.any()
    best = LSMRInverseLinearOperator(A, atol=1e-12, btol=1e-12) @ outside
    torch.testing.assert_close(best, torch.linalg.pinv(A, rtol=1e-8) @ outside)


@pytest.mark.parametrize("solver", KRYLOV)
@pytest.mark.parametrize("case", ["preconditioned", "started", "alternating"])
def test_no_column_is_called_converged_that_is_not(solver, case):
    """In float32, where the recurrences go on to shrink."""
    for seed in range(8):
        b = vectors(60, None, torch.float32, seed)
        options = {"rtol": 1e-5, "on_failure": "ignore"}
        if case == "preconditioned":
            A, b = (
                1e3 * positive(200, 1e6, torch.float32),
                vectors(200, None, b.dtype, seed),
            )
            options |= {"M": NystromPreconditioner(A, 0.1), "damping": 0.1}
        elif case == "started":
            A = positive(60, 10.0, torch.float32)
            b, options["x0"] = 1e-6 * b, vectors(60, None, torch.float32, seed + 9)
        else:
            A = (positive if solver == "CG" else indefinite)(30, 1e3, torch.float32)
            b = vectors(30, None, torch.float32, seed)
        inverse = KRYLOV[solver](A, maxiter=600, **options)
        x = inverse @ b
        # the residual as the operator's own products have it, rounding errors included
        own = (b - torch.add(A @ x, x, alpha=options.get("damping", 0.0))).norm().item()
        report = inverse.last_solve
        tolerance = report.tolerances[0]
        assert report.residual_norms[0] == pytest.approx(own, rel=0.05, abs=0.5 * tolerance)
        assert own <= 1.5 * tolerance or not report.converged[0]


def test_a_right_hand_side_in_the_null_space_is_no_negative_curvature():
    for seed in range(5):
        A = with_spectrum(
            torch.cat([torch.zeros(20), torch.logspace(-3, 0, 20)]), torch.float64, seed
        )
        null = torch.linalg.eigh(A)[1][:, :3]
        for b in (null, null[:, 0]):
            CGInverseLinearOperator(A, on_failure="ignore") @ b
            multishift_cg(A, b, [0.0, 1e-20], on_failure="ignore")
