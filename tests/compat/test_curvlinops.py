"""Programs written for curvlinops, with the import lines changed."""

from __future__ import annotations

import copy
import importlib

import numpy as np
import pytest
import torch
import torchlinop
from torch import nn
from torch.nn.utils import parameters_to_vector
from torchlinop.compat.curvlinops import (
    CGInverseLinearOperator,
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    LSMRInverseLinearOperator,
    NeumannInverseLinearOperator,
    TransposedJacobianLinearOperator,
)
from torchlinop.compat.curvlinops.examples import IdentityLinearOperator, gradient_and_loss
from torchlinop.compat.curvlinops.examples.functorch import (
    functorch_empirical_fisher,
    functorch_ggn,
    functorch_gradient_and_loss,
    functorch_hessian,
    functorch_jacobian,
)
from torchlinop.compat.curvlinops.utils import allclose_report

from tests.problems import binary, classification, regression

CLOSE = {"rtol": 1e-11, "atol": 1e-13}


# matplotlib reads a tensor by an __array__ that torch has not brought up to date
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
def test_monte_carlo_fisher_session(tmp_path):
    """The calls of a comparison of the GGN with sampled Fisher matrices, and its plots."""
    torch.manual_seed(0)
    data = [(torch.rand(n, 7), torch.randint(low=0, high=3, size=(n,))) for n in (4, 6)]
    model = nn.Sequential(
        nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 3)
    )
    params = [p for p in model.parameters() if p.requires_grad]
    arguments = (model, nn.CrossEntropyLoss(reduction="mean"), params, data)
    GGN = GGNLinearOperator(*arguments)
    size = GGN.shape[0]
    identity = torch.eye(size)
    ggn = GGN @ identity
    assert type(ggn) is torch.Tensor

    def distance(fisher):
        return torch.linalg.matrix_norm(ggn - fisher).item()

    one = FisherMCLinearOperator(*arguments) @ identity
    torch.rand(123)
    again = FisherMCLinearOperator(*arguments) @ identity
    torch.testing.assert_close(again, one, rtol=1e-4, atol=1e-5 * one.abs().max().item())
    other = FisherMCLinearOperator(*arguments, seed=654321) @ identity
    assert torch.linalg.matrix_norm(one - other) > 0
    many = FisherMCLinearOperator(*arguments, mc_samples=200) @ identity
    assert distance(many) < distance(one)

    sum_of_samples, distances = torch.zeros(size, size), []
    for seed in range(123456789, 123456789 + 64):
        sample = FisherMCLinearOperator(*arguments, seed=seed, check_deterministic=False)
        sum_of_samples += sample @ identity
        distances.append(distance(sum_of_samples / (len(distances) + 1)))
    assert distances[63] < 0.5 * np.mean(distances[:4])

    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, (left, right) = pyplot.subplots(ncols=2)
    image = left.imshow((ggn.abs() + 1e-5).log10())
    pyplot.colorbar(image, ax=left, shrink=0.8)
    right.semilogx(range(1, 65), distances, "bo")
    figure.savefig(tmp_path / "picture.png")
    pyplot.close(figure)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
