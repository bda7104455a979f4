"""Gradients of single samples: of their losses, or of their predictions.

One forward pass and as many backward passes as there are seeds, for all samples at once;
only parameters that no rule of :mod:`torchlinop.kronecker` covers take a backward pass for
each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.autodiff.experience import Experience
from torchlinop.curvature.summed import as_risk
from torchlinop.data import Batch
from torchlinop.kronecker.blocks import VectorPlan, plan_blocks
from torchlinop.kronecker.evaluation import Evaluation
from torchlinop.kronecker.moments import sample_slices
from torchlinop.kronecker.seeds import Rows, Seeds, rows_of
from torchlinop.kronecker.tied import gradients_of
from torchlinop.sources import EmpiricalRisk

#: from a prediction and its batch to what is pulled back: the number of seeds, and seeds
#: ``(K, *prediction.shape)`` by the first and last of their numbers
Cotangents = Callable[[Tensor, Batch, Rows], tuple[int, Callable[[int, int], Tensor]]]


class PerSampleGradients:
    """Rows ``s^T J_n`` for seeds ``s`` in the prediction of each sample ``n``.

    Parameters
    ----------
    risk
        Model, parameters, loss.
    cotangents
        The seeds.
    """

    def __init__(self, risk: EmpiricalRisk, cotangents: Cotangents) -> None:
        self._risk = risk
        self._cotangents = cotangents
        self._state = Experience()
        self._axes: Any = None

    def __call__(self, batch: Batch) -> Iterator[Tensor]:
        """Yield gradients ``(S, K, dim)`` of some samples of a batch after the other."""
        evaluation = Evaluation(self._risk, batch, self._seeds, self._state, self._axes)
        self._axes = evaluation.axes
        space = self._risk.space
        plan = plan_blocks(evaluation.uses, evaluation.unknown, space, joint_bias=False)
        seeds, samples = evaluation.seeds, evaluation.seeds.rows.samples
        with torch.no_grad():
            gradients = [
                torch.cat(parts) for parts in zip(*evaluation.gradients(), strict=True)
            ]
            others = _alone(evaluation, sorted(plan.uncovered), space.dtype)
            like = seeds.weights.to(space.dtype)
            blocks = [_Block(block, evaluation, gradients, like) for block in plan.blocks]
            each = seeds.count * space.dim * like.element_size()
            for part in sample_slices(samples, each):
                yield torch.cat(_joined(blocks, others, part), dim=2)

    def _seeds(self, prediction: Tensor, batch: Batch) -> Seeds:
        rows = rows_of(self._risk, prediction, batch)
        count, make = self._cotangents(prediction.detach(), batch, rows)
        weights = torch.ones(rows.samples, dtype=prediction.dtype, device=prediction.device)
        return Seeds(rows, count, make, weights)


class _Block:
    """Gradients in the parameters of one block."""

    def __init__(
        self, plan: Any, evaluation: Evaluation, gradients: list[Tensor], like: Tensor
    ) -> None:
        self.indices: tuple[int, ...] = plan.group.indices
        self._matrix = gradients_of(plan, evaluation, gradients, like)
        self._vector: Tensor | None = None
        if self._matrix is None:
            assert isinstance(plan, VectorPlan)
            rows = plan.sample_gradients(gradients, evaluation.uses, evaluation.places)
            self._vector = rows.to(like.dtype).transpose(0, 1)  # (S, K, entries)

    def rows(self, samples: slice) -> Tensor:
        """Return ``(S, K, entries)``."""
        if self._matrix is not None:
            return self._matrix.rows(samples)
        assert self._vector is not None
        return self._vector[samples]


def _joined(
    blocks: Sequence[_Block], others: dict[int, Tensor], samples: slice
) -> list[Tensor]:
    """Return the gradients by parameters, each of which is a block of its own."""
    found = {block.indices[0]: block.rows(samples) for block in blocks}
    found |= {i: rows[samples] for i, rows in others.items()}
    return [found[i] for i in sorted(found)]


def _alone(
    evaluation: Evaluation, indices: list[int], dtype: torch.dtype
) -> dict[int, Tensor]:
    """Return gradients in parameters without a rule, ``(S, K, entries)`` by parameter."""
    if not indices:
        return {}
    count, samples = evaluation.seeds.count, evaluation.seeds.rows.samples
    parts = [
        [g.reshape(-1).to(dtype) for g in gradients]
        for gradients in evaluation.parameter_gradients(indices)
    ]  # sample after sample, the seeds of each
    columns = [torch.stack(column) for column in zip(*parts, strict=True)]
    return {
        i: column.reshape(samples, count, -1)
        for i, column in zip(indices, columns, strict=True)
    }


def loss_cotangents(risk: EmpiricalRisk, scale: float) -> Cotangents:
    """Pull back the gradient of each sample's summand of the loss, times ``scale``."""

    def cotangents(
        prediction: Tensor, batch: Batch, _: Rows
    ) -> tuple[int, Callable[[int, int], Tensor]]:
        with torch.enable_grad():
            leaf = prediction.detach().requires_grad_()
            slope = risk.loss.gradient(leaf, batch.y, batch.size, scale).detach()
        return 1, lambda start, stop: slope.unsqueeze(0)[start:stop]

    return cotangents


