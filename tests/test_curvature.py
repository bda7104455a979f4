"""Curvature matrices of losses in all their settings, however the data is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchlinop import (
    EFLinearOperator,
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    gradient_and_loss,
)
from torchlinop.reference import (
    dense_empirical_fisher,
    dense_ggn,
    dense_gradient,
    dense_hessian,
    dense_jacobian,
)

from tests.problems import binary, classification, mlp, regression

#: float64 rounding of sums of some hundred terms of order one
CLOSE = {"rtol": 1e-11, "atol": 1e-13}
WEIGHT = torch.tensor([0.2, 3.0, 1.5], dtype=torch.float64)


def _ignoring(problem):
    """Some targets ignored, all of one batch's among them."""
    data = [(X, y.clone()) for X, y in problem.data]
    data[0][1][1] = -100
    data[2][1][:] = -100
    return problem._replace(data=data)


def _soft(problem):
    data = [(X, torch.rand(len(y), 3).double().softmax(-1)) for X, y in problem.data]
    return problem._replace(data=data)


def _sequences(loss):
    """Predictions of shape (N, C, T), targets (N, T)."""
    problem = classification(loss, classes=6)
    model = nn.Sequential(problem.model, nn.Unflatten(1, (3, 2)))
    torch.manual_seed(3)
    data = [(X, torch.randint(3, (len(X), 2))) for X, _ in problem.data]
    data[1][1][0, 0] = -100
    return problem._replace(model=model, data=data)


CE, BCE, MSE = nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss
POSITIVE = torch.tensor([3.0, 0.5], dtype=torch.float64)
PROBLEMS = {
    "cross-entropy": lambda r: classification(CE(reduction=r)),
    "class weights": lambda r: classification(CE(WEIGHT, reduction=r)),
    "smoothing": lambda r: classification(CE(label_smoothing=0.2, reduction=r)),
    "ignored": lambda r: _ignoring(classification(CE(reduction=r))),
    "weights, ignored, smoothing": lambda r: _ignoring(
        classification(CE(WEIGHT, label_smoothing=0.1, reduction=r))
    ),
    "soft targets": lambda r: _soft(classification(CE(reduction=r))),
    "soft targets, weights, smoothing": lambda r: _soft(
        classification(CE(WEIGHT, label_smoothing=0.3, reduction=r))
    ),
    "sequences": lambda r: _sequences(CE(WEIGHT, reduction=r)),
    "squared error": lambda r: regression(MSE(reduction=r)),
    "logistic": lambda r: binary(BCE(reduction=r)),
    "positive weight": lambda r: binary(BCE(pos_weight=POSITIVE, reduction=r)),
    "both weights": lambda r: binary(
        BCE(weight=POSITIVE.flip(0), pos_weight=POSITIVE, reduction=r)
    ),
    "Huber": lambda r: regression(nn.HuberLoss(reduction=r, delta=0.5)),
    "log-likelihood": lambda r: _ignoring(_log_softmax(nn.NLLLoss(WEIGHT, reduction=r))),
}


def _log_softmax(loss):
    problem = classification(loss)
    return problem._replace(model=nn.Sequential(problem.model, nn.LogSoftmax(-1)))


@pytest.fixture(params=list(PROBLEMS))
def problem(request, reduction):
    return PROBLEMS[request.param](reduction)


@pytest.fixture(params=["mean", "sum"])
def reduction(request):
    return request.param


@pytest.mark.parametrize("cache", ["auto", False], ids=["kept", "recomputed"])
def test_hessian(problem, cache):
    H = HessianLinearOperator(*problem.arguments, cache=cache)
    torch.testing.assert_close(H.to_dense(), dense_hessian(*problem.arguments), **CLOSE)


