"""Applying a linearization to many vectors: in blocks where that pays and works."""

from __future__ import annotations

import warnings
from typing import Protocol

import torch
from torch import Tensor

#: on a CPU a block pays while it stays in the cache
_CPU_BLOCK_BYTES = 4 << 20
#: on a GPU it pays as long as it fits
_GPU_MEMORY_SHARE = 0.2


class RowFunction(Protocol):
    """A linear function of a row ``(dim,)``, or of rows ``(K, dim)`` if batched."""

    def __call__(self, v: Tensor, /, *, batched: bool = False) -> Tensor:
        """Map ``(dim,)`` to ``(dim_out,)``, or ``(K, dim)`` to ``(K, dim_out)``."""


def apply_rows(
    function: RowFunction, rows: Tensor, *, nbytes: int, state: BlockState
) -> Tensor:
    """Apply to every row of a ``(K, dim)`` tensor; returns a fresh ``(K, dim_out)``.

    Parameters
    ----------
    function
        Applied to blocks of rows where that pays and works, else to one row at a time.
    rows
        Shape ``(K, dim)``, contiguous; a single row is better given to ``function``.
    nbytes
        What the linearization behind ``function`` holds: a measure of the memory that
        each row of a block takes.
    state
        What earlier calls learned about block sizes.
    """
    count = rows.shape[0]
    if count == 0:
        return function(rows.new_zeros(rows.shape[1])).unsqueeze(0)[:0]
    chunk = min(count, state.block_size(nbytes, rows.device))
    if chunk > 1:
        try:
            with warnings.catch_warnings():
                # torch falls back to a loop for operations without a batching rule
                warnings.filterwarnings("ignore", message="There is a performance drop")
                blocks = [function(b, batched=True) for b in rows.split(chunk)]
            return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                state.limit = chunk // 2
                return apply_rows(function, rows, nbytes=nbytes, state=state)
            state.limit = 1
    first = function(rows[0])
    results = first.new_empty(count, *first.shape)
    results[0] = first
    for i in range(1, count):
        results[i] = function(rows[i])
    return results


class BlockState:
    """How many vectors a block may hold; learns from failures.

    Attributes
    ----------
    limit : int or None
        Set once a block of vectors has failed: 1 where an operation has no batching
        rule, half the block after running out of memory.
    """

    def __init__(self) -> None:
        self.limit: int | None = None

    def block_size(self, nbytes: int, device: torch.device) -> int:
        """Return how many vectors to multiply at once."""
        if self.limit is not None and self.limit <= 1:
            return 1
        if device.type == "cuda":
            budget = int(_GPU_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
        else:
            budget = _CPU_BLOCK_BYTES
        size = max(1, budget // max(nbytes, 1))
        return size if self.limit is None else min(size, self.limit)
