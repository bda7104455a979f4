"""The generalized Gauss-Newton matrix."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.autodiff.losses import HessianProduct
from torchlinop.curvature.gauss_newton import BatchGaussNewton
from torchlinop.curvature.summed import SummedLinearOperator, as_risk
from torchlinop.data import Batch
from torchlinop.sources import EmpiricalRisk


class GGNLinearOperator(SummedLinearOperator):
    r"""Generalized Gauss-Newton matrix of the empirical risk.

    .. math:: G = \frac1Z \sum_n J_n^\top \, \nabla_f^2 \ell(f_n, y_n) \, J_n

    with :math:`J_n` the Jacobian of the prediction :math:`f_n` with respect to the
    parameters: the Hessian of the risk with the model replaced by its linearization.
    Positive semi-definite for losses that are convex in the prediction. For softmax
    cross-entropy and squared error it is the Fisher information matrix.

    Parameters
    ----------
    model, loss_function, params, data
        What :class:`~torchlinop.EmpiricalRisk` describes; any loss will do.
    **options
        Keyword arguments of :class:`~torchlinop.EmpiricalRisk`.

    Attributes
    ----------
    space : ParameterSpace
        Order, names and shapes of the parameters in a vector.

    References
    ----------
    Schraudolph, "Fast curvature matrix-vector products for second-order gradient
    descent", Neural Computation 14 (2002), https://doi.org/10.1162/08997660260028683

    Examples
    --------
    For a linear model the GGN is the Hessian, here :math:`\frac2N X^\top X`:

    >>> import torch
    >>> from torchlinop import GGNLinearOperator
    >>> X, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1)
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> G = GGNLinearOperator(model, torch.nn.MSELoss(), model.parameters(), [(X, y)])
    >>> G @ torch.tensor([1.0, -1.0])
    tensor([-4., -6.])
    """

    def __init__(
        self,
        model: Model | EmpiricalRisk,
        loss_function: Loss | None = None,
        params: Parameters | None = None,
        data: Data | None = None,
        **options: Any,
    ) -> None:
        risk = as_risk(model, loss_function, params, data, options)
        if risk.flat:
            warnings.warn(
                f"{risk.loss_function!r} is piecewise linear in the prediction: its second "
                "derivative, and with it this matrix, is zero. Use a smooth loss "
                "(CrossEntropyLoss on logits for NLLLoss, HuberLoss for L1Loss), or the "
                "Hessian or EFLinearOperator.",
                UserWarning,
                stacklevel=2,
            )
        super().__init__(risk, BatchGaussNewton(risk, _loss_hessian))


def _loss_hessian(risk: EmpiricalRisk, prediction: Tensor, batch: Batch) -> HessianProduct:
    """Return the loss Hessian at a prediction, divided by the normaliser."""
    return risk.loss.hessian_product(prediction, batch.y, batch.size, 1 / risk.normalizer)