@pytest.mark.parametrize("cache", ["auto", False], ids=["kept", "recomputed"])
def test_ggn(problem, cache):
    if isinstance(problem.loss, nn.NLLLoss):
        with pytest.warns(UserWarning, match="this matrix, is zero"):
            G = GGNLinearOperator(*problem.arguments, cache=cache)
        assert not G.to_dense().any()
    else:
        G = GGNLinearOperator(*problem.arguments, cache=cache)
    torch.testing.assert_close(G.to_dense(), dense_ggn(*problem.arguments), **CLOSE)


def test_gradient(problem):
    gradient, loss = gradient_and_loss(*problem.arguments)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    torch.testing.assert_close(flat, dense_gradient(*problem.arguments), **CLOSE)
    X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    torch.testing.assert_close(loss, problem.loss(problem.model(X), y), **CLOSE)


def test_gradient_of_a_risk():
    """A risk that is shared, after parameters and the total weight have changed."""
    weight = torch.tensor([0.2, 3.0, 1.0], dtype=torch.float64)
    problem = classification(nn.CrossEntropyLoss(weight=weight))
    risk = EmpiricalRisk(*problem.arguments)
    with torch.no_grad():
        problem.params[0].add_(1.0)
        problem.data[0][1].fill_(1)
    gradient, loss = gradient_and_loss(risk)
    torch.testing.assert_close((gradient, loss), gradient_and_loss(*problem.arguments))
    flat = torch.cat([g.reshape(-1) for g in gradient])
    torch.testing.assert_close(flat, dense_gradient(*problem.arguments), **CLOSE)
    with pytest.raises(TypeError, match="An EmpiricalRisk has its own data"):
        gradient_and_loss(risk, data=problem.data)


def test_fisher_mc_approaches_ggn(problem):
    """The distance shrinks like one over the root of the number of samples."""
    if not isinstance(problem.loss, (CE, BCE, MSE)):
        pytest.skip("no known likelihood")
    ggn = dense_ggn(*problem.arguments)
    distances = []
    for mc_samples in (20, 2000):
        squares = [
            (F_ - ggn).norm().square()
            for F_ in (
                FisherMCLinearOperator(
                    *problem.arguments, mc_samples=mc_samples, seed=seed
                ).to_dense()
                for seed in range(8)
            )
        ]
        distances.append(torch.stack(squares).mean().sqrt())
    # 8 repetitions of a chi-square-like variable: the ratio 10 within a factor of 2
    assert 5 < distances[0] / distances[1] < 20
    assert distances[1] < 0.1 * ggn.norm()


def test_fisher_mc_is_one_matrix_for_a_seed(problem):
    if not isinstance(problem.loss, (CE, BCE, MSE)):
        pytest.skip("no known likelihood")
    state = torch.get_rng_state()
    first = FisherMCLinearOperator(*problem.arguments, mc_samples=2, seed=3)
    matrix = first.to_dense()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = FisherMCLinearOperator(*problem.arguments, mc_samples=2, seed=3, cache=False)
    torch.testing.assert_close(again.to_dense(), matrix, **CLOSE)
    X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    whole = [(X, y)]
    uncut = FisherMCLinearOperator(
        problem.model, problem.loss, problem.params, whole, mc_samples=2, seed=3
    )
    torch.testing.assert_close(uncut.to_dense(), matrix, **CLOSE)
    other = FisherMCLinearOperator(*problem.arguments, mc_samples=2, seed=4)
    assert (other.to_dense() - matrix).norm() > 0.01 * matrix.norm()


def test_empirical_fisher_of_weighted_classes(reduction):
    problem = _ignoring(
        classification(CE(WEIGHT, label_smoothing=0.1, reduction=reduction))
    )
    y = torch.cat([y for _, y in problem.data])
    total = WEIGHT[y[y != -100]].sum().item()
    expected = dense_empirical_fisher(
        problem.model,
        CE(WEIGHT, label_smoothing=0.1, reduction="none"),
        problem.params,
        problem.data,
        normalizer=1.0 if reduction == "sum" else total,
    )
    E = EFLinearOperator(*problem.arguments)
    torch.testing.assert_close(E.to_dense(), expected, **CLOSE)


