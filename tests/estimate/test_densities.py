"""Spectral densities against spectra that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from torch import nn
from torchlinop import GGNLinearOperator, HessianLinearOperator, estimate

from tests.estimate.matrices import Counted, Failing, decaying, with_spectrum
from tests.problems import classification

UNIFORM = torch.linspace(-0.5, 1, 400, dtype=torch.float64)
OUTLIERS = torch.cat([torch.linspace(0, 0.1, 380).double(), torch.arange(1, 21).double()])


def smoothed(values, x, sigma):
    """The density of known eigenvalues, in the same smoothing."""
    z = (x[:, None] - values.numpy()) / sigma
    return np.exp(-0.5 * z**2).mean(axis=1) / (sigma * np.sqrt(2 * np.pi))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("probes", ["rademacher", "gaussian", "sphere"])
def test_density_of_a_known_spectrum(dtype, probes):
    A = Counted(with_spectrum(UNIFORM, dtype))
    p = estimate.spectral_density(A, num_probes=20, num_steps=60, probes=probes)
    assert p.num_matvecs == A.columns == 1200
    assert p.nodes.shape == p.weights.shape == (20, 60)
    np.testing.assert_allclose(p.weights.sum(axis=1), 1, rtol=1e-6)
    x = p.grid(300)
    truth = smoothed(UNIFORM, x, 0.05)
    low, high = p.band(x, sigma=0.05, width=5)
    assert ((low <= truth + 1e-3) & (truth <= high + 1e-3)).all()
    assert np.abs(p.density(x, sigma=0.05) - truth).max() < 0.15
    assert trapezoid(p.density(x, sigma=0.02), x) == pytest.approx(1, abs=0.01)
    np.testing.assert_allclose(p.bounds, (-0.5, 1), atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_identity_with_rounding_errors(scale, dtype):
    """After one step only rounding is left, which is not orthogonal to anything."""
    A = with_spectrum(torch.full((200,), scale), dtype)
    p = estimate.spectral_density(A, num_probes=5, num_steps=20)
    np.testing.assert_allclose(p.bounds, (scale, scale), atol=1e-5)
    low, high = p.count_above(scale - 0.1), p.count_above(scale + 0.1)
    assert low.value == pytest.approx(200)
    assert high.value == pytest.approx(0)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 7.0])
def test_a_single_point(scale):
    p = estimate.spectral_density(with_spectrum(torch.full((50,), scale)))
    x = p.grid()
    assert x[0] < scale < x[-1]
    assert trapezoid(p.density(x), x) == pytest.approx(1, abs=1e-3)


def test_quadrature_is_exact_for_polynomials():
    """Of degree up to twice the steps less one, for each vector."""
    A = with_spectrum(UNIFORM)
    p = estimate.spectral_density(A, num_probes=3, num_steps=4, seed=9)
    from torchlinop import aslinearoperator
    from torchlinop.estimate.probes import ProbeSource

    rows = ProbeSource(aslinearoperator(A), "rademacher", 9).rows(3)
    powers, moments = rows, []
    for _ in range(8):
        moments.append((rows * powers).sum(dim=1).numpy() / 400)
        powers = powers @ A
    for degree, moment in enumerate(moments):
        np.testing.assert_allclose((p.weights * p.nodes**degree).sum(1), moment, atol=1e-12)


def test_log_density_over_many_decades():
    values = 10.0 ** torch.linspace(-2, 2, 300, dtype=torch.float64)
    values[:60] *= -1  # the small ones, below 10^-1.2
    p = estimate.spectral_density(with_spectrum(values), num_probes=20, num_steps=250)
    x = np.geomspace(1e-6, 1e4, 1200)
    positive, negative = p.log_density(x), p.log_density(x, sign=-1)
    assert trapezoid(positive, np.log10(x)) == pytest.approx(0.8, abs=0.06)
    assert trapezoid(negative, np.log10(x)) == pytest.approx(0.2, abs=0.06)
    middle = (x > 0.2) & (x < 50)
    assert positive[middle].mean() == pytest.approx(1 / 4, rel=0.1)
    assert negative[middle].max() < 0.01
    low, high = p.log_band(x)
    assert ((low <= positive) & (positive <= high)).all()
    assert p.log_grid()[0] < p.floor < p.log_grid()[-1]
    zero = estimate.spectral_density(torch.zeros(5, 5))
    assert np.isfinite(zero.log_density(zero.log_grid())).all()
    assert np.isfinite(zero.density(zero.grid())).all()


def test_counts_and_traces():
    p = estimate.spectral_density(with_spectrum(OUTLIERS), num_probes=20, num_steps=60)
    for threshold, count in ((0.5, 20), (10.5, 10), (-1, 400), (30, 0)):
        found = p.count_above(threshold)
        assert abs(found.value - count) <= 3 * found.stderr + 1e-6
    trace = p.trace_of(lambda theta: theta)
    assert abs(trace.value - OUTLIERS.sum().item()) < 3 * trace.stderr
    assert "400 eigenvalues in [" in str(p)


def test_invariant_subspaces_end_early():
    p = estimate.spectral_density(torch.eye(40), num_probes=2, num_steps=30)
    np.testing.assert_allclose(p.nodes, 1, rtol=1e-6)
    np.testing.assert_allclose(p.weights[:, 0], 1)
    assert p.count_above(0.5).value == pytest.approx(40)
    three = with_spectrum(torch.tensor([1.0, 2.0, 3.0]).repeat(20))
    p = estimate.spectral_density(three, num_probes=3, num_steps=50)
    np.testing.assert_allclose(np.unique(p.nodes[p.weights > 1e-9].round(6)), [1, 2, 3])
    assert p.bounds == pytest.approx((1, 3))


def test_nothing_is_lost_to_copies_of_converged_eigenvalues():
    """Without orthogonalization outliers appear again and again, with one weight in all."""
    p = estimate.spectral_density(with_spectrum(OUTLIERS, torch.float32), num_steps=200)
    assert (p.nodes[0] > 19.9).sum() > 1
    exact = estimate.spectral_density(with_spectrum(OUTLIERS), num_steps=60)
    np.testing.assert_allclose(
        p.count_above(19.5).value, exact.count_above(19.5).value, rtol=1e-3
    )


def test_outliers_of_the_digits():
    """Nine outliers for ten classes: one for each difference of two logits."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    X, y = torch.tensor(images / 16)[:500], torch.tensor(labels)[:500]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=18)

    def closure():
        optimizer.zero_grad()
        value = loss(model(X), y)
        value.backward()
        return value

    optimizer.step(closure)
    G = GGNLinearOperator(model, loss, model.parameters(), [(X, y)])
    p = estimate.spectral_density(G, num_probes=6, num_steps=60)
    dense = torch.linalg.eigvalsh(G.to_dense()).numpy()
    for threshold in (1.3 * dense[-10], 0.5 * (dense[-5] + dense[-6])):
        count = p.count_above(threshold)
        assert abs(count.value - (dense > threshold).sum()) < 3 * count.stderr + 0.5


