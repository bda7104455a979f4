"""Whether the ranks of a group have the same model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from torchlinop.distributed.checksums import checksum

#: what has to be the same on every rank, by what it is called in an error
Facts: TypeAlias = dict[str, Any]


def facts_of(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Facts:
    """Return what tells models apart: plain values, and of tensors little numbers."""
    return {
        **plain,
        **{
            name: (tuple(tensor.shape), str(tensor.dtype), int(checksum(tensor)))
            for name, tensor in tensors.items()
        },
    }


def require_same(facts: Sequence[Facts]) -> None:
    """Refuse facts that differ from rank to rank; name the first that does.

    Raises
    ------
    ValueError
        They do.
    """
    first = facts[0]
    for rank, others in enumerate(facts):
        for name in [*first, *others]:
            here, there = first.get(name, "nothing"), others.get(name, "nothing")
            if here != there:
                raise ValueError(_difference(name, rank, here, there))


def _difference(name: str, rank: int, here: Any, there: Any) -> str:
    if isinstance(here, tuple) and isinstance(there, tuple) and here[:-1] == there[:-1]:
        return (
            f"The ranks have different models: {name}, of shape {here[0]}, has other "
            f"values on rank {rank} than on rank 0. Load the same checkpoint or seed on "
            "every rank, or send that of rank 0: torch.distributed.broadcast(tensor, 0) "
            "for every parameter and buffer."
        )
    return (
        f"The ranks have different models: {name} is {here!r} on rank 0 and {there!r} on "
        f"rank {rank}. Run the same program on every rank."
    )
