"""Averages over random vectors, and the exact answers that they estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop.estimate.arguments import require_finite
from torchlinop.estimate.estimates import mean_and_stderr
from torchlinop.estimate.probes import ProbeSource, block_size


def product_rows(A: TorchLinearOperator, rows: Tensor) -> Tensor:
    """Multiply rows ``(K, N)`` in blocks; returns rows ``(K, M)``."""
    blocks = [A._product(block.T).T for block in rows.split(block_size(A))]
    result = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    require_finite(result, "An estimate")
    return result


def row_dots(x: Tensor, y: Tensor) -> np.ndarray:
    """Inner products ``x_k^H y_k`` of rows, on the host in double precision."""
    wide = torch.promote_types(x.dtype, torch.float64)
    return torch.linalg.vecdot(x, y).to(device="cpu", dtype=wide).numpy()


def unit_rows(A: TorchLinearOperator) -> Iterator[tuple[slice, Tensor]]:
    """The identity in blocks of rows, and which rows they are."""
    n, width = A.shape[1], block_size(A)
    for start in range(0, n, width):
        here = slice(start, min(start + width, n))
        block = torch.zeros(here.stop - start, n, dtype=A.torch_dtype, device=A.device)
        block[:, here].fill_diagonal_(1)
        yield here, block


def exact_diagonal(A: TorchLinearOperator) -> Tensor:
    """The diagonal, by products with all unit vectors."""
    return torch.cat(
        [product_rows(A, rows)[:, here].diagonal().clone() for here, rows in unit_rows(A)]
    )


class Hutchinson:
    """The mean of a number over random vectors.

    Parameters
    ----------
    A
        What is multiplied.
    source
        Of the vectors.
    number
        From vectors and their products, as rows, to an array of one number each.
    exact
        Computes the exact value.
    finish
        From the mean and its standard error to those of what is wanted.
    """

    method, least = "hutchinson", 1

    def __init__(
        self,
        A: TorchLinearOperator,
        source: ProbeSource,
        number: Callable[[Tensor, Tensor], np.ndarray],
        exact: Callable[[], Any],
        finish: Callable[[Any, float], tuple[Any, float]] = lambda mean, error: (
            mean,
            error,
        ),
    ) -> None:
        self._A, self._source, self._number, self._exact = A, source, number, exact
        self._finish = finish
        self._samples: np.ndarray = np.zeros(0)
        self.num_matvecs, self.exact_matvecs = 0, A.shape[1]

    def grow(self, num_matvecs: int) -> None:
        """Draw as many vectors as are missing."""
        while self.num_matvecs < num_matvecs:
            count = min(block_size(self._A), num_matvecs - self.num_matvecs)
            z = self._source.rows(count)
            more = self._number(z, product_rows(self._A, z))
            self._samples = np.append(self._samples, more)
            self.num_matvecs = len(self._samples)

    def estimate(self) -> tuple[Any, float]:
        """What is wanted and its standard error."""
        return self._finish(*mean_and_stderr(self._samples))

    def exact(self) -> Any:
        """Use all unit vectors instead."""
        self.num_matvecs += self.exact_matvecs
        return self._exact()
