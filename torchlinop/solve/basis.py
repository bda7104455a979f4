"""A basis of right-hand sides, so that nothing is solved for twice."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import cho_solve
from scipy.linalg.lapack import get_lapack_funcs
from torch import Tensor

from torchlinop.solve.columns import column_norms, take

#: squared distances of unit vectors below this may be rounding errors of float64
_NOISE = 1e-13
#: rows that are converted to float64 at once
_ROWS = 1 << 16


class Basis(NamedTuple):
    """Some columns of a block ``(N, K)``, and all as combinations of them."""

    #: (r,), which columns
    columns: np.ndarray
    #: (r, K), float64 or complex128
    combinations: np.ndarray
    #: (r,), with which all columns can be expected to reach theirs
    tolerances: np.ndarray


def basis_of(B: Tensor, norms: np.ndarray, tolerances: np.ndarray) -> Basis | None:
    """Return columns of which all others are combinations, or None if none is.

    A column is left out only if what the others miss of it is a small part of its
    tolerance or a rounding error. Columns that are nearly dependent, but not that nearly,
    stay: their differences matter for the solution.

    Parameters
    ----------
    B
        Shape ``(N, K)``.
    norms, tolerances
        2-norms of the columns, positive, and what is wanted of their residuals, ``(K,)``.
    """
    if len(norms) < 2:
        return None
    gram = inner(B, B) / np.outer(norms, norms)
    (pstrf,) = get_lapack_funcs(("pstrf",), (gram,))
    least = (0.1 * (tolerances / norms).min()) ** 2
    U, pivots, rank, _ = pstrf(gram, tol=max(_NOISE, least))
    if rank == len(norms):
        return None
    kept, left = pivots[:rank] - 1, pivots[rank:] - 1
    some, rest = take(B, kept), take(B, left)
    unit = norms[kept, None]
    C: np.ndarray = np.zeros((rank, len(left)), dtype=gram.dtype)
    missing = rest
    for _ in range(2):  # a Gram matrix has the square of the condition number
        C = C + cho_solve((U[:rank, :rank], False), inner(some, missing) / unit) / unit
        missing = rest - some @ torch.as_tensor(C, dtype=B.dtype, device=B.device)
    rounding = torch.finfo(B.dtype).eps * (norms[left] + np.abs(C).T @ norms[kept])
    distances = column_norms(missing)
    found = distances <= np.maximum(0.1 * tolerances[left], 10 * rounding)
    if not found.any():
        return None
    columns = np.concatenate([kept, left[~found]])
    combinations = np.zeros((len(columns), len(norms)), dtype=gram.dtype)
    combinations[np.arange(len(columns)), columns] = 1
    combinations[:rank, left[found]] = C[:, found]
    reachable = 10 * torch.finfo(B.dtype).eps * norms[columns]
    shares = _shares(np.abs(combinations), columns, tolerances, reachable)
    return Basis(columns, combinations, shares)


def _shares(
    weights: np.ndarray, columns: np.ndarray, tolerances: np.ndarray, reachable: np.ndarray
) -> np.ndarray:
    """Tolerances of the basis with which all columns can be expected to reach theirs."""
    own = tolerances[columns]
    parts = weights * own[:, None]
    sums = np.linalg.norm(parts, axis=0)  # residuals that do not point the same way
    factors = 0.99 * tolerances / np.where(sums > 0, sums, 1)
    factors[columns] = 1
    matters = parts > 1e-3 / len(columns) * tolerances
    shares = own * np.where(matters, np.minimum(factors, 1), 1).min(axis=1)
    return np.maximum(shares, np.minimum(own, reachable))


def inner(X: Tensor, Y: Tensor) -> np.ndarray:
    """``X^H Y``, in float64 or complex128."""
    wide = torch.promote_types(X.dtype, torch.float64)
    total = torch.zeros(X.shape[1], Y.shape[1], dtype=wide, device=X.device)
    for x, y in zip(X.split(_ROWS), Y.split(_ROWS), strict=True):
        total.addmm_(x.to(wide).mH, y.to(wide))
    return total.cpu().numpy()
