"""Sums over the data of which Kronecker factors are made."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchlinop.kronecker.blocks import MatrixPlan, VectorPlan
from torchlinop.kronecker.evaluation import Evaluation
from torchlinop.kronecker.seeds import FisherType
from torchlinop.kronecker.uses import ConvolutionUse

#: most bytes of inputs that are made at once
_CHUNK = 8 << 20
#: larger Gram matrices are computed in four parts, of which one follows from another;
#: smaller products gain less than they cost
_SPLIT = 320


class WeightSharing(enum.StrEnum):
    """What is done with the positions at which a sample uses the same parameters."""

    #: every position is a datum of its own
    EXPAND = "expand"
    #: inputs are averaged over the positions, output gradients added up
    REDUCE = "reduce"


def sample_slices(samples: int, bytes_of_one: int) -> Iterator[slice]:
    """Cut the samples of a batch such that what is made of them stays small."""
    step = max(1, min(samples, _CHUNK // max(bytes_of_one, 1)))
    for start in range(0, samples, step):
        yield slice(start, min(start + step, samples))


class MatrixMoments:
    """Second moments of a matrix's inputs and output gradients, for each group.

    Parameters
    ----------
    plan
        Which block.
    sharing
        How positions are treated.
    like
        A tensor of the dtype and device of the factors.
    """

    def __init__(self, plan: MatrixPlan, sharing: WeightSharing, like: Tensor) -> None:
        self._reduce = sharing is WeightSharing.REDUCE
        #: inputs are unit vectors, whose second moment is diagonal
        self._diagonal = plan.indexed and not self._reduce
        size = (plan.inputs,) if self._diagonal else (plan.inputs, plan.inputs)
        self.inputs = like.new_zeros(plan.groups, *size)
        self.outputs = like.new_zeros(plan.groups, plan.outputs, plan.outputs)

    def add_inputs(self, plan: MatrixPlan, batch: Evaluation, weights: Tensor) -> None:
        """Add a batch's inputs: of each sample the mean over its positions, weighted."""
        samples = len(weights)
        use = batch.uses[plan.uses[0]]
        if (
            len(plan.uses) == 1
            and plan.has_weight
            and not self._reduce
            and isinstance(use, ConvolutionUse)
            and use.slides(batch.places[plan.uses[0]])
        ):
            self._add_moments(plan, use, weights)
            return
        entries = sum(batch.uses[i].shape.numel() for i in plan.uses)
        positions = entries // (samples * plan.outputs * plan.groups) + 1
        each = positions * plan.inputs * plan.groups
        # a column of ones is known without being multiplied
        bare = dataclasses.replace(plan, has_bias=False) if plan.has_weight else plan
        for part in sample_slices(samples, each * weights.element_size()):
            a = bare.input_vectors(batch.uses, batch.places, part, weights)
            if plan.indexed:
                self._add_indices(a[0], weights[part])
            else:
                ones = plan.has_weight and plan.has_bias
                self._add_rows(a.to(weights.dtype), weights[part], ones=ones)

    def _add_moments(self, plan: MatrixPlan, use: ConvolutionUse, weights: Tensor) -> None:
        samples = len(weights)
        positions = torch.Size(use.positions).numel() // samples
        scale, scales = _scales(weights / positions)
        each = weights.element_size() * use.entries_of_sample
        for part in sample_slices(samples, each):
            own = None if scales is None else scales[part]
            moment = use.moment(part, own, weights.dtype, ones=plan.has_bias)
            self.inputs.add_(moment, alpha=scale)

    def _add_rows(self, a: Tensor, weights: Tensor, *, ones: bool = False) -> None:
        if self._reduce:
            a = a.mean(2, keepdim=True)
        scale, scales = _scales(weights / a.shape[2])
        if scales is not None:
            a = a * scales.view(1, -1, 1, 1)
        rows, d = a.flatten(1, 2), a.shape[-1]
        _add_gram(self.inputs[:, :d, :d], rows, scale)
        if ones:
            if scales is None:
                sums = rows.sum(1)
            else:
                sums = scales.repeat_interleave(a.shape[2]) @ rows
            self.inputs[:, :d, d] += scale * sums
            self.inputs[:, d, d] += weights.sum()

    def _add_indices(self, index: Tensor, weights: Tensor) -> None:
        count = index.shape[1]
        if self._diagonal:
            shares = (weights / count).unsqueeze(1).expand(index.shape)
            shares = (shares * (index >= 0)).reshape(-1)
            self.inputs[0].index_add_(0, index.clamp(min=0).reshape(-1), shares)
            return
        means = weights.new_zeros(len(index), self.inputs.shape[-1])
        means.scatter_add_(1, index.clamp(min=0), (index >= 0).to(means) / count)
        self._add_rows(means.view(1, len(index), 1, -1), weights)

    def add_outputs(
        self, plan: MatrixPlan, gradients: list[Tensor], batch: Evaluation
    ) -> None:
        """Add output gradients at some seeds."""
        g = plan.output_gradients(gradients, batch.uses, batch.places)
        g = g.to(self.outputs.dtype)
        if self._reduce:
            g = g.sum(3)
        elif g.stride(-1) != 1 and g.shape[3] >= g.shape[4]:  # channels before positions
            self.outputs += (g.mT @ g).sum((0, 2))
            return
        rows = g.transpose(0, 1).flatten(1, -2)  # (G, all, outputs)
        _add_gram(self.outputs, rows)

    def tensors(self) -> list[Tensor]:
        """Return the sums."""
        return [self.inputs, self.outputs]

    def squares(self) -> list[Tensor]:
        """Return diagonals: sums of squares, finite where all entries are."""
        inputs = self.inputs if self._diagonal else _diagonals(self.inputs)
        return [inputs, _diagonals(self.outputs)]

    def factors(
        self, plan: MatrixPlan, weight: float, fisher_type: FisherType
    ) -> tuple[Tensor, Tensor]:
        """Return the factors ``(G, d, d)`` of inputs and of output gradients.

        Parameters
        ----------
        weight
            Of all data.
        fisher_type
            For ``"forward-only"`` the second one is the identity, ``(G, d)``.
        """
        inputs = self.inputs
        if not self._diagonal:
            d = inputs.shape[-1] - (plan.has_weight and plan.has_bias)
            _mirror(inputs[:, :d, :d])
            inputs[:, d:, :d] = inputs[:, :d, d:].mT
        inputs = inputs.div_(weight) if weight != 1 else inputs
        if fisher_type is FisherType.FORWARD_ONLY:
            return inputs, torch.ones_like(self.outputs[..., 0])
        return inputs, _mirror(self.outputs)


