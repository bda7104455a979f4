"""Where the samples are among the positions at which a parameter is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Axis(NamedTuple):
    """The dimension of positions that counts the samples.

    Attributes
    ----------
    dim : int
    inner : bool
        If the dimension counts more than the samples: whether they are what changes first
        along it (tokens times samples), not last (samples times tokens).
    """

    dim: int
    inner: bool


@dataclass(frozen=True)
class Place:
    """Where the samples are among the positions of a use.

    Attributes
    ----------
    dims : int
        How many dimensions of positions there are.
    axis : Axis or None
        None where all samples share the positions.
    samples : int
        Number of samples.
    """

    dims: int
    axis: Axis | None
    samples: int

    def rows(self, x: Tensor, start: int) -> Tensor:
        """Arrange ``(..., *positions, *rest)`` as ``(..., S, T, d)``.

        ``S`` is 1 where all samples share the positions.

        Parameters
        ----------
        x
            Its positions begin at dimension ``start``.
        start
            0 or 1.
        """
        lead, positions = x.shape[:start], x.shape[start : start + self.dims]
        count, width = positions.numel(), x.shape[start + self.dims :].numel()
        samples = 1
        if self.axis is not None:
            samples = self.samples
            x = self._split(x, start).movedim(start + self.axis.dim, start)
        return x.reshape(*lead, samples, count // samples, width)

    def narrow(self, x: Tensor, samples: slice) -> Tensor:
        """Return the part of ``(*positions, ...)`` that belongs to some samples."""
        if self.axis is None:
            return x
        dim, count = self.axis.dim, samples.stop - samples.start
        x = self._split(x, 0).narrow(dim, samples.start, count)
        if self.axis.inner:
            x = x.transpose(dim, dim + 1)
        return x.flatten(dim, dim + 1)

    def of(self, samples: slice) -> Place:
        """Return the place of some of the samples."""
        return Place(self.dims, self.axis, samples.stop - samples.start)

    def only_of(self, x: Tensor, n: int) -> bool:
        """Whether ``(*positions, ...)`` is zero but for the positions of one sample."""
        assert self.axis is not None
        x = self._split(x, 0)
        before = x.narrow(self.axis.dim, 0, n)
        after = x.narrow(self.axis.dim, n + 1, self.samples - n - 1)
        return not bool(before.any() | after.any())

    def _split(self, x: Tensor, start: int) -> Tensor:
        """Split the dimension of the samples: they first, then what else it counts."""
        assert self.axis is not None
        dim = start + self.axis.dim
        if self.axis.inner:
            return x.unflatten(dim, (-1, self.samples)).transpose(dim, dim + 1)
        return x.unflatten(dim, (self.samples, -1))
