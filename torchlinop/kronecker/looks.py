"""One batch after the other: the model evaluated, its blocks planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torchlinop.autodiff.experience import Experience
from torchlinop.kronecker.blocks import BlockPlan, plan_blocks
from torchlinop.kronecker.evaluation import Evaluation
from torchlinop.kronecker.places import Axis
from torchlinop.kronecker.seeds import FisherType, SeedSource
from torchlinop.kronecker.settings import Settings, Uncovered
from torchlinop.sources import EmpiricalRisk

#: where the samples were found to be, and in which look at model and data: a backward pass
#: that further passes do without
_found: WeakKeyDictionary[EmpiricalRisk, tuple[int, Sequence[Axis | None]]] = (
    WeakKeyDictionary()
)


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
