"""Layer norm for first derivatives: torch's kernels, but right to any order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchlinop.autodiff.rules.normalizations import FIRST

from .differences import check

_layer_norm = FIRST[F.layer_norm]


def _tensors(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@pytest.mark.parametrize("affine", [0, 1, 2])
def test_derivatives(shape, affine):
    inputs = _tensors((2, 3, 5), *[shape] * affine)
    with torch.no_grad():
        expected = F.layer_norm(inputs[0], shape, *inputs[1:])
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.testing.assert_close(_layer_norm(leaves[0], shape, *leaves[1:]), expected)

    def function(x, *rest):
        if not x.requires_grad:  # nothing is differentiated
            return F.layer_norm(x, shape, *rest)
        return _layer_norm(x, shape, *rest)

    check(function, inputs)


def test_several_gradients_at_once():
    x, w, b = leaves = [t.requires_grad_() for t in _tensors((4, 5), 5, 5)]
    y = _layer_norm(x, (5,), w, b)
    assert type(y.grad_fn).__name__ == "_LayerNormBackward"
    (seeds,) = _tensors((3, 4, 5))
    batched = torch.autograd.grad(
        y, leaves, seeds, is_grads_batched=True, retain_graph=True
    )
    for i, seed in enumerate(seeds):
        expected = torch.autograd.grad(F.layer_norm(x, (5,), w, b), leaves, seed)
        for part, of_one in zip(batched, expected, strict=True):
            torch.testing.assert_close(part[i], of_one)


def test_is_left_to_torch_within_transforms():
    (x,) = _tensors((4, 5))
    gradient = torch.func.grad(lambda x: F.layer_norm(x, (5,)).pow(3).sum())(x)
    seen = []

    def function(x):
        seen.append(_layer_norm(x, (5,)))
        return F.layer_norm(x, (5,)).pow(3).sum()

    torch.testing.assert_close(torch.func.grad(function)(x), gradient)
    assert seen == [NotImplemented]
