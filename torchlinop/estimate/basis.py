"""An orthonormal basis, on the device as far as the budget goes and on the host beyond."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: entries of each vector that are combined at once
_COLUMNS = 1 << 15


class Basis:
    """Rows of a matrix, filled from the top.

    Parameters
    ----------
    capacity
        Most vectors.
    like
        A vector ``(N,)`` of the dtype and on the device of the products.
    on_device
        How many of them may lie there; the others lie on the host.
    """

    def __init__(self, capacity: int, like: Tensor, on_device: int) -> None:
        here = min(capacity, on_device)
        shapes = ((here, like.device), (capacity - here, torch.device("cpu")))
        self._parts = [
            torch.empty(rows, len(like), dtype=like.dtype, device=device)
            for rows, device in shapes
        ]
        self._split = here
        self._device = like.device

    def __getitem__(self, i: int) -> Tensor:
        """Vector ``i``, on the device."""
        if i < self._split:
            return self._parts[0][i]
        return self._parts[1][i - self._split].to(self._device)

    def __setitem__(self, i: int, vector: Tensor) -> None:
        if i < self._split:
            self._parts[0][i] = vector
        else:
            self._parts[1][i - self._split] = vector.to("cpu")

    def rows(self, count: int) -> list[Tensor]:
        """The first vectors where they lie, as blocks of rows."""
        return self._filled(count)

    def _filled(self, count: int) -> list[Tensor]:
        if count <= self._split:
            return [self._parts[0][:count]]
        here = self._parts[0][: min(count, self._split)]
        there = self._parts[1][: max(count - self._split, 0)]
        return [part for part in (here, there) if len(part)]

    def dots(self, count: int, w: Tensor) -> Tensor:
        """Inner products of the first vectors with ``w``, shape ``(count,)``."""
        parts = self._filled(count)
        products = [torch.mv(part.conj(), w.to(part.device)) for part in parts]
        return torch.cat([product.to(self._device) for product in products])

    def subtract(self, w: Tensor, coefficients: Tensor) -> None:
        """Subtract a combination of the first vectors from ``w``."""
        start = 0
        for part in self._filled(len(coefficients)):
            share = coefficients[start : start + len(part)]
            start += len(part)
            if part.device == w.device:
                w.addmv_(part.T, share, alpha=-1)
            else:
                w.sub_(torch.mv(part.T, share.to(part.device)).to(w.device))

    def orthogonalize(self, count: int, w: Tensor) -> Tensor:
        """Remove the components of ``w`` along the first vectors, and return them."""
        if count <= self._split:  # in as few calls as there can be
            rows = self._parts[0][:count]
            coefficients = torch.mv(rows.conj(), w)
            w.addmv_(rows.T, coefficients, alpha=-1)
            return coefficients
        coefficients = self.dots(count, w)
        self.subtract(w, coefficients)
        return coefficients

    def combine(self, S: Tensor) -> None:
        """Replace the first vectors by combinations of them: ``S`` has shape ``(m, k)``."""
        for chunk, columns in self._chunks(S):
            done = 0
            for part in self._filled(S.shape[1]):
                part[:, columns] = chunk[done : done + len(part)].to(part.device)
                done += len(part)

    def combinations(self, S: Tensor) -> Tensor:
        """Return combinations of the first vectors as columns ``(N, k)``."""
        result = torch.empty(
            self._parts[0].shape[1], S.shape[1], dtype=S.dtype, device=self._device
        )
        for chunk, columns in self._chunks(S):
            result[columns] = chunk.T
        return result

    def _chunks(self, S: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Combinations, as rows, for some columns at a time."""
        parts = self._filled(len(S))
        for start in range(0, parts[0].shape[1], _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            rows = [part[:, columns].to(self._device) for part in parts]
            yield S.T @ (rows[0] if len(rows) == 1 else torch.cat(rows)), columns
