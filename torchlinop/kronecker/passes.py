"""Passes over the data in which factors are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from torchlinop.autodiff.experience import Experience
from torchlinop.kronecker.blocks import (
    BlockPlan,
    MatrixPlan,
    TiedPlan,
    VectorPlan,
    plan_blocks,
)
from torchlinop.kronecker.evaluation import Evaluation
from torchlinop.kronecker.layout import Group, ParameterLayout
from torchlinop.kronecker.moments import MatrixMoments, UncoveredDiagonal, VectorMoment
from torchlinop.kronecker.places import Axis
from torchlinop.kronecker.seeds import FisherType, SeedSource
from torchlinop.kronecker.settings import Settings, Uncovered
from torchlinop.kronecker.tied import TiedMoments
from torchlinop.sources import EmpiricalRisk
from torchlinop.structured import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    KroneckerLinearOperator,
    StructuredLinearOperator,
)

#: where the samples were found to be, and in which look at model and data: a backward pass
#: that further passes do without
_found: WeakKeyDictionary[EmpiricalRisk, tuple[int, Sequence[Axis | None]]] = (
    WeakKeyDictionary()
)


Moment = MatrixMoments | TiedMoments | VectorMoment


@dataclass
class Look:
    """One batch in a pass.

    Attributes
    ----------
    position : int
        Of the batch in the data.
    evaluation : Evaluation
    blocks : list of BlockPlan
    uncovered : list of int
        Parameters that no rule covers.
    """

    position: int
    evaluation: Evaluation
    blocks: list[BlockPlan]
    uncovered: list[int]


def looks(risk: EmpiricalRisk, settings: Settings) -> Iterator[Look]:
    """Evaluate the model batch by batch.

    Raises
    ------
    ValueError
        A parameter is covered by no rule, or is used otherwise than in another batch.
    """
    if settings.fisher_type is FisherType.MC:
        risk.batches.require_order()
    source = SeedSource(risk, settings.fisher_type, settings.mc_samples, settings.seed)
    state, groups = Experience(), None
    look_number, axes = _found.get(risk, (-1, None))
    if look_number != risk.looks:
        axes = None
    for batch in risk.batches:
        evaluation = Evaluation(risk, batch, source, state, axes)
        plan = plan_blocks(
            evaluation.uses, evaluation.unknown, risk.space, joint_bias=settings.joint_bias
        )
        if plan.uncovered and settings.uncovered is Uncovered.ERROR:
            _refuse(risk, plan.uncovered)
        own = [block.group for block in plan.blocks]
        if groups is not None and own != groups:
            raise ValueError(
                f"In batch {batch.position} the model uses its parameters otherwise than "
                f"in batch 0: blocks of {[g.names for g in own]} instead of "
                f"{[g.names for g in groups]}. One matrix needs one structure."
            )
        groups = own
        axes = evaluation.axes
        if axes is not None:
            _found[risk] = risk.looks, axes
        look = Look(batch.position, evaluation, plan.blocks, sorted(plan.uncovered))
        del evaluation, batch  # not kept while the next batch is evaluated
        yield look
        del look


def _refuse(risk: EmpiricalRisk, uncovered: dict[int, str]) -> None:
    reasons = "; ".join(f"{risk.space.names[i]!r} {why}" for i, why in uncovered.items())
    raise ValueError(
        f"No Kronecker factors for some parameters: {reasons}. Leave them out of params, "
        "or pass uncovered='diagonal' to have the exact diagonal for them (one backward "
        "pass for each sample)."
    )


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
    moments: list[Moment] = []
    uncovered: UncoveredDiagonal | None = None
    plans: list[BlockPlan] = []
    total = 0.0
    forward_only = settings.fisher_type is FisherType.FORWARD_ONLY
    for look in looks(risk, settings):
        batch = look.evaluation
        weights = batch.seeds.weights.to(risk.space.dtype)
        total += weights.double().sum().item()
        if uncovered is None:
            plans = look.blocks
            moments = [_moment(plan, settings, weights) for plan in plans]
            uncovered = uncovered_diagonal(risk, look.uncovered)
        pairs = list(zip(moments, look.blocks, strict=True))
        with torch.no_grad():
            for moment, plan in pairs:
                if forward_only or not isinstance(moment, VectorMoment):
                    moment.add_inputs(plan, batch, weights)  # type: ignore[arg-type]
            for gradients in batch.gradients():
                for moment, plan in pairs:
                    moment.add_outputs(plan, gradients, batch)  # type: ignore[arg-type]
        uncovered.add(batch)
        finite = {plan.label: moment.finite() for moment, plan in pairs}
        require_finite(finite | uncovered.finite(risk.space.names), look.position)
        del look, batch, pairs
    assert uncovered is not None
    total = total or 1.0
    blocks = []
    for moment, plan in zip(moments, plans, strict=True):
        if not isinstance(moment, VectorMoment):
            inputs, outputs = moment.factors(plan, total, settings.fisher_type)  # type: ignore[arg-type]
            blocks.append(KFACBlock(plan, inputs, outputs))
        else:
            matrix = moment.matrix(total, settings.fisher_type)
            blocks.append(KFACBlock(plan, matrix=matrix))
    return Result(blocks, uncovered)


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


def require_finite(finite: dict[str, Tensor], position: int) -> None:
    """Refuse sums that are not finite.

    Parameters
    ----------
    finite
        Whether the sums of a block are, a boolean tensor, by the block's label.
    position
        Of the last batch.
    """
    if not finite:
        return
    whole = torch.stack(list(finite.values())).tolist()
    for label, is_finite in zip(finite, whole, strict=True):
        if not is_finite:
            raise ValueError(
                f"The factors of {label} are not finite after batch {position}: an input "
                "or an output gradient there is NaN or infinite. Look at the data and the "
                "parameters (check_finite=True)."
            )
