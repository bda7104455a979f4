"""What is learned, product by product, about the cheapest way to multiply."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

#: bytes of the linearization and two vectors, times columns, beyond which a block leaves a
#: CPU's caches
_CPU_BLOCK_BYTES = 32 << 20
#: share of a GPU's free memory that a block may take
_GPU_MEMORY_SHARE = 0.2
#: calls that are to come where nothing is known of earlier ones
_EXPECTED = 0


class Experience:
    """What an operator has learned about applying its linear maps.

    Parameters
    ----------
    room
        Bytes that replays may take.
    expected
        How many products the maps that were replaced by these have seen.

    Attributes
    ----------
    limit : int or None
        How many vectors a block may hold, once one has failed: 1 where an operation has
        no batching rule, half the block after running out of memory.
    replays_pay : bool or None
        Whether the replay of one map was faster than its function.
    blocks : int
        How many blocks were multiplied.
    block_ratio : float or None
        Time of a column in a block over that of a single product.
    """

    def __init__(
        self, room: Callable[[], float] = lambda: math.inf, expected: int = 0
    ) -> None:
        self.room = room
        self.expected = expected or _EXPECTED
        self.limit: int | None = None
        self.replays_pay: bool | None = None
        self.blocks = 0
        self.block_ratio: float | None = None

    def go_on(self, room: Callable[[], float], expected: int) -> None:
        """Keep what was learned for the maps that replace those so far."""
        self.room = room
        self.expected = expected or _EXPECTED

    def block_size(self, nbytes: int, device: torch.device) -> int:
        """Return how many vectors may be multiplied at once."""
        if self.limit is not None and self.limit <= 1:
            return 1
        if device.type == "cuda":
            budget = int(_GPU_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
        else:
            budget = _CPU_BLOCK_BYTES
        size = max(1, budget // max(nbytes, 1))
        return size if self.limit is None else min(size, self.limit)


class Pace:
    """Seconds that a column takes, alone and in a block: the least that was seen."""

    def __init__(self) -> None:
        self.single = self.block = math.inf
        #: whether there was but one block, the first of all: slow perhaps for being that
        self._doubtful = False

    def note(self, seconds: float, columns: int, experience: Experience) -> None:
        """Remember how long one column took, or a block."""
        if columns == 1:
            self.single = min(self.single, seconds)
        else:
            experience.blocks += 1
            self._doubtful = experience.blocks == 1
            self.block = min(self.block, seconds / columns)
        if max(self.single, self.block) < math.inf and not self._doubtful:
            experience.block_ratio = self.block / self.single

    def prefers_blocks(self, experience: Experience) -> bool:
        """Whether the next columns should be a block.

        Both are tried, unless other batches have shown what is faster.
        """
        shown = experience.block_ratio
        if self.block == math.inf:
            return self.single < math.inf if shown is None else shown < 1
        return self.block < (3 if self._doubtful else 1) * self.single < math.inf