def test_layers():
    problem = classification(nn.CrossEntropyLoss())
    H = HessianLinearOperator(*problem.arguments)
    dense = H.to_dense()
    found = estimate.layer_densities(H, num_steps=1000, num_probes=3)
    start = 0
    assert sum(p.dim for p in found.values()) == H.shape[0]
    for p in found.values():
        block = dense[start : start + p.dim, start : start + p.dim]
        start += p.dim
        values = torch.linalg.eigvalsh(block)
        assert p.bounds == pytest.approx((values[0].item(), values[-1].item()), abs=1e-6)
    names = list(H.space.names)
    groups = {"odd": names[1::2], "first": names[:1]}
    chosen = estimate.layer_densities(H, groups=groups, num_probes=1, num_steps=1000)
    sizes = dict(zip(names, H.space.sizes, strict=True))
    assert chosen["odd"].dim == sum(sizes[name] for name in names[1::2])
    shifted = estimate.layer_densities(2 * H, space=H.space, num_probes=1)
    assert list(shifted) == list(found)
    with pytest.raises(TypeError, match=r"has no parameter space\. Pass space="):
        estimate.layer_densities(2 * H)
    with pytest.raises(KeyError, match="are no parameters"):
        estimate.layer_densities(H, groups={"a": ["nothing"]})
    with pytest.raises(TypeError, match=r"a list of parameters.* Write \['0\.weight'\]"):
        estimate.layer_densities(H, groups={"w": "0.weight"})
    with pytest.raises(ValueError, match="entries, the operator 60 rows"):
        estimate.layer_densities(decaying(), space=H.space)


class Attention(nn.Module):
    """Whose keys' bias changes nothing: each query's scores are shifted by the same."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return (torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)).mean(1)


def test_a_layer_that_is_zero_but_for_rounding():
    torch.manual_seed(0)
    model = Attention()
    data = [(torch.randn(8, 5, 6), torch.randint(6, (8,)))]
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)
    found = estimate.layer_densities(H, groups={"keys": ["k.bias"]})
    assert max(np.abs(found["keys"].bounds)) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "skew"),
    [(torch.float32, 1.0), (torch.float64, 0.01), (torch.float64, 1.0), (torch.cdouble, 1)],
)
def test_matrices_that_are_not_symmetric(dtype, skew):
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(300, 300, generator=generator, dtype=dtype)
    A = with_spectrum(UNIFORM[:300] + 1, dtype) + skew * (part - part.mH) / 34
    for count in (2, 10):
        with pytest.raises(ValueError, match=r"not symmetric.* take \(A \+ A\.H\) / 2"):
            estimate.spectral_density(A, num_probes=count, num_steps=10)
    for estimator in (
        lambda A: estimate.logdet(A, damping=10.0),
        lambda A: estimate.effective_dimension(A, damping=10.0),
        lambda A: estimate.function_trace(A, np.exp),
    ):
        with pytest.raises(ValueError, match="not symmetric"):
            estimator(A)
    if skew == 1:
        with pytest.raises(ValueError, match="not symmetric"):
            estimate.spectral_density(A, num_probes=1, num_steps=10)


def test_interrupt_and_bad_input():
    A = Failing(decaying(), 30, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as caught:
        estimate.spectral_density(A, num_probes=5, num_steps=20)
    assert caught.value.result.nodes.shape == (5, 6)
    assert caught.value.result.num_matvecs == 30
    with pytest.raises(ValueError, match="num_probes has to be an integer of at least 1"):
        estimate.spectral_density(decaying(), num_probes=0)
    with pytest.raises(ValueError, match="spectral_density is for square matrices"):
        estimate.spectral_density(torch.ones(2, 3))
    broken = decaying()
    broken[0, 0] = torch.nan
    with pytest.raises(np.linalg.LinAlgError, match="NaN or infinite entries"):
        estimate.spectral_density(broken)
    p = estimate.spectral_density(decaying(), num_probes=1, num_steps=9)
    assert np.isinf(p.band(p.grid())[1]).all()
    with pytest.raises(ValueError, match="sign has to be 1 or -1"):
        p.log_density([1.0], sign=0)
    with pytest.raises(ValueError, match="x and sigma have to be positive"):
        p.log_density([-1.0])
    with pytest.raises(ValueError, match="sigma has to be positive"):
        p.density([1.0], sigma=0)