def test_natural_gradient_session(tmp_path, capsys):
    """Natural gradients by few and by more CG steps, a Neumann series, and their plots."""
    import matplotlib.pyplot as plt
    from scipy.sparse.linalg import eigsh

    torch.manual_seed(0)
    data = [(torch.rand(64, 7).double(), torch.rand(64, 3).double()) for _ in range(2)]
    model = nn.Sequential(
        nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 3)
    ).double()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    arguments = (model, nn.MSELoss(reduction="mean").double(), params, data)
    GGN = GGNLinearOperator(*arguments)
    shapes = [p.shape for p in params.values()]
    delta = 1e-2
    damped = GGN + delta * IdentityLinearOperator(shapes, GGN.device, torch.float64)
    gradient, loss = gradient_and_loss(*arguments)
    gradient = parameters_to_vector(gradient).detach()
    dense, dense_loss = functorch_gradient_and_loss(*arguments)
    assert allclose_report(gradient, parameters_to_vector(dense).detach())
    assert allclose_report(loss, dense_loss)

    few = CGInverseLinearOperator(damped, eps=0, max_iter=5, max_tridiag_iter=5)
    rough = few @ gradient
    assert allclose_report(damped @ rough, gradient, rtol=1e-4, atol=1e-5)
    matrix = functorch_ggn(*arguments).detach()
    matrix = matrix + delta * torch.eye(matrix.shape[0]).double()
    inverse = torch.linalg.inv(matrix)
    natural_gradient = inverse @ gradient
    loose, tight = {"rtol": 5e-3, "atol": 5e-5}, {"rtol": 5e-4, "atol": 5e-6}
    assert allclose_report(rough, natural_gradient, **loose)
    more = CGInverseLinearOperator(damped, eps=0, max_iter=10, max_tridiag_iter=10)
    assert allclose_report(more @ gradient, natural_gradient, **tight)
    capsys.readouterr()
    assert not allclose_report(rough, natural_gradient, **tight)
    assert "of 88 entries differ" in capsys.readouterr().out
    assert few.last_solve.iterations[0] == 5
    assert not few.last_solve.converged[0]

    top = eigsh(damped.to_scipy(), k=1, which="LM", return_eigenvectors=False)[0]
    assert top == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-10)
    scale = 1.0 if top < 2.0 else 1.99 / top
    series = NeumannInverseLinearOperator(damped, scale=scale, num_terms=10)
    neumann = series @ torch.eye(series.shape[1]).double()
    step = torch.eye(88).double() - scale * matrix
    expected = scale * sum(torch.matrix_power(step, k) for k in range(11))
    assert allclose_report(neumann, expected)

    figure, axes = plt.subplots(ncols=3)
    for axis, picture in zip(axes, (matrix, neumann, inverse), strict=True):
        image = axis.imshow(picture.detach().cpu().abs().log10())
        plt.colorbar(image, ax=axis, shrink=0.5)
    figure.savefig(tmp_path / "inverses.png")
    plt.close(figure)


def test_inverses_take_that_librarys_arguments():
    A = torchlinop.aslinearoperator(torch.diag(torch.linspace(1, 2, 9)).double())
    b = torch.ones(9).double()
    exact = b / torch.linspace(1, 2, 9).double()
    for inverse in (
        CGInverseLinearOperator(A),
        CGInverseLinearOperator(A, tolerance=1e-12, preconditioner=lambda X: 0.5 * X),
        CGInverseLinearOperator(A, initial_guess=exact, max_iter=0),
        LSMRInverseLinearOperator(A, atol=1e-12, btol=1e-12, maxiter=50, show=False),
        NeumannInverseLinearOperator(A, num_terms=200, scale=0.6, check_nan=True),
    ):
        assert allclose_report(inverse @ b, exact)
        assert allclose_report(inverse.adjoint() @ b, exact)
        assert inverse.to_scipy() is inverse
    with pytest.raises(ValueError, match="n_tridiag has to be 0"):
        CGInverseLinearOperator(A, n_tridiag=1)


def test_operators_are_those_of_the_package():
    problem = binary()
    for ours, theirs, dense in (
        (torchlinop.HessianLinearOperator, HessianLinearOperator, functorch_hessian),
        (torchlinop.GGNLinearOperator, GGNLinearOperator, functorch_ggn),
        (torchlinop.EFLinearOperator, EFLinearOperator, functorch_empirical_fisher),
    ):
        operator = theirs(*problem.arguments, progressbar=False, num_data=9)
        assert isinstance(operator, ours)
        torch.testing.assert_close(operator.to_dense(), dense(*problem.arguments), **CLOSE)
    jacobian = problem.model, problem.params, problem.data
    J = JacobianLinearOperator(*jacobian)
    dense = functorch_jacobian(*jacobian)
    torch.testing.assert_close(J.to_dense(), dense, **CLOSE)
    T = TransposedJacobianLinearOperator(*jacobian)
    torch.testing.assert_close(T.to_dense(), dense.T, **CLOSE)


def test_empirical_fisher_of_cross_entropy():
    problem = classification(nn.CrossEntropyLoss(reduction="sum"))
    E = EFLinearOperator(*problem.arguments)
    expected = functorch_empirical_fisher(*problem.arguments)
    torch.testing.assert_close(E.to_dense(), expected, **CLOSE)


