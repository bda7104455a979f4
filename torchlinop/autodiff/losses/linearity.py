"""Losses without curvature, with which a Gauss-Newton matrix is zero."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinop.autodiff.diagnose import is_missing_derivative
from torchlinop.autodiff.losses.loss_function import LikelihoodLoss, LossFunction

#: multiples of a prediction at which a loss is looked at; a probability stays one, and the
#: logarithm of one a negative number
_MULTIPLES = (1.0, 0.5, 0.1, 1e-2, 1e-3)


def is_piecewise_linear(
    loss: LossFunction, prediction: Tensor, target: Tensor, batch_size: int
) -> bool:
    """Whether a loss is linear in the prediction up to kinks: its Hessian is zero.

    So are ``L1Loss``, ``NLLLoss`` and hinge losses, and with them every Gauss-Newton
    matrix. A loss whose Hessian is zero only at this prediction, as that of ``HuberLoss``
    with large residuals, is not piecewise linear: it is evaluated at smaller
    predictions and close to the target, too. ``False`` where a second derivative is
    missing, which is another error.
    """
    if isinstance(loss, LikelihoodLoss) or not prediction.numel():
        return False
    prediction = prediction.detach()
    generator = torch.Generator("cpu").manual_seed(0)
    u = torch.randn(prediction.shape, generator=generator, device="cpu").to(prediction)
    points = [multiple * prediction for multiple in _MULTIPLES]
    if isinstance(target, Tensor) and target.shape == prediction.shape:
        y = target.to(prediction)
        points += [y + multiple * (prediction - y) for multiple in _MULTIPLES[1:]]
    try:
        with torch.enable_grad():
            products = (
                loss.hessian_product(point, target, batch_size, 1.0)(u) for point in points
            )
            return not any(product.count_nonzero() for product in products)
    except (RuntimeError, NotImplementedError) as error:
        if is_missing_derivative(error):
            return False
        raise
