"""Inputs of functions, and functions of the parameters of a module."""

from __future__ import annotations

import torch
from torch.func import functional_call


def positive(*shape):
    return lambda: torch.rand(*shape) + 0.5


def inner(*shape):
    """Within (0, 1), or within the pixels of a grid."""
    return lambda: 0.1 + 0.8 * torch.rand(*shape)


def spread(*shape):
    """Distinct numbers from -4 to 4, of which none is a multiple of a half."""

    def make():
        size = torch.Size(shape).numel()
        values = torch.linspace(-3.87, 3.91, size)[torch.randperm(size)]
        near = (2 * values - (2 * values).round()).abs() < 0.04
        return (values + 0.04 * near).reshape(shape)

    return make


def regular(n):
    return lambda: torch.randn(n, n) + 4 * torch.eye(n)


def module(make, *inputs, **options):
    """A module as a function of its input and its parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = make().double()
    names, values = zip(*made.named_parameters(), strict=True)

    def call(*args):
        X, weights = args[: len(inputs)], args[len(inputs) :]
        result = functional_call(made, dict(zip(names, weights, strict=True)), X, options)
        return result if isinstance(result, torch.Tensor) else result[0]

    return call, *inputs, *(tuple(v.shape) for v in values)
