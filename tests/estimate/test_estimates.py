"""Estimators: known answers, stopping, cost, what they print, bad input."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torchlinop import GGNLinearOperator, aslinearoperator, estimate, monitor
from torchlinop.estimate.probes import ProbeSource
from torchlinop.estimate.recurrence import Recurrence
from tqdm import tqdm

from tests.estimate.matrices import Counted, Failing, decaying, with_spectrum
from tests.problems import classification

METHODS = ["hutchinson", "hutch++", "xtrace", "xnystrace"]
#: what every estimator takes
ALL = {
    "trace": estimate.trace,
    **{
        method: (lambda A, method=method, **o: estimate.trace(A, method=method, **o))
        for method in METHODS[1:]
    },
    "diagonal": estimate.diagonal,
    "xdiag": lambda A, **o: estimate.diagonal(A, method="xdiag", **o),
    "frobenius": estimate.frobenius_norm,
    "function": lambda A, **o: estimate.function_trace(A, np.exp, **o),
    "logdet": lambda A, **o: estimate.logdet(A, damping=0.1, **o),
    "dimension": lambda A, **o: estimate.effective_dimension(A, damping=0.1, **o),
}


@pytest.mark.parametrize("name", ALL)
def test_counts_products_and_repeats_for_a_seed(name):
    A = Counted(decaying())
    first = ALL[name](A, num_matvecs=30, seed=3)
    assert first.num_matvecs == A.columns <= 30
    assert first.num_matvecs >= 24
    again, other = (ALL[name](A, num_matvecs=30, seed=seed) for seed in (3, 4))
    for one, two, same in ((first, again, True), (first, other, False)):
        equal = np.array_equal(np.asarray(one.value), np.asarray(two.value))
        assert equal is same
    assert first.seed == 3


@pytest.mark.parametrize("probes", ["rademacher", "gaussian", "sphere"])
def test_blocks_do_not_change_the_random_vectors(probes):
    A = Counted(decaying(61))
    whole = ProbeSource(A, probes, 7).rows(6)
    source = ProbeSource(A, probes, 7)
    assert torch.equal(whole, torch.cat([source.rows(1), source.rows(3), source.rows(2)]))
    if probes == "rademacher":
        assert (whole.abs() == 1).all()
        assert 0.3 < (whole > 0).double().mean() < 0.7
    if probes == "sphere":
        norms = torch.linalg.vector_norm(whole, dim=1)
        torch.testing.assert_close(norms, torch.full((6,), 61.0).double().sqrt())
    single = Counted(decaying(61, dtype=torch.float32))
    drawn = ProbeSource(single, probes, 7).rows(6)
    torch.testing.assert_close(drawn, whole.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS[1:])
def test_low_rank_is_exact(method, dtype):
    """Where the sketch holds the whole range there is nothing left to estimate."""
    values = torch.zeros(60, dtype=torch.float64)
    values[:5] = torch.arange(1, 6)
    found = estimate.trace(with_spectrum(values, dtype), method=method, num_matvecs=24)
    assert found.value == pytest.approx(15, rel=100 * torch.finfo(dtype).eps)


def test_methods_on_a_decaying_spectrum():
    """Squared errors of Hutch++ fall with the square of the products, Hutchinson's with
    their number (Meyer et al. 2021, theorem 1.1); the others are better still.
    """
    A = decaying(200, rate=1.5)
    truth = A.trace().item()

    def rms(method, products):
        errors = [
            estimate.trace(A, method=method, num_matvecs=products, seed=s).value - truth
            for s in range(40)
        ]
        return math.sqrt(np.mean(np.square(errors)))

    gain = {method: rms(method, 15) / rms(method, 120) for method in METHODS}
    assert 1.5 < gain["hutchinson"] < 5  # eight times the products: 2.8
    assert gain["hutch++"] > 8
    assert gain["xtrace"] > 8
    assert rms("hutch++", 120) < rms("hutchinson", 120) / 5
    assert rms("xtrace", 120) < rms("hutch++", 120)
    assert rms("xnystrace", 120) < rms("xtrace", 120)


@pytest.mark.parametrize("name", ALL)
def test_stops_at_the_relative_error(name):
    matrix = decaying(300, rate=0.5) + 0.5 * torch.eye(300)
    A = Counted(matrix)
    loose, tight = (ALL[name](A, rtol=rtol) for rtol in (0.2, 0.05))
    assert loose.num_matvecs + tight.num_matvecs == A.columns
    for found, rtol in ((loose, 0.2), (tight, 0.05)):
        error, value = (torch.as_tensor(x).norm() for x in (found.stderr, found.value))
        assert error <= rtol * value
    assert loose.num_matvecs <= tight.num_matvecs


def test_default_is_one_per_cent():
    found = estimate.trace(decaying(2000, rate=0.1))
    assert found.stderr < 0.01 * found.value
    assert found.num_matvecs < 2000


@pytest.mark.parametrize("name", ["trace", "xtrace", "diagonal", "xdiag", "frobenius"])
def test_exact_where_that_is_no_more_work(name):
    A = Counted(with_spectrum(torch.linspace(-1, 1, 20, dtype=torch.float64)))
    found = ALL[name](A, rtol=1e-6)
    assert found.method == "exact"
    error, value = torch.as_tensor(found.stderr), torch.as_tensor(found.value)
    assert error.max() == 0
    assert error.shape == value.shape
    assert "+- 0 (" in str(found)
    truth = {"frobenius": A.matrix.norm(), "trace": A.matrix.trace()}
    truth["xtrace"] = truth["trace"]
    torch.testing.assert_close(
        torch.as_tensor(found.value, dtype=torch.float64),
        truth.get(name, A.matrix.diagonal()),
        rtol=1e-12,
        atol=1e-13,
    )
    assert found.num_matvecs == A.columns <= 40


def test_xdiag_beats_hutchinson_on_a_decaying_spectrum():
    A = decaying(100, rate=2.0)
    errors = {
        method: torch.linalg.vector_norm(
            estimate.diagonal(A, method=method, num_matvecs=60).value - A.diagonal()
        )
        for method in ("hutchinson", "xdiag")
    }
    assert errors["xdiag"] < errors["hutchinson"] / 5


def test_closed_forms():
    values = torch.arange(1, 61).double() ** -1.0
    A = with_spectrum(values)
    exact = estimate.function_trace(A, np.sqrt, num_matvecs=600, num_steps=60)
    assert abs(exact.value - values.sqrt().sum().item()) < 3 * exact.stderr
    dimension = estimate.effective_dimension(A, damping=0.05, num_matvecs=2000)
    truth = (values / (values + 0.05)).sum().item()
    assert abs(dimension.value - truth) < 3 * dimension.stderr < 0.2 * truth
    norm = estimate.frobenius_norm(A, num_matvecs=50)
    assert abs(norm.value - values.norm().item()) < 3 * norm.stderr


@pytest.mark.parametrize("products", [100, 200])
def test_standard_errors_where_the_steps_are_too_few(products):
    """The quadratures have not settled: what is missing is more than the last change."""
    many = 10.0 ** -torch.linspace(0, 6, 400, dtype=torch.float64)
    half = torch.cat([torch.zeros(200), torch.linspace(0.01, 1, 200)]).double()
    options = {"num_matvecs": products}
    for seed in range(6):
        found = estimate.logdet(with_spectrum(many), damping=1e-7, seed=seed, **options)
        truth = (many + 1e-7).log().sum().item()
        assert abs(found.value - truth) < 2 * found.stderr < 2 * abs(truth)
        A = with_spectrum(half)
        found = estimate.effective_dimension(A, damping=1e-6, seed=seed, **options)
        truth = (half / (half + 1e-6)).sum().item()
        assert abs(found.value - truth) < 3 * found.stderr < math.inf


def test_bounds_by_quadrature():
    """Gauss' is above and Gauss-Radau's below, whatever the number of steps."""
    values = 10.0 ** -torch.linspace(0, 5, 80, dtype=torch.float64)
    A = with_spectrum(values)
    z = ProbeSource(aslinearoperator(A), "gaussian", 0).rows(3)
    U = torch.linalg.eigh(A)
    weights = ((z @ U.eigenvectors) ** 2).numpy() / z.square().sum(1, keepdim=True).numpy()
    for f in (lambda x: np.log(x + 1e-4), lambda x: x / (x + 1e-4)):
        truth = (weights * f(U.eigenvalues.numpy())).sum(axis=1)
        for steps in (1, 3, 10, 40):
            recurrence = Recurrence(aslinearoperator(A), z.clone())
            recurrence.advance(steps)
            low, high = (
                (q.weights * f(q.nodes)).sum(axis=1)
                for q in (recurrence.radau(0.0, -1e-4), recurrence.quadrature())
            )
            assert (low < truth).all()
            assert (truth < high).all()
        assert (high - low < 0.1 * np.abs(truth)).all()


def test_damping_far_below_what_the_steps_resolve():
    """Few steps say so in the standard error; without a limit there are more of them."""
    values = 10.0 ** -torch.linspace(0, 6, 150, dtype=torch.float64)
    A, damping = with_spectrum(values), 1e-5
    truth = (values / (values + damping)).sum().item()
    for seed in range(4):
        options = {"damping": damping, "seed": seed}
        few = estimate.effective_dimension(A, num_steps=8, num_matvecs=320, **options)
        assert abs(few.value - truth) < few.stderr
        assert few.stderr > 0.1 * truth
        found = estimate.effective_dimension(A, rtol=0.05, **options)
        assert abs(found.value - truth) < 3 * found.stderr <= 0.15 * found.value


def test_logdet_of_a_ggn():
    problem = classification(nn.CrossEntropyLoss())
    G = GGNLinearOperator(*problem.arguments)
    damped = G.to_dense() + 0.01 * torch.eye(G.shape[0])
    truth = torch.linalg.slogdet(damped).logabsdet.item()
    found = estimate.logdet(G, damping=0.01, rtol=0.02)
    assert abs(found.value - truth) < 3 * found.stderr
    assert found.stderr <= 0.02 * abs(truth) * 1.1


def test_prints():
    assert str(estimate.Estimate(0.5312, 0.0021, 120, "", 0)) == (
        "0.5312 +- 0.0021 (120 products)"
    )
    assert str(estimate.Estimate(1234567.0, 4.2e3, 9, "", 0)) == (
        "1234567 +- 4200 (9 products)"
    )
    assert str(estimate.Estimate(3.21e-9, 4.4e-11, 9, "", 0)) == (
        "3.210e-09 +- 4.4e-11 (9 products)"
    )
    assert str(estimate.Estimate(2.0, 0.0, 9, "exact", 0)) == "2 +- 0 (9 products)"
    vector = estimate.diagonal(torch.eye(9), num_matvecs=2)
    assert str(vector) == "vector of norm 3 +- 0 (2 products)"
    with pytest.raises(TypeError, match=r"a vector of shape \(9,\), no number"):
        float(vector)


@pytest.mark.parametrize("name", ALL)
def test_interrupt_keeps_what_there_is(name):
    A = Failing(decaying(300, rate=0.5), 40, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as caught:
        ALL[name](A, rtol=1e-3)
    assert isinstance(caught.value, estimate.Interrupted)
    kept = caught.value.result
    assert 0 < kept.num_matvecs <= A.columns
    assert torch.isfinite(torch.as_tensor(kept.value)).all()
    early = Failing(decaying(), 0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as caught:
        ALL[name](early)
    assert not isinstance(caught.value, estimate.Interrupted)


@pytest.mark.parametrize("name", ALL)
def test_bad_input(name):
    estimator, A = ALL[name], decaying()
    with pytest.raises(ValueError, match=r"rtol has to be between 0 and 1 .* got 1\.5"):
        estimator(A, rtol=1.5)
    for count in (0, 2.5, math.nan, math.inf, [3]):
        with pytest.raises(ValueError, match="num_matvecs has to be an integer of at"):
            estimator(A, num_matvecs=count)
    with pytest.raises(ValueError, match="probes has to be one of rademacher, gaussian"):
        estimator(A, probes="normal")
    with pytest.raises(TypeError, match=r"seed has to be an integer, got 1\.5"):
        estimator(A, seed=1.5)
    broken = A.clone()
    broken[0, 0] = torch.inf
    with pytest.raises(np.linalg.LinAlgError, match="NaN or infinite entries"):
        estimator(broken, num_matvecs=12)
    with pytest.raises(ValueError, match="the matrix has no entries"):
        estimator(torch.zeros(0, 0))
    if name != "frobenius":
        with pytest.raises(ValueError, match="is for square matrices, got 3 x 4"):
            estimator(torch.ones(3, 4))


@pytest.mark.parametrize("estimator", [estimate.logdet, estimate.effective_dimension])
def test_errors_name_the_function(estimator):
    with pytest.raises(ValueError, match=f"^{estimator.__name__} is for square matrices"):
        estimator(torch.ones(3, 4), damping=1.0)
    for damping in ("much", None, math.nan):
        with pytest.raises(ValueError, match="damping has to be a finite number >= 0"):
            estimator(decaying(), damping=damping)


@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e21, 1e30])
def test_sizes_beyond_the_range_of_squares(scale):
    """Of which nothing is known in float32: no answer is better than a wrong one."""
    A = (decaying() * scale).float()
    for estimator in (
        estimate.spectral_density,
        estimate.eigsh,
        estimate.frobenius_norm,
        lambda A: estimate.trace(A, method="xnystrace", num_matvecs=20),
    ):
        with pytest.raises(np.linalg.LinAlgError, match=r"beyond the range of .* \* A, or"):
            estimator(A)
    found = estimate.eigsh(A.double())
    assert found.eigenvalues[-1].item() == pytest.approx(scale, rel=1e-5)


def test_a_function_may_be_complex():
    A = decaying()
    found = estimate.function_trace(A, lambda x: np.exp(1j * x), rtol=0.02)
    truth = torch.linalg.eigvalsh(A).mul(1j).exp().sum().item()
    assert abs(found.value - truth) < 3 * found.stderr


def test_numbers_of_products_out_of_range():
    A = decaying()
    for method, least in (("hutch++", 3), ("xtrace", 2)):
        with pytest.raises(ValueError, match=f"at least {least} products, got num_matvecs"):
            estimate.trace(A, method=method, num_matvecs=least - 1)
    with pytest.raises(ValueError, match="num_matvecs=61 is more than the 60 products"):
        estimate.trace(A, num_matvecs=61)
    with pytest.raises(ValueError, match="num_matvecs=19 is not enough for two random"):
        estimate.function_trace(A, np.exp, num_matvecs=19, num_steps=10)
    single = estimate.trace(A, num_matvecs=1)
    assert single.stderr == math.inf
    assert torch.isinf(estimate.diagonal(A, num_matvecs=1).stderr).all()


def test_methods_that_do_not_fit():
    A = with_spectrum(torch.linspace(-1, 1, 40, dtype=torch.float64))
    with pytest.raises(ValueError, match="method has to be one of hutchinson, hutch"):
        estimate.trace(A, method="slq")
    with pytest.raises(ValueError, match="method has to be one of hutchinson, xdiag"):
        estimate.diagonal(A, method="xtrace")
    with pytest.raises(ValueError, match=r"the eigenvalue -\d"):
        estimate.trace(A, method="xnystrace", num_matvecs=20)
    with pytest.raises(ValueError, match=r"smallest Ritz value is -\d.*Take damping > \d"):
        estimate.logdet(A, damping=0.01)
    with pytest.raises(ValueError, match="damping has to be a finite number >= 0, got -1"):
        estimate.logdet(A, damping=-1)
    with pytest.raises(ValueError, match="without it the effective dimension is the rank"):
        estimate.effective_dimension(A, damping=0)
    with pytest.raises(ValueError, match="smallest Ritz value is -"):
        estimate.effective_dimension(A, damping=0.01)
    with pytest.raises(TypeError, match="f gets a NumPy array: pass np"):
        estimate.function_trace(A, torch.exp, num_matvecs=20)
    with pytest.raises(TypeError, match="f gets a NumPy array: pass np"):
        estimate.spectral_density(A).trace_of(torch.exp)
    with pytest.raises(ValueError, match="f has to map an array of Ritz values"):
        estimate.function_trace(A, lambda theta: theta[0], num_matvecs=20)


def test_progress_bar(capsys):
    estimate.trace(decaying(), num_matvecs=10, progress=True)
    assert "product" in capsys.readouterr().err
    estimate.trace(decaying(), num_matvecs=10)
    assert not capsys.readouterr().err


def test_no_thread_is_left(monkeypatch):
    """Of tqdm's own, which looks after bars that stand still."""
    monkeypatch.setattr(tqdm, "monitor", None)
    before = threading.active_count()
    for progress in (False, True):
        estimate.trace(decaying(), num_matvecs=10, progress=progress)
        with monitor(aslinearoperator(decaying()), progress=progress) as log:
            estimate.eigsh(aslinearoperator(decaying()), 1, progress=progress)
        assert not log.stopped
    assert threading.active_count() == before
    assert tqdm.monitor is None
