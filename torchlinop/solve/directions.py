r"""Search directions of conjugate gradients: orthonormal rows, of positive curvature."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from torchlinop.solve.columns import column_norms, column_sizes, divided, dot
from torchlinop.solve.report import NegativeCurvatureError
from torchlinop.solve.system import System

#: rounding errors of p^H A p for unit vectors p, in units of eps |A|
_NOISE = 30


def picked(block: Tensor, rows: np.ndarray) -> Tensor:
    """Return some rows, or the block itself if they are all."""
    if len(rows) == len(block):
        return block
    return block[torch.as_tensor(rows, device=block.device)]


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the double-precision type of this kind."""
    return torch.promote_types(dtype, torch.float64)


def orthonormalized(W: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """Return an orthonormal basis of the rows, without those that depend on others.

    ``out`` is used for it if it has the right size.
    """
    gram = (W.conj() @ W.T).to(widened(W.dtype))
    lengths = gram.diagonal().real.sqrt()
    tiny = torch.finfo(W.dtype).tiny ** 0.25
    if not ((lengths > tiny) & (lengths < 1 / tiny)).all():
        # squares may have underflowed or overflowed
        norms = column_norms(W.T)
        if not norms.all():
            return orthonormalized(picked(W, np.flatnonzero(norms)), eps)
        W = divided(W.T, column_sizes(W.T)[0]).T
        gram = (W.conj() @ W.T).to(widened(W.dtype))
        lengths = gram.diagonal().real.sqrt()
    # once by Cholesky is enough where the rows are far from dependent
    L, info = torch.linalg.cholesky_ex(gram / torch.outer(lengths, lengths))
    pivots = L.diagonal().real
    if not info.item() and (not len(pivots) or pivots.min().item() > eps**0.25):
        inverse = torch.linalg.solve_triangular(
            L, torch.diag(1 / lengths).to(L), upper=False
        )
        return torch.mm(inverse.conj().resolve_conj().to(W.dtype), W, out=out)
    scaled = W / lengths.to(W.real.dtype).unsqueeze(1)
    Q, triangle = torch.linalg.qr(scaled.T)
    if not torch.isfinite(triangle).all():  # LAPACK's, of some complex64 blocks
        double = torch.linalg.qr(scaled.T.to(widened(W.dtype)))
        Q, triangle = (factor.to(W.dtype) for factor in double)
    left, values, _ = torch.linalg.svd(triangle, full_matrices=False)
    kept = values > 10 * eps * values[0]
    return (Q @ left[:, kept]).T.contiguous()


def inverse_of(
    curvature: Tensor, P: Tensor, norm: float, system: System
) -> Callable[[Tensor], Tensor] | None:
    """Return the product with the inverse of ``P^H A P``, or None if it is all noise."""
    curvature = (curvature + curvature.mH) / 2
    noise = _NOISE * system.eps * norm
    L, info = torch.linalg.cholesky_ex(curvature)
    if not info.item() and L.diagonal().real.min().item() ** 2 > noise:
        return lambda C: torch.cholesky_solve(C.to(L.dtype), L).to(C.dtype)
    values, vectors = torch.linalg.eigh(curvature)
    if values[0].item() < 0:
        direction = P.T @ vectors[:, 0].to(P.dtype)
        noise = max(noise, refuse_indefinite(direction, system))
    kept = values > noise
    if not kept.any():
        return None
    values, vectors = values[kept], vectors[:, kept]
    return lambda C: ((vectors / values) @ (vectors.mH @ C.to(vectors.dtype))).to(C.dtype)


def refuse_indefinite(p: Tensor, system: System) -> float:
    """Raise if the curvature along ``p`` is negative beyond rounding.

    Returns what rounding can make of a curvature.
    """
    p = p.reshape(-1, 1)
    p = divided(p, column_sizes(p)[0])
    p = p / max(column_norms(p)[0], torch.finfo(p.dtype).tiny)
    curvature = dot(p, system.product(p))
    noise = _NOISE * system.eps * system.norm()
    if curvature < -noise:
        raise NegativeCurvatureError(
            f"The matrix is not positive definite: along one direction p of length 1, "
            f"p^H A p = {curvature:.3e}. Conjugate gradients need a positive definite "
            "matrix: add more damping, or use MINRESInverseLinearOperator, which takes "
            "indefinite ones (such as the Hessian).",
            p.reshape(-1),
            curvature,
        )
    return noise
