"""Second moments of the gradients of single samples, layer by layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchlinop._memory import available_memory
from torchlinop._space import ParameterSpace
from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.curvature.summed import as_risk
from torchlinop.gradients.per_sample import sample_rows
from torchlinop.kronecker.layout import Group, ParameterLayout
from torchlinop.kronecker.operator import BlockwiseLinearOperator
from torchlinop.kronecker.settings import Settings, Uncovered
from torchlinop.sources import EmpiricalRisk
from torchlinop.structured import (
    BlockDiagonalLinearOperator,
    KroneckerLinearOperator,
    LowRankPlusDiagonalLinearOperator,
    StructuredLinearOperator,
)


class _GradientMoment(BlockwiseLinearOperator):
    """What the centred and the uncentred moments share."""

    def __init__(
        self,
        model: Model | EmpiricalRisk,
        loss_function: Loss | None = None,
        params: Parameters | None = None,
        data: Data | None = None,
        *,
        groups: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ) -> None:
        risk = as_risk(model, loss_function, params, data, options)
        self._groups = _groups(risk.space, groups)
        settings = Settings.of(
            risk,
            fisher_type="empirical",
            mc_samples=1,
            seed=0,
            uncovered=Uncovered.DIAGONAL,
        )
        super().__init__(risk, settings)

    @abstractmethod
    def _center(self, mean: Tensor) -> Tensor:
        """Return the point around which the moment is taken."""

    def _computed(self, risk: EmpiricalRisk) -> BlockDiagonalLinearOperator:
        layout = ParameterLayout(tuple(risk.space.sizes), self._groups)
        moments = [
            _Moment(sum(risk.space.sizes[i] for i in group.indices))
            for group in self._groups
        ]
        for rows in sample_rows(risk):
            parts = layout.split(rows.T)
            for moment, group, part in zip(moments, self._groups, parts, strict=True):
                moment.add(part.T, group)
        blocks = [moment.operator(self._center) for moment in moments]
        return BlockDiagonalLinearOperator(blocks, layout)


class GradientSecondMomentLinearOperator(_GradientMoment):
    r"""Uncentred second moment of the samples' gradients, block diagonal by layers.

    .. math:: M = \frac1N \sum_{n=1}^N g_n g_n^\top, \qquad g_n = N \,\nabla_\theta L_n

    where the risk is the sum :math:`L = \sum_n L_n` over samples, with all weights and the
    normaliser in the summands: :math:`g_n` is the gradient that is seen when one sample is
    drawn at random, and its mean is the gradient of the risk. For ``reduction="mean"``
    without weights it is the gradient of the sample's own loss. With weights :math:`w_n`
    (class weights) it is :math:`N w_n / Z` times that of the sample's loss without its
    weight, :math:`Z` the total weight; a sample whose targets are all ignored counts with
    a gradient of zero. All targets of one sample (tokens, pixels) make one gradient, other
    than in :class:`~torchlinop.EFLinearOperator`, where each is a datum.

    A block holds the matrix, or the gradients where there are fewer samples than
    parameters: as many numbers as the block has parameters, times the smaller of both.

    Parameters
    ----------
    model, loss_function, params, data
        What :class:`~torchlinop.EmpiricalRisk` describes, in a fixed order. A callable
        loss has to be a sum or mean of independent terms.
    groups
        Names of parameters by the name of their group, each in one of them. By default one
        group for each module that has parameters: weight and bias of a layer are together.
    **options
        Keyword arguments of :class:`~torchlinop.EmpiricalRisk`.

    Attributes
    ----------
    space : ParameterSpace

    Raises
    ------
    ValueError
        The data is shuffled, or a group is wrong.
    KeyError
        A group names a parameter that there is not.
    MemoryError
        The gradients do not fit into memory.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import GradientSecondMomentLinearOperator
    >>> f = lambda params, X: X @ params[0]
    >>> data = [(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[-1.0], [0.0]]))]
    >>> loss, params = torch.nn.MSELoss(), [torch.zeros(2, 1)]
    >>> M = GradientSecondMomentLinearOperator(f, loss, params, data)
    >>> M.to_dense().round(decimals=3)
    tensor([[2., 4.],
            [4., 8.]])
    """

    def _center(self, mean: Tensor) -> Tensor:
        return torch.zeros_like(mean)


class GradientCovarianceLinearOperator(_GradientMoment):
    r"""Covariance of the samples' gradients, block diagonal by layers.

    .. math:: C = \frac1N \sum_{n=1}^N (g_n - \bar g)(g_n - \bar g)^\top, \qquad
              g_n = N \,\nabla_\theta L_n, \quad \bar g = \nabla_\theta L

    with :math:`g_n` as for :class:`~torchlinop.GradientSecondMomentLinearOperator`, of
    which it is the centred version: the noise of stochastic gradients. The mean of ``B``
    gradients that are drawn independently has the covariance :math:`C / B`.

    Parameters
    ----------
    model, loss_function, params, data, groups
        As for :class:`~torchlinop.GradientSecondMomentLinearOperator`.
    **options
        Keyword arguments of :class:`~torchlinop.EmpiricalRisk`.

    Attributes
    ----------
    space : ParameterSpace

    Raises
    ------
    ValueError, KeyError, MemoryError
        As for :class:`~torchlinop.GradientSecondMomentLinearOperator`.

    References
    ----------
    McCandlish et al., "An empirical model of large-batch training" (2018),
    https://arxiv.org/abs/1812.06162: ``C.trace()`` over the squared length of the gradient
    is the noise scale.

    Examples
    --------
    >>> import torch
    >>> from torchlinop import GradientCovarianceLinearOperator
    >>> f = lambda params, X: X @ params[0]
    >>> data = [(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[-1.0], [0.0]]))]
    >>> loss, params = torch.nn.MSELoss(), [torch.zeros(2, 1)]
    >>> C = GradientCovarianceLinearOperator(f, loss, params, data)
    >>> C.to_dense().round(decimals=3)
    tensor([[1., 2.],
            [2., 4.]])
    """

    def _center(self, mean: Tensor) -> Tensor:
        return mean


class _Moment:
    """Sums over the gradients in the parameters of one block.

    Rows are kept while there are fewer of them than columns; then their mean, and the sum
    of outer products of what they differ from it.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._rows: list[Tensor] = []
        self._count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def add(self, rows: Tensor, group: Group) -> None:
        """Add gradients ``(S, size)``."""
        if not bool(rows.isfinite().all()):
            raise ValueError(
                f"Gradients in {', '.join(group.names)} are not finite. Look at the data "
                "and the parameters (check_finite=True)."
            )
        if self._scatter is not None:
            self._merge(rows)
            return
        self._count += len(rows)
        _require_room(self._size * min(self._count, self._size), rows, group)
        self._rows.append(rows.clone())
        if self._count > self._size:
            held = torch.cat(self._rows)
            self._rows = []
            self._mean = held.mean(0)
            centred = held - self._mean
            self._scatter = centred.T @ centred

    def _merge(self, rows: Tensor) -> None:
        """Update mean and scatter (Chan, Golub, LeVeque 1983, equation 2.1)."""
        assert self._mean is not None
        assert self._scatter is not None
        new, total = len(rows), self._count + len(rows)
        mean = rows.mean(0)
        shift = mean - self._mean
        centred = rows - mean
        self._scatter += centred.T @ centred
        self._scatter += torch.outer(shift, shift * (self._count * new / total))
        self._mean = self._mean + shift * (new / total)
        self._count = total

    def operator(self, center: Any) -> StructuredLinearOperator:
        """Return ``N sum (h - c)(h - c)^T``, of gradients ``h`` of summands."""
        count = self._count
        if self._scatter is None:
            rows = torch.cat(self._rows)
            factor = count**0.5 * (rows - center(rows.mean(0)))
            zeros = rows.new_zeros(self._size)
            return LowRankPlusDiagonalLinearOperator(zeros, factor.T)
        assert self._mean is not None
        shift = self._mean - center(self._mean)
        matrix = self._scatter + count * torch.outer(shift, shift)
        return KroneckerLinearOperator(count * (matrix + matrix.T) / 2)