def output_cotangents(
    prediction: Tensor, _: Batch, rows: Rows
) -> tuple[int, Callable[[int, int], Tensor]]:
    """Pull back the entries of each sample's prediction, one after the other."""
    count = prediction.numel() // rows.samples

    def make(start: int, stop: int) -> Tensor:
        units = torch.eye(count, dtype=prediction.dtype, device=prediction.device)
        shape = rows.split(prediction.unsqueeze(0)).shape[1:]  # (S, T, C)
        chosen = units[start:stop].reshape(-1, 1, *shape[1:])
        return rows.join(chosen.expand(-1, rows.samples, *shape[1:]))

    return count, make


def per_sample_gradients(
    model: Model | EmpiricalRisk,
    loss_function: Loss | None = None,
    params: Parameters | None = None,
    data: Data | None = None,
    **options: Any,
) -> Tensor:
    r"""Gradients of the samples' summands of the risk.

    With :math:`L = \sum_n L_n` the risk, weights and the normaliser included, row ``n`` is
    :math:`\nabla_\theta L_n`, so the rows add up to the gradient of the risk. Computed in
    one forward and one backward pass for each batch. Everything is held at once; products
    with fewer numbers in memory are those of :class:`~torchlinop.JacobianLinearOperator`.

    Parameters
    ----------
    model, loss_function, params, data
        What :class:`~torchlinop.EmpiricalRisk` describes, in a fixed order. A callable
        loss has to be a sum or mean of independent terms.
    **options
        Keyword arguments of :class:`~torchlinop.EmpiricalRisk`.

    Returns
    -------
    Tensor
        Shape ``(number of samples, dim)``, on the device of the parameters.

    Raises
    ------
    ValueError
        The data is shuffled, or the samples are not found in the predictions.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import per_sample_gradients
    >>> f = lambda params, X: X @ params[0]
    >>> data = [(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[-1.0], [0.0]]))]
    >>> per_sample_gradients(f, torch.nn.MSELoss(), [torch.zeros(2, 1)], data)
    tensor([[1., 2.],
            [0., 0.]])
    """
    risk = as_risk(model, loss_function, params, data, options)
    return torch.cat(list(sample_rows(risk)))


def sample_rows(risk: EmpiricalRisk) -> Iterator[Tensor]:
    """Yield the rows of :func:`per_sample_gradients`, ``(S, dim)`` at a time."""
    if not risk.options.ranks.alone:
        raise ValueError(
            "Gradients of single samples are those of one process's data, but the risk is "
            "that of a process group. Build it without process_group=; for the data of all "
            "processes there are EFLinearOperator, KFACLinearOperator and the like."
        )
    if risk.changed():
        risk.survey()
    risk.batches.require_order()
    pull_back = PerSampleGradients(risk, loss_cotangents(risk, 1 / risk.normalizer))
    for batch in risk.batches:
        risk.require_unchanged(batch)
        for rows in pull_back(batch):
            yield rows.squeeze(1)
