"""Whether what the user gave as data is data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def require_reiterable(data: Any) -> None:
    """Refuse what is no re-iterable of pairs, as far as that shows without reading."""
    if not hasattr(data, "__iter__"):
        raise TypeError(
            "data has to be a re-iterable of (X, y), such as a list or a DataLoader, "
            f"got {type(data).__name__}."
        )
    if isinstance(data, (Tensor, Mapping)):
        raise TypeError(
            f"data has to be a re-iterable of pairs (X, y), got {type(data).__name__}. "
            "For one batch write data=[(X, y)]."
        )
    if hasattr(data, "__next__"):
        raise TypeError(
            f"data is a {type(data).__name__}, which can be read only once; every "
            "product reads all data. Pass list(data), or a DataLoader."
        )


def require_pair(position: int, item: Any) -> tuple[Any, Any]:
    """Return an item of the data as ``(X, y)``."""
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    got = type(item).__name__
    if isinstance(item, (tuple, list)):
        got += f" of length {len(item)}"
    raise TypeError(
        f"Every item of data has to be a pair (X, y), item {position} is a {got}. "
        "For one batch write data=[(X, y)]."
    )


def require_batches(number: int) -> None:
    """Refuse data that yields nothing."""
    if number == 0:
        raise ValueError(
            "data is empty: it yielded no (X, y). If it is a generator or an iterator "
            "that was used before, pass a list or a DataLoader."
        )


def require_number(size: Any, X: Any) -> int:
    """Return a number of samples, or refuse what ``batch_size`` made of ``X``."""
    try:
        return int(size)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"batch_size={size!r} for an X of type {type(X).__name__}: it has to be a "
            "function from X to its number of samples."
        ) from error
