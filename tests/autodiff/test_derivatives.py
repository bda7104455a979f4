"""What a model may call has right first, second and third derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchlinop.autodiff.rules import Corrections, SecondOrderRules, functions

from .corrected import CORRECTED
from .differences import by_forward_mode, by_transforms, check, made
from .functions import FUNCTIONS
from .inputs import spread

#: what cannot be made without arguments
MADE = {
    "Threshold": lambda: nn.Threshold(0.3, -1.0),
    "MultiheadAttention": lambda: nn.MultiheadAttention(6, 2),
}


@pytest.fixture(autouse=True)
def _also_on_small_tensors(monkeypatch):
    monkeypatch.setattr(functions, "_SMALL", 0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(name):
    f, *inputs = FUNCTIONS[name]
    with Corrections():
        check(f, made(inputs))


@pytest.mark.parametrize("mode", [Corrections, SecondOrderRules])
@pytest.mark.parametrize("name", CORRECTED)
def test_corrected_derivatives(name, mode):
    f, *inputs = CORRECTED[name]
    inputs = made(inputs)
    expected = f(*inputs)
    with mode():
        value = f(*[x.requires_grad_() for x in inputs]).detach()
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        check(f, inputs)


@pytest.mark.parametrize("derivative", [by_transforms, by_forward_mode])
@pytest.mark.parametrize("name", CORRECTED)
def test_derivatives_inside_transforms(name, derivative):
    f, *inputs = CORRECTED[name]
    with SecondOrderRules():
        check(f, made(inputs), derivative)


@pytest.mark.parametrize("name", nn.modules.activation.__all__)
def test_modules_of_activations(name):
    """All that torch has, those of newer versions included."""
    module = MADE.get(name, getattr(nn, name))().double().eval()
    if hasattr(module, "dim"):
        module.dim = -1
    inputs = made([spread(2, 4, 6, 2) if name == "Softmax2d" else spread(4, 6)])

    def call(x):
        return module(x, x, x)[0] if name == "MultiheadAttention" else module(x)

    with Corrections():
        check(call, inputs)
        if hasattr(module, "inplace"):
            module.inplace = True
            check(lambda x: module(1 * x), inputs)
