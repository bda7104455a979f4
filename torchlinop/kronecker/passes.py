"""Passes over the data in which factors are computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlinop.kronecker.adding import Structure, accumulate
from torchlinop.kronecker.blocks import BlockPlan, MatrixPlan, TiedPlan, VectorPlan
from torchlinop.kronecker.layout import Group, ParameterLayout
from torchlinop.kronecker.looks import Look
from torchlinop.kronecker.moments import MatrixMoments, UncoveredDiagonal, VectorMoment
from torchlinop.kronecker.seeds import FisherType
from torchlinop.kronecker.settings import Settings
from torchlinop.kronecker.tied import TiedMoments
from torchlinop.sources import EmpiricalRisk
from torchlinop.structured import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    KroneckerLinearOperator,
    StructuredLinearOperator,
)

Moment = MatrixMoments | TiedMoments | VectorMoment


@dataclass
class KFACBlock:
    """A block after a pass.

    Attributes
    ----------
    plan : BlockPlan
    inputs, outputs : Tensor or None
        Factors of a matrix, ``(G, d, d)`` or ``(G, d)`` if they are diagonal.
    matrix : Tensor or None
        Of scales and shifts.
    """

    plan: BlockPlan
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    matrix: Tensor | None = None

    def operator(self) -> StructuredLinearOperator:
        """Return the block as an operator."""
        if self.matrix is not None:
            return KroneckerLinearOperator(self.matrix)
        assert isinstance(self.plan, (MatrixPlan, TiedPlan))
        assert self.inputs is not None
        assert self.outputs is not None
        if isinstance(self.plan, MatrixPlan) and not self.plan.has_weight:
            # of a bias alone the other factor is a number, which needs no damping
            return KroneckerLinearOperator(self.outputs[0] * self.inputs.reshape(1))
        groups = []
        for a, g in zip(self.inputs, self.outputs, strict=True):
            pair = (a, g) if self.plan.transposed else (g, a)
            groups.append(KroneckerLinearOperator(*pair))
        return groups[0] if len(groups) == 1 else BlockDiagonalLinearOperator(groups)


@dataclass
class Result:
    """All blocks after a pass, and the diagonals of what no rule covers."""

    blocks: list[KFACBlock]
    uncovered: UncoveredDiagonal

    def operator(
        self, risk: EmpiricalRisk, blocks: list[StructuredLinearOperator]
    ) -> BlockDiagonalLinearOperator:
        """Return the block-diagonal operator of these blocks on the parameters."""
        groups = [block.plan.group for block in self.blocks]
        return assemble(risk, groups, blocks, self.uncovered)


def assemble(
    risk: EmpiricalRisk,
    groups: list[Group],
    blocks: list[StructuredLinearOperator],
    uncovered: UncoveredDiagonal,
) -> BlockDiagonalLinearOperator:
    """Return a block-diagonal operator on the parameters."""
    names = risk.space.names
    groups = groups + [Group((names[i],), (i,)) for i in uncovered.indices]
    diagonals = [DiagonalLinearOperator(d) for d in uncovered.diagonals]
    layout = ParameterLayout(tuple(risk.space.sizes), tuple(groups))
    return BlockDiagonalLinearOperator([*blocks, *diagonals], layout)


def kfac_pass(risk: EmpiricalRisk, settings: Settings) -> Result:
    """Compute KFAC's factors in one pass over the data.

    Raises
    ------
    ValueError
        A factor is not finite; the error names its layer and the batch.
    """
    structure, sums = accumulate(risk, settings, lambda s: _Moments(risk, settings, s))
    ranks = risk.options.ranks
    total = sum(ranks.together(lambda: sums.weight, "adding up weights")) or 1.0
    blocks = []
    for moment, plan in zip(sums.moments, structure.plans, strict=True):
        if not isinstance(moment, VectorMoment):
            inputs, outputs = moment.factors(plan, total, settings.fisher_type)  # type: ignore[arg-type]
            blocks.append(KFACBlock(plan, inputs, outputs))
        else:
            matrix = moment.matrix(total, settings.fisher_type)
            blocks.append(KFACBlock(plan, matrix=matrix))
    return Result(blocks, sums.uncovered)


class _Moments:
    """The sums that factors are made of.

    Attributes
    ----------
    moments : list of Moment
        Of the blocks.
    uncovered : UncoveredDiagonal
    weight : float
        Of this process's data.
    """

    def __init__(
        self, risk: EmpiricalRisk, settings: Settings, structure: Structure
    ) -> None:
        space = risk.space
        like = torch.empty(0, dtype=space.dtype, device=space.device)
        self.moments = [_moment(plan, settings, like) for plan in structure.plans]
        self.uncovered = uncovered_diagonal(risk, structure.uncovered)
        self.weight = 0.0
        self._dtype, self._names = space.dtype, space.names
        self._forward_only = settings.fisher_type is FisherType.FORWARD_ONLY

    def add(self, look: Look) -> None:
        """Add a batch."""
        batch = look.evaluation
        weights = batch.seeds.weights.to(self._dtype)
        self.weight += weights.double().sum().item()
        pairs = list(zip(self.moments, look.blocks, strict=True))
        with torch.no_grad():
            for moment, plan in pairs:
                if self._forward_only or not isinstance(moment, VectorMoment):
                    moment.add_inputs(plan, batch, weights)  # type: ignore[arg-type]
            for gradients in batch.gradients():
                for moment, plan in pairs:
                    moment.add_outputs(plan, gradients, batch)  # type: ignore[arg-type]
        self.uncovered.add(batch)
        squares = {plan.label: moment.squares() for moment, plan in pairs}
        require_finite(squares | self.uncovered.squares(self._names), look.position)

    def tensors(self) -> list[Tensor]:
        """Return all sums."""
        parts = list(self.uncovered.diagonals)
        for moment in self.moments:
            parts += moment.tensors()
        return parts


def uncovered_diagonal(risk: EmpiricalRisk, indices: list[int]) -> UncoveredDiagonal:
    """Start the diagonals of what no rule covers."""
    like = [
        torch.empty(risk.space.sizes[i], dtype=risk.space.dtype, device=risk.space.device)
        for i in indices
    ]
    return UncoveredDiagonal(indices, like)


def _moment(plan: BlockPlan, settings: Settings, like: Tensor) -> Moment:
    if isinstance(plan, TiedPlan):
        return TiedMoments(plan, settings.weight_sharing, like)
    if isinstance(plan, MatrixPlan):
        return MatrixMoments(plan, settings.weight_sharing, like)
    assert isinstance(plan, VectorPlan)
    return VectorMoment(plan, like)


def require_finite(sums: dict[str, list[Tensor]], position: int) -> None:
    """Refuse sums that are not finite.

    Parameters
    ----------
    sums
        Tensors of one dtype by the label of their block.
    position
        Of the last batch.
    """
    everything = [part.reshape(-1) for parts in sums.values() for part in parts]
    if not everything or torch.cat(everything).isfinite().all():
        return
    for label, parts in sums.items():
        if not all(part.isfinite().all() for part in parts):
            raise ValueError(
                f"The factors of {label} are not finite after batch {position}: an input "
                "or an output gradient there is NaN or infinite. Look at the data and the "
                "parameters (check_finite=True)."
            )
