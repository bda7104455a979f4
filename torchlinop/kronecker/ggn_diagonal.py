"""The diagonal of the GGN or a Fisher matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.curvature.summed import as_risk
from torchlinop.kronecker.adding import Structure, accumulate
from torchlinop.kronecker.blocks import BlockPlan, MatrixPlan, VectorPlan
from torchlinop.kronecker.ekfac import require_gradients
from torchlinop.kronecker.looks import Look
from torchlinop.kronecker.operator import BlockwiseLinearOperator
from torchlinop.kronecker.passes import assemble, require_finite, uncovered_diagonal
from torchlinop.kronecker.settings import Settings, Uncovered
from torchlinop.kronecker.tied import gradients_of
from torchlinop.sources import EmpiricalRisk
from torchlinop.structured import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    StructuredLinearOperator,
)


class GGNDiagonalLinearOperator(BlockwiseLinearOperator):
    r"""Diagonal of the GGN or a Fisher matrix, from gradients of single samples.

    Exact for ``"type-2"`` (the GGN) and ``"empirical"``; for ``"mc"`` an unbiased estimate
    of the GGN's. Of parameters that are used in a way for which KFAC has no rule the
    gradients are computed sample by sample.

    Parameters
    ----------
    model, loss_function, params, data, fisher_type, mc_samples, seed
        As for :class:`~torchlinop.KFACLinearOperator`.
    **options
        Keyword arguments of :class:`~torchlinop.EmpiricalRisk`.

    Attributes
    ----------
    space : ParameterSpace

    Raises
    ------
    ValueError, TypeError
        As for :class:`~torchlinop.KFACLinearOperator`.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import GGNDiagonalLinearOperator
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> data = [(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1))]
    >>> D = GGNDiagonalLinearOperator(model, torch.nn.MSELoss(), model.parameters(), data)
    >>> D.diagonal().round()
    tensor([10., 20.])
    """

    def __init__(
        self,
        model: Model | EmpiricalRisk,
        loss_function: Loss | None = None,
        params: Parameters | None = None,
        data: Data | None = None,
        *,
        fisher_type: str = "type-2",
        mc_samples: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        risk = as_risk(model, loss_function, params, data, options)
        settings = Settings.of(
            risk,
            fisher_type=fisher_type,
            mc_samples=mc_samples,
            seed=seed,
            joint_bias=False,
            uncovered=Uncovered.DIAGONAL,
        )
        require_gradients(settings, "GGNDiagonalLinearOperator")
        super().__init__(risk, settings)

    def _computed(self, risk: EmpiricalRisk) -> BlockDiagonalLinearOperator:
        structure, sums = accumulate(risk, self.settings, lambda s: _Diagonals(risk, s))
        groups = [plan.group for plan in structure.plans]
        blocks: list[StructuredLinearOperator] = [
            DiagonalLinearOperator(total) for total in sums.totals
        ]
        return assemble(risk, groups, blocks, sums.uncovered)


class _Diagonals:
    """Sums of squared gradients of single samples, of all blocks."""

    def __init__(self, risk: EmpiricalRisk, structure: Structure) -> None:
        space = risk.space
        self._dtype, self._names = space.dtype, space.names
        self.totals = [
            torch.zeros(
                sum(space.sizes[i] for i in plan.group.indices),
                dtype=space.dtype,
                device=space.device,
            )
            for plan in structure.plans
        ]
        self.uncovered = uncovered_diagonal(risk, structure.uncovered)

    def add(self, look: Look) -> None:
        """Add a batch."""
        weights = look.evaluation.seeds.weights.to(self._dtype)
        with torch.no_grad():
            for gradients in look.evaluation.gradients():
                for total, plan in zip(self.totals, look.blocks, strict=True):
                    total += _squares(plan, look, gradients, weights)
        self.uncovered.add(look.evaluation)
        pairs = zip(look.blocks, self.totals, strict=True)
        squares = {plan.label: [total] for plan, total in pairs}
        require_finite(squares | self.uncovered.squares(self._names), look.position)

    def tensors(self) -> list[Tensor]:
        """Return all sums."""
        return [*self.totals, *self.uncovered.diagonals]


def _squares(plan: BlockPlan, look: Look, gradients: list[Tensor], like: Tensor) -> Tensor:
    """Sum over samples and seeds of squared gradients, in the order of the parameters."""
    evaluation = look.evaluation
    if isinstance(plan, VectorPlan):
        v = plan.sample_gradients(gradients, evaluation.uses, evaluation.places)
        return v.to(like.dtype).square().sum((0, 1))
    own = gradients_of(plan, evaluation, gradients, like)
    assert own is not None
    squares = own.squares(None, None)
    is_transposed = isinstance(plan, MatrixPlan) and plan.transposed
    return (squares.mT if is_transposed else squares).reshape(-1)
