"""Wrong derivatives of user-written Functions are found, right ones never suspected."""

from __future__ import annotations

import itertools

import pytest
import torch
from torchlinop.autodiff.differences import (
    WrongDerivativeError,
    check_hessian,
    check_jacobian,
)
from torchlinop.autodiff.linearize import HessianProduct, JacobianProducts

DTYPES = [torch.float32, torch.float64]


class Right(torch.autograd.Function):
    """``x + sin(x) / 2``."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x + 0.5 * x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 + 0.5 * x.cos())


class Square(torch.autograd.Function):
    """``x^2``, whose backward is right, and right if it is differentiated again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x


class NumPySaved(Square):
    @staticmethod
    def forward(ctx, x):
        ctx.array = x.detach().numpy()
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * g * torch.from_numpy(ctx.array)


class Detached(Square):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x.detach()


class NoGrad(Square):
    @staticmethod
    @torch.no_grad()
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x


def _hessian(value, leaves):
    """Check the Hessian of ``value(leaves)`` as it comes out of double backward."""

    def gradient(leaves, create_graph=False):
        return torch.autograd.grad(
            value(leaves), leaves, create_graph=create_graph, allow_unused=True
        )

    own = [leaf.detach().requires_grad_() for leaf in leaves]
    product = HessianProduct(gradient(own, create_graph=True), own)
    check_hessian(gradient, product, leaves, ["F", "G"])


def _jacobian(function, leaves):
    own = [leaf.detach().requires_grad_() for leaf in leaves]
    product = JacobianProducts(function(own), own)
    check_jacobian(function, product.jvp, leaves, ["F"])


def _quadratic(square, share):
    """Half the square of the norm; the Function contributes ``share`` of its Hessian."""

    def value(leaves):
        (x,) = leaves
        return 0.5 * ((1 - share) * x.square() + share * square(x)).sum()

    return value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [NumPySaved, Detached, NoGrad])
def test_second_derivative_that_lacks_a_tenth(function, dtype):
    x = torch.linspace(-1, 2, 7, dtype=dtype)
    with pytest.raises(
        WrongDerivativeError, match=r"second derivative .* 10 % off.* F, G,"
    ):
        _hessian(_quadratic(function.apply, 0.1), [x])
    _hessian(_quadratic(Square.apply, 0.1), [x])
    _hessian(_quadratic(function.apply, 0.02), [x])  # within what is not looked at


def _network(activation, function, sizes, samples, seed, dtype):
    torch.manual_seed(seed)
    leaves = []
    for n_in, n_out in itertools.pairwise(sizes):
        bias = torch.randn(n_out) * 0.1 * (seed % 2)  # zeros: kinks at the very point
        leaves += [torch.randn(n_in, n_out) / n_in**0.5, bias]
    X, y = torch.randn(samples, sizes[0]), torch.randn(samples, sizes[-1])
    leaves, X, y = [t.to(dtype) for t in leaves], X.to(dtype), y.to(dtype)

    def value(leaves):
        h = X
        for W, b in zip(leaves[:-2:2], leaves[1:-2:2], strict=True):
            h = function(activation(h @ W + b))
        return (h @ leaves[-2] + leaves[-1] - y).square().mean()

    return value, leaves


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [torch.relu, torch.abs], ids=["relu", "abs"])
def test_kinks_are_no_errors(activation, dtype):
    """Some of these networks have units at zero: a dead layer in front, no bias."""
    for seed in range(100):
        _hessian(*_network(activation, Right.apply, (4, 8, 6, 2), 20, seed, dtype))


def test_kink_at_the_point():
    """Differences converge, to the mean of the derivatives on both sides."""
    for dtype in DTYPES:
        x = torch.tensor([0.0, 1.0, -1.0], dtype=dtype)
        _hessian(lambda leaves: Square.apply(leaves[0].relu()).sum(), [x])
        _jacobian(lambda leaves: Right.apply(leaves[0].relu()), [x])


