"""Bad input: the error says what came, what was expected and how to mend it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn
from torchlinop import (
    DiagonalLinearOperator,
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    UnsupportedDerivativeError,
    aslinearoperator,
)

from tests.problems import classification, regression


@pytest.fixture
def problem():
    return classification()


@pytest.fixture
def H(problem):
    return HessianLinearOperator(*problem.arguments)


@pytest.fixture(autouse=True)
def _untouched(request):
    """Nothing of the model changes when an operator is refused."""
    if "problem" not in request.fixturenames:
        yield
        return
    model = request.getfixturevalue("problem").model
    before = copy.deepcopy(model.state_dict())
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    yield
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags


# ------------------------------------------------------------------------- operands


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones(26), r"\(N,\) or \(N, K\) with N = 27, got \(26,\)"),
        (np.ones((2, 27)), r"got \(2, 27\). The transpose of what came would fit"),
        (np.ones((27, 2, 2)), r"got \(27, 2, 2\)"),
    ],
)
def test_wrong_shape(H, x, message):
    with pytest.raises(ValueError, match=message):
        H @ x


def test_wrong_shape_of_methods(H):
    with pytest.raises(ValueError, match=r"matvec .* expects shape \(N,\) or \(N, 1\)"):
        H.matvec(np.ones((27, 2)))
    with pytest.raises(ValueError, match=r"matmat .* expects shape \(N, K\)"):
        H.matmat(np.ones(27))
    with pytest.raises(ValueError, match=r"rmatvec .* expects shape \(M,\)"):
        H.rmatvec(np.ones(3))
    with pytest.raises(ValueError, match=r"rmatmat .* expects shape \(M, K\)"):
        H.rmatmat(np.ones(27))
    with pytest.raises(ValueError, match=r"x @ operator .* M = 27, got \(3,\)"):
        np.ones(3) @ H


def test_sparse_operand(H):
    sparse = scipy.sparse.identity(27, format="csr")
    with pytest.raises(TypeError, match="toarray"):
        H.matmat(sparse)
    with pytest.raises(TypeError, match="to_dense"):
        H @ torch.eye(27).to_sparse()


def test_operand_that_is_no_array_of_numbers(H):
    with pytest.raises(TypeError, match=r"dtype object.*astype"):
        H @ np.full(27, None)
    with pytest.raises(TypeError, match="array of numbers"):
        H @ np.full(27, "a")
    with pytest.raises(TypeError, match="masked"):
        H @ np.ma.array(np.ones(27), mask=np.arange(27) == 3)


def test_one_tensor_per_parameter(H, problem):
    tensors = [torch.ones_like(p) for p in problem.params]
    named = H.space.to_named(torch.ones(27, dtype=torch.float64))
    for given in (tensors, tuple(tensors), named):
        message = rf"a {type(given).__name__} of 4 tensors, of shapes \[\(3, 4\), \(3,\)"
        for product in (
            lambda x: H @ x,
            lambda x: x @ H,
            H.dot,
            H.matvec,
            aslinearoperator(np.eye(27)).matmat,
        ):
            with pytest.raises(TypeError, match=message + r".*space\.to_vector\(tensors\)"):
                product(given)
        torch.testing.assert_close(H @ H.space.to_vector(given), H @ torch.ones(27))


def test_ragged_lists(H):
    with pytest.raises(TypeError, match=r"a list of which NumPy makes none: .*inhomogen"):
        H @ [[1.0, 2.0], [3.0]]


def test_scalars_with_matmul(H):
    with pytest.raises(ValueError, match=r"use \* instead"):
        H @ 2
    with pytest.raises(ValueError, match="divided by a scalar only"):
        H / H
    with pytest.raises(ValueError, match="integer >= 0"):
        H**-1
    with pytest.raises(ValueError, match="integer >= 0"):
        H**0.5


def test_operators_that_do_not_fit(H):
    wide = aslinearoperator(np.ones((27, 54)))
    with pytest.raises(ValueError, match="27 x 27 operator and a 27 x 54 one"):
        H + wide
    with pytest.raises(ValueError, match="54 columns meet 27 rows"):
        wide @ H
    with pytest.raises(ValueError, match="square"):
        wide**2


# ----------------------------------------------------------------------------- data


def _build(problem, data, operator=HessianLinearOperator, **options):
    return operator(problem.model, problem.loss, problem.params, data, **options)


def test_generator_as_data(problem):
    with pytest.raises(TypeError, match=r"generator, which can be read only once.*list"):
        _build(problem, (batch for batch in problem.data))
    with pytest.raises(TypeError, match="iterator, which can be read only once"):
        _build(problem, iter(problem.data))


def test_empty_data(problem):
    with pytest.raises(ValueError, match="data is empty"):
        _build(problem, [])


def test_data_that_is_no_list_of_pairs(problem):
    X, y = problem.data[0]
    with pytest.raises(TypeError, match=r"item 0 is a Tensor.*data=\[\(X, y\)\]"):
        _build(problem, (X, y))
    with pytest.raises(TypeError, match="item 0 is a tuple of length 3"):
        _build(problem, [(X, y, y)])
    with pytest.raises(TypeError, match="re-iterable of pairs"):
        _build(problem, X)
    with pytest.raises(TypeError, match="got int"):
        _build(problem, 3)


def test_all_targets_ignored(problem):
    data = [(X, torch.full_like(y, -100)) for X, y in problem.data]
    with pytest.raises(ValueError, match="total weight of zero"):
        _build(problem, data)


def test_non_finite_values_on_request(problem):
    X, y = problem.data[0]
    bad = X.clone()
    bad[0, 0] = torch.nan
    _build(problem, [(bad, y)])
    with pytest.raises(ValueError, match="1 of 20 entries of batch 1 of the data"):
        _build(problem, [(X, y), (bad, y)], check_finite=True)


def test_non_finite_parameters_on_request():
    problem = regression()
    problem.params[0].data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"parameter '0.weight' are NaN or infinite"):
        _build(problem, problem.data, check_finite=True)


def test_unknown_batch_size(problem):
    class Text:
        pass

    with pytest.raises(TypeError, match="Pass batch_size="):
        _build(problem, [(Text(), torch.zeros(1).long())])


# ----------------------------------------------------------------------- parameters


def test_foreign_parameter(problem):
    stranger = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"params\[1\], of shape \(3,\), is not a param"):
        HessianLinearOperator(
            problem.model, problem.loss, [problem.params[0], stranger], problem.data
        )


def test_misspelt_name(problem):
    with pytest.raises(KeyError, match=r"'0.wieght' is not a parameter.*0.weight"):
        HessianLinearOperator(
            problem.model, problem.loss, {"0.wieght": problem.params[0]}, problem.data
        )


def test_right_name_wrong_tensor(problem):
    with pytest.raises(ValueError, match="not the model's own"):
        HessianLinearOperator(
            problem.model, problem.loss, {"0.weight": torch.ones(3, 4)}, problem.data
        )


def test_parameter_twice(problem):
    with pytest.raises(ValueError, match=r"lists '0\.weight' twice"):
        HessianLinearOperator(
            problem.model, problem.loss, [problem.params[0]] * 2, problem.data
        )


def test_tied_weights_by_two_names(problem):
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = model[0].weight
    params = dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(ValueError, match=r"twice, as '0\.weight' and as '1\.weight'"):
        HessianLinearOperator(model, problem.loss, params, problem.data)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda m: [], ValueError, "params is empty"),
        (lambda m: m[0].weight, TypeError, r"For one tensor write \[tensor\]"),
        (lambda m: m.named_parameters(), TypeError, "dict\\(model.named_parameters"),
        (lambda m: 3, TypeError, "got int"),
        (lambda m: ["weight"], TypeError, "entry 0 is str"),
    ],
)
def test_params_of_a_wrong_kind(problem, params, error, message):
    with pytest.raises(error, match=message):
        HessianLinearOperator(
            problem.model, problem.loss, params(problem.model), problem.data
        )


def test_two_dtypes():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"share one dtype.*float32.*float64"):
        HessianLinearOperator(
            model, nn.MSELoss(), model.parameters(), [(torch.ones(1, 2), torch.ones(1, 2))]
        )


def test_two_devices():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"share one device.*cpu.*meta"):
        HessianLinearOperator(
            model, nn.MSELoss(), model.parameters(), [(torch.ones(1, 2), torch.ones(1, 2))]
        )


def test_operators_on_two_devices(H):
    other = IdentityLinearOperator([(27,)], "meta", torch.float64)
    with pytest.raises(ValueError, match="two devices"):
        H + other


def test_integer_and_complex_parameters():
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="real floating-point"):
            HessianLinearOperator.from_function(torch.sum, torch.ones(2, dtype=dtype))


# ----------------------------------------------------------------- model and loss


def test_training_mode():
    data = [(torch.ones(2, 3), torch.zeros(2).long())]
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    arguments = nn.CrossEntropyLoss(), list(model.parameters()), data
    with pytest.raises(ValueError, match=r"1 \(Dropout\).*model.eval\(\)"):
        HessianLinearOperator(model, *arguments)
    model[1].eval()
    with pytest.raises(ValueError, match=r"2 \(BatchNorm1d\).*model.eval\(\)"):
        GGNLinearOperator(model, *arguments)
    model.eval()
    HessianLinearOperator(model, *arguments)


def test_hidden_randomness():
    linear = nn.Linear(3, 3)

    def model(params, X):
        return nn.functional.dropout(X @ params[0].T, 0.5, training=True)

    data = [(torch.ones(20, 3), torch.zeros(20).long())]
    with pytest.raises(ValueError, match="two different predictions"):
        GGNLinearOperator(model, nn.CrossEntropyLoss(), [linear.weight], data)
    state = torch.get_rng_state()
    GGNLinearOperator(
        model, nn.CrossEntropyLoss(), [linear.weight], data, check_deterministic=False
    ).to_dense()
    assert torch.equal(torch.get_rng_state(), state)


def test_model_that_returns_no_tensor(problem):
    def model(params, X):
        return {"logits": X}

    with pytest.raises(TypeError, match=r"has to return a tensor, got dict.*logits"):
        HessianLinearOperator(model, problem.loss, problem.params, problem.data)
    with pytest.raises(TypeError, match="model has to be"):
        HessianLinearOperator(3, problem.loss, problem.params, problem.data)


def test_loss_without_a_known_reduction(problem):
    def loss(prediction, target):
        return nn.functional.cross_entropy(prediction, target)

    with pytest.raises(ValueError, match=r"How loss combines.*reduction='mean'"):
        HessianLinearOperator(problem.model, loss, problem.params, problem.data)
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'none'"):
        _build(problem, problem.data, reduction="none")
    with pytest.raises(ValueError, match="contradicts CrossEntropyLoss"):
        _build(problem, problem.data, reduction="sum")
    with pytest.raises(ValueError, match="has reduction='none'"):
        _build(problem._replace(loss=nn.CrossEntropyLoss(reduction="none")), problem.data)
    with pytest.raises(TypeError, match="has to be callable"):
        _build(problem._replace(loss="mse"), problem.data)


def test_loss_that_returns_no_scalar(problem):
    def loss(prediction, target):
        return nn.functional.cross_entropy(prediction, target, reduction="none")

    with pytest.raises(ValueError, match=r"has to return a scalar tensor, got \(5,\)"):
        _build(problem._replace(loss=loss), problem.data, reduction="mean")


def test_prediction_and_target_of_two_shapes():
    model = nn.Linear(2, 1)
    data = [(torch.ones(3, 2), torch.ones(3))]
    with pytest.raises(ValueError, match=r"\(3, 1\) and the target has shape \(3,\)"):
        HessianLinearOperator(model, nn.MSELoss(), model.parameters(), data)


def test_fisher_of_an_unknown_likelihood():
    problem = regression(nn.HuberLoss())
    with pytest.raises(TypeError, match="GGNLinearOperator, which takes any loss"):
        FisherMCLinearOperator(*problem.arguments)


@pytest.mark.parametrize("mc_samples", [0, -1, 1.5, None, "2"])
def test_mc_samples_out_of_range(problem, mc_samples):
    with pytest.raises(ValueError, match="mc_samples"):
        _build(problem, problem.data, FisherMCLinearOperator, mc_samples=mc_samples)


def test_bad_cache_option(problem):
    with pytest.raises(ValueError, match="cache has to be 'auto', True or False"):
        _build(problem, problem.data, cache="always")


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (
            torch.zeros(1).long(),
            ValueError,
            r"expects a target of shape \(5,\), got \(1,\)",
        ),
        (torch.ones(5, 1).double(), ValueError, r"of shape \(5, 3\), got \(5, 1\)"),
        (torch.zeros(5).int(), TypeError, r"int64, got torch.int32. Pass y.long\(\)"),
        (torch.arange(5), ValueError, "between 0 and 4, but the prediction has 3 classes"),
        (None, TypeError, "got NoneType for y"),
    ],
)
def test_targets_that_do_not_fit(problem, y, error, message):
    with pytest.raises(error, match=message):
        _build(problem, [(problem.data[0][0], y)]) @ np.ones(27)


def test_complex_predictions():
    with pytest.raises(TypeError, match=r"torch.view_as_real"):
        JacobianLinearOperator.from_function(torch.fft.fft, torch.ones(4))


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    data = [(torch.ones(1, 2), torch.ones(1, 2))]
    with pytest.raises(ValueError, match="made in inference mode"):
        GGNLinearOperator(model, nn.MSELoss(), model.parameters(), data)


def test_vectors_that_are_none_of_the_kinds(H):
    for x in (None, {"a": 1}, {1, 2}):
        with pytest.raises(TypeError, match=f"of type {type(x).__name__}"):
            H @ x


def test_memory_budget_in_words(problem):
    with pytest.raises(TypeError, match="number of bytes, got '1GB'"):
        _build(problem, problem.data, memory_budget="1GB")


# --------------------------------------------------------------- missing derivatives


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class Sine(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_operation_without_second_derivative_is_named():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(Sine()), nn.Linear(3, 2)).double()
    data = [(torch.randn(4, 2).double(), torch.randint(2, (4,)))]
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), model.parameters(), data)
    with pytest.raises(UnsupportedDerivativeError, match=r"Once in module '1.0' \(Sine\)"):
        H @ np.ones(H.shape[0])
    assert not any(m._forward_hooks for m in model.modules())


def test_ggn_does_without_a_second_derivative():
    """By forward mode, where the Function offers it; else by an error."""

    class OnceForward(Once):
        @staticmethod
        def jvp(ctx, t):
            return t * ctx.cosine

        @staticmethod
        def forward(ctx, x):
            ctx.cosine = x.cos()
            return Once.forward(ctx, x)

    X, y = torch.randn(4, 2).double(), torch.randn(4, 3).double()
    W = torch.randn(2, 3).double()

    def ggn(sine):
        return GGNLinearOperator(
            lambda params, X: sine(X @ params[0]), nn.MSELoss(), [W], [(X, y)]
        )

    torch.testing.assert_close(ggn(OnceForward.apply).to_dense(), ggn(torch.sin).to_dense())
    with pytest.raises(UnsupportedDerivativeError, match="Once"):
        ggn(Once.apply) @ np.ones(6)


def test_hessian_of_a_function_without_second_derivative():
    H = HessianLinearOperator.from_function(lambda x: Once.apply(x).sum(), torch.ones(2))
    with pytest.raises(UnsupportedDerivativeError, match="no second derivative"):
        H @ np.ones(2)


def test_errors_of_the_model_pass_through(problem):
    data = [(torch.ones(2, 5).double(), torch.zeros(2).long())]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        _build(problem, data)


# ----------------------------------------------------------------------- structured


def test_structured_operators():
    with pytest.raises(TypeError, match="list of shapes"):
        IdentityLinearOperator(3, "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"shape \(n,\), got \(2, 2\)"):
        DiagonalLinearOperator(torch.eye(2))
    with pytest.raises(TypeError, match="Expected a matrix"):
        aslinearoperator("matrix")
    with pytest.raises(ValueError, match="two dimensions"):
        aslinearoperator(np.ones(3))
    with pytest.raises(TypeError, match="float32 or float64"):
        IdentityLinearOperator([(3,)], "cpu", torch.int64)


def test_functions():
    with pytest.raises(TypeError, match="f has to be a function"):
        HessianLinearOperator.from_function(3, torch.ones(2))
    with pytest.raises(TypeError, match="x has to be a tensor"):
        HessianLinearOperator.from_function(torch.sum, 3.0)
    with pytest.raises(TypeError, match="f has to return a tensor, got float"):
        HessianLinearOperator.from_function(lambda x: 1.0, torch.ones(2)) @ np.ones(2)
    with pytest.raises(ValueError, match=r"f returned shape \(2,\).*JacobianLinear"):
        HessianLinearOperator.from_function(torch.sin, torch.ones(2)) @ np.ones(2)


def test_empirical_fisher_needs_a_reduction(problem):
    with pytest.raises(ValueError, match="reduction="):
        EFLinearOperator(problem.model, lambda f, y: f.sum(), problem.params, problem.data)
