"""The Hessian."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.autodiff.backward import backward
from torchlinop.autodiff.differences import check_hessian
from torchlinop.autodiff.graphs import require_twice_differentiable
from torchlinop.autodiff.linearize import HessianProduct, retained_bytes
from torchlinop.autodiff.recording import recording
from torchlinop.autodiff.replay import Replayed
from torchlinop.curvature.derivative_check import DerivativeCheck
from torchlinop.curvature.summed import SummedLinearOperator, as_risk
from torchlinop.data import Batch
from torchlinop.sources import EmpiricalRisk, ScalarSource, TorchFunction


class HessianLinearOperator(SummedLinearOperator):
    r"""Hessian of the empirical risk, :math:`\nabla_\theta^2 L(\theta)`.

    Symmetric, in general indefinite.

    Parameters
    ----------
    model, loss_function, params, data
        What :class:`~torchlinop.EmpiricalRisk` describes; any loss will do.
    **options
        Keyword arguments of :class:`~torchlinop.EmpiricalRisk`.

    Attributes
    ----------
    space : ParameterSpace
        Order, names and shapes of the parameters in a vector.

    References
    ----------
    Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994),
    https://doi.org/10.1162/neco.1994.6.1.147

    Examples
    --------
    For least squares with a linear model the Hessian is :math:`\frac2N X^\top X`:

    >>> import torch
    >>> from torchlinop import HessianLinearOperator
    >>> X, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1)
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> H = HessianLinearOperator(model, torch.nn.MSELoss(), model.parameters(), [(X, y)])
    >>> H.to_dense()
    tensor([[10., 14.],
            [14., 20.]])
    """

    def __init__(
        self,
        model: Model | EmpiricalRisk | TorchFunction,
        loss_function: Loss | None = None,
        params: Parameters | None = None,
        data: Data | None = None,
        **options: Any,
    ) -> None:
        source: ScalarSource
        if isinstance(model, TorchFunction):
            source = model
        else:
            source = as_risk(model, loss_function, params, data, options)
        super().__init__(source, partial(_hessian_map, source, DerivativeCheck(source)))

    @staticmethod
    def from_function(f: Callable[[Any], Tensor], x: Any) -> HessianLinearOperator:
        """Hessian of any scalar torch function at ``x``.

        Parameters
        ----------
        f
            Function of ``x`` that returns a scalar tensor.
        x
            A tensor, or a dict or list of tensors. The operator follows changes of its
            values; after changes of other things that ``f`` uses, call :meth:`refresh`.

        Examples
        --------
        >>> import torch
        >>> from torchlinop import HessianLinearOperator
        >>> H = HessianLinearOperator.from_function(lambda x: x.pow(3).sum(), torch.ones(2))
        >>> H @ torch.tensor([1.0, 2.0])
        tensor([ 6., 12.])
        """
        return HessianLinearOperator(TorchFunction(f, x))


def _hessian_map(source: ScalarSource, check: DerivativeCheck, batch: Batch) -> _HessianMap:
    """Linearize the gradient of one batch's share."""

    def build(leaves: list[Tensor]) -> tuple[HessianProduct, int, list[str]]:
        output, slope = source.differential(leaves, batch)
        if not output.requires_grad:
            return HessianProduct([None] * len(leaves), leaves), 0, []
        require_twice_differentiable([output, slope])
        gradient = backward([output], leaves, [slope], create_graph=True)
        product = HessianProduct(gradient, leaves)
        nbytes = retained_bytes(product.graph, (*leaves, *batch.sources))
        return product, nbytes, check.due(batch, [output, slope])

    product, nbytes, functions = source.record(batch, build, order=2)
    if functions:
        check_hessian(
            partial(_gradient, source, batch), product, source.leaves(), functions
        )
        check.done()
    return _HessianMap(product, source, batch, nbytes)


def _gradient(
    source: ScalarSource, batch: Batch, leaves: list[Tensor]
) -> tuple[Tensor | None, ...]:
    with recording(source.space.device, rules=False):
        output, slope = source.differential(leaves, batch)
        return backward([output], leaves, [slope], retain_graph=False)


class _HessianMap:
    """One batch's Hessian as a function of rows."""

    def __init__(
        self, product: HessianProduct, source: ScalarSource, batch: Batch, nbytes: int
    ) -> None:
        self._product = product
        self._source = source
        self._batch = batch
        self._replayed = Replayed()
        self.nbytes = nbytes

    def __call__(self, v: Tensor, *, batched: bool = False) -> Tensor:
        if not batched:
            return self._replayed(self._single, v)
        space = self._source.space
        return space.join(self._product(space.split(v), batched=True), batched=True)

    def _single(self, v: Tensor) -> Tensor:
        space = self._source.space
        try:
            return space.join(self._product(space.split(v)))
        except (RuntimeError, NotImplementedError) as error:
            raise self._source.explained(error, self._batch, order=2) from error
