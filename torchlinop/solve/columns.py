"""Blocks of columns: norms, products, selections."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: columns from this length on are reduced one by one on a CPU
_LONG = 1 << 15


def column_norms(X: Tensor) -> np.ndarray:
    """2-norms of the columns, shape ``(K,)``, in float64 on the host."""
    norms = _column_norms(X)
    if are_moderate(norms) or not X.shape[0]:
        return norms
    largest = X.abs().amax(dim=0)
    scale = torch.where(largest > 0, largest, 1)
    return _column_norms(X / scale) * scale.double().cpu().numpy()


def are_moderate(norms: np.ndarray) -> bool:
    """Whether squares of all norms are far from underflow and overflow in float32."""
    return bool(((norms > 1e-4) & (norms < 1e4)).all())


def _column_norms(X: Tensor) -> np.ndarray:
    if X.shape[1] == 1 or _long_columns(X):
        return np.sqrt(column_dots(X, X))
    return torch.linalg.vector_norm(X, dim=0).double().cpu().numpy()


def dot(x: Tensor, y: Tensor) -> float:
    """Real part of ``x^H y`` for vectors ``(N,)`` or ``(N, 1)``."""
    return torch.vdot(x.reshape(-1), y.reshape(-1)).real.item()


def column_dots(X: Tensor, Y: Tensor) -> np.ndarray:
    """Real parts of ``x_k^H y_k``, shape ``(K,)``, in float64 on the host."""
    if X.shape[1] == 1:
        return np.array([dot(X, Y)])
    if _long_columns(X):
        return np.array([dot(x, y) for x, y in zip(X.T, Y.T, strict=True)])
    products = X.conj() * Y if X.dtype.is_complex else X * Y
    return products.sum(dim=0).real.double().cpu().numpy()


def _long_columns(X: Tensor) -> bool:
    """Where torch's reductions lose digits (4e-4 at 1e7 float32 entries), or are slow."""
    return X.device.type == "cpu" and X.shape[0] > _LONG


def row(coefficients: np.ndarray, like: Tensor) -> Tensor | float:
    """Coefficients of columns, shape ``(K,)``, for products with ``like``."""
    if len(coefficients) == 1:
        return float(coefficients[0])
    return torch.as_tensor(coefficients).to(like.device, like.dtype)


def take(X: Tensor, columns: np.ndarray) -> Tensor:
    """Return some columns, or ``X`` itself if they are all."""
    if len(columns) == X.shape[1]:
        return X
    return X[:, torch.as_tensor(columns, device=X.device)]


def add_columns(X: Tensor, columns: np.ndarray, D: Tensor) -> None:
    """``X[:, columns] += D``."""
    if len(columns) == X.shape[1]:
        X.add_(D)
    else:
        X.index_add_(1, torch.as_tensor(columns, device=X.device), D)


def require_finite_columns(norms: np.ndarray, what: str) -> None:
    """Refuse NaN and infinity."""
    if not np.isfinite(norms).all():
        bad = np.flatnonzero(~np.isfinite(norms))[:5].tolist()
        raise ValueError(f"{what} has NaN or infinite entries in columns {bad}.")


def require_finite_iteration(norms: np.ndarray, solver: str, iteration: int) -> None:
    """Refuse to go on with NaN."""
    if not np.isfinite(norms).all():
        raise np.linalg.LinAlgError(
            f"NaN or infinity in iteration {iteration} of {solver}: the product with the "
            "matrix or the preconditioner is not finite. For a curvature matrix look for "
            "NaN in parameters and data with check_finite=True."
        )
