r"""An orthonormal basis of the range of ``A Omega`` that can grow, and leaving vectors out.

With :math:`A \Omega = Q R`, leaving out the ``i``-th column of :math:`\Omega` leaves the
range of :math:`Q (I - s_i s_i^H)` where :math:`s_i` is the normalized ``i``-th column of
:math:`R^{-H}`: Epperly, Tropp and Webber, "XTrace: making the most of every sample in
stochastic trace estimation", SIAM J. Matrix Anal. Appl. 45 (2024),
https://doi.org/10.1137/23M1548323.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import solve_triangular
from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop.estimate.hutchinson import product_rows
from torchlinop.estimate.probes import ProbeSource


class RangeSketch:
    """Vectors, a basis of their products, and the products of that.

    Parameters
    ----------
    A
        Square.
    source
        Of the vectors.
    again
        What multiplies the basis, ``A`` or its adjoint.

    Attributes
    ----------
    omega, q, z : Tensor
        Random vectors, the basis and its products, as rows ``(r, N)``.
    R : numpy.ndarray
        Shape ``(r, r)``, upper triangular, in double precision.
    """

    def __init__(
        self, A: TorchLinearOperator, source: ProbeSource, again: TorchLinearOperator
    ) -> None:
        self._A, self._source, self._again = A, source, again
        nothing = torch.zeros(0, A.shape[1], dtype=A.torch_dtype, device=A.device)
        self.omega = self.q = self.z = nothing
        self.R: np.ndarray = np.zeros((0, 0))

    def __len__(self) -> int:
        return len(self.q)

    def grow(self, count: int) -> None:
        """Add vectors, each for two products."""
        omega = self._source.rows(count)
        rest = product_rows(self._A, omega)
        above = np.zeros((len(self), count))
        for _ in range(2):
            c = self.q.conj() @ rest.T
            rest = rest - c.T @ self.q
            above = above + on_host(c)
        Q, R = torch.linalg.qr(rest.T)
        q = Q.T.contiguous()
        z = product_rows(self._again, q)
        grown = np.block([[self.R, above], [np.zeros((count, len(self))), on_host(R)]])
        omega, q, z = (
            torch.cat(pair) for pair in ((self.omega, omega), (self.q, q), (self.z, z))
        )
        self.omega, self.q, self.z, self.R = omega, q, z, grown


def left_out(R: np.ndarray) -> np.ndarray:
    """The vectors ``s_i`` of an upper triangular ``R``, as columns ``(r, r)``."""
    R = R.copy()
    d = np.diag(R).copy()
    # a range of lower dimension: any direction will do for what is not there
    least = np.finfo(float).eps * (np.abs(d).max() or 1.0)
    np.fill_diagonal(R, np.where(np.abs(d) > least, d, least))
    S = solve_triangular(R, np.eye(len(R)), trans="C")
    return S / np.linalg.norm(S, axis=0)


def on_host(x: Tensor) -> np.ndarray:
    """Return a small matrix as NumPy in double precision."""
    wide = torch.promote_types(x.dtype, torch.float64)
    return x.to(device="cpu", dtype=wide).resolve_conj().numpy()


def column_dots(X: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """``x_i^H y_i`` of columns."""
    return (X.conj() * Y).sum(axis=0)
