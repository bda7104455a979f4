"""The page for those who come from curvlinops: each row is true."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchlinop
from torch import nn
from torchlinop.compat import curvlinops as ours
from torchlinop.compat.curvlinops.examples.functorch import (
    functorch_empirical_fisher,
    functorch_hessian,
)

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
NAMES, DIFFERENCES = (
    [[cell.strip() for cell in line.strip("|").split(" |")] for line in table.splitlines()]
    for table in re.findall(r"\| --- \| --- \| --- \|\n((?:\|.*\n)+)", PAGE)
)
STATUS = {row[0].strip("` "): row[1] for row in NAMES}
ROOM = "torchlinop.compat.curvlinops"


def _problem(reduction="mean"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    data = [(torch.rand(n, 3).double(), torch.randint(2, (n,))) for n in (3, 2)]
    return model, nn.CrossEntropyLoss(reduction=reduction), list(model.parameters()), data


def _exists(name):
    parts = name.split(".")
    try:
        found = importlib.import_module(ROOM)
        for i, part in enumerate(parts):
            if not hasattr(found, part):
                found = importlib.import_module(".".join([ROOM, *parts[: i + 1]]))
            else:
                found = getattr(found, part)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("name", list(STATUS))
def test_names(name):
    assert STATUS[name] in ("works", "works differently", "not offered")
    assert _exists(name) == (STATUS[name] != "not offered")


def test_all_names_are_in_the_table():
    assert len(STATUS) == len(NAMES)
    there = {name for name, status in STATUS.items() if status != "not offered"}
    assert {name for name in there if "." not in name} == set(ours.__all__)
    for module in ("examples", "examples.functorch"):
        names = importlib.import_module(f"{ROOM}.{module}").__all__
        assert {f"{module}.{name}" for name in names} <= there


def test_all_names_of_the_release_are_in_the_table():
    library = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    assert set(library.__all__) <= set(STATUS)


def test_every_difference_of_a_name_has_its_reason():
    for name, status, reason in NAMES:
        assert status == "works" or reason.endswith("."), name


# ------------------------------------------- names that work differently, how they do


def labels_of_a_seed():
    """The same for every way to cut the data."""
    model, loss, params, data = _problem()
    joined = [tuple(torch.cat(part) for part in zip(*data, strict=True))]
    A, B = (ours.FisherMCLinearOperator(model, loss, params, d) for d in (data, joined))
    torch.testing.assert_close(A.to_dense(), B.to_dense())


def transposed_jacobian():
    model, _, params, data = _problem()
    T = ours.TransposedJacobianLinearOperator(model, params, data)
    assert isinstance(T.T, ours.JacobianLinearOperator)


def cg_tolerance():
    A = torch.diag(torch.linspace(1, 1e4, 60)).double()
    b = torch.ones(60, 3).double()
    inverse = ours.CGInverseLinearOperator(torchlinop.aslinearoperator(A))
    residual = A @ (inverse @ b) - b
    assert (residual.norm(dim=0) < 1e-9 * b.norm(dim=0)).all()
    with pytest.raises(ValueError, match="n_tridiag has to be 0"):
        ours.CGInverseLinearOperator(inverse, n_tridiag=1)


def diverging_series():
    A = torchlinop.aslinearoperator(torch.diag(torch.tensor([1.0, 3.0]).double()))
    series = ours.NeumannInverseLinearOperator(A, num_terms=10, check_nan=False)
    with pytest.raises(np.linalg.LinAlgError):
        series @ torch.ones(2).double()


def inverse_of_ekfac():
    E = ours.EKFACLinearOperator(*_problem(), fisher_type="type-2")
    found = ours.KFACInverseLinearOperator(E, damping=0.1)
    exact = E.to_dense() + 0.1 * torch.eye(E.shape[0])
    torch.testing.assert_close(found.to_dense(), torch.linalg.inv(exact))


def blocks_stay():
    B = ours.BlockDiagonalLinearOperator([torch.eye(2), torch.eye(1)])
    assert isinstance(B.blocks, tuple)
    assert len(B.blocks) == 2


def ends_of_spectra():
    values = torch.linspace(-1, 2, 100, dtype=torch.float64)
    A = torch.diag(values)
    for name in ("spectrum", "log_spectrum"):
        grid, _ = getattr(ours, f"lanczos_approximate_{name}")(A, 60, margin=0.0)
        assert grid[-1].item() == pytest.approx(2, abs=0.05)
    calls = []

    class Counted(torchlinop.TorchLinearOperator):
        def _apply(self, x):
            calls.append(x.shape[1])
            return A @ x

        def _adjoint(self):
            return self

    counted = Counted(A.shape, A.dtype, A.device)
    ours.LanczosApproximateSpectrumCached(counted, 20)
    ours.LanczosApproximateLogSpectrumCached(counted, 20)
    assert sum(calls) == 40


def weighted_empirical_fisher():
    model, _, params, data = _problem()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 3.0]).double())
    X, y = (torch.cat(part) for part in zip(*data, strict=True))
    total = 0.0
    for x, label in zip(X, y, strict=True):
        summed = nn.functional.cross_entropy(
            model(x[None]), label[None], weight=loss.weight, reduction="sum"
        )
        g = nn.utils.parameters_to_vector(torch.autograd.grad(summed, params))
        total = total + torch.outer(g, g)
    expected = total / loss.weight[y].sum()
    torch.testing.assert_close(
        functorch_empirical_fisher(model, loss, params, data), expected
    )


OF_NAMES = {
    "FisherMCLinearOperator": labels_of_a_seed,
    "TransposedJacobianLinearOperator": transposed_jacobian,
    "CGInverseLinearOperator": cg_tolerance,
    "NeumannInverseLinearOperator": diverging_series,
    "KFACInverseLinearOperator": inverse_of_ekfac,
    "BlockDiagonalLinearOperator": blocks_stay,
    "lanczos_approximate_spectrum": ends_of_spectra,
    "lanczos_approximate_log_spectrum": ends_of_spectra,
    "LanczosApproximateSpectrumCached": ends_of_spectra,
    "LanczosApproximateLogSpectrumCached": ends_of_spectra,
    "examples.functorch.functorch_empirical_fisher": weighted_empirical_fisher,
}


# ------------------------------------------------------- what is different on purpose


def numpy_dtype():
    H = ours.HessianLinearOperator(*_problem())
    assert H.dtype == np.dtype(float)
    assert H.torch_dtype is torch.float64


def scipy_dtype():
    model, loss, params, data = _problem()
    model.float()
    data = [(X.float(), y) for X, y in data]
    H = ours.HessianLinearOperator(model, loss, params, data)
    assert H.to_scipy() is H
    assert H.dtype == np.float32
    assert (H.to_scipy(dtype=float) @ np.ones(14)).dtype == np.float64


def numpy_arrays():
    H = ours.HessianLinearOperator(*_problem())
    assert type(H @ np.ones(14)) is np.ndarray


def weighted_mean():
    model, _, params, data = _problem()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 3.0]).double())
    H = ours.HessianLinearOperator(model, loss, params, data)
    dense = functorch_hessian(model, loss, params, data)
    torch.testing.assert_close(H.to_dense(), dense)


def test_weighted_mean_there():
    library = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    model, _, params, data = _problem()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 3.0]).double())
    H = library.HessianLinearOperator(model, loss, params, data) @ torch.eye(14).double()
    dense = functorch_hessian(model, loss, params, data)
    assert (H - dense).norm() / dense.norm() == pytest.approx(0.06, abs=0.005)


def read_once():
    model, loss, params, data = _problem()
    with pytest.raises(TypeError, match="can be read only once"):
        ours.HessianLinearOperator(model, loss, params, (batch for batch in data))


def unknown_name():
    model, loss, params, data = _problem()
    with pytest.raises(KeyError, match=r"'weight' is not a parameter.*0\.weight"):
        ours.HessianLinearOperator(model, loss, {"weight": params[0]}, data)


def random_model():
    model, loss, params, data = _problem()
    model.append(nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"random because of 3 \(Dropout\)"):
        ours.HessianLinearOperator(model, loss, params, data)


def after_a_step():
    model, loss, params, data = _problem()
    options = {"fisher_type": "type-2"}
    K = ours.KFACLinearOperator(model, loss, params, data, **options)
    before = K.to_dense()
    with torch.no_grad():
        params[0].add_(1.0)
    anew = ours.KFACLinearOperator(model, loss, params, data, **options)
    torch.testing.assert_close(K.to_dense(), anew.to_dense())
    assert (K.to_dense() - before).norm() > 0.01 * before.norm()


def wrong_number():
    with pytest.raises(ValueError, match="num_data=6, but the data holds 5"):
        ours.EFLinearOperator(*_problem(), num_data=6)


def outside():
    A = torch.arange(9.0).reshape(3, 3)
    with pytest.raises(IndexError, match="rows holds 3"):
        ours.SubmatrixLinearOperator(A, [3], [0])
    assert ours.SubmatrixLinearOperator(A, [-1], [0]).to_dense().item() == 6


def methods():
    K = ours.KFACLinearOperator(*_problem())
    for name in ("trace", "det", "logdet", "frobenius_norm"):
        assert getattr(K, name)().ndim == 0


def counted_products():
    H = ours.HessianLinearOperator(*_problem())
    with torchlinop.monitor(H) as log:
        for _ in range(3):
            H @ np.ones(14)
    assert log.num_products == 3


def products_are_kept():
    """What is recorded with the first product serves the others: no more passes."""
    model, loss, params, data = _problem()
    passes = []

    class Data(list):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    H = ours.HessianLinearOperator(model, loss, params, Data(data))
    for _ in range(4):
        H @ np.ones(14)
    count = len(passes)
    H @ np.ones(14)
    assert len(passes) == count


def by_name_only():
    for name in ("Hessian", "GGN", "EF"):
        with pytest.raises(TypeError, match="positional arguments"):
            getattr(ours, f"{name}LinearOperator")(*_problem(), False, True, 5, None)


OF_ROWS = {
    "`block_sizes` or `batch_size_fn` in the eighth or ninth place": by_name_only,
    "`A.dtype` is a torch dtype": numpy_dtype,
    "`A.to_scipy()` is float64 for a float32 model": scipy_dtype,
    "A NumPy array is an error": numpy_arrays,
    "A weighted loss over several batches is scaled by their sizes": weighted_mean,
    "Data that can be read once (a generator) gives zeros": read_once,
    "A name that the model lacks gives zeros": unknown_name,
    "Random or changing data is a `RuntimeError`": random_model,
    "A stale matrix after an optimizer step (KFAC)": after_a_step,
    "`num_data` scales the matrix": wrong_number,
    "An index of a submatrix that is out of bounds is a `ValueError`": outside,
    "`K.trace`, `K.det`, `K.logdet` are properties (3.0)": methods,
    "`progressbar=True` shows every pass over the data, in every product": counted_products,
    "`torch.compile` makes products faster": products_are_kept,
}


def test_every_difference_is_checked():
    differently = {n for n, status in STATUS.items() if status == "works differently"}
    assert differently == set(OF_NAMES)
    assert {row[0].removeprefix("| ") for row in DIFFERENCES} == set(OF_ROWS)


@pytest.mark.parametrize("name", list(OF_NAMES))
def test_names_that_work_differently(name):
    OF_NAMES[name]()


@pytest.mark.parametrize("row", list(OF_ROWS))
def test_differences(row):
    OF_ROWS[row]()


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_snippets(snippet):
    model, loss, params, data = arguments = _problem()
    scope = {"model": model, "loss_function": loss, "params": params, "data": data}
    scope |= {"arguments": arguments, "gradient": torch.ones(14).double()}
    exec(snippet, scope)
    if "steps" in scope:
        step, gradient = scope["steps"], torchlinop.gradient_and_loss(*arguments)[0]
        for a, b in zip(scope["damped"] @ step, gradient, strict=True):
            torch.testing.assert_close(a, b)
    elif "largest" in scope:
        assert scope["H"].shape == (6, 6)
        assert scope["largest"] > 0
    else:
        assert scope["step"].keys() == dict(model.named_parameters()).keys()


def test_torch_save(tmp_path):
    """What its main branch has instead of state_dict, and what is here."""
    arguments = _problem()
    K = ours.KFACLinearOperator(*arguments, fisher_type="type-2")
    torch.save(K, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    torch.testing.assert_close(again.to_dense(), K.to_dense())
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    K.save(tmp_path / "matrix")
    again = ours.KFACLinearOperator.load(tmp_path / "matrix", params=arguments[2])
    torch.testing.assert_close(again.to_dense(), K.to_dense())
    assert [t.shape for t in again @ arguments[2]] == [p.shape for p in arguments[2]]
    with pytest.raises(ValueError, match="was read from a file"):
        again.gradient_and_loss()
