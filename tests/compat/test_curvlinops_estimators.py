"""Estimators and spectra by curvlinops' names and arguments."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from torchlinop.compat import curvlinops as ours
from torchlinop.compat.curvlinops import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
    hutchinson_diag,
    hutchinson_squared_fro,
    hutchinson_trace,
    hutchpp_trace,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
    xdiag,
    xtrace,
)

from tests.estimate.matrices import decaying, with_spectrum

NAMES = [
    "LanczosApproximateLogSpectrumCached",
    "LanczosApproximateSpectrumCached",
    "hutchinson_diag",
    "hutchinson_squared_fro",
    "hutchinson_trace",
    "hutchpp_trace",
    "lanczos_approximate_log_spectrum",
    "lanczos_approximate_spectrum",
    "xdiag",
    "xtrace",
]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_those_of_the_library(name):
    theirs = pytest.importorskip("curvlinops")

    def arguments(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters]

    assert arguments(getattr(ours, name)) == arguments(getattr(theirs, name))
    if inspect.isclass(getattr(ours, name)):
        method = "approximate_log_spectrum" if "Log" in name else "approximate_spectrum"
        mine, other = (getattr(getattr(lib, name), method) for lib in (ours, theirs))
        assert arguments(mine) == arguments(other)


A = decaying(40)


def test_traces_diagonals_and_norms():
    torch.manual_seed(0)
    for estimator, products in ((hutchinson_trace, 30), (hutchpp_trace, 30), (xtrace, 30)):
        for distribution in ("rademacher", "normal"):
            found = torch.stack([estimator(A, products, distribution) for _ in range(30)])
            assert found.dtype == torch.float64
            assert found.std() > 0  # every call draws anew
            assert abs(found.mean() - A.trace()) < 5 * found.std() / math.sqrt(30)
    for estimator in (hutchinson_diag, xdiag):
        found = torch.stack([estimator(A, 20) for _ in range(200)])
        error = (found.mean(dim=0) - A.diagonal()).abs()
        assert (error < 5 * found.std(dim=0) / math.sqrt(200)).all()
    wide = A[:25]
    found = torch.stack([hutchinson_squared_fro(wide, 10) for _ in range(50)])
    assert abs(found.mean() - wide.square().sum()) < 5 * found.std() / math.sqrt(50)


def test_torch_seed_repeats_them():
    first, second = [], []
    for numbers in (first, second):
        torch.manual_seed(3)
        numbers += [hutchinson_trace(A, 3).item(), xtrace(A, 4).item()]
        numbers += lanczos_approximate_spectrum(A, 10)[1].tolist()
    assert first == second


def test_numbers_that_the_library_refuses():
    with pytest.raises(ValueError, match=r"num_matvecs \(40\) has to be less than"):
        hutchinson_trace(A, 40)
    with pytest.raises(ValueError, match="has to be divisible by 3, got 10"):
        hutchpp_trace(A, 10)
    with pytest.raises(ValueError, match="has to be divisible by 2, got 9"):
        xdiag(A, 9)
    with pytest.raises(ValueError, match="'rademacher' or 'normal', got 'sphere'"):
        hutchinson_diag(A, 9, "sphere")


VALUES = torch.linspace(-1, 2, 300, dtype=torch.float64)


def test_spectrum():
    matrix = with_spectrum(VALUES)
    torch.manual_seed(0)
    grid, density = lanczos_approximate_spectrum(matrix, 40, num_points=500, num_repeats=10)
    assert grid.shape == density.shape == (500,)
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=0.03)
    inside = (grid > -0.5) & (grid < 1.5)
    assert density[inside].mean().item() == pytest.approx(1 / 3, rel=0.1)
    cached = LanczosApproximateSpectrumCached(matrix, 40, boundaries=(-1.0, None))
    one, two = (cached.approximate_spectrum(num_repeats=2, kappa=1.1) for _ in range(2))
    assert torch.equal(one[1], two[1])
    assert one[0][0].item() == pytest.approx(-1.15, abs=0.01)
    more = cached.approximate_spectrum(num_repeats=3, kappa=1.1)[1]
    assert not torch.equal(more, one[1])


def test_log_spectrum():
    sizes = 10.0 ** torch.linspace(-2, 1, 300, dtype=torch.float64)
    sizes[::2] *= -1
    matrix = with_spectrum(sizes)
    torch.manual_seed(0)
    grid, density = lanczos_approximate_log_spectrum(
        matrix, 100, num_points=800, num_repeats=5, epsilon=1e-4
    )
    # with respect to the size itself; the Gaussians are wide, and some lies outside
    assert 0.8 < torch.trapezoid(density, grid).item() < 1.02
    middle = (grid > 0.1) & (grid < 5)
    per_decade = density * grid * math.log(10)
    assert per_decade[middle].mean().item() == pytest.approx(1 / 3, rel=0.15)
    cached = LanczosApproximateLogSpectrumCached(matrix, 60, boundaries=(0.01, 10.0))
    grid, _ = cached.approximate_log_spectrum(margin=0.0, epsilon=0.0)
    np.testing.assert_allclose(grid[[0, -1]], [0.01, 10.0])


class Theirs:
    """What that library asks of an operator."""

    def __init__(self, matrix):
        self.matrix, self.shape = matrix, matrix.shape
        self.device, self.dtype = matrix.device, matrix.dtype

    def __matmul__(self, x):
        return self.matrix @ x

    def to_scipy(self):
        return self.matrix.numpy()


def test_close_to_the_library_itself():
    library = pytest.importorskip("curvlinops")
    matrix = with_spectrum(VALUES)
    torch.manual_seed(0)
    options = {"num_points": 200, "num_repeats": 40, "boundaries": (-1.0, 2.0)}
    grid, mine = lanczos_approximate_spectrum(matrix, 30, **options)
    their_grid, theirs = library.lanczos_approximate_spectrum(Theirs(matrix), 30, **options)
    torch.testing.assert_close(grid, their_grid)
    assert (mine - theirs).abs().max() < 0.3 * theirs.max()
    assert (mine - theirs).abs().mean() < 0.08 * theirs.max()
    positive = with_spectrum(10.0 ** torch.linspace(-2, 1, 300, dtype=torch.float64))
    options["boundaries"] = (0.01, 10.0)
    grid, mine = lanczos_approximate_log_spectrum(positive, 60, **options)
    their_grid, theirs = library.lanczos_approximate_log_spectrum(
        Theirs(positive), 60, **options
    )
    torch.testing.assert_close(grid, their_grid)
    assert (grid * (mine - theirs)).abs().max() < 0.2 * (grid * theirs).max()