def test_empirical_fisher_of_a_callable_loss():
    problem = regression()

    def loss(prediction, target):
        return (prediction - target).abs().pow(3).sum(-1).mean()

    expected = dense_empirical_fisher(
        problem.model,
        lambda f, y: (f - y).abs().pow(3).sum(-1),
        problem.params,
        problem.data,
        normalizer=8.0,
    )
    E = EFLinearOperator(
        problem.model, loss, problem.params, problem.data, reduction="mean"
    )
    torch.testing.assert_close(E.to_dense(), expected, **CLOSE)


@pytest.mark.parametrize("operator", [HessianLinearOperator, GGNLinearOperator])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_any_callable_loss(operator, reduction):
    problem = regression()

    def loss(prediction, target):
        each = (prediction - target).square().sum(-1).add(1).log()  # Student's t
        return each.mean() if reduction == "mean" else each.sum()

    dense = dense_hessian if operator is HessianLinearOperator else dense_ggn
    expected = dense(problem.model, loss, problem.params, problem.data)
    A = operator(problem.model, loss, problem.params, problem.data, reduction=reduction)
    for _ in range(2):  # the second time from the kept linearization
        torch.testing.assert_close(A.to_dense(), expected, **CLOSE)


def test_functional_losses_are_recognized():
    problem = classification()
    H = HessianLinearOperator(problem.model, F.cross_entropy, problem.params, problem.data)
    torch.testing.assert_close(H.to_dense(), dense_hessian(*problem.arguments), **CLOSE)


@pytest.mark.parametrize("operator", [HessianLinearOperator, GGNLinearOperator])
def test_callable_model_and_dict_input(operator):
    problem = regression()
    params = dict(problem.model.named_parameters())
    data = [({"left": X[:, :1], "right": X[:, 1:]}, y) for X, y in problem.data]

    def model(params, X):
        X = torch.cat([X["left"], X["right"]], dim=1)
        return torch.func.functional_call(problem.model, params, (X,))

    dense = dense_hessian if operator is HessianLinearOperator else dense_ggn
    A = operator(model, problem.loss, params, data)
    torch.testing.assert_close(A.to_dense(), dense(*problem.arguments), **CLOSE)


def test_subset_of_parameters_is_a_submatrix():
    problem = classification()
    full = dense_hessian(*problem.arguments)
    subset = [problem.params[2], problem.params[1]]
    H = HessianLinearOperator(problem.model, problem.loss, subset, problem.data)
    index = torch.cat([torch.arange(15, 24), torch.arange(12, 15)])
    torch.testing.assert_close(H.to_dense(), full[index][:, index], **CLOSE)
    assert H.space.names == ("2.weight", "0.bias")


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(3, 3, bias=False)
            self.decode = nn.Linear(3, 3, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(torch.tanh(self.encode(x)))

    model = Tied().double()
    data = [(torch.randn(n, 3).double(), torch.randn(n, 3).double()) for n in (2, 3)]
    arguments = (model, MSE(), list(model.parameters()), data)
    (W,) = model.parameters()

    def loss(w):
        X, y = (torch.cat(parts) for parts in zip(*data, strict=True))
        return F.mse_loss(torch.tanh(X @ w.view(3, 3).T) @ w.view(3, 3).T, y)

    expected = torch.func.hessian(loss)(W.detach().reshape(-1))
    H = HessianLinearOperator(*arguments)
    torch.testing.assert_close(H.to_dense(), expected, **CLOSE)


def test_unused_parameters_give_zeros():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)}).double()

    def predict(params, X):
        return X @ params[0].T

    params = [model["used"].weight, model["unused"].weight]
    data = [(torch.randn(3, 2).double(), torch.randn(3, 1).double())]
    for operator in (HessianLinearOperator, GGNLinearOperator):
        matrix = operator(predict, MSE(), params, data).to_dense()
        assert matrix[:2, :2].norm() > 0
        assert matrix[2:].norm() == matrix[:, 2:].norm() == 0