CE, MSE, BCE = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss
WEIGHT = torch.tensor([0.2, 3.0, 1.5], dtype=torch.float64)
POSITIVE = torch.tensor([3.0, 0.5], dtype=torch.float64)
#: loss, shape of a prediction after the batch dimension, settings of the loss
EMPIRICAL = {
    "classes": (CE, (3,), {}),
    "class weights": (CE, (3,), {"weight": WEIGHT}),
    "ignored": (CE, (3,), {"ignore_index": 1}),
    "all at once": (
        CE,
        (3, 2),
        {"weight": WEIGHT, "ignore_index": 1, "label_smoothing": 0.2},
    ),
    "images of classes": (CE, (3, 2, 2), {}),
    "soft": (CE, (3,), {"weight": WEIGHT, "label_smoothing": 0.1}),
    "soft sequences": (CE, (3, 2), {}),
    "scalars": (MSE, (), {}),
    "vectors": (MSE, (4,), {}),
    "sequences of vectors": (MSE, (3, 2), {}),
    "binary scalars": (BCE, (), {"pos_weight": POSITIVE[0]}),
    "positive weight": (BCE, (2,), {"pos_weight": POSITIVE}),
    "both weights": (BCE, (3, 2), {"weight": POSITIVE.flip(0), "pos_weight": POSITIVE}),
}


def _by_loop(model, loss_function, params, data):
    """Backward through the loss of each datum, one after the other."""
    summed = copy.copy(loss_function)
    summed.reduction = "sum"
    total, normalizer = 0.0, 0.0
    for X, y in data:
        f = model(X)
        if isinstance(loss_function, CE):
            rows = f.movedim(1, -1).reshape(-1, f.shape[1])
            soft = y.is_floating_point()
            targets = y.movedim(1, -1).reshape(rows.shape) if soft else y.reshape(-1)
        elif f.ndim == 1:
            rows, targets = f[:, None], y[:, None]
        else:
            rows, targets = f.reshape(-1, f.shape[-1]), y.reshape(-1, f.shape[-1])
        for row, target in zip(rows, targets, strict=True):
            loss = summed(row, target)
            parts = torch.autograd.grad(loss, params, retain_graph=True)
            g = parameters_to_vector(parts)
            total = total + torch.outer(g, g)
            if not isinstance(loss_function, CE):
                normalizer += target.numel()
            elif soft:
                normalizer += 1
            elif target != loss_function.ignore_index:
                weight = loss_function.weight
                normalizer += 1.0 if weight is None else weight[target].item()
    return total / (normalizer if loss_function.reduction == "mean" else 1.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", list(EMPIRICAL))
def test_empirical_fisher_in_every_setting(case, reduction):
    kind, shape, settings = EMPIRICAL[case]
    torch.manual_seed(5)
    size = int(np.prod(shape))
    model = nn.Sequential(nn.Linear(3, size), nn.Tanh(), nn.Unflatten(1, shape or (1,)))
    if not shape:
        model.append(nn.Flatten(0))
    model.double()
    data = []
    for n in (3, 1):
        X = torch.randn(n, 3).double()
        if kind is not CE:
            y = torch.randn(n, *shape).double()
            y = y.sigmoid().round() if kind is BCE else y
        elif case.startswith("soft"):
            y = torch.randn(n, *shape).double().softmax(1)
        else:
            y = torch.randint(3, (n, *shape[1:]))
        data.append((X, y))
    arguments = model, kind(**settings, reduction=reduction), list(model.parameters()), data
    expected = _by_loop(*arguments)
    assert expected.norm() > 0
    torch.testing.assert_close(functorch_empirical_fisher(*arguments), expected, **CLOSE)
    E = torchlinop.EFLinearOperator(*arguments)
    torch.testing.assert_close(E.to_dense(), expected, **CLOSE)


def test_empirical_fisher_of_other_losses_is_refused():
    problem = regression(nn.HuberLoss())
    with pytest.raises(TypeError, match=r"got HuberLoss\. Use torchlinop\.reference"):
        functorch_empirical_fisher(*problem.arguments)


def test_wrong_number_of_data():
    problem = regression()
    with pytest.raises(ValueError, match="num_data=5, but the data holds 8"):
        GGNLinearOperator(*problem.arguments, num_data=5)


def test_report_of_differences(capsys):
    assert allclose_report(torch.ones(2), np.ones(2))
    assert capsys.readouterr().out == ""
    assert not allclose_report(np.array([1.0, 2.0]), torch.tensor([1.0, 2.5]))
    printed = capsys.readouterr().out
    assert "[1]: 2.0" in printed
    assert "1 of 2 entries differ" in printed
