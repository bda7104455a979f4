r"""Traces."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from scipy.linalg import eigh, solve_triangular
from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop.estimate.arguments import one_of, require_squares, square_operator
from torchlinop.estimate.estimates import Estimate, dependent_mean, mean_and_stderr
from torchlinop.estimate.hutchinson import (
    Hutchinson,
    exact_diagonal,
    product_rows,
    row_dots,
)
from torchlinop.estimate.probes import Probes, ProbeSource
from torchlinop.estimate.sampling import Sampler, sampled
from torchlinop.estimate.sketches import RangeSketch, column_dots, left_out, on_host

TraceMethod: TypeAlias = Literal["hutchinson", "hutch++", "xtrace", "xnystrace"]


def trace(
    A: Any,
    *,
    method: TraceMethod = "hutchinson",
    num_matvecs: int | None = None,
    rtol: float | None = None,
    probes: Probes = "rademacher",
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    r"""Estimate :math:`\mathrm{tr} A`, without bias.

    Parameters
    ----------
    A
        Operator or matrix, shape ``(N, N)``.
    method
        ``"hutchinson"``: the mean of :math:`z^H A z`. ``"hutch++"``: exact in a random part
        of the range, the mean elsewhere. ``"xtrace"``: the same, with each vector used for
        both in turn. ``"xnystrace"``: for positive semi-definite matrices, with one product
        for each vector. Hutchinson's error falls with the root of the number of products;
        that of the others falls faster where eigenvalues decay, but they keep one to two
        vectors for each product.
    num_matvecs
        Most vectors to multiply, at most ``N``.
    rtol
        Relative standard error at which to stop; 0.01 if neither is given. If that takes
        ``N`` products and no number is given, the trace is computed exactly.
    probes
        Distribution of the random vectors: ``"rademacher"``, ``"gaussian"`` or
        ``"sphere"``. With ``"sphere"`` the last two methods use that what is left out of a
        subspace is on a sphere, too.
    seed
        Of the random vectors, the same on every device.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Estimate

    Raises
    ------
    ValueError
        ``A`` is not square, an argument is out of range, or ``"xnystrace"`` finds a
        negative eigenvalue.
    numpy.linalg.LinAlgError
        A product is not finite.
    Interrupted
        On Ctrl-C, with the estimate so far.

    References
    ----------
    Hutchinson, Commun. Stat. Simul. Comput. 19 (1990),
    https://doi.org/10.1080/03610919008812866; Meyer, Musco, Musco and Woodruff, "Hutch++:
    optimal stochastic trace estimation", SOSA 2021,
    https://doi.org/10.1137/1.9781611976496.16; Epperly, Tropp and Webber, "XTrace", SIAM J.
    Matrix Anal. Appl. 45 (2024), https://doi.org/10.1137/23M1548323

    Examples
    --------
    >>> import torch
    >>> from torchlinop import estimate
    >>> A = torch.diag(2.0 ** -torch.arange(100.0, dtype=torch.float64))
    >>> float(estimate.trace(A, num_matvecs=10))  # of random signs a diagonal is no trouble
    2.0
    >>> t = estimate.trace(A, method="xtrace", probes="gaussian", num_matvecs=40)
    >>> abs(t.value - 2) < 1e-4
    True
    """
    A = square_operator(A, "trace")
    one_of("method", method, tuple(_METHODS))
    source = ProbeSource(A, probes, seed)
    return sampled(_METHODS[method](A, source), num_matvecs, rtol, seed, progress)


def _exact(A: TorchLinearOperator) -> Any:
    return on_host(exact_diagonal(A)).sum().item()


def _hutchinson(A: TorchLinearOperator, source: ProbeSource) -> Sampler:
    return Hutchinson(A, source, row_dots, lambda: _exact(A))


class _HutchPlusPlus:
    """Exact in the range of a sketch, Hutchinson's mean in its complement.

    The products of the random vectors are those of the vectors as they are drawn, so that
    the sketch may grow later.
    """

    method, least = "hutch++", 3

    def __init__(self, A: TorchLinearOperator, source: ProbeSource) -> None:
        self._A, self._source = A, source
        self._sketch = RangeSketch(A, source, A)
        self._probes: tuple[Tensor, Tensor] | None = None
        self.num_matvecs, self.exact_matvecs = 0, A.shape[0]

    def grow(self, num_matvecs: int) -> None:
        rank = num_matvecs // 3
        count = num_matvecs - 2 * rank
        if rank > len(self._sketch):
            self._sketch.grow(rank - len(self._sketch))
        have = 0 if self._probes is None else len(self._probes[0])
        if count > have:
            z = self._source.rows(count - have)
            new = z, product_rows(self._A, z)
            old = self._probes or (z[:0], z[:0])
            self._probes = torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]])
        self.num_matvecs = 2 * len(self._sketch) + max(count, have)

    def estimate(self) -> tuple[Any, float]:
        assert self._probes is not None
        (z, az), q, aq = self._probes, self._sketch.q, self._sketch.z
        c = z @ q.mH  # rows of coefficients
        outside = z - c @ q
        samples = row_dots(outside, az - c @ aq)  # outside is orthogonal to Q
        mean, error = mean_and_stderr(samples)
        return row_dots(q, aq).sum().item() + mean, error

    def exact(self) -> Any:
        self.num_matvecs += self.exact_matvecs
        return _exact(self._A)


class _XTrace:
    """Of each vector in turn a sample in the complement of the range of all others."""

    method, least = "xtrace", 2

    def __init__(self, A: TorchLinearOperator, source: ProbeSource) -> None:
        self._A, self._kind = A, source.kind
        self._sketch = RangeSketch(A, source, A)
        self.exact_matvecs = A.shape[0]
        self._spent = 0

    @property
    def num_matvecs(self) -> int:
        return 2 * len(self._sketch) + self._spent

    def grow(self, num_matvecs: int) -> None:
        if num_matvecs // 2 > len(self._sketch):
            self._sketch.grow(num_matvecs // 2 - len(self._sketch))

    def estimate(self) -> tuple[Any, float]:
        sketch, n = self._sketch, self._A.shape[0]
        r, R, S = len(sketch), sketch.R, left_out(sketch.R)
        W = on_host(sketch.q.conj() @ sketch.omega.T)
        h = on_host(sketch.q.conj() @ sketch.z.T)
        X = on_host(sketch.omega.conj() @ sketch.z.T)
        hS, hW = h @ S, h @ W
        overlaps = S.conj().T @ S

        def samples(j: int | None) -> np.ndarray:
            """One for each vector, in a space without that one and vector ``j``."""
            E, hE, U, hU = S, hS, W, hW
            inside, left = np.trace(h), r - 1
            if j is not None:  # all directions are made orthogonal to that of j
                s, hs, c = S[:, j : j + 1], hS[:, j : j + 1], overlaps[j]
                lengths = np.sqrt(np.maximum(1 - np.abs(c) ** 2, np.finfo(float).eps))
                E, hE = (S - s * c) / lengths, (hS - hs * c) / lengths
                along = s.conj().T @ W
                U, hU = W - s * along, hW - hs * along
                inside, left = inside - column_dots(s, hs), r - 2
            along = column_dots(E, U)
            U, hU = U - E * along, hU - hE * along  # projections of the vectors
            inside = inside - column_dots(E, hE)
            outside = column_dots(W - U, R) - column_dots(X.conj().T, U)
            outside = outside + column_dots(U, hU)
            if self._kind == "sphere":
                size = n - np.linalg.norm(U, axis=0) ** 2
                outside = outside * (n - left) / size
            return inside + outside

        without = [samples(j) for j in range(r)] if r > 1 else [samples(None)]
        return dependent_mean(samples(None), np.stack(without, axis=1))

    def exact(self) -> Any:
        self._spent += self.exact_matvecs
        return _exact(self._A)


class _XNysTrace:
    """The trace of a Nyström approximation, and of what it lacks by leaving one out.

    With ``H = Omega^H A Omega``, leaving out a vector takes away ``b b^H`` with
    ``b = A Omega H^-1 e / sqrt(e^H H^-1 e)``, and the vector's own sample of the rest is
    ``1 / (e^H H^-1 e)``.
    """

    method, least = "xnystrace", 1

    def __init__(self, A: TorchLinearOperator, source: ProbeSource) -> None:
        self._A, self._source = A, source
        nothing = torch.zeros(0, A.shape[1], dtype=A.torch_dtype, device=A.device)
        self._pair = nothing, nothing
        self.exact_matvecs = A.shape[0]
        self._spent = 0

    @property
    def num_matvecs(self) -> int:
        return len(self._pair[0]) + self._spent

    def grow(self, num_matvecs: int) -> None:
        omega, y = self._pair
        if num_matvecs > len(omega):
            more = self._source.rows(num_matvecs - len(omega))
            image = product_rows(self._A, more)
            require_squares(image, "xnystrace")
            self._pair = torch.cat([omega, more]), torch.cat([y, image])

    def estimate(self) -> tuple[Any, float]:
        omega, y = self._pair
        r, n = omega.shape
        scale = torch.linalg.vector_norm(y).item()
        if scale == 0:
            return 0.0, 0.0
        shift = math.sqrt(n) * torch.finfo(y.dtype).eps * scale
        y = y + shift * omega
        R = on_host(torch.linalg.qr(y.T, mode="r")[1])
        H = on_host(omega.conj() @ y.T)
        gram = on_host(omega.conj() @ omega.T)

        C = _cholesky(H, gram)
        D = solve_triangular(C, np.eye(r), trans="C")
        B = solve_triangular(C, R.conj().T, trans="C").conj().T
        whole = np.linalg.norm(B) ** 2 - shift * n
        inverse, taken = D.conj().T @ D, (B @ D).conj().T @ (B @ D)  # of H, and with A^2

        def samples(K: np.ndarray, T: np.ndarray, spread: np.ndarray, left: int) -> Any:
            rest = 1 / K
            if self._source.kind == "sphere":
                rest = rest * (n - left) * spread  # over the squared distance
            return whole - T / K + rest

        K, T = inverse.diagonal().real, taken.diagonal().real
        M = np.linalg.inv(gram)
        spread = M.diagonal().real
        # where j is left out as well: Schur complements, row by row
        c = inverse / K
        K2 = K[:, None] - (np.abs(inverse) ** 2 / K)
        T2 = T[:, None] - 2 * (c.conj() * taken).real + np.abs(c) ** 2 * T
        spread2 = spread[:, None] - np.abs(M) ** 2 / spread
        for x in (K2, spread2):
            np.fill_diagonal(x, 1)
        without = samples(K2, T2, spread2, r - 2) - T / K
        return dependent_mean(samples(K, T, spread, r - 1), without)

    def exact(self) -> Any:
        self._spent += self.exact_matvecs
        return _exact(self._A)


def _cholesky(H: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Upper factor of ``Omega^H A Omega``; refuse what is not positive definite."""
    H = (H + H.conj().T) / 2
    try:
        return np.linalg.cholesky(H).conj().T
    except np.linalg.LinAlgError:
        lowest = eigh(H, gram, eigvals_only=True)[0]
        raise ValueError(
            "xnystrace is for positive semi-definite matrices (GGN, Fisher), but in a "
            f"subspace this one has the eigenvalue {lowest:.3e}. Use method='xtrace'."
        ) from None


_METHODS: dict[str, Any] = {
    "hutchinson": _hutchinson,
    "hutch++": _HutchPlusPlus,
    "xtrace": _XTrace,
    "xnystrace": _XNysTrace,
}