def test_jacobian_of_images():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    model = model.double()
    params = list(model.parameters())
    data = [(torch.randn(n, 2, 3, 3).double(), None) for n in (2, 1)]
    J = JacobianLinearOperator(model, params, data)
    expected = dense_jacobian(model, params, data)
    torch.testing.assert_close(J.to_dense(), expected, **CLOSE)
    torch.testing.assert_close(J.T.to_dense(), expected.T, **CLOSE)
    assert J.T.T is J


def test_jacobian_gives_the_gauss_newton_matrix():
    problem = regression(MSE(reduction="sum"))
    J = JacobianLinearOperator(problem.model, problem.params, problem.data)
    G = GGNLinearOperator(*problem.arguments)
    torch.testing.assert_close((2 * J.T @ J).to_dense(), G.to_dense(), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_present_themselves_as_float32(dtype):
    torch.manual_seed(0)
    model = mlp(4, 5, 3).to(dtype)
    data = [(torch.randn(6, 4).to(dtype), torch.randint(3, (6,)))]
    arguments = (model, CE(), list(model.parameters()), data)
    double = model.to(torch.float64)
    reference = (
        double,
        CE(),
        list(double.parameters()),
        [(data[0][0].double(), data[0][1])],
    )
    expected = dense_hessian(*reference), dense_ggn(*reference)
    model.to(dtype)
    arguments = (model, CE(), list(model.parameters()), data)
    for operator, dense in zip(
        (HessianLinearOperator, GGNLinearOperator), expected, strict=True
    ):
        A = operator(*arguments)
        assert A.dtype == np.float32
        y = A @ np.ones(A.shape[1], dtype=np.float32)
        assert y.dtype == np.float32
        error = np.linalg.norm(y - dense.sum(1).numpy()) / np.linalg.norm(dense.sum(1))
        assert error < 20 * torch.finfo(dtype).eps


def test_from_function_of_dicts_and_lists():
    x = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    H = HessianLinearOperator.from_function(lambda x: x["b"] * x["a"].prod(), x)
    expected = torch.tensor([[0.0, 3.0, 2.0], [3.0, 0.0, 1.0], [2.0, 1.0, 0.0]])
    torch.testing.assert_close(H.to_dense(), expected)
    H = HessianLinearOperator.from_function(lambda x: x[1] * x[0].prod(), [x["a"], x["b"]])
    torch.testing.assert_close(H.to_dense(), expected)
    assert (
        HessianLinearOperator.from_function(lambda x: x.sum(), x["a"]).to_dense().norm()
        == 0
    )


def test_function_with_derivatives_inside():
    """A residual of a differential equation: the loss itself is differentiated."""
    net = mlp(1, 4, 1)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    names = [n for n, _ in net.named_parameters()]

    def residual(*params):
        def u(t):
            weights = dict(zip(names, params, strict=True))
            return torch.func.functional_call(net, weights, (t.reshape(1),))[0]

        du = torch.func.vmap(torch.func.grad(u))(t)
        return (du - torch.func.vmap(u)(t)).square().sum()

    params = [p.detach() for p in net.parameters()]
    blocks = torch.autograd.functional.hessian(residual, tuple(params))
    expected = torch.cat(
        [
            torch.cat([b.reshape(p.numel(), -1) for b in row], dim=1)
            for row, p in zip(blocks, params, strict=True)
        ]
    )
    H = HessianLinearOperator.from_function(lambda x: residual(*x), params)
    torch.testing.assert_close(H.to_dense(), expected, **CLOSE)


def test_weight_normalization():
    """Against the formula: PyTorch's own second derivatives are wrong (torch 2.13)."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).double()
    data = classification().data
    params = dict(model.named_parameters())

    def explicit(params, X):
        bias, g, v = params.values()
        return X @ (g * v / v.norm(dim=1, keepdim=True)).T + bias

    for operator, dense in (
        (HessianLinearOperator, dense_hessian),
        (GGNLinearOperator, dense_ggn),
    ):
        A = operator(model, CE(), params, data)
        expected = dense(explicit, CE(), {k: p.detach() for k, p in params.items()}, data)
        torch.testing.assert_close(A.to_dense(), expected, **CLOSE)


def test_transposed_jacobian_of_a_view_leaves_its_argument_alone():
    J = JacobianLinearOperator.from_function(lambda x: x.view(2, 3), torch.zeros(6))
    u = np.ones(6, dtype=np.float32)
    y = J.T @ u
    assert not np.shares_memory(u, y)
    data = [(torch.zeros(2, 1), None)] * 2
    J = JacobianLinearOperator(lambda p, X: p[0], [torch.zeros(6)], data)
    u = np.ones(12, dtype=np.float32)
    assert (J.T @ u).tolist() == [2.0] * 6
    assert u.tolist() == [1.0] * 12


@pytest.mark.parametrize("operator", [HessianLinearOperator, GGNLinearOperator])
def test_models_with_derivatives_inside(operator):
    """A force field: the prediction is itself a gradient."""

    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = mlp(3, 4, 1)

        def forward(self, x):
            x = x.detach().requires_grad_()
            energy = self.energy(x).sum()
            return -torch.autograd.grad(energy, x, create_graph=True)[0][:, :2]

    problem = regression()
    model = Force()
    params = dict(model.named_parameters())

    def explicit(params, X):
        weights = {k.removeprefix("energy."): p for k, p in params.items()}

        def energy(x):
            return torch.func.functional_call(model.energy, weights, (x,)).sum()

        return -torch.func.vmap(torch.func.grad(energy))(X)[:, :2]

    dense = dense_hessian if operator is HessianLinearOperator else dense_ggn
    expected = dense(explicit, MSE(), params, problem.data)
    for given in (model, explicit):
        A = operator(given, MSE(), params, problem.data)
        torch.testing.assert_close(A.to_dense(), expected, **CLOSE)
    J = JacobianLinearOperator(model, params, problem.data)
    expected = dense_jacobian(explicit, params, problem.data)
    torch.testing.assert_close(J.to_dense(), expected, **CLOSE)


def test_sparse_embedding():
    torch.manual_seed(0)
    dense, sparse = (
        nn.Sequential(nn.Embedding(5, 3, sparse=s), nn.Flatten(), nn.Linear(6, 2)).double()
        for s in (False, True)
    )
    sparse.load_state_dict(dense.state_dict())
    data = [(torch.randint(5, (4, 2)), torch.randint(2, (4,)))]
    matrices = [
        HessianLinearOperator(m, CE(), m.parameters(), data).to_dense()
        for m in (dense, sparse)
    ]
    torch.testing.assert_close(*matrices)


def test_byte_targets_with_weights():
    problem = classification(CE(WEIGHT))
    expected = dense_hessian(*problem.arguments)
    data = [(X, y.byte()) for X, y in problem.data]
    H = HessianLinearOperator(problem.model, problem.loss, problem.params, data)
    torch.testing.assert_close(H.to_dense(), expected, **CLOSE)


def test_columns_of_a_table_as_targets():
    table = torch.randn(5, 3, dtype=torch.float64)
    data = list(zip(table[:, :2].split([4, 1]), table[:, 2].split([4, 1]), strict=True))
    w = torch.zeros(2, dtype=torch.float64)
    G = GGNLinearOperator(lambda p, X: X @ p[0], MSE(), [w], data)
    X = table[:, :2]
    torch.testing.assert_close(G.to_dense(), 2 / 5 * X.T @ X)


def test_data_made_in_inference_mode():
    problem = classification()
    with torch.inference_mode():
        data = [(X.clone(), y.clone()) for X, y in problem.data]
    H = HessianLinearOperator(problem.model, problem.loss, problem.params, data)
    torch.testing.assert_close(H.to_dense(), dense_hessian(*problem.arguments), **CLOSE)