def _require_room(entries: int, rows: Tensor, group: Group) -> None:
    nbytes = entries * rows.element_size()
    if nbytes > available_memory(rows.device):
        raise MemoryError(
            f"The block of {', '.join(group.names)} needs {nbytes / 2**30:.1f} GiB, more "
            "than is free. Pass fewer samples or smaller groups; EFLinearOperator "
            "multiplies with the whole uncentred matrix and stores nothing."
        )


def _groups(
    space: ParameterSpace, given: Mapping[str, Sequence[str]] | None
) -> tuple[Group, ...]:
    """Return the groups of parameters: by modules, or as given."""
    if given is None:
        modules: dict[str, list[str]] = {}
        for name in space.names:
            modules.setdefault(name.rpartition(".")[0] or name, []).append(name)
        given = modules
    places = {name: i for i, name in enumerate(space.names)}
    seen: list[str] = []
    for group, names in given.items():
        if isinstance(names, str):
            raise ValueError(
                f"groups[{group!r}] has to be a list of parameters, got the string "
                f"{names!r}. Write [{names!r}]."
            )
        unknown = [name for name in names if name not in places]
        if unknown:
            raise KeyError(f"{unknown} are no parameters. There are {list(places)}.")
        seen += names
    if sorted(seen) != sorted(places):
        missing = [name for name in places if name not in seen]
        twice = sorted({name for name in seen if seen.count(name) > 1})
        raise ValueError(
            "Every parameter has to be in one group; in none are "
            f"{missing}, in several {twice}."
        )
    return tuple(
        Group(tuple(names), tuple(places[n] for n in names))
        for names in given.values()
        if names
    )