def _scales(shares: Tensor) -> tuple[float, Tensor | None]:
    """Return a common factor of second moments, or one for the rows of each sample."""
    if bool((shares == shares[0]).all()):
        return shares[0].item(), None
    return 1.0, shares.sqrt()


def _diagonals(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1)


def _add_gram(total: Tensor, rows: Tensor, scale: float = 1.0) -> None:
    """Add ``scale * rows^T rows`` to ``(G, d, d)``, but for what :func:`_mirror` copies."""
    d = rows.shape[-1]
    if d < _SPLIT:
        total.baddbmm_(rows.mT, rows, alpha=scale)
        return
    half = d // 2
    left, right = rows[..., :half], rows[..., half:]
    _add_gram(total[:, :half, :half], left, scale)
    _add_gram(total[:, half:, half:], right, scale)
    total[:, :half, half:].baddbmm_(left.mT, right, alpha=scale)


def _mirror(whole: Tensor) -> Tensor:
    """Copy what is above the diagonal of ``(G, d, d)`` and was computed once."""
    d = whole.shape[-1]
    if d >= _SPLIT:
        half = d // 2
        _mirror(whole[:, :half, :half])
        _mirror(whole[:, half:, half:])
        whole[:, half:, :half] = whole[:, :half, half:].mT
    return whole


class VectorMoment:
    """The exact block of scales and shifts.

    Parameters
    ----------
    plan
        Which block.
    like
        A tensor of the dtype and device of the block.
    """

    def __init__(self, plan: VectorPlan, like: Tensor) -> None:
        self.block = like.new_zeros(plan.size, plan.size)

    def add_inputs(self, plan: VectorPlan, batch: Evaluation, weights: Tensor) -> None:
        """Add what the block is for uncorrelated output gradients."""
        self.block += plan.input_moment(batch.uses, batch.places, weights)

    def add_outputs(
        self, plan: VectorPlan, gradients: list[Tensor], batch: Evaluation
    ) -> None:
        """Add outer products of the gradients of single samples at some seeds."""
        v = plan.sample_gradients(gradients, batch.uses, batch.places)
        rows = v.flatten(0, 1).to(self.block.dtype)
        _add_gram(self.block.unsqueeze(0), rows.unsqueeze(0))

    def tensors(self) -> list[Tensor]:
        """Return the sum."""
        return [self.block]

    def squares(self) -> list[Tensor]:
        """Return the diagonal: sums of squares, finite where all entries are."""
        return [self.block.diagonal()]

    def matrix(self, weight: float, fisher_type: FisherType) -> Tensor:
        """Return the block."""
        scale = weight if fisher_type is FisherType.FORWARD_ONLY else 1.0
        return _mirror(self.block.unsqueeze(0)).squeeze(0).div_(scale)


class UncoveredDiagonal:
    """The exact diagonal for parameters that no rule covers, from single samples.

    Parameters
    ----------
    indices
        Which parameters.
    like
        One tensor for each of them, of the dtype and device of the diagonal.
    """

    def __init__(self, indices: list[int], like: list[Tensor]) -> None:
        self.indices = indices
        self.diagonals = [torch.zeros_like(x).reshape(-1) for x in like]

    def add(self, batch: Evaluation) -> None:
        """Add the squared gradients of a batch's samples at all seeds."""
        if self.indices:
            for gradients in batch.parameter_gradients(self.indices):
                for total, g in zip(self.diagonals, gradients, strict=True):
                    total += g.reshape(len(g), -1).to(total.dtype).square().sum(0)

    def squares(self, names: Sequence[str]) -> dict[str, list[Tensor]]:
        """Return the sums of squares by the names of the parameters."""
        pairs = zip(self.indices, self.diagonals, strict=True)
        return {names[i]: [diagonal] for i, diagonal in pairs}
