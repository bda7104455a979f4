"""How well a model fits its data, as a likelihood."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from torchlinop._typing import Scalar
from torchlinop.autodiff.losses import CrossEntropy
from torchlinop.autodiff.losses.binary import BinaryCrossEntropyWithLogits
from torchlinop.autodiff.losses.squared_error import MeanSquaredError
from torchlinop.autodiff.recording import recording
from torchlinop.posterior.predictive import Likelihood
from torchlinop.sources import EmpiricalRisk
from torchlinop.structured import StructuredLinearOperator

_LIKELIHOODS = {
    CrossEntropy: Likelihood.CATEGORICAL,
    BinaryCrossEntropyWithLogits: Likelihood.BERNOULLI,
    MeanSquaredError: Likelihood.GAUSSIAN,
}


@dataclass(frozen=True)
class Fit:
    """What posteriors with different priors share."""

    risk: EmpiricalRisk
    look: int
    curvature: StructuredLinearOperator
    likelihood: Likelihood
    #: the loss, summed over the data
    total_loss: float
    #: the sum over the risk
    risk_scale: float
    num_targets: int

    def log_likelihood(self, noise_variance: float) -> float:
        """Return that of all data; for unknown likelihoods up to a constant."""
        if self.likelihood is not Likelihood.GAUSSIAN:
            return -self.total_loss
        constant = self.num_targets * math.log(2 * math.pi * noise_variance)
        return -0.5 * (self.total_loss / noise_variance + constant)


def fit_of(risk: EmpiricalRisk, curvature: StructuredLinearOperator) -> Fit:
    """Evaluate the model on its data, that of all processes."""
    told = risk.options.ranks.together(lambda: _own(risk), "evaluating a likelihood")
    totals, counts = zip(*told, strict=True)
    likelihood = _LIKELIHOODS.get(type(risk.loss), Likelihood.UNKNOWN)
    return Fit(
        risk,
        risk.looks,
        curvature,
        likelihood,
        sum(totals),
        risk.normalizer,
        sum(counts),
    )


def _own(risk: EmpiricalRisk) -> tuple[float, int]:
    """Sum of the loss over the data of this process, and the number of targets."""
    total, count = 0.0, 0
    leaves = [leaf.detach() for leaf in risk.leaves()]
    for batch in risk.batches:
        risk.require_unchanged(batch)
        share = 1.0
        if risk.loss.reduction == "mean":
            share = risk.loss.normalizer(batch.y, batch.size)
        with recording(risk.space.device, rules=False), torch.no_grad():
            prediction = risk.predict(leaves, batch)
            if share:  # else every target of the batch is ignored
                total += share * risk.loss_function(prediction, batch.y).item()
        count += prediction.numel()
    return total, count


def require_gaussian(fit: Fit) -> None:
    """Refuse a noise variance for targets without one."""
    if fit.likelihood is not Likelihood.GAUSSIAN:
        raise ValueError(
            f"{fit.risk.loss_function!r} has no noise variance: it is for MSELoss, whose "
            "targets are taken as Gaussian."
        )


def positive_number(name: str, value: Scalar) -> float:
    """Return a finite number above zero, or refuse it."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} has to be a number above zero, got {value!r}.")
    return number
