"""Linearizing small batches as one, where that gives the same matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchlinop._space import ParameterSpace
from torchlinop.autodiff.probing import probe_vector
from torchlinop.data import Batch, joined

#: a larger linearization is not worth joining with others
_SMALL = 8 << 20
#: nor are these
_LARGE = 64 << 20
#: what another order of additions may change, in units of rounding
_NOISE = 100


def groups(nbytes: Mapping[int, int]) -> Iterator[list[int]]:
    """Yield positions of small linearizations that may become one.

    Parameters
    ----------
    nbytes
        Their sizes.
    """
    group: list[int] = []
    total = 0
    for position, size in nbytes.items():
        if size > _SMALL:
            continue
        if group and total + size > _LARGE:
            if len(group) > 1:
                yield group
            group, total = [], 0
        group.append(position)
        total += size
    if len(group) > 1:
        yield group


def linearized_as_one(
    batches: Sequence[Batch],
    maps: Sequence[Any],
    linearize: Callable[[Batch], Any],
    space: ParameterSpace,
) -> Any | None:
    """Return one linear map that is the sum of several, None if there is none.

    Whether samples are treated one by one cannot be seen in a model. But linear maps that
    agree on one random vector are the same, except with probability zero.

    Parameters
    ----------
    batches
        What the maps are linearizations of.
    maps
        Functions of a vector, on one device.
    linearize
        Makes such a map of a batch.
    space
        Of the vectors.
    """
    batch = joined(batches)
    if batch is None:
        return None
    probe = probe_vector(space.dim, space.dtype, space.device)
    try:
        whole = linearize(batch)
        if _agree(whole(probe), (linear_map(probe) for linear_map in maps)):
            return whole
    except Exception:  # a number of samples that the model is not made for, no memory
        pass
    return None


def _agree(whole: Tensor, parts: Iterable[Tensor]) -> bool:
    """Whether a tensor is a sum, but for rounding."""
    rest = whole.clone()
    for part in parts:
        rest -= part
    bound = _NOISE * torch.finfo(whole.dtype).eps * torch.linalg.vector_norm(whole)
    return bool(torch.linalg.vector_norm(rest) <= bound)
