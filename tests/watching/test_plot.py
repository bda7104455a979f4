"""Pictures: what is drawn, where, and in which colours."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.sparse.linalg as spla
import torch
import torchlinop
from scipy.integrate import trapezoid
from torchlinop import HessianLinearOperator, RunLog, estimate, monitor, plot

from tests.problems import classification
from tests.watching.matrices import with_spectrum

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

SPECTRUM = np.sort(np.r_[10.0, np.linspace(-1, 1, 99) ** 3])


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def A():
    return with_spectrum(SPECTRUM)[0]


@pytest.fixture(scope="module")
def density(A):
    return estimate.spectral_density(A, num_steps=50)


@pytest.fixture(scope="module")
def log(A):
    with monitor(A, max_products=30) as log:
        spla.eigsh(A, k=5, which="LA", v0=np.ones(100), tol=1e-14)
    return log


def pictures(A, density, log):
    """One call for each function that draws into Axes."""
    return {
        "eigenvalues": lambda ax: plot.eigenvalues(SPECTRUM, ax=ax),
        "density": lambda ax: plot.density(density, ax=ax),
        "log_density": lambda ax: plot.log_density(density, ax=ax),
        "matrix": lambda ax: plot.matrix(A, ax=ax),
        "convergence": lambda ax: plot.convergence(log, ax=ax),
        "layers": lambda ax: plot.layers({"a": density, "b": density}, ax=ax),
        "sharpness": lambda ax: plot.sharpness(SPECTRUM, learning_rate=0.1, ax=ax),
    }


@pytest.mark.parametrize("style", ["default", "dark_background", "grayscale"])
@pytest.mark.parametrize("name", sorted(set(plot.__all__) - {"overview"}))
def test_each_draws_where_it_is_told(A, density, log, name, style):
    with plt.style.context(style):
        draw = pictures(A, density, log)[name]
        figure, ax = plt.subplots()
        assert draw(ax) is ax
        assert ax.has_data()
        figure.canvas.draw()
        assert plt.get_fignums() == [figure.number]
        assert draw(None) is not ax
        assert len(plt.get_fignums()) == 2
        # nothing is drawn in the colour of the page
        page = matplotlib.colors.to_rgb(ax.get_facecolor())
        for line in ax.lines:
            ink = matplotlib.colors.to_rgb(line.get_color())
            assert name == "matrix" or np.abs(np.subtract(page, ink)).max() > 0.2


def test_eigenvalues_with_signs():
    ax = plot.eigenvalues(torch.tensor([0.5, -3.0, 2.0, 1e-14, 0.0]), label="H")
    positive, negative = ax.lines
    np.testing.assert_allclose(positive.get_ydata(), [2, 0.5])
    np.testing.assert_allclose(negative.get_ydata(), [3])
    assert negative.get_linestyle() != positive.get_linestyle()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["H", "H, negative"]


def test_one_eigenvalue_among_many_is_in_the_picture(density):
    ax = plot.density(density)
    (line,) = ax.lines
    x, y = line.get_data()
    assert trapezoid(y, x) == pytest.approx(1, rel=0.01)
    assert y[np.abs(x - 10).argmin()] > 2 * ax.get_ylim()[0]
    assert y[np.abs(x - 5).argmin()] < ax.get_ylim()[0]
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() <= y.min()
    assert heights.max() >= y.max()


def test_log_density_of_both_signs(density):
    ax = plot.log_density(density, label="A")
    up, down = ax.lines
    decades = np.log10(up.get_xdata())
    shares = [trapezoid(line.get_ydata(), decades) for line in (up, down)]
    np.testing.assert_allclose(shares, [0.5, 0.5], atol=0.06)
    assert ax.get_xlim()[1] > 10
    positive = estimate.spectral_density(torch.diag(torch.tensor([1.0, 2.0])))
    assert len(plot.log_density(positive).lines) == 1


def test_matrix():
    p = classification()
    H = HessianLinearOperator(*p.arguments)
    ax = plot.matrix(H, decades=3, blocks=H.space.sizes)
    drawn = ax.images[0].get_array()
    dense = np.abs(H.to_dense().numpy())
    expected = np.clip(np.log10(dense / dense.max()), -3, 0)
    np.testing.assert_allclose(drawn, expected, atol=1e-6)
    assert len(ax.lines) == 2 * (len(H.space.sizes) - 1)
    plot.matrix(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="blocks add up to 5"):
        plot.matrix(H, blocks=[2, 3])
    with pytest.raises(ValueError, match="up to 20000 rows"):
        plot.matrix(np.zeros((0, 3)))


def test_convergence_of_a_run_and_of_its_file(A, log, tmp_path):
    ax = plot.convergence(log, k=3, which="LA")
    assert len(ax.lines) == 3
    assert ax.get_title() == "stopped by max_products"
    curve = log.convergence(3, which="LA")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), curve.residual_norms[:, 2])
    assert ax.get_legend().get_texts()[0].get_text() == "10"
    log.save(tmp_path / "run.json", k=3, which="LA")
    again = plot.convergence(RunLog.load(tmp_path / "run.json"))
    np.testing.assert_array_equal(again.lines[0].get_ydata(), ax.lines[0].get_ydata())
    b = np.ones(100)
    with monitor(A) as solve:
        spla.minres(A, b, maxiter=20)
    (line,) = plot.convergence(solve, b=b).lines
    assert (np.diff(line.get_ydata()) <= 0).all()


def test_layers(density):
    ax = plot.layers({"first": density, "second": density})
    assert [t.get_text() for t in ax.get_yticklabels()] == ["first", "second"]
    first, *_ = ax.lines
    assert first.get_ydata().min() >= 0
    assert first.get_ydata().max() < 1
    with pytest.raises(ValueError, match="no layers"):
        plot.layers({})


def test_sharpness_and_the_edge():
    values = np.stack([np.arange(5.0), np.arange(5.0) + 1], axis=1)
    rates = np.array([0.1, 0.1, 0.2, 0.2, 0.2])
    ax = plot.sharpness(values, steps=range(10, 15), learning_rate=rates)
    largest, second, edge = ax.lines
    np.testing.assert_array_equal(largest.get_ydata(), values[:, 1])
    np.testing.assert_array_equal(second.get_ydata(), values[:, 0])
    np.testing.assert_allclose(edge.get_ydata(), 2 / rates)
    np.testing.assert_array_equal(edge.get_xdata(), np.arange(10, 15))
    tracker = estimate.Tracker(torch.diag(torch.tensor([3.0, 1.0, 2.0])), k=2)
    tracker.update()
    tracker.update()
    largest, second = plot.sharpness(tracker).lines
    np.testing.assert_allclose(largest.get_ydata(), [3, 3], rtol=1e-5)
    np.testing.assert_allclose(second.get_ydata(), [2, 2], rtol=1e-5)
    with pytest.raises(ValueError, match="There are 5 values and steps"):
        plot.sharpness(values, steps=[1])
    with pytest.raises(ValueError, match="have to have shape"):
        plot.sharpness(np.zeros(0))


def test_overview(A):
    axes = plot.overview(A)
    assert axes.shape == (2, 2)
    text = axes[1, 1].texts[0].get_text()
    assert "effective rank" in text
    figure = plt.figure()
    found = torchlinop.summary(A, num_matvecs=300)
    axes = plot.overview(found, figure=figure)
    assert all(ax.figure is figure for ax in axes.flat)
    figure.canvas.draw()
    page, box = figure.bbox, axes[1, 1].texts[0].get_window_extent()
    assert box.x1 < page.x1
    assert box.y0 > page.y0


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'torchlinop\[plot\]'"):
        plot.eigenvalues(SPECTRUM)


def test_nothing_to_draw():
    for nothing in ([], [np.nan]):
        with pytest.raises(ValueError, match="no eigenvalues to draw"):
            plot.eigenvalues(np.array(nothing))


def test_what_is_no_density_and_no_log(A):
    for draw in (plot.density, plot.log_density, lambda A: plot.layers({"all": A})):
        with pytest.raises(TypeError, match=r"a SpectralDensity, which .* got Symmetric"):
            draw(A)
    with pytest.raises(TypeError, match=r"a RunLog, which .* got int"):
        plot.convergence(1)


def test_several_curves_are_told_apart_without_colour():
    spectrum = estimate.spectral_density(np.diag(np.arange(40.0)), num_steps=10)
    ax = plot.density(spectrum, label="one")
    plot.density(spectrum, ax=ax, label="two")
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()
    ax = plot.eigenvalues(np.arange(1.0, 9), label="one")
    plot.eigenvalues(np.arange(1.0, 9), ax=ax, label="two")
    assert ax.lines[0].get_marker() != ax.lines[1].get_marker()


def test_what_cannot_be_drawn():
    spectrum = estimate.spectral_density(np.eye(9))
    with pytest.raises(TypeError, match=r"a Mapping, which estimate.layer_densities\(A\)"):
        plot.layers(spectrum)
    with pytest.raises(ValueError, match="Eigenvalues have to be real"):
        plot.eigenvalues(np.array([1 + 2j]))
    for constant in (np.zeros((9, 9)), np.eye(9)):
        ax = plot.density(estimate.spectral_density(constant))
        ax.figure.canvas.draw()
        low, high = ax.get_ylim()
        assert low < max(ax.lines[0].get_ydata()) < high
