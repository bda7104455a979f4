"""The gradient of the empirical risk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.autodiff.recording import recording
from torchlinop.curvature.summed import as_risk
from torchlinop.sources import EmpiricalRisk


def gradient_and_loss(
    model: Model | EmpiricalRisk,
    loss_function: Loss | None = None,
    params: Parameters | None = None,
    data: Data | None = None,
    **options: Any,
) -> tuple[list[Tensor], Tensor]:
    """Gradient and value of the empirical risk on all data.

    Parameters
    ----------
    model, loss_function, params, data, **options
        What :class:`~torchlinop.EmpiricalRisk` describes, or a risk alone.

    Returns
    -------
    gradient : list of Tensor
        One tensor for each parameter, in the order of ``params``. The parameters' own
        ``.grad`` is untouched.
    loss : Tensor
        A scalar.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import gradient_and_loss
    >>> model = lambda params, X: X @ params[0]
    >>> data = [(torch.eye(2), torch.ones(2, 1))]
    >>> gradient_and_loss(model, torch.nn.MSELoss(), [torch.zeros(2, 1)], data)
    ([tensor([[-1.],
            [-1.]])], tensor(1.))
    """
    risk = as_risk(model, loss_function, params, data, options)
    ranks = risk.options.ranks
    if any(ranks.together(risk.changed, "computing a gradient")):
        risk.survey()
    space = risk.space
    like = torch.empty(0, dtype=space.dtype, device=space.device)
    total = ranks.sum(lambda: _share(risk), like, (space.dim + 1,), "computing a gradient")
    return space.split(total[:-1]), total[-1].clone()


def _share(risk: EmpiricalRisk) -> Tensor:
    """Return the flat gradient, and behind it the value, of this process's data."""
    leaves = risk.leaves()
    gradient = [torch.zeros_like(leaf) for leaf in leaves]
    loss = torch.zeros((), dtype=risk.space.dtype, device=risk.space.device)
    for batch in risk.batches:
        share = 1.0
        if risk.loss.reduction == "mean":
            share = risk.loss.normalizer(batch.y, batch.size) / risk.normalizer
            if share == 0:  # every target of the batch is ignored
                continue
        with recording(risk.space.device, rules=False):
            value = share * risk.loss_function(risk.predict(leaves, batch), batch.y)
            parts = torch.autograd.grad(value, leaves, allow_unused=True)
        loss += value.detach()
        for total, part in zip(gradient, parts, strict=True):
            if part is not None:
                total += part
    flat = risk.space.join(gradient)
    return torch.cat([flat, loss.reshape(1)])
