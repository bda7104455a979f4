"""What losses tell about themselves: the dimension of a datum, whether they are linear."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchlinop.autodiff.losses import as_loss, is_piecewise_linear


@pytest.mark.parametrize(
    ("loss", "shape", "dim"),
    [
        (nn.CrossEntropyLoss(), (5, 3), -1),
        (nn.CrossEntropyLoss(), (5, 3, 2, 4), -3),
        (nn.CrossEntropyLoss(), (3,), -1),
        (nn.NLLLoss(), (5, 3, 2), -2),
        (nn.MSELoss(), (5, 3, 2), -1),
        (nn.MSELoss(), (5,), None),
        (nn.MSELoss(), (), None),
        (nn.BCEWithLogitsLoss(), (5, 3), -1),
        (nn.BCEWithLogitsLoss(), (5,), None),
        (nn.HuberLoss(), (5, 3), -1),
    ],
)
def test_dimension_of_a_datum(loss, shape, dim):
    prediction = torch.zeros(shape)
    assert as_loss(loss, None).row_dimension(prediction) == dim


def _log_probabilities():
    return torch.randn(6, 3).log_softmax(-1)


LABELS = torch.arange(6) % 3
VALUES = torch.linspace(-2, 2, 18).view(6, 3)
PROBABILITIES = VALUES.sigmoid()


@pytest.mark.parametrize(
    ("loss", "prediction", "target", "expected"),
    [
        (nn.L1Loss(), VALUES, -VALUES, True),
        (nn.NLLLoss(), _log_probabilities(), LABELS, True),
        (nn.NLLLoss(ignore_index=0), _log_probabilities(), LABELS, True),
        (lambda f, y: (1 - f * y).relu().sum(), VALUES, VALUES.sign(), True),
        (lambda f, y: f.sum(), VALUES, LABELS, True),
        (lambda f, y: torch.zeros(()), VALUES, LABELS, True),
        (
            lambda f, y: (1 - f * y).relu().square().sum(),
            9 + VALUES,
            torch.ones(6, 3),
            False,
        ),
        (nn.HuberLoss(delta=0.1), 50 + VALUES, VALUES, False),
        (nn.SmoothL1Loss(), 50 + VALUES, VALUES, False),
        (nn.SoftMarginLoss(), VALUES, VALUES.sign(), False),
        (nn.BCELoss(), PROBABILITIES, PROBABILITIES.round(), False),
        (nn.PoissonNLLLoss(), VALUES, VALUES.exp(), False),
        (nn.CrossEntropyLoss(), VALUES, LABELS, False),
        (nn.MSELoss(), VALUES, VALUES, False),
        (nn.MultiMarginLoss(), VALUES, LABELS, False),  # no second derivative: an error
    ],
)
def test_piecewise_linear(loss, prediction, target, expected):
    known = isinstance(loss, nn.Module) and not isinstance(loss, nn.MultiMarginLoss)
    loss = as_loss(loss, None if known else "sum")
    state = torch.get_rng_state()
    assert is_piecewise_linear(loss, prediction, target, len(prediction)) is expected
    assert torch.equal(torch.get_rng_state(), state)


def test_piecewise_linear_leaves_errors_alone():
    def loss(prediction, target):
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        is_piecewise_linear(as_loss(loss, "sum"), VALUES, LABELS, 6)
