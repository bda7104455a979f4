r"""Square roots of loss Hessians, column by column.

The Hessian of a loss in the prediction is block diagonal with one block :math:`H_r` for
each row: a vector along the dimension of the classes. With :math:`H_r = \sum_c s_{rc}
s_{rc}^\top`, column ``c`` holds :math:`s_{rc}` for all rows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: rounding in an eigenvalue of a loss Hessian, in units of eps and of the largest
_NOISE = 100


class HessianRoot(NamedTuple):
    """A root of the Hessian of a summed loss.

    Attributes
    ----------
    columns : int
        How many there are.
    column
        From a number to the column, shaped like the prediction.
    """

    columns: int
    column: Callable[[int], Tensor]


def diagonal_root(diagonal: Tensor, dim: int | None) -> HessianRoot:
    """Root of a Hessian that is diagonal, shaped like the prediction."""
    root = diagonal.sqrt()
    if dim is None:
        return HessianRoot(1, lambda _: root)

    def column(c: int) -> Tensor:
        only = torch.zeros_like(root)
        only.select(dim, c).copy_(root.select(dim, c))
        return only

    return HessianRoot(root.shape[dim], column)


def softmax_root(p: Tensor, total: Tensor, dim: int) -> HessianRoot:
    r"""Root of :math:`t\,(\operatorname{diag} p - p p^\top)`, one column less than classes.

    Its Cholesky factor: with :math:`q_c = \sum_{k > c} p_k`, column ``c`` is zero before,
    :math:`r_c = \sqrt{t\, p_c q_c / (p_c + q_c)}` at, and :math:`-r_c p_k / q_c` after the
    entry ``c``; the last one is zero.
    """
    dim = dim % p.ndim
    classes = p.shape[dim]
    # summed from the end, where small numbers are added to small ones
    after = p.flip(dim).cumsum(dim).flip(dim)

    def column(c: int) -> Tensor:
        column = torch.zeros_like(p)
        if c + 1 == classes:  # the only class
            return column
        own, rest = p.narrow(dim, c, 1), after.narrow(dim, c + 1, 1)
        root = (total * own * _quotient(rest, after.narrow(dim, c, 1))).sqrt()
        shares = _quotient(p.narrow(dim, c + 1, classes - c - 1), rest)
        column.narrow(dim, c, 1).copy_(root)
        column.narrow(dim, c + 1, classes - c - 1).copy_(-root * shares)
        return column

    return HessianRoot(max(1, classes - 1), column)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """Divide; zero where the divisor is."""
    return torch.where(b == 0, 0.0, a / b)


def root_by_eigenvalues(
    product: Callable[[Tensor], Tensor], prediction: Tensor, dim: int | None
) -> HessianRoot:
    """Root of a Hessian that is known by its product, from the eigenvalues of its blocks.

    Raises
    ------
    ValueError
        The Hessian has negative eigenvalues, or couples the rows.
    """
    moved = prediction.unsqueeze(-1) if dim is None else prediction.movedim(dim, -1)
    shape, classes = moved.shape, moved.shape[-1]

    def back(rows: Tensor) -> Tensor:
        moved = rows.reshape(shape)
        return moved.squeeze(-1) if dim is None else moved.movedim(-1, dim)

    def rows_of(u: Tensor) -> Tensor:
        return (u.unsqueeze(-1) if dim is None else u.movedim(dim, -1)).reshape(-1, classes)

    identity = torch.eye(classes, dtype=prediction.dtype, device=prediction.device)
    units = [back(e.expand(shape)) for e in identity]
    H = torch.stack([rows_of(product(u)) for u in units], dim=-1)
    _require_separate_rows(product, H, back, rows_of)
    values, vectors = torch.linalg.eigh((H + H.mT) / 2)
    noise = _NOISE * torch.finfo(values.dtype).eps * values.abs().max()
    if bool((values < -noise).any()):
        raise ValueError(
            "The loss is not convex in the prediction: its Hessian has the eigenvalue "
            f"{values.min().item():.3e}. No Kronecker factors represent an indefinite "
            "matrix; use a convex loss, or GGNLinearOperator."
        )
    roots = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return HessianRoot(classes, lambda c: back(roots[..., c]))


def _require_separate_rows(
    product: Callable[[Tensor], Tensor],
    H: Tensor,
    back: Callable[[Tensor], Tensor],
    rows_of: Callable[[Tensor], Tensor],
) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    shape = H.shape[:-1]
    u = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(H)
    expected = (H @ u.unsqueeze(-1)).squeeze(-1)
    difference = (rows_of(product(back(u))) - expected).abs().max()
    size = H.abs().sum(-1).max()
    if bool(difference > torch.finfo(H.dtype).eps ** 0.5 * size):
        raise ValueError(
            "The loss couples several data (its Hessian is not block diagonal), so it is "
            "no sum over the data. Use a sum or mean of independent terms, or "
            "GGNLinearOperator."
        )
