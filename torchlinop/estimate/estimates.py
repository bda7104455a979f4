"""An estimate and how far it can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Estimate:
    """A random estimate with its standard error.

    Attributes
    ----------
    value : float, complex or torch.Tensor
        The estimate; of a diagonal a tensor ``(N,)`` on the operator's device.
    stderr : float or torch.Tensor
        Its standard error, estimated from the same numbers: the truth is within one of it
        in about two of three cases, within two in 95 of 100. Zero where the value is
        exact, infinite where there was one sample only.
    num_matvecs : int
        Vectors that were multiplied.
    method : str
        How it was found; ``"exact"`` where that was no more work.
    seed : int
        Of the random vectors.

    Examples
    --------
    >>> from torchlinop.estimate import Estimate
    >>> print(Estimate(0.53117, 0.00213, 120, "hutchinson", 0))
    0.5312 +- 0.0021 (120 products)
    >>> float(Estimate(0.53117, 0.00213, 120, "hutchinson", 0))
    0.53117
    """

    value: Any
    stderr: Any
    num_matvecs: int
    method: str
    seed: int

    def __float__(self) -> float:
        if isinstance(self.value, Tensor):
            raise TypeError(
                f"The estimate is a vector of shape {tuple(self.value.shape)}, no number: "
                "use its .value."
            )
        return float(self.value)

    def __str__(self) -> str:
        if isinstance(self.value, Tensor):
            size = self.value.abs().square().sum().sqrt().item()
            error = self.stderr.square().sum().sqrt().item()
            text = f"vector of norm {_plus_minus(size, error)}"
        else:
            text = _plus_minus(self.value, self.stderr)
        return f"{text} ({self.num_matvecs} products)"


def _plus_minus(value: float | complex, error: float) -> str:
    """Two digits of the error, and as many of the value as it leaves."""
    if error == 0 or not math.isfinite(error):
        return f"{value:.6g} +- {error:.2g}"
    exponent = math.floor(math.log10(error))
    if -5 < exponent < 6:
        places = max(1 - exponent, 0)
        return f"{value:.{places}f} +- {error:.{places}f}"
    digits = max(1, math.floor(math.log10(max(abs(value), error))) - exponent + 1)
    return f"{value:.{digits}e} +- {error:.1e}"


def mean_and_stderr(samples: np.ndarray) -> tuple[Any, float]:
    """Mean and its standard error, of real or complex numbers."""
    count = len(samples)
    mean = samples.mean()
    if count < 2:
        return mean.item(), math.inf
    variance = (np.abs(samples - mean) ** 2).sum() / (count - 1)
    return mean.item(), math.sqrt(variance / count)


def dependent_mean(samples: np.ndarray, without: np.ndarray) -> tuple[Any, float]:
    r"""Mean of samples that depend on one another, and its standard error.

    Sample :math:`t_i` is made of random vector ``i`` and of a space that all the others
    span, and whatever the others are, its mean is the truth. Then so is that of
    :math:`t_i^{(j)}`, which is made without vector ``j``, and since two vectors are
    independent given all others,

    .. math:: \mathrm{cov}(t_i, t_j) = E (t_i - t_i^{(j)}) \overline{(t_j - t_j^{(i)})},

    in which the truth does not occur. With the mean of these products over all pairs the
    estimate of the variance has no bias.

    Parameters
    ----------
    samples
        Shape ``(m,)``.
    without
        Shape ``(m, m)``: entry ``i, j`` is sample ``i`` without vector ``j``. The diagonal
        is not looked at.
    """
    count = len(samples)
    mean, error = mean_and_stderr(samples)
    if count < 2:
        return mean, error
    change = samples[:, None] - without
    np.fill_diagonal(change, 0)
    covariance = (change * change.conj().T).sum().real / (count * (count - 1))
    return mean, math.sqrt(error**2 + max(covariance, 0.0))
