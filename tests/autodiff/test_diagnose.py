"""Which operation, in which module or in the loss, has no derivative."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torchlinop.autodiff.diagnose import (
    explain,
    is_missing_derivative,
)
from torchlinop.autodiff.graphs import (
    custom_functions,
    once_differentiable_functions,
    require_twice_differentiable,
)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Never(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def _twice(value, leaves):
    require_twice_differentiable([value])
    gradient = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    gradient = [g for g in gradient if g is not None]
    torch.autograd.grad(gradient, leaves, [torch.ones_like(g) for g in gradient])


def _hessian_error(value, leaves):
    """What torch says to two derivatives of ``value``."""
    with pytest.raises(RuntimeError, match=r"deriv|differentiate|must implement") as caught:
        _twice(value, leaves)
    return caught.value


def _forward_error(function, x):
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"forward AD|jvp") as caught,
    ):
        function(forward_ad.make_dual(x, torch.ones_like(x)))
    return caught.value


def _explained(model, X, loss=lambda f: f.square().sum(), *, blame_loss=True, order=2):
    """What is said about the Hessian of ``loss(model(X))``."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    error = _hessian_error(loss(model(X)), leaves)
    assert is_missing_derivative(error)
    return str(explain(error, model, lambda: model(X), order, loss if blame_loss else None))


def _table(mode):
    return nn.EmbeddingBag(6, 3, mode=mode), torch.arange(4).view(2, 2)


X = torch.linspace(-1, 1, 12).view(4, 3)
LACKED = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14),
    reason="this PyTorch has the second derivative",
)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.hardsigmoid, "hardsigmoid_backward"),
        pytest.param(
            lambda x: torch.cdist(x, x.detach() + 1, p=3.0), "_cdist_backward", marks=LACKED
        ),
        pytest.param(F.pdist, "_pdist_backward", marks=LACKED),
        (lambda x: torch.sparse.softmax(x.to_sparse(), 1).to_dense(), "_sparse_softmax"),
        (lambda x: torch.special.zeta(x.abs() + 2, x.abs() + 1), "zeta"),
        (lambda x: torch.igamma(x.abs() + 1, x.abs()), "igamma"),
        (
            lambda x: torch.segment_reduce(x, "max", lengths=torch.tensor([2, 2]), axis=0),
            "_segment_reduce_backward",
        ),
        (
            lambda x: F.scaled_dot_product_attention(*[x.view(1, 1, 4, 3)] * 3),
            "_scaled_dot_product_flash_attention_for_cpu_backward",
        ),
        (Once.apply, "Once"),
        (Never.apply, "Never"),
    ],
)
def test_operation_and_module_are_named(function, name):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(Apply(function)))
    message = _explained(model, X)
    assert message.startswith(f"Operation {name}")
    assert "in module '1.0' (Apply) has no " in message


def test_operation_of_a_table():
    table, indices = _table("sum")
    message = _explained(table, indices)
    assert message.startswith(
        "Operation _embedding_bag_backward in module 'the model itself' (EmbeddingBag) "
        "has no second derivative"
    )


@pytest.mark.parametrize(
    "message",
    [
        "derivative for aten::_ctc_loss_backward is not implemented",
        "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is "
        "not supported for CuDNN RNNs due to limitations in the CuDNN API.",
        "the derivative for 'igamma: input' is not implemented.",
        "Trying to use forward AD with _cdist_forward that does not support it because it "
        "has not been implemented yet.",
        "trying to differentiate twice a function that was marked with "
        "@once_differentiable",
        "You must implement the jvp function for custom autograd.Function to use it with "
        "forward mode AD.",
        "torch.compile with aot_autograd does not currently support double backward",
        "index_fill does not support automatic differentiation for outputs with complex "
        "dtype.",
    ],
)
def test_messages_about_missing_derivatives(message):
    assert is_missing_derivative(RuntimeError(message))
    assert not is_missing_derivative(ValueError(message))


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (lambda: torch.linalg.det(torch.eye(2).half()), "not implemented for 'Half'"),
        (lambda: torch.vmap(lambda x: x.item())(torch.ones(2)), "vmap"),
        (lambda: torch.vmap(Once.apply)(torch.ones(2)), "setup_context"),
        (lambda: torch.ones(2, 3) @ torch.ones(2, 3), "shapes cannot be multiplied"),
        (lambda: torch.autograd.grad(torch.ones(1), torch.ones(1)), "does not require"),
    ],
)
def test_other_errors_are_not_about_derivatives(fail, said):
    with pytest.raises(RuntimeError, match=said) as caught:
        fail()
    assert not is_missing_derivative(caught.value)


def test_modules_in_place_are_not_blamed_for_later_ones():
    model = nn.Sequential(
        nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3), nn.Hardsigmoid()
    )
    assert "in module '3' (Hardsigmoid)" in _explained(model, X)
    model = nn.Sequential(nn.Linear(3, 3), nn.Hardsigmoid(), nn.ReLU(inplace=True))
    assert "in module '1' (Hardsigmoid)" in _explained(model, X)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Hardsigmoid())
    model[1].forward = lambda x: x.mul_(2)
    assert "in module '2' (Hardsigmoid)" in _explained(model, X)


def _ctc(logits):
    targets, lengths = torch.ones(1, 1).long(), torch.tensor([4])
    return F.ctc_loss(
        logits.unsqueeze(1).log_softmax(-1), targets, lengths, torch.tensor([1])
    )


LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (_ctc, "_ctc_loss_backward"),
        (lambda f: F.multi_margin_loss(f, LABELS), "multi_margin_loss_backward"),
        (
            lambda f: F.multilabel_margin_loss(f, torch.zeros(4, 3).long()),
            "multilabel_margin_loss_backward",
        ),
        (lambda f: Once.apply(f).sum(), "Once"),
    ],
)
@pytest.mark.parametrize("order", [1, 2])
def test_loss_is_blamed(loss, name, order):
    """Also where the model has an operation that the error is not about."""
    for model in (
        nn.Linear(3, 3),
        nn.Sequential(nn.Linear(3, 3), nn.Tanh()),
        nn.Sequential(nn.Linear(3, 3), Apply(lambda x: x.detach() * F.hardsigmoid(x))),
    ):
        prediction = model(X).detach().requires_grad_()
        error = _hessian_error(loss(prediction), [prediction])
        message = str(explain(error, model, lambda m=model: m(X), order, loss))
        assert message.startswith(f"Operation {name} in the loss has no second derivative")
        assert "Or use the GGN" not in message
        assert "forward" not in message.split("PyTorch said")[0]
        assert "JacobianLinearOperator and EFLinearOperator do without" in message


def test_advice_about_the_model():
    model = nn.Sequential(nn.Linear(3, 3), nn.Hardsigmoid())
    assert "Or use the GGN" in _explained(model, X)
    assert "Or use the GGN" not in _explained(model, X, order=1)
    assert "Replace it" in _explained(model, X, order=1)
    model[1] = Apply(Once.apply)
    assert "without once_differentiable. Or use the GGN" in _explained(model, X)
    model[1] = Apply(Never.apply)
    message = _explained(model, X)
    assert "has no derivative in PyTorch" in message
    assert "GGN" not in message


def test_forward_mode_names_the_operation_that_lacks_it():
    """A Hardsigmoid has forward derivatives, a table of sums has not."""
    table, indices = _table("mean")
    model = nn.Sequential(table, nn.Linear(3, 3), nn.Hardsigmoid())
    other = nn.Sequential(nn.Linear(3, 3), nn.Hardsigmoid(), Apply(Once.apply))

    def evaluate(weight):
        return torch.func.functional_call(table, {"weight": weight}, (indices,))

    error = _forward_error(evaluate, table.weight.detach())
    message = str(explain(error, model, lambda: model(indices), 1))
    assert message.startswith("Operation _embedding_bag_backward in module '0'")
    assert "no second derivative and no forward-mode derivative" in message
    error = _forward_error(Once.apply, X)
    message = str(explain(error, other, lambda: other(X), 1))
    assert message.startswith("Operation Once in module '2'")
    assert "(or give it a jvp)" in message


def test_functions_that_are_no_modules():
    inner = nn.Hardsigmoid()
    w = torch.ones(3, requires_grad=True)

    def model(w):
        return inner(X * w)

    error = _hessian_error(model(w).sum(), [w])
    message = str(explain(error, model, lambda: model(w), 2))
    assert "hardsigmoid_backward in a module of type Hardsigmoid has" in message
    message = str(explain(error, model, lambda: F.hardsigmoid(X * w), 2))
    assert "hardsigmoid_backward in the model has" in message


def test_every_module_is_called_once_and_keeps_nothing():
    calls = []

    class Counted(nn.Hardsigmoid):
        def forward(self, x, *, factor):
            calls.append(x)
            return super().forward(factor * x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.gate = Counted()

        def forward(self, x):
            return self.gate(x, factor=self.scale)

    model = Model()
    error = _hessian_error(model(X).sum(), [model.scale])
    calls.clear()
    message = str(explain(error, model, lambda: model(X), 2))
    assert "in module 'gate' (Counted)" in message
    assert len(calls) == 1
    assert model.scale.grad is None
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_models_that_fail_by_themselves():
    model = nn.Sequential(nn.Linear(3, 3), nn.Hardsigmoid(), nn.Linear(4, 4))
    error = RuntimeError("derivative for aten::hardsigmoid_backward is not implemented")
    message = str(explain(error, model, lambda: model(X), 2, lambda f: f.sum()))
    assert "in module '1' (Hardsigmoid)" in message


def test_compiled_models():
    error = RuntimeError(
        "torch.compile with aot_autograd does not currently support double backward"
    )
    model = nn.Linear(3, 3)
    message = str(explain(error, model, lambda: pytest.fail("evaluated"), 2))
    assert "Pass the model that was compiled instead" in message


def test_operation_that_is_not_found_again():
    error = RuntimeError("Double backward is not supported")
    message = str(explain(error, nn.Linear(3, 3), lambda: X, 2))
    assert message.startswith("An operation in the model has no second derivative")
    assert "Replace it" in message
    message = str(explain(error, None, lambda: Square.apply(X.clone().requires_grad_()), 2))
    assert message.startswith("Operation Square in the model has no second derivative")
    assert "Write the backward of this autograd.Function" in message


def test_custom_functions_of_a_graph():
    class Cube(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            return 3 * g * ctx.saved_tensors[0] ** 2

    x = torch.ones(2, requires_grad=True)
    value = Cube.apply(Once.apply(x)).sum() + torch.utils.checkpoint.checkpoint(
        torch.sin, x.sum(), use_reentrant=True
    )
    assert sorted(custom_functions([value])) == ["Cube", "Once"]
    assert once_differentiable_functions([value]) == ["Once"]
    assert custom_functions([torch.vmap(Cube.apply)(x)]) == ["VmappedCube"]
    assert custom_functions([x.sin(), torch.ones(2)]) == []


def test_control_flow_of_torch_is_once_differentiable():
    x = torch.ones(2, requires_grad=True)
    value = torch.ops.higher_order.cond(torch.tensor(True), torch.sin, torch.cos, (x,))
    assert once_differentiable_functions([value]) == ["CondAutogradOp"]
