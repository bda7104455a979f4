"""Norms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from torchlinop._operator import TorchLinearOperator, aslinearoperator
from torchlinop.estimate.arguments import not_empty, require_squares
from torchlinop.estimate.estimates import Estimate
from torchlinop.estimate.hutchinson import Hutchinson, product_rows, row_dots, unit_rows
from torchlinop.estimate.probes import Probes, ProbeSource
from torchlinop.estimate.sampling import sampled


def frobenius_norm(
    A: Any,
    *,
    num_matvecs: int | None = None,
    rtol: float | None = None,
    probes: Probes = "rademacher",
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    r"""Estimate the Frobenius norm, :math:`\|A\|_F^2 = \mathrm{E} \|A z\|^2`.

    Parameters
    ----------
    A
        Operator or matrix of any shape ``(M, N)``; of a wide one the adjoint is multiplied.
    num_matvecs
        Most vectors to multiply, at most ``min(M, N)``.
    rtol
        Relative standard error at which to stop; 0.01 if neither is given. If that takes
        ``min(M, N)`` products and no number is given, the norm is computed exactly.
    probes
        Distribution of the random vectors: ``"rademacher"``, ``"gaussian"`` or
        ``"sphere"``.
    seed
        Of the random vectors, the same on every device.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Estimate
        The square of its value is unbiased.

    Raises
    ------
    ValueError
        An argument is out of range.
    numpy.linalg.LinAlgError
        A product is not finite.
    Interrupted
        On Ctrl-C, with the estimate so far.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import estimate
    >>> float(estimate.frobenius_norm(torch.tensor([[3.0, 4.0]])))
    5.0
    """
    A = not_empty(aslinearoperator(A), "frobenius_norm")
    if A.shape[1] > A.shape[0]:
        A = A._adjoint()
    source = ProbeSource(A, probes, seed)
    squared = Hutchinson(A, source, _squares, lambda: _exact(A), root_of)
    return sampled(squared, num_matvecs, rtol, seed, progress)


def root_of(square: float, error: float) -> tuple[float, float]:
    """Root of an estimate, and its standard error."""
    root = math.sqrt(square)
    return root, error / (2 * root) if root else 0.0


def _squares(_: Tensor, az: Tensor) -> np.ndarray:
    require_squares(az, "frobenius_norm")
    return row_dots(az, az).real


def _exact(A: TorchLinearOperator) -> float:
    total = 0.0
    for _, rows in unit_rows(A):
        image = product_rows(A, rows)
        total += row_dots(image, image).real.sum().item()
    return math.sqrt(total)
