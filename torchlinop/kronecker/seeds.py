r"""Vectors that are pulled back through a model: columns of roots of the loss Hessian.

The matrix that is approximated is :math:`\sum_{n,c} (J_n^\top s_{nc}) (J_n^\top
s_{nc})^\top` with :math:`s_{nc}` in the space of one sample's predictions. A seed holds one
:math:`s_{nc}` for each sample of a batch.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from torchlinop.autodiff.losses import LikelihoodLoss
from torchlinop.data import Batch
from torchlinop.sources import EmpiricalRisk


class FisherType(enum.StrEnum):
    """Which matrix the factors approximate, by its root in the space of predictions."""

    #: the GGN: the loss Hessian at the prediction
    TYPE2 = "type-2"
    #: the Fisher matrix: loss gradients at labels that are drawn from the likelihood
    MC = "mc"
    #: the empirical Fisher matrix: the data's own loss gradients
    EMPIRICAL = "empirical"
    #: output gradients are taken as uncorrelated and of length one
    FORWARD_ONLY = "forward-only"


@dataclass(frozen=True)
class Rows:
    """A prediction as vectors of samples: ``(S, T, C)``.

    Attributes
    ----------
    shape : torch.Size
        Of the prediction.
    dim : int or None
        The dimension of the classes.
    samples : int
        ``S``.
    """

    shape: torch.Size
    dim: int | None
    samples: int

    def split(self, x: Tensor) -> Tensor:
        """Arrange ``(K, *shape)`` as ``(K, S, T, C)``."""
        moved = x.unsqueeze(-1) if self.dim is None else x.movedim(self.dim, -1)
        return moved.reshape(x.shape[0], self.samples, -1, moved.shape[-1])

    def join(self, rows: Tensor) -> Tensor:
        """Inverse of :meth:`split`."""
        shape = [*self.shape, 1]
        if self.dim is not None:
            shape = list(self.shape)
            shape.append(shape.pop(self.dim))
        moved = rows.reshape(rows.shape[0], *shape)
        return moved.squeeze(-1) if self.dim is None else moved.movedim(-1, self.dim)

    def of_sample(self, seeds: Tensor, n: int) -> Tensor:
        """Return seeds ``(K, *shape)`` with zeros for all other samples."""
        rows = self.split(seeds)
        only = torch.zeros_like(rows)
        only[:, n] = rows[:, n]
        return self.join(only)


def random_seed(rows: Rows, n: int, like: Tensor, generator: Generator) -> Tensor:
    """Return one seed ``(1, *shape)`` of positive random numbers for one sample."""
    seed = rows.split(torch.zeros_like(like).unsqueeze(0))
    terms, classes = (
        (1 + torch.rand(size, generator=generator, device="cpu")).to(like)
        for size in seed.shape[2:]
    )
    seed[:, n] = classes
    seed[:, n].mul_(terms.unsqueeze(1))
    return rows.join(seed)


def rows_of(risk: EmpiricalRisk, prediction: Tensor, batch: Batch) -> Rows:
    """Find the samples in a prediction.

    Raises
    ------
    ValueError
        The number of predictions is no multiple of the number of samples.
    """
    dim = risk.loss.row_dimension(prediction)
    count = (
        prediction.numel() if dim is None else prediction.numel() // prediction.shape[dim]
    )
    if batch.size < 1 or count % batch.size:
        raise ValueError(
            f"Batch {batch.position} has {batch.size} samples, but the model returned "
            f"{count} predictions (shape {tuple(prediction.shape)}), which is no multiple. "
            "Pass batch_size=, a function from X to the number of samples."
        )
    return Rows(prediction.shape, dim, batch.size)


@dataclass(frozen=True)
class Seeds:
    """The seeds of a batch.

    Attributes
    ----------
    rows : Rows
        Where the samples are.
    count : int
        How many seeds there are.
    make
        From the first and last number to seeds, ``(K, *prediction.shape)``.
    weights : Tensor
        Weights of the samples in the loss, ``(S,)``.
    """

    rows: Rows
    count: int
    make: Callable[[int, int], Tensor]
    weights: Tensor


class SeedSource:
    """Makes the seeds of batch after batch, in the order of the data.

    Parameters
    ----------
    risk
        Whose loss it is.
    fisher_type
        Which seeds.
    mc_samples, seed
        For ``"mc"``: labels of each datum, and where the random numbers start.
    """

    def __init__(
        self, risk: EmpiricalRisk, fisher_type: FisherType, mc_samples: int, seed: int
    ) -> None:
        self._risk = risk
        self._fisher_type = fisher_type
        self._mc_samples = mc_samples
        self._generator = risk.generator(seed, mc_samples)

    def __call__(self, prediction: Tensor, batch: Batch) -> Seeds:
        """Return the seeds of a batch."""
        loss, prediction = self._risk.loss, prediction.detach()
        rows = rows_of(self._risk, prediction, batch)
        weights = loss.row_weights(prediction, batch.y).unsqueeze(0)
        weights = rows_of_weights(rows, weights)
        if self._fisher_type is FisherType.FORWARD_ONLY:
            return Seeds(rows, 0, lambda _, __: prediction.unsqueeze(0)[:0], weights)
        if self._fisher_type is FisherType.MC:
            assert isinstance(loss, LikelihoodLoss)
            samples = loss.sample_gradients(
                prediction, batch.y, self._mc_samples, self._generator
            )
            samples *= (self._mc_samples * self._risk.normalizer) ** -0.5
            return Seeds(rows, self._mc_samples, lambda i, j: samples[i:j], weights)
        scale = self._risk.normalizer**-0.5
        if self._fisher_type is FisherType.EMPIRICAL:
            leaf = prediction.requires_grad_()
            gradient = loss.gradient(leaf, batch.y, batch.size, 1.0).detach()
            return self._by_term(rows, 1, lambda _: gradient, scale, weights)
        root = loss.hessian_root(prediction, batch.y, batch.size)
        return self._by_term(rows, root.columns, root.column, scale, weights)

    def _by_term(
        self,
        rows: Rows,
        columns: int,
        column: Callable[[int], Tensor],
        scale: float,
        weights: Tensor,
    ) -> Seeds:
        """Seeds with one loss term of each sample, since terms are independent."""
        terms = torch.Size(rows.shape).numel() // rows.samples
        if rows.dim is not None:
            terms //= rows.shape[rows.dim]

        def one(number: int) -> Tensor:
            c, t = divmod(number, terms)
            whole = scale * column(c)
            if terms == 1:
                return whole
            parts = rows.split(whole.unsqueeze(0))
            only = torch.zeros_like(parts)
            only[:, :, t] = parts[:, :, t]
            return rows.join(only).squeeze(0)

        def make(start: int, stop: int) -> Tensor:
            return torch.stack([one(i) for i in range(start, stop)])

        return Seeds(rows, columns * terms, make, weights)


def rows_of_weights(rows: Rows, weights: Tensor) -> Tensor:
    """Weight of each sample: the sum over its terms."""
    if rows.dim is not None:
        weights = weights.movedim(rows.dim, -1)
    return weights.reshape(rows.samples, -1).sum(1)
