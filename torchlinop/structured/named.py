"""Blocks of a matrix by the names of parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torchlinop._space import ParameterSpace
from torchlinop.structured.submatrix import SubmatrixLinearOperator


def block(
    A: Any,
    rows: str | Iterable[str],
    columns: str | Iterable[str] | None = None,
    *,
    space: ParameterSpace | None = None,
) -> SubmatrixLinearOperator:
    """Rows and columns of a matrix that belong to parameters.

    Parameters
    ----------
    A
        An operator on a parameter space, for instance a Hessian.
    rows
        A parameter's name, or several.
    columns
        The same for the columns; the same parameters by default.
    space
        The parameters, ``A.space`` by default; needed for sums and products.

    Raises
    ------
    KeyError
        A name is not a parameter.
    TypeError, ValueError
        The parameters of ``A`` are not known, or do not fit it.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import GGNLinearOperator, block
    >>> model = torch.nn.Linear(2, 1)
    >>> data = [(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))]
    >>> G = GGNLinearOperator(model, torch.nn.MSELoss(), model.parameters(), data)
    >>> block(G, "weight").to_dense()
    tensor([[2., 4.],
            [4., 8.]])
    """
    known = getattr(A, "space", None) if space is None else space
    if not isinstance(known, ParameterSpace):
        raise TypeError(
            f"The parameters of a {type(A).__name__} are not known. Pass space=, for "
            "instance G.space of the operator that it was made of."
        )
    if (known.dim, known.dim) != tuple(A.shape):
        raise ValueError(
            f"A is {A.shape[0]} x {A.shape[1]}, but the parameters have {known.dim} "
            "entries."
        )
    of_rows = _positions(known, rows)
    of_columns = of_rows if columns is None else _positions(known, columns)
    return SubmatrixLinearOperator(A, of_rows, of_columns)


def _positions(space: ParameterSpace, names: str | Iterable[str]) -> list[int]:
    wanted = [names] if isinstance(names, str) else list(names)
    starts, start = {}, 0
    for name, size in zip(space.names, space.sizes, strict=True):
        starts[name] = range(start, start + size)
        start += size
    for name in wanted:
        if name not in starts:
            raise KeyError(f"{name!r} is not a parameter; there are {', '.join(starts)}.")
    return [i for name in wanted for i in starts[name]]
