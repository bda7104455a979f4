"""Which entries of a parameter vector belong to which block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Parameters that share a block.

    Attributes
    ----------
    names : tuple of str
    indices : tuple of int
        Which parameters, in the order in which the block has them.
    rows : int or None
        The parameters are matrices with this many rows, side by side; None if their
        entries come one after the other.
    """

    names: tuple[str, ...]
    indices: tuple[int, ...]
    rows: int | None = None


@dataclass(frozen=True)
class ParameterLayout:
    """Blocks of parameters in a vector of all of them.

    Attributes
    ----------
    sizes : tuple of int
        Numbers of entries of the parameters.
    groups : tuple of Group
        Every parameter is in one of them.
    """

    sizes: tuple[int, ...]
    groups: tuple[Group, ...]

    def split(self, x: Tensor) -> list[Tensor]:
        """Return the part ``(n_i, K)`` of each block."""
        parts = x.split(list(self.sizes))
        blocks = []
        for group in self.groups:
            own = [parts[i] for i in group.indices]
            if len(own) == 1:
                blocks.append(own[0])
            elif group.rows is None:
                blocks.append(torch.cat(own))
            else:
                sides = [part.reshape(group.rows, -1, x.shape[1]) for part in own]
                blocks.append(torch.cat(sides, dim=1).reshape(-1, x.shape[1]))
        return blocks

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Inverse of :meth:`split`."""
        columns = parts[0].shape[1]
        whole = parts[0].new_empty(sum(self.sizes), columns)
        own = whole.split(list(self.sizes))
        for group, part in zip(self.groups, parts, strict=True):
            first = 0
            for i in group.indices:
                if group.rows is None:
                    own[i].copy_(part[first : first + self.sizes[i]])
                    first += self.sizes[i]
                else:
                    side = own[i].view(group.rows, -1, columns)
                    matrix = part.reshape(group.rows, -1, columns)
                    side.copy_(matrix[:, first : first + side.shape[1]])
                    first += side.shape[1]
        return whole

    def label(self, i: int) -> str:
        """Return the names of a block's parameters."""
        return f"the block of {', '.join(self.groups[i].names)}"
