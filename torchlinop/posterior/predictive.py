"""What a Gaussian distribution of predictions says about targets."""

from __future__ import annotations

import enum
import math
import operator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

#: normal numbers that are drawn at once
_CHUNK = 1 << 22


class Likelihood(enum.StrEnum):
    """How targets are distributed, given a prediction."""

    #: one class, with the prediction as logits
    CATEGORICAL = "categorical"
    #: a bit for each entry of the prediction, which is its logit
    BERNOULLI = "bernoulli"
    #: around the prediction, with a constant variance
    GAUSSIAN = "gaussian"
    #: of a loss whose likelihood is not known
    UNKNOWN = "unknown"


@dataclass(frozen=True, eq=False)
class Predictive:
    r"""Normal distribution of a linearized model's predictions for some samples.

    Attributes
    ----------
    mean : Tensor
        Predictions at the mean of the parameters, shape ``(N, C)``.
    covariance : Tensor
        Shape ``(N, C, C)``: :math:`J_n \Sigma J_n^\top` with the Jacobian :math:`J_n` of
        sample ``n`` and the covariance :math:`\Sigma` of the parameters.
    likelihood : Likelihood
        How targets are distributed around a prediction.
    noise_variance : float
        Variance of Gaussian targets around a prediction.
    """

    mean: Tensor
    covariance: Tensor
    likelihood: Likelihood
    noise_variance: float = 1.0

    @property
    def variance(self) -> Tensor:
        """Variances of the predictions, shape ``(N, C)``."""
        return self.covariance.diagonal(dim1=1, dim2=2)

    @property
    def target_covariance(self) -> Tensor:
        """Covariance of new targets: with their own noise, shape ``(N, C, C)``.

        Raises
        ------
        ValueError
            The likelihood is not Gaussian.
        """
        if self.likelihood is not Likelihood.GAUSSIAN:
            raise ValueError(
                f"Targets with a {self.likelihood} likelihood have no constant noise; "
                "target_covariance is for MSELoss. Use probit() or monte_carlo() for "
                "probabilities of classes."
            )
        noise = torch.eye(self.mean.shape[1], dtype=self.mean.dtype).to(self.mean.device)
        return self.covariance + self.noise_variance * noise

    def probit(self) -> Tensor:
        r"""Probabilities of classes, ``(N, C)``, by logits scaled for their variance.

        .. math:: p_n = \mathrm{softmax}\Big(
            \frac{f_{nc}}{\sqrt{1 + \frac\pi8 \operatorname{var} f_{nc}}}\Big)

        or the sigmoid of the same for binary targets: the logistic function is nearly that
        of a normal distribution (probit), whose mean is known. It never changes the most
        probable of two classes; covariances of the logits are left out.

        Raises
        ------
        ValueError
            The targets are not classes.

        References
        ----------
        MacKay, "The evidence framework applied to classification networks", Neural
        Computation 4 (1992), https://doi.org/10.1162/neco.1992.4.5.720
        """
        return self._probabilities(self.mean / (1 + math.pi / 8 * self.variance).sqrt())

    def monte_carlo(self, num_samples: int = 1000, *, seed: int = 0) -> Tensor:
        """Probabilities of classes, ``(N, C)``: means over drawn predictions.

        Parameters
        ----------
        num_samples
            How many predictions are drawn for each sample.
        seed
            Of the random numbers: the same for every device.

        Raises
        ------
        ValueError
            The targets are not classes, or ``num_samples`` is no positive integer.
        """
        num_samples = positive_integer("num_samples", num_samples)
        generator = Generator("cpu").manual_seed(seed)
        values, vectors = torch.linalg.eigh(self.covariance)
        roots = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
        total = torch.zeros_like(self.mean)
        step = max(1, min(num_samples, _CHUNK // max(1, self.mean.numel())))
        for start in range(0, num_samples, step):
            count = min(step, num_samples - start)
            shape = (count, *self.mean.shape)
            noise = torch.randn(
                shape, generator=generator, dtype=torch.float64, device="cpu"
            ).to(self.mean)
            drawn = self.mean + torch.einsum("ncd,snd->snc", roots, noise)
            total += self._probabilities(drawn).sum(0)
        return total / num_samples

    def _probabilities(self, logits: Tensor) -> Tensor:
        if self.likelihood is Likelihood.CATEGORICAL:
            return logits.softmax(-1)
        if self.likelihood is Likelihood.BERNOULLI:
            return logits.sigmoid()
        raise ValueError(
            f"Targets with a {self.likelihood} likelihood are not classes: probabilities "
            "are for CrossEntropyLoss and BCEWithLogitsLoss. Use mean and covariance."
        )


def positive_integer(name: str, value: int) -> int:
    """Return an integer of at least 1, or refuse it."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name} has to be a positive integer, got {value!r}.")
    return number
