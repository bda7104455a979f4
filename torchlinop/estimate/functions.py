r"""Traces of functions of a matrix, by stochastic Lanczos quadrature."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchlinop.estimate.arguments import (
    at_least_zero,
    positive_count,
    square_operator,
    target,
)
from torchlinop.estimate.estimates import Estimate
from torchlinop.estimate.probes import Probes, ProbeSource, block_size
from torchlinop.estimate.progress import progress_bar
from torchlinop.estimate.quadratures import Function, Quadratures
from torchlinop.estimate.sampling import Interrupted

#: relative standard error that is aimed at where nothing is said
_RTOL = 0.01
#: random vectors of the first block, from which it is learned how many steps it takes
_FIRST = 8
#: most vectors, as a multiple of ``N``, where there is no other limit
_MOST = 4


def function_trace(
    A: Any,
    f: Function,
    *,
    num_matvecs: int | None = None,
    rtol: float | None = None,
    num_steps: int | None = None,
    probes: Probes = "rademacher",
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    r"""Estimate :math:`\mathrm{tr} f(A) = \sum_i f(\lambda_i)` of a symmetric matrix.

    The mean over random vectors of :math:`z^H f(A) z`, each by a Gauss quadrature from
    Lanczos' recurrence.

    Parameters
    ----------
    A
        Symmetric or Hermitian operator or matrix, shape ``(N, N)``.
    f
        From eigenvalues, a float64 array of any shape, to an array of the same shape.
        The smoother it is on the spectrum, the fewer steps it takes.
    num_matvecs
        Most vectors to multiply, in all steps together.
    rtol
        Relative standard error at which to stop; 0.01 if neither is given.
    num_steps
        Products for each random vector. By default as many as it takes for the quadrature
        to change by less than a tenth of the standard error.
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
        Its standard error has the last change of the quadratures added; where they have
        not settled, those that would follow as well.

    Raises
    ------
    ValueError
        ``A`` is not square or not symmetric, an argument is out of range, or ``f`` is not
        finite at a Ritz value.
    TypeError
        ``f`` does not take NumPy arrays.
    numpy.linalg.LinAlgError
        A product is not finite.
    Interrupted
        On Ctrl-C, with the estimate so far.

    References
    ----------
    Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature",
    SIAM J. Matrix Anal. Appl. 38 (2017), https://doi.org/10.1137/16M1104974

    Examples
    --------
    >>> import numpy as np, torch
    >>> from torchlinop import estimate
    >>> A = torch.diag(torch.linspace(1, 2, 100, dtype=torch.float64))
    >>> t = estimate.function_trace(A, np.exp, num_matvecs=200)
    >>> abs(t.value - A.diagonal().exp().sum().item()) < 1e-6
    True
    """
    A = square_operator(A, "function_trace")
    if num_steps is not None:
        num_steps = min(positive_count("num_steps", num_steps), A.shape[0])
    quadratures = Quadratures(A, f, ProbeSource(A, probes, seed), None)
    return _function_trace(quadratures, num_matvecs, rtol, num_steps, seed, progress)


def _monotone_trace(
    A: Any,
    f: Function,
    damping: float,
    *,
    num_matvecs: int | None = None,
    rtol: float | None = None,
    num_steps: int | None = None,
    probes: Probes = "rademacher",
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """The same of ``log(x + damping)`` and its like, between two bounds."""
    if num_steps is not None:
        num_steps = min(positive_count("num_steps", num_steps), A.shape[0])
    limit = -damping if damping else None
    quadratures = Quadratures(A, f, ProbeSource(A, probes, seed), limit)
    return _function_trace(quadratures, num_matvecs, rtol, num_steps, seed, progress)


def logdet(A: Any, *, damping: float = 0.0, **options: Any) -> Estimate:
    r"""Estimate :math:`\log\det(A + \delta I)` of a positive semi-definite matrix.

    Parameters
    ----------
    A
        Symmetric or Hermitian operator or matrix, shape ``(N, N)``.
    damping
        :math:`\delta \ge 0`, large enough to make the matrix positive definite. Without it,
        small eigenvalues decide, and they take many steps.
    **options
        Keyword arguments of :func:`function_trace`.

    Returns
    -------
    Estimate
        Each quadrature is the middle between Gauss' and Gauss-Radau's, which are bounds;
        half their difference is added to the standard error.

    Raises
    ------
    ValueError
        As :func:`function_trace`, or a Ritz value of :math:`A + \delta I` is not positive:
        the logarithm is not defined.

    Examples
    --------
    >>> import math, torch
    >>> from torchlinop import estimate
    >>> t = estimate.logdet(torch.eye(50), damping=1.0, num_matvecs=4)
    >>> round(t.value / math.log(2), 3)
    50.0
    """
    A, damping = square_operator(A, "logdet"), at_least_zero("damping", damping)

    def log(theta: np.ndarray) -> np.ndarray:
        return np.log(_positive(theta, damping))

    return _monotone_trace(A, log, damping, **options)


def effective_dimension(A: Any, *, damping: float, **options: Any) -> Estimate:
    r"""Estimate :math:`\mathrm{tr}\, A (A + \delta I)^{-1}`, how many directions matter.

    Eigenvalues far above the damping count as one, those far below as nothing.

    Parameters
    ----------
    A
        Positive semi-definite operator or matrix, shape ``(N, N)``.
    damping
        :math:`\delta > 0`.
    **options
        Keyword arguments of :func:`function_trace`.

    Returns
    -------
    Estimate
        Each quadrature is the middle between Gauss' and Gauss-Radau's, which are bounds;
        half their difference is added to the standard error.

    Raises
    ------
    ValueError
        As :func:`function_trace`, or a Ritz value of :math:`A + \delta I` is not positive.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import estimate
    >>> t = estimate.effective_dimension(torch.eye(50), damping=1.0, num_matvecs=4)
    >>> round(t.value, 3)
    25.0
    """
    A = square_operator(A, "effective_dimension")
    damping = at_least_zero("damping", damping)
    if not damping:
        raise ValueError(
            "damping has to be positive: without it the effective dimension is the rank."
        )

    def share(theta: np.ndarray) -> np.ndarray:
        return theta / _positive(theta, damping)

    return _monotone_trace(A, share, damping, **options)


def _positive(theta: np.ndarray, damping: float) -> np.ndarray:
    """Return ``theta + damping``; refuse what is not positive."""
    lowest = float(theta.min())
    if not lowest + damping > 0:
        raise ValueError(
            f"The smallest Ritz value is {lowest:.3e}, so A + {damping:g} I is not "
            f"positive definite. Take damping > {max(-lowest, 0):.3e}, or the GGN in place "
            "of a Hessian."
        )
    return theta + damping


def _function_trace(
    quadratures: Quadratures,
    num_matvecs: int | None,
    rtol: float | None,
    num_steps: int | None,
    seed: int,
    progress: bool,
) -> Estimate:
    """Find how many steps it takes with a first block; then take more vectors."""
    rtol = target(rtol)
    if num_matvecs is None and rtol is None:
        rtol = _RTOL
    A = quadratures.operator
    n = A.shape[0]
    limit = _MOST * n * (num_steps or n)
    if num_matvecs is not None:
        limit = positive_count("num_matvecs", num_matvecs)
        if limit < 2 * (num_steps or 1):
            raise ValueError(
                f"num_matvecs={limit} is not enough for two random vectors of "
                f"{num_steps or 1} products each."
            )
    first = min(_FIRST, block_size(A), max(2, limit // (num_steps or 25)))
    with progress_bar(progress, num_matvecs) as bar:
        try:
            steps = num_steps or quadratures.steps_needed(first, limit, rtol, bar.update)
            while True:
                value, error = quadratures.estimate()
                spent = quadratures.num_matvecs
                if quadratures.count >= 2 and (
                    spent + steps > limit
                    or (rtol is not None and error <= rtol * abs(value))
                ):
                    return Estimate(value, error, spent, "lanczos quadrature", seed)
                more = min(block_size(A), first, (limit - spent) // steps)
                quadratures.grow(more, steps, bar.update)
        except KeyboardInterrupt as interrupt:
            if not quadratures.count:
                raise
            so_far = *quadratures.estimate(), quadratures.num_matvecs
            raise Interrupted(Estimate(*so_far, "lanczos quadrature", seed)) from interrupt