def test_very_many_kinks_are_no_errors():
    """Their number grows like the step, so that differences agree, without converging."""
    torch.manual_seed(0)
    X = torch.randn(1_000_000)

    def value(leaves):
        h = (X * leaves[0] - 0.3).relu()
        return (Right.apply(h).square() + 3 * h).mean()

    _hessian(value, [torch.ones(1)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_kinks_beside_an_error(dtype):
    """Coarse steps cross them, fine ones do not."""
    x = torch.ones(4, dtype=dtype)

    def value(leaves):
        kinks = (leaves[0] - (1 - 2**-5)).abs()
        return (Detached.apply(leaves[0]) + leaves[0].pow(3) + kinks).sum()

    with pytest.raises(WrongDerivativeError, match="25 % off"):
        _hessian(value, [x])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [torch.relu, torch.tanh], ids=["relu", "tanh"])
@pytest.mark.parametrize("function", [NumPySaved, Detached])
def test_errors_in_a_network(function, activation, dtype):
    value, leaves = _network(activation, function.apply, (4, 8, 2), 20, 1, dtype)
    with pytest.raises(WrongDerivativeError, match=r"% off from finite differences"):
        _hessian(value, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_that_is_small_in_all(dtype):
    """It is looked for leaf by leaf."""
    x, tiny = torch.ones(5, dtype=dtype), torch.full((2,), 1e-3, dtype=dtype)

    def value(leaves):
        return 1e3 * leaves[0].pow(4).sum() + Detached.apply(leaves[1]).sum()

    with pytest.raises(WrongDerivativeError, match="100 % off"):
        _hessian(value, [x, tiny])


@pytest.mark.parametrize("dtype", DTYPES)
def test_jacobian_products(dtype):
    class Cut(Square):
        """Its gradient is right, and no function of the cotangent to torch."""

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return 2 * g.detach() * x

    class Through(Square):
        """Rounds, and pretends not to."""

        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, g):
            return 1.0 * g

    x = torch.tensor([0.3, 1.2, -2.1], dtype=dtype)
    for right in (Square, Detached, NumPySaved):
        _jacobian(lambda leaves, right=right: right.apply(leaves[0]).sin(), [x])
    with pytest.raises(WrongDerivativeError, match="derivative that torch computes"):
        _jacobian(lambda leaves: leaves[0] + Cut.apply(leaves[0]).sin(), [x])
    with pytest.raises(WrongDerivativeError, match="pass check_derivatives=False"):
        _jacobian(lambda leaves: Through.apply(leaves[0]), [0.01 * x])


def test_what_is_not_known_is_no_error():
    x = torch.ones(3)

    def not_elsewhere(leaves):
        if not torch.equal(leaves[0].detach(), x):
            raise RuntimeError("not positive definite")
        return leaves[0].square()

    _jacobian(not_elsewhere, [x])
    check_jacobian(lambda leaves: leaves[0] + torch.nan, lambda v: v[0], [x], ["F"])
    check_jacobian(lambda leaves: leaves[0].exp() * 1e-45, lambda v: v[0] * 0, [x], ["F"])
    for dtype in (torch.float16, torch.bfloat16):  # too coarse
        _hessian(_quadratic(Detached.apply, 0.5), [x.to(dtype)])


def test_leaves_that_are_unused_or_zero():
    leaves = [torch.ones(3), torch.zeros(2), torch.zeros(2)]

    def value(leaves):
        return Square.apply(leaves[0] + leaves[1].sum()).pow(2).sum()

    state = torch.get_rng_state()
    _hessian(value, leaves)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(WrongDerivativeError, match="second derivative"):
        _hessian(lambda leaves: Detached.apply(leaves[0] + leaves[1].sum()).sum(), leaves)
    _hessian(lambda leaves: Right.apply(leaves[0]).sum(), leaves)
