r"""A matrix that is used in several ways: by an embedding and a head, or transposed.

Its block is :math:`\sum_u R_u \otimes C_u` over the kinds of use, with factors of its rows
and of its columns (cross terms between them are left out, as between layers). The product
:math:`R \otimes C` that stands for it has the same partial traces,

.. math::
    R = \sum_u \operatorname{tr}(C_u) R_u, \qquad
    C = \sum_u \operatorname{tr}(R_u) C_u \Big/ \sum_u \operatorname{tr}(R_u)
    \operatorname{tr}(C_u),

so it has the sum's trace, and does not depend on how each product is scaled between its
factors. (To add up inputs' and output gradients' moments, as for uses of one kind, would
add numbers of different units here.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchlinop.kronecker.blocks import BlockPlan, MatrixPlan, TiedPlan
from torchlinop.kronecker.evaluation import Evaluation
from torchlinop.kronecker.moments import MatrixMoments, WeightSharing, sample_slices
from torchlinop.kronecker.sample_gradients import SampleGradients
from torchlinop.kronecker.seeds import FisherType


class TiedMoments:
    """Second moments of each kind of use.

    Parameters
    ----------
    plan, sharing, like
        As for :class:`MatrixMoments`.
    """

    def __init__(self, plan: TiedPlan, sharing: WeightSharing, like: Tensor) -> None:
        self._moments = [MatrixMoments(part, sharing, like) for part in plan.parts]

    def add_inputs(self, plan: TiedPlan, batch: Evaluation, weights: Tensor) -> None:
        """Add a batch's inputs."""
        for moment, part in zip(self._moments, plan.parts, strict=True):
            moment.add_inputs(part, batch, weights)

    def add_outputs(
        self, plan: TiedPlan, gradients: list[Tensor], batch: Evaluation
    ) -> None:
        """Add output gradients at some seeds."""
        for moment, part in zip(self._moments, plan.parts, strict=True):
            moment.add_outputs(part, gradients, batch)

    def tensors(self) -> list[Tensor]:
        """Return the sums."""
        return [tensor for moment in self._moments for tensor in moment.tensors()]

    def squares(self) -> list[Tensor]:
        """Return diagonals: sums of squares, finite where all entries are."""
        return [part for moment in self._moments for part in moment.squares()]

    def factors(
        self, plan: TiedPlan, weight: float, fisher_type: FisherType
    ) -> tuple[Tensor, Tensor]:
        """Return the factors of columns and of rows, ``(1, d, d)`` or ``(1, d)``."""
        pairs = []
        for moment, part in zip(self._moments, plan.parts, strict=True):
            inputs, outputs = moment.factors(part, weight, fisher_type)
            pairs.append((inputs, outputs) if part.transposed else (outputs, inputs))
        rows, columns = nearest_product(pairs)
        return columns, rows


def nearest_product(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the Kronecker product with the partial traces of a sum of some.

    Parameters
    ----------
    pairs
        Factors ``(1, d, d)``, or ``(1, d)`` where they are diagonal.
    """
    traces = [(_trace(rows), _trace(columns)) for rows, columns in pairs]
    total = torch.stack([r * c for r, c in traces]).sum()
    rows = _sum([c * R for (R, _), (_, c) in zip(pairs, traces, strict=True)])
    columns = _sum([r * C for (_, C), (r, _) in zip(pairs, traces, strict=True)])
    return rows, columns / torch.where(total == 0, 1.0, total)


def _trace(factor: Tensor) -> Tensor:
    return (factor if factor.ndim == 2 else factor.diagonal(dim1=1, dim2=2)).sum()


def _sum(factors: Sequence[Tensor]) -> Tensor:
    if len({factor.ndim for factor in factors}) > 1:
        factors = [f if f.ndim == 3 else torch.diag_embed(f) for f in factors]
    return torch.stack(list(factors)).sum(0)


class TiedGradients:
    """Gradients of single samples, as :class:`SampleGradients`: rows are the outputs.

    Parameters
    ----------
    plan, batch, gradients, like
        As for :class:`SampleGradients`.
    """

    def __init__(
        self, plan: TiedPlan, batch: Evaluation, gradients: list[Tensor], like: Tensor
    ) -> None:
        self._kinds = [
            (part.transposed, SampleGradients(part, batch, gradients, like))
            for part in plan.parts
        ]
        self._each = plan.rows * plan.columns * like.element_size()

    def squares(self, row_basis: Tensor | None, column_basis: Tensor | None) -> Tensor:
        """Return the sum of squared entries ``(1, rows, columns)``, in other bases."""

        def turned(M: Tensor) -> Tensor:
            M = M if row_basis is None else row_basis.mT @ M
            return M if column_basis is None else M @ column_basis

        return _total(turned(M).square().sum(0, keepdim=True) for M in self._matrices())

    def output_moment(self, columns: Tensor) -> Tensor:
        r"""Return :math:`\sum M C M^\top` for a symmetric ``C`` (1, columns, columns)."""
        return _total(
            torch.einsum("mri,msi->rs", M @ columns, M).unsqueeze(0)
            for M in self._matrices()
        )

    def input_moment(self, rows: Tensor) -> Tensor:
        r"""Return :math:`\sum M^\top R M` for a symmetric ``R`` ``(1, rows, rows)``."""
        return _total(
            torch.einsum("mri,mrj->ij", rows @ M, M).unsqueeze(0) for M in self._matrices()
        )

    def rows(self, part: slice) -> Tensor:
        """Return the gradients of some samples, ``(S, K, entries of the matrix)``."""
        return self._whole(part).movedim(0, 2).flatten(2)

    def _whole(self, part: slice) -> Tensor:
        """Return ``(1, samples, seeds, rows, columns)``."""
        return _total(
            M.mT if transposed else M
            for transposed, M in ((t, own.whole(part)) for t, own in self._kinds)
        )

    def _matrices(self) -> Iterator[Tensor]:
        """Yield ``(matrices, rows, columns)``, those of some samples at a time."""
        seeds, samples = self._kinds[0][1].count, self._kinds[0][1].samples
        for part in sample_slices(samples, seeds * self._each):
            yield self._whole(part).flatten(0, 2)


def _total(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def gradients_of(
    plan: BlockPlan, batch: Evaluation, gradients: list[Tensor], like: Tensor
) -> SampleGradients | TiedGradients | None:
    """Return the gradients of single samples in a matrix; None for other parameters."""
    if isinstance(plan, TiedPlan):
        return TiedGradients(plan, batch, gradients, like)
    if isinstance(plan, MatrixPlan):
        return SampleGradients(plan, batch, gradients, like)
    return None
