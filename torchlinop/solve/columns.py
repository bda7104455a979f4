"""Blocks of columns: norms, products, sizes, selections."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: columns from this length on are reduced one by one on a CPU
_LONG = 1 << 15


def column_norms(X: Tensor) -> np.ndarray:
    """2-norms of the columns, shape ``(K,)``, in float64 on the host."""
    norms = _column_norms(X)
    if _in_range(norms, X, 0.25):
        return norms
    size, units = column_sizes(X)
    with np.errstate(over="ignore", invalid="ignore"):
        return _column_norms(divided(X, size)) * units


def _column_norms(X: Tensor) -> np.ndarray:
    if X.shape[1] == 1 or _long_columns(X):
        return np.sqrt(_column_dots(X, X))
    return torch.linalg.vector_norm(X, dim=0).double().cpu().numpy()


def dot(x: Tensor, y: Tensor) -> float:
    """Real part of ``x^H y`` for vectors ``(N, 1)``."""
    return float(column_dots(x, y)[0])


def column_dots(X: Tensor, Y: Tensor) -> np.ndarray:
    """Real parts of ``x_k^H y_k``, shape ``(K,)``, in float64 on the host.

    Where products of entries might underflow or overflow, columns are scaled.
    """
    dots = _column_dots(X, Y)
    if _in_range(np.abs(dots), X):
        return dots
    (x, x_units), (y, y_units) = column_sizes(X), column_sizes(Y)
    with np.errstate(over="ignore", invalid="ignore"):
        return _column_dots(divided(X, x), divided(Y, y)) * x_units * y_units


def _column_dots(X: Tensor, Y: Tensor) -> np.ndarray:
    if X.shape[1] == 1 or _long_columns(X):
        pairs = zip(X.T, Y.T, strict=True)
        return np.array([torch.vdot(x, y).real.item() for x, y in pairs])
    products = X.conj() * Y if X.dtype.is_complex else X * Y
    return products.sum(dim=0).real.double().cpu().numpy()


def _in_range(sums: np.ndarray, X: Tensor, power: float = 0.5) -> bool:
    """Whether sums of products are far from what underflows and overflows."""
    bound = torch.finfo(X.dtype).tiny ** power
    return not X.shape[0] or bool(((sums > bound) & (sums < 1 / bound)).all())


def _long_columns(X: Tensor) -> bool:
    """Where torch's reductions lose digits (4e-4 at 1e7 float32 entries), or are slow."""
    return X.device.type == "cpu" and X.shape[0] > _LONG


def column_sizes(*blocks: Tensor) -> tuple[Tensor, np.ndarray]:
    """Powers of two near the largest entries of the columns, on the device and the host.

    In units of these, squares of right-hand sides neither underflow nor overflow, and
    dividing by them and multiplying with them rounds nothing.
    """
    real = blocks[0].real
    if not len(real):
        return real.new_ones(real.shape[1]), np.ones(real.shape[1])
    largest = np.max(
        [block.abs().amax(dim=0).double().cpu().numpy() for block in blocks], axis=0
    )
    limits = torch.finfo(real.dtype)
    largest = np.where(np.isfinite(largest) & (largest > 0), largest, 1)
    exponents = np.frexp(np.clip(largest, 2 * limits.tiny, limits.max / 8))[1]
    sizes = np.ldexp(1.0, exponents)
    return torch.as_tensor(sizes, dtype=real.dtype, device=real.device), sizes


def divided(X: Tensor, sizes: Tensor) -> Tensor:
    """``X / sizes`` for powers of two; complex division would square them."""
    return X * sizes.reciprocal()


def row(coefficients: np.ndarray, like: Tensor) -> Tensor | float:
    """Coefficients of columns, shape ``(K,)``, for products with ``like``."""
    if len(coefficients) == 1:
        return float(coefficients[0])
    return torch.as_tensor(coefficients, dtype=like.dtype, device=like.device)


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
