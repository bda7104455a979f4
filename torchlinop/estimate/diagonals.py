r"""Diagonals."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop.estimate.arguments import one_of, square_operator
from torchlinop.estimate.estimates import Estimate
from torchlinop.estimate.hutchinson import exact_diagonal, product_rows
from torchlinop.estimate.probes import Probes, ProbeSource, block_size
from torchlinop.estimate.sampling import Sampler, sampled
from torchlinop.estimate.sketches import RangeSketch, column_dots, left_out

DiagonalMethod: TypeAlias = Literal["hutchinson", "xdiag"]

#: vectors of which all pairs are looked at for how much samples depend on one another
_PAIRED = 12


def diagonal(
    A: Any,
    *,
    method: DiagonalMethod = "hutchinson",
    num_matvecs: int | None = None,
    rtol: float | None = None,
    probes: Probes = "rademacher",
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    r"""Estimate the diagonal of a matrix, without bias.

    Parameters
    ----------
    A
        Operator or matrix, shape ``(N, N)``.
    method
        ``"hutchinson"``: the mean of :math:`\bar z \circ A z`. ``"xdiag"``: exact in a
        random part of the range, the mean elsewhere, with each vector used for both in
        turn; it keeps three vectors for each two products.
    num_matvecs
        Most vectors to multiply, at most ``N``.
    rtol
        Relative standard error at which to stop, in the 2-norm; 0.01 if neither is given.
        If that takes ``N`` products and no number is given, the diagonal is computed
        exactly.
    probes
        Distribution of the random vectors: ``"rademacher"``, which is best here,
        ``"gaussian"`` or ``"sphere"``.
    seed
        Of the random vectors, the same on every device.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Estimate
        Its value and standard error are tensors of shape ``(N,)``.

    Raises
    ------
    ValueError
        ``A`` is not square, or an argument is out of range.
    numpy.linalg.LinAlgError
        A product is not finite.
    Interrupted
        On Ctrl-C, with the estimate so far.

    References
    ----------
    Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix", Appl. Numer.
    Math. 57 (2007), https://doi.org/10.1016/j.apnum.2007.01.003; Epperly, Tropp and Webber,
    "XTrace", SIAM J. Matrix Anal. Appl. 45 (2024), https://doi.org/10.1137/23M1548323

    Examples
    --------
    >>> import torch
    >>> from torchlinop import estimate
    >>> A = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    >>> estimate.diagonal(A, num_matvecs=2).value
    tensor([1., 2., 3.])
    """
    A = square_operator(A, "diagonal")
    one_of("method", method, ("hutchinson", "xdiag"))
    source = ProbeSource(A, probes, seed)
    samplers: dict[str, Any] = {"hutchinson": _Hutchinson, "xdiag": _XDiag}
    sampler: Sampler = samplers[method](A, source)
    return sampled(sampler, num_matvecs, rtol, seed, progress)


class _Hutchinson:
    """Mean and spread of ``conj(z) * (A z)``, of which nothing else is kept."""

    method, least = "hutchinson", 1

    def __init__(self, A: TorchLinearOperator, source: ProbeSource) -> None:
        self._A, self._source = A, source
        self.exact_matvecs = A.shape[0]
        #: number of samples, their mean, and the sum of squared distances from it
        self._state: tuple[int, Tensor, Tensor] = (0, _zeros(A), _zeros(A).real)
        self._spent = 0

    @property
    def num_matvecs(self) -> int:
        return self._state[0] + self._spent

    def grow(self, num_matvecs: int) -> None:
        while self._state[0] < num_matvecs:
            count, mean, squares = self._state
            more = min(block_size(self._A), num_matvecs - count)
            z = self._source.rows(more)
            samples = z.conj() * product_rows(self._A, z)
            new = samples.mean(dim=0)
            spread = (samples - new).abs().square().sum(dim=0)
            total = count + more
            shift = new - mean
            # Chan, Golub and LeVeque, https://doi.org/10.1080/00031305.1983.10483115
            squares = squares + spread + shift.abs().square() * (count * more / total)
            self._state = total, mean + shift * (more / total), squares

    def estimate(self) -> tuple[Tensor, Tensor]:
        count, mean, squares = self._state
        return mean, _stderr(squares, count)

    def exact(self) -> Tensor:
        self._spent = self.exact_matvecs
        return exact_diagonal(self._A)


class _XDiag:
    """Of each vector in turn a sample in the complement of the range of all others."""

    method, least = "xdiag", 2

    def __init__(self, A: TorchLinearOperator, source: ProbeSource) -> None:
        self._A = A
        self._sketch = RangeSketch(A, source, A._adjoint())
        self.exact_matvecs = A.shape[0]
        self._spent = 0

    @property
    def num_matvecs(self) -> int:
        return 2 * len(self._sketch) + self._spent

    def grow(self, num_matvecs: int) -> None:
        if num_matvecs // 2 > len(self._sketch):
            self._sketch.grow(num_matvecs // 2 - len(self._sketch))

    def estimate(self) -> tuple[Tensor, Tensor]:
        sketch = self._sketch
        r = len(sketch)
        S = left_out(sketch.R)
        s = torch.as_tensor(S.T.copy(), dtype=sketch.q.dtype, device=sketch.q.device)
        Qs, Ts = s @ sketch.q, s @ sketch.z
        inside = (sketch.q * sketch.z.conj()).sum(dim=0)
        # (I - Q_i Q_i^H) A omega_i is Q s_i (s_i^H r_i)
        left = torch.as_tensor(
            column_dots(S, sketch.R)[:, None], dtype=Qs.dtype, device=Qs.device
        )
        samples = Qs * (sketch.omega.conj() * left - Ts.conj())
        mean = samples.mean(dim=0)
        squares = (samples - mean).abs().square().sum(dim=0)
        error = _stderr(squares, r)
        variance = error.square().sum().item()
        if 0 < variance < math.inf:
            more = max(self._covariance(S, samples, Qs, Ts), 0.0)
            error = error * math.sqrt(1 + more / variance)
        return inside + mean, error

    def _covariance(self, S: np.ndarray, samples: Tensor, Qs: Tensor, Ts: Tensor) -> float:
        """Covariance of two samples, summed over the entries, from some of the pairs.

        As for traces (``estimates.dependent_mean``). Without two vectors the space lacks
        the direction of the second and what that of the first has orthogonal to it.
        """
        R, omega = self._sketch.R, self._sketch.omega
        along, overlaps = S.conj().T @ R, S.conj().T @ S

        def change(i: int, j: int) -> Tensor:
            """Sample ``i`` minus what it is without vector ``j``."""
            c = overlaps[j, i].item()
            length = math.sqrt(max(1 - abs(c) ** 2, np.finfo(float).eps))
            q, t = (Qs[i] - c * Qs[j]) / length, (Ts[i] - c * Ts[j]) / length
            alone = q * (omega[i].conj() * (along[i, i].item() / length) - t.conj())
            return samples[i] + Qs[j] * Ts[j].conj() - alone

        some = list(range(min(len(S), _PAIRED)))
        pairs = list(itertools.combinations(some, 2))
        products = [torch.vdot(change(j, i), change(i, j)).real for i, j in pairs]
        return torch.stack(products).mean().item()

    def exact(self) -> Tensor:
        self._spent = self.exact_matvecs
        return exact_diagonal(self._A)


def _stderr(squares: Tensor, count: int) -> Tensor:
    """Standard error of a mean, from squared distances; infinite for one sample."""
    if count < 2:
        return torch.full_like(squares, torch.inf)
    return (squares / (count - 1) / count).sqrt()


def _zeros(A: TorchLinearOperator) -> Tensor:
    return torch.zeros(A.shape[0], dtype=A.torch_dtype, device=A.device)
