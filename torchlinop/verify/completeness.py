"""Has a solver missed an eigenvalue? Residuals cannot tell; random vectors can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from torchlinop._interchange import as_tensor
from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Array
from torchlinop.estimate import Estimate
from torchlinop.estimate.arguments import one_of, square_operator
from torchlinop.estimate.densities import density_of
from torchlinop.solve.columns import column_norms
from torchlinop.verify.residuals import columns, wide
from torchlinop.verify.results import Completeness

#: which eigenvalues the list should hold all of
Which: TypeAlias = Literal["LA", "SA", "LM"]

_SIDES = {"LA": "above", "SA": "below", "LM": "above in size"}
#: how far out an eigenvalue is
_MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "LA": lambda values: values,
    "SA": lambda values: -values,
    "LM": np.abs,
}


def complete(
    A: Any,
    eigenvalues: Array,
    eigenvectors: Array,
    *,
    which: Which = "LA",
    threshold: float | None = None,
    num_probes: int = 10,
    num_steps: int = 30,
    seed: int = 0,
) -> Completeness:
    r"""Whether a list of eigenpairs holds all those beyond a threshold.

    Lanczos from random vectors, on the matrix with the given space projected off. A Ritz
    value beyond the threshold proves that something was missed. The weights of such values
    estimate how many: each missed eigenvector has a share of :math:`1/N` of a random
    vector, on average. That no vector shows any proves nothing, but each would have to be
    all but orthogonal to what was missed.

    Parameters
    ----------
    A
        A symmetric or Hermitian operator or matrix, shape ``(N, N)``.
    eigenvalues, eigenvectors
        Shapes ``(K,)`` and ``(N, K)``, as ``eigsh`` returns them; check them with
        :func:`eigenpairs` first.
    which
        Whether the list should hold the largest (``"LA"``), the smallest (``"SA"``) or
        those largest in size (``"LM"``, SciPy's default).
    threshold
        Beyond which the list should hold all; by default the innermost value of the list.
        Others that equal it, to residuals and rounding, are not counted as missed. With
        ``"LM"`` a size.
    num_probes, num_steps
        Random vectors, and products with each.
    seed
        Of the random vectors.

    Returns
    -------
    Completeness

    Raises
    ------
    ValueError
        The shapes do not fit, the list is empty, or values are not finite.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import verify
    >>> A = torch.diag(torch.tensor([1.0, 5.0, 5.0, 2.0, 3.0]))
    >>> vectors = torch.eye(5)
    >>> bool(verify.complete(A, torch.tensor([5.0, 5.0]), vectors[:, 1:3]))
    True
    >>> print(verify.complete(A, torch.tensor([3.0, 5.0]), vectors[:, [4, 1]]))
    incomplete: 2 eigenvalues above 3 were given,
      about 1.0 +- 0.0 others are there, one as far out as 5 (52 products)
    """
    A = square_operator(A, "complete")
    one_of("which", which, tuple(_MEASURES))
    values = wide(as_tensor(eigenvalues, A.device)).cpu().numpy()
    V = columns("eigenvectors", eigenvectors, A.shape[0], A)
    if values.shape != (V.shape[1],) or not len(values):
        raise ValueError(
            f"Expected one eigenvalue for each of {V.shape[1]} eigenvectors and at least "
            f"one, got shape {values.shape}."
        )
    if np.iscomplexobj(values) or not (np.isfinite(values).all() and V.isfinite().all()):
        raise ValueError("Eigenvalues and eigenvectors have to be finite, and values real.")
    Q = torch.linalg.qr(wide(V))[0].to(A.torch_dtype)
    measure = _MEASURES[which]
    outness = measure(values)
    limit = float(outness.min()) if threshold is None else _limit(threshold, which)
    image = A @ Q
    inexact = column_norms(wide(image) - wide(Q) @ (wide(Q).mH @ wide(image))).max()
    scale = max(float(np.abs(values).max()), abs(limit))
    slack = float(inexact) + torch.finfo(A.torch_dtype).eps ** (2 / 3) * scale
    away = 0.0 if which == "LM" else limit - max(scale, 1e-30)
    deflated = _Deflated(A, Q, -away if which == "SA" else away)
    # what is left may be zero but for rounding errors
    density = density_of(
        deflated, num_probes, num_steps, "rademacher", seed, progress=False, norm=scale
    )
    beyond = measure(density.nodes) > limit + slack
    samples = A.shape[0] * (density.weights * beyond).sum(axis=1)
    worst = np.argmax(measure(density.nodes), axis=1)
    extremes = density.nodes[np.arange(len(worst)), worst]
    error = float(samples.std(ddof=1) / len(samples) ** 0.5) if len(samples) > 1 else np.inf
    return Completeness(
        threshold=-limit if which == "SA" else limit,
        side=_SIDES[which],
        num_found=int((outness >= limit - slack).sum()),
        missed=np.sort(extremes[beyond.any(axis=1)]),
        num_missed=Estimate(
            float(samples.mean()), error, density.num_matvecs, "lanczos quadrature", seed
        ),
        num_matvecs=density.num_matvecs + V.shape[1],
    )


def _limit(threshold: float, which: Which) -> float:
    if not np.isfinite(threshold) or (which == "LM" and threshold < 0):
        raise ValueError(
            f"threshold has to be finite, and with which='LM' a size, got {threshold!r}."
        )
    return -float(threshold) if which == "SA" else float(threshold)


class _Deflated(TorchLinearOperator):
    """A matrix in the space orthogonal to ``Q``; on ``Q`` it is a number."""

    def __init__(self, A: TorchLinearOperator, Q: Tensor, on_Q: float) -> None:
        super().__init__(A.shape, A.torch_dtype, A.device)
        self._A, self._Q, self._on_Q = A, Q, on_Q

    def _apply(self, x: Tensor) -> Tensor:
        Q = self._Q
        inside = Q.mH @ x
        y = self._A._product(x - Q @ inside)
        for _ in range(2):  # once leaves rounding errors of the largest eigenvalues
            y = y - Q @ (Q.mH @ y)
        return y.add_(Q @ inside, alpha=self._on_Q)

    def _adjoint(self) -> TorchLinearOperator:
        return self
