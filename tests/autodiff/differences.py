"""Derivatives up to the third, compared with differences of the next lower ones."""

from __future__ import annotations

import torch


def made(inputs):
    """Tensors from what a table says of them."""
    torch.manual_seed(0)
    return [(torch.randn(x) if isinstance(x, tuple) else x()).double() for x in inputs]


def by_autograd(f, inputs, directions):
    """Derivative of ``f`` along one direction after the other."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = f(*leaves)
    for direction in directions:
        if not value.requires_grad:
            return torch.zeros_like(value)
        parts = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        pairs = zip(parts, direction, strict=True)
        value = sum((p * d).sum() for p, d in pairs if p is not None)
    return value.detach()


def by_transforms(f, inputs, directions):
    """The same with nested transforms."""
    for direction in directions:

        def f(*args, previous=f, direction=direction):
            parts = torch.func.grad(previous, tuple(range(len(args))))(*args)
            return sum((p * d).sum() for p, d in zip(parts, direction, strict=True))

    return f(*inputs)


def by_forward_mode(f, inputs, directions):
    """The same with nested forward-mode derivatives."""
    for direction in directions:

        def f(*args, previous=f, direction=direction):
            return torch.func.jvp(previous, args, tuple(direction))[1]

    return f(*inputs)


def check(f, inputs, derivative=by_autograd, step=1e-3):
    """Compare each derivative with central differences, of fourth order, of the last."""
    with torch.no_grad():
        weights = torch.randn_like(f(*inputs))

    def scalar(*args):
        return (weights * (f(*args) + 0.3).sin()).sum()

    directions = [[2 * torch.rand_like(x) - 1 for x in inputs] for _ in range(3)]
    for order in range(1, 4):
        value = derivative(scalar, inputs, directions[:order])
        expected = 0.0
        for shift, weight in ((1, 2 / 3), (-1, -2 / 3), (2, -1 / 12), (-2, 1 / 12)):
            pairs = zip(inputs, directions[order - 1], strict=True)
            shifted = [x + shift * step * d for x, d in pairs]
            lower = by_autograd(scalar, shifted, directions[: order - 1])
            expected = expected + weight * lower / step
        torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-7)
