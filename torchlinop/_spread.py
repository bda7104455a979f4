"""Tensors that are spread over processes (``DTensor``): seen whole, and spread again.

Nothing is imported: what is not in ``sys.modules`` nobody uses.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_spread(x: Any) -> bool:
    """Whether ``x`` is a ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def whole(x: Tensor) -> Tensor:
    """Return all of a ``DTensor``. Collective: every process of its mesh has to call this.

    The memory may be that of ``x``, where every process has all of it.
    """
    spread: Any = x
    with torch.no_grad():
        gathered: Tensor = spread.detach().full_tensor()
    return gathered


def require_vector(x: Tensor) -> None:
    """Refuse a ``DTensor`` in whose place a product could not be put."""
    tensors: Any = sys.modules["torch.distributed.tensor"]
    spread: Any = x
    for placement in spread.placements:
        if type(placement) not in (tensors.Shard, tensors.Replicate):
            raise ValueError(
                f"Got a DTensor with the placements {spread.placements}. Vectors have to "
                "be placed Shard(...) or Replicate(), and so are the products: call "
                "x.redistribute(placements=[Shard(0)]) first."
            )


def spread_like(y: Tensor, x: Tensor) -> Tensor:
    """Return the ``DTensor`` of which every process has ``y``, placed like ``x``.

    Only this process's part of ``y`` is kept. Nothing is communicated.
    """
    tensors: Any = sys.modules["torch.distributed.tensor"]
    like: Any = x
    mesh, placements = like.device_mesh, like.placements
    part = y
    for i, placement in enumerate(placements):
        if isinstance(placement, tensors.Shard):
            parts = part.chunk(mesh.size(i), placement.dim)
            here = mesh.get_local_rank(i)
            # the last processes have none, where there is too little
            empty = part.narrow(placement.dim, 0, 0)
            part = parts[here] if here < len(parts) else empty
    part = part.clone(memory_format=torch.contiguous_format)  # y is not kept
    made: Tensor = tensors.DTensor.from_local(
        part, mesh, placements, run_check=False, shape=y.shape, stride=y.stride()
    )
    return made
