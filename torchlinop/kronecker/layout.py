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
        own: list[Tensor] = [parts[0]] * len(self.sizes)
        for group, part in zip(self.groups, parts, strict=True):
            sizes = [self.sizes[i] for i in group.indices]
            if len(sizes) == 1:
                sides = [part]
            elif group.rows is None:
                sides = list(part.split(sizes))
            else:
                widths = [size // group.rows for size in sizes]
                matrix = part.reshape(group.rows, sum(widths), part.shape[1])
                sides = [
                    side.reshape(-1, part.shape[1]) for side in matrix.split(widths, dim=1)
                ]
            for i, side in zip(group.indices, sides, strict=True):
                own[i] = side
        return torch.cat(own)

    def label(self, i: int) -> str:
        """Return the names of a block's parameters."""
        return f"the block of {', '.join(self.groups[i].names)}"
