r"""Sums over gradients of single samples, :math:`M_{nc} = \sum_t g_{ntc} a_{nt}^\top`.

Where a sample has one position, ``M`` has rank one and is not formed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchlinop.kronecker.blocks import MatrixPlan
from torchlinop.kronecker.evaluation import Evaluation
from torchlinop.kronecker.moments import sample_slices


class SampleGradients:
    """Gradients in a weight at some seeds, for each group.

    Parameters
    ----------
    plan
        Which block.
    batch
        A forward pass.
    gradients
        In the outputs of all uses.
    like
        A tensor ``(S,)`` of the dtype in which is computed.
    """

    def __init__(
        self, plan: MatrixPlan, batch: Evaluation, gradients: list[Tensor], like: Tensor
    ) -> None:
        self._plan, self._batch, self._like = plan, batch, like
        g = plan.output_gradients(gradients, batch.uses, batch.places)
        self._outputs = g.to(like.dtype)  # (K, G, S, T, outputs)

    def squares(self, output_basis: Tensor | None, input_basis: Tensor | None) -> Tensor:
        """Return the sum of squared entries ``(G, outputs, inputs)``, in other bases.

        Parameters
        ----------
        output_basis, input_basis
            ``(G, d, d)``, one vector a column; None for unit vectors.
        """
        total: Tensor | None = None
        for g, a in self._parts():
            if output_basis is not None:
                g = g @ output_basis.unsqueeze(0).unsqueeze(2)
            if a.ndim == 4 and input_basis is not None:
                a = a @ input_basis.unsqueeze(1)
            if a.ndim == 4 and a.shape[2] == 1:
                own = g.squeeze(3).square().sum(0).mT @ a.squeeze(2).square()
            else:
                M = self._matrices(g, a)
                if a.ndim == 3 and input_basis is not None:
                    M = M @ input_basis.unsqueeze(1)
                own = M.square().sum(1).unflatten(1, (len(g), -1)).sum(1)
            total = own if total is None else total + own
        assert total is not None
        return total

    def output_moment(self, inputs: Tensor) -> Tensor:
        r"""Return :math:`\sum M A M^\top` for a symmetric ``A`` ``(G, inputs, inputs)``."""
        total = torch.zeros((), dtype=inputs.dtype, device=inputs.device)
        for g, a in self._parts():
            if a.ndim == 4 and a.shape[2] == 1:
                a = a.squeeze(2)  # (G, S, inputs)
                lengths = ((a @ inputs) * a).sum(-1)  # (G, S)
                rows = g.squeeze(3)  # (K, G, S, outputs)
                weighted = rows * lengths.unsqueeze(0).unsqueeze(-1)
                rows, weighted = (x.transpose(0, 1).flatten(1, 2) for x in (rows, weighted))
                total = total + rows.mT @ weighted
            else:
                M = self._matrices(g, a).unflatten(2, (len(g), -1))  # (G, S, K, o, i)
                product = M @ inputs.unsqueeze(1).unsqueeze(2)
                total = total + torch.einsum("gskoi,gskpi->gop", product, M)
        return total

    def input_moment(self, outputs: Tensor) -> Tensor:
        r"""Return :math:`\sum M^\top B M` for a symmetric ``B`` (G, outputs, outputs)."""
        total = torch.zeros((), dtype=outputs.dtype, device=outputs.device)
        for g, a in self._parts():
            if a.ndim == 4 and a.shape[2] == 1:
                rows = g.squeeze(3)
                lengths = ((rows @ outputs) * rows).sum(-1).sum(0)  # (G, S)
                a = a.squeeze(2)
                total = total + a.mT @ (a * lengths.unsqueeze(-1))
            else:
                M = self._matrices(g, a).unflatten(2, (len(g), -1))
                product = outputs.unsqueeze(1).unsqueeze(2) @ M
                total = total + torch.einsum("gskoi,gskoj->gij", product, M)
        return total

    @property
    def count(self) -> int:
        """Number of seeds."""
        return self._outputs.shape[0]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self._outputs.shape[2]

    def whole(self, part: slice) -> Tensor:
        """Return the gradients of some samples, ``(G, S, K, outputs, inputs)``."""
        rows = self._matrices(self._outputs[:, :, part], self._inputs(part))
        return rows.unflatten(2, (self.count, -1))

    def rows(self, part: slice) -> Tensor:
        """Return the gradients of some samples, ``(S, K, entries of the block)``."""
        M = self.whole(part)
        if self._plan.transposed:
            M = M.mT
        return M.movedim(0, 2).flatten(2)

    def _inputs(self, part: slice) -> Tensor:
        plan, batch, like = self._plan, self._batch, self._like
        a = plan.input_vectors(batch.uses, batch.places, part, like[part])
        return a if plan.indexed else a.to(like.dtype)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield output gradients ``(K, G, S', T, o)`` and inputs of some samples."""
        plan, positions = self._plan, self._outputs.shape[3]
        matrix = 0
        if positions > 1 or plan.indexed:
            matrix = self.count * plan.outputs * plan.inputs
        entries = plan.groups * (matrix + positions * plan.inputs)
        for part in sample_slices(self.samples, entries * self._like.element_size()):
            yield self._outputs[:, :, part], self._inputs(part)

    def _matrices(self, g: Tensor, a: Tensor) -> Tensor:
        """Return ``M`` of shape ``(G, S, K outputs, inputs)``."""
        rows = g.permute(1, 2, 0, 4, 3).flatten(2, 3)  # (G, S, K outputs, T)
        if a.ndim == 4:
            return rows @ a
        index = a.unsqueeze(2).expand(*rows.shape)
        M = rows.new_zeros(*rows.shape[:3], self._plan.inputs)
        return M.scatter_add_(3, index.clamp(min=0), rows * (index >= 0))
