"""Blocks of vectors whose columns are spread over the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchlinop._operator import TorchLinearOperator
from torchlinop.distributed.ranks import ProcessRanks, process_ranks


def split_columns(
    A: TorchLinearOperator, *, process_group: Any = None
) -> TorchLinearOperator:
    """Return an operator of which every rank multiplies some of the columns.

    For operators that every rank has as a whole (all of the data, no ``process_group``),
    in block solvers, estimators and ``to_dense``. A single vector is multiplied by the
    last rank alone.

    Parameters
    ----------
    A
        The same matrix on every rank.
    process_group
        Of :mod:`torch.distributed`; by default all processes. All of them multiply, or
        leave that to :func:`driver`: ``driver(split_columns(H))``.

    Raises
    ------
    ValueError
        The ranks have different matrices.
    RuntimeError
        The process group is not initialized.
    """
    ranks = process_ranks(dist.group.WORLD if process_group is None else process_group)
    _require_replicas(A, ranks)
    return _SplitColumns(A, ranks)


def _require_replicas(A: TorchLinearOperator, ranks: ProcessRanks) -> None:
    """Compare a product on all ranks."""

    def facts() -> tuple[Any, ...]:
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randn(A.shape[1], 1, generator=generator, device="cpu")
        product = A._product(x.to(A.device, A.torch_dtype)).squeeze(1)
        # entries count differently, so that a permutation is another matrix
        weights = torch.linspace(0, 1, len(product), dtype=x.dtype, device="cpu")
        size, place = product.norm(), (product * weights.to(product)).norm()
        return (A.shape, str(A.torch_dtype)), size.item(), place.item()

    told = ranks.together(facts, "splitting columns")
    tolerance = torch.finfo(A.torch_dtype).eps ** (2 / 3) * told[0][1]
    for rank, (kind, size, place) in enumerate(told):
        differs = max(abs(size - told[0][1]), abs(place - told[0][2]))
        if kind != told[0][0] or not differs <= tolerance:
            raise ValueError(
                f"Rank {rank} has another matrix than rank 0. To split columns every rank "
                "needs the whole one: the same model and all of the data. Where the data "
                "is spread, build the operator with process_group= instead."
            )


class _SplitColumns(TorchLinearOperator):
    """An operator of which every rank multiplies some of the columns."""

    def __init__(
        self,
        operator: TorchLinearOperator,
        ranks: ProcessRanks,
        origin: _SplitColumns | None = None,
    ) -> None:
        super().__init__(operator.shape, operator.torch_dtype, operator.device)
        self._operator = operator
        self._ranks = ranks
        self._origin = origin

    def _apply(self, x: Tensor) -> Tensor:
        rank, size, k = self._ranks.rank, self._ranks.line.size, x.shape[1]
        own = slice(k * rank // size, k * (rank + 1) // size)
        shape = (self.shape[0], k)

        def part() -> Tensor:
            product = x.new_zeros(shape)
            if own.start < own.stop:
                product[:, own] = self._operator._product(x[:, own])
            return product

        return self._ranks.sum(part, x, shape, "multiplying columns")

    def _adjoint(self) -> TorchLinearOperator:
        if self._origin is not None:
            return self._origin
        adjoint = self._operator._adjoint()
        if adjoint is self._operator:
            return self
        return _SplitColumns(adjoint, self._ranks, origin=self)
