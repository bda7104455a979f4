"""Sums over all data: batch by batch, and over the processes that share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from torchlinop.kronecker.blocks import BlockPlan
from torchlinop.kronecker.looks import Look, looks
from torchlinop.kronecker.settings import Settings
from torchlinop.sources import EmpiricalRisk

_DOING = "computing Kronecker factors"


class Structure(NamedTuple):
    """What the sums are sums of, the same for every batch.

    Attributes
    ----------
    plans : list of BlockPlan
    uncovered : list of int
        Parameters that no rule covers.
    """

    plans: list[BlockPlan]
    uncovered: list[int]


class Sums(Protocol):
    """Tensors to which every batch adds."""

    def add(self, look: Look) -> None:
        """Add a batch."""

    def tensors(self) -> list[Tensor]:
        """Return the tensors, to be written to."""


Kind = TypeVar("Kind", bound=Sums)


def accumulate(
    risk: EmpiricalRisk, settings: Settings, start: Callable[[Structure], Kind]
) -> tuple[Structure, Kind]:
    """Pass over all data.

    Parameters
    ----------
    risk, settings
        What is evaluated.
    start
        Makes sums that are zero.

    Raises
    ------
    ValueError
        A parameter is covered by no rule, or is used otherwise than in other data.
    """
    sums: list[Kind] = []

    def own_data() -> Structure | None:
        structure = None
        for look in looks(risk, settings):
            structure = Structure(look.blocks, look.uncovered)
            if not sums:
                sums.append(start(structure))
            sums[0].add(look)
            del look  # not kept while the next batch is evaluated
        return structure

    told = risk.options.ranks.together(own_data, _DOING)
    structures = [structure for structure in told if structure is not None]
    groups = [[plan.group for plan in each.plans] for each in structures]
    if any(own != groups[0] for own in groups):
        raise ValueError(
            "The ranks use the parameters in different ways: blocks of "
            f"{' and of '.join(str([g.names for g in own]) for own in groups)}. One matrix "
            "needs one structure."
        )
    total = sums[0] if sums else start(structures[0])
    add_up(risk, total.tensors())
    return structures[0], total


def add_up(risk: EmpiricalRisk, tensors: Sequence[Tensor]) -> None:
    """Add tensors of one dtype up over the processes, in place."""
    ranks = risk.options.ranks
    if ranks.alone or not tensors:
        return
    sizes = [tensor.numel() for tensor in tensors]
    total = ranks.sum(
        lambda: torch.cat([tensor.reshape(-1) for tensor in tensors]),
        tensors[0].new_empty(0),
        (sum(sizes),),
        _DOING,
    )
    for tensor, part in zip(tensors, total.split(sizes), strict=True):
        tensor.copy_(part.view(tensor.shape))


def take_first(risk: EmpiricalRisk, tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with those of the first process: others may round differently."""
    if risk.options.ranks.rank:
        for tensor in tensors:
            tensor.zero_()
    add_up(risk, tensors)
