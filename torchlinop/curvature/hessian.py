"""The Hessian."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.autodiff.backward import backward
from torchlinop.autodiff.columns import LinearRows, PassingRows
from torchlinop.autodiff.differences import check_hessian
from torchlinop.autodiff.experience import Experience
from torchlinop.autodiff.graphs import require_twice_differentiable
from torchlinop.autodiff.linearize import HessianProduct, Retained, retained
from torchlinop.autodiff.recording import recording
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
        super().__init__(source, _BatchHessian(source))

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


class _BatchHessian:
    """Linearizes the gradient of one batch's share of a scalar."""

    def __init__(self, source: ScalarSource) -> None:
        self._source = source
        self._check = DerivativeCheck(source)

    def linearize(self, batch: Batch) -> LinearRows:
        """Keep the graph of the batch's gradient."""
        source = self._source

        def build(leaves: list[Tensor]) -> tuple[HessianProduct, Retained, list[str]]:
            product, functions = self._recorded(batch, leaves)
            kept = retained(product.graph, (*leaves, *batch.sources))
            return product, kept, functions

        product, kept, functions = source.record(batch, build, order=2)
        if functions:
            gradient = partial(_gradient, source, batch)
            check_hessian(gradient, product, source.leaves(), functions)
            self._check.done()
        rows = partial(_product, source, batch, product)
        return LinearRows(rows, nbytes=kept.nbytes, nodes=kept.nodes)

    def passing(self, batch: Batch) -> PassingRows:
        """Apply the batch's Hessian with nothing kept."""
        return PassingRows(partial(self._once, batch), partial(self.linearize, batch))

    def _once(self, batch: Batch, v: Tensor) -> Tensor:
        build = partial(self._recorded, batch)
        product, functions = self._source.record(batch, build, order=2)
        if functions:  # to be checked first
            return self.linearize(batch).row(v, Experience())
        return _product(self._source, batch, product, v, retain=False)

    def _recorded(
        self, batch: Batch, leaves: list[Tensor]
    ) -> tuple[HessianProduct, list[str]]:
        """The product with the batch's Hessian, and the Functions to be checked."""
        output, slope = self._source.differential(leaves, batch)
        with torch._C.DisableTorchFunction():  # a mode would see the question
            depends = output.requires_grad
        if not depends:
            return HessianProduct([None] * len(leaves), leaves), []
        require_twice_differentiable([output, slope])
        gradient = backward([output], leaves, [slope], create_graph=True)
        return HessianProduct(gradient, leaves), self._check.due(batch, [output, slope])


def _gradient(
    source: ScalarSource, batch: Batch, leaves: list[Tensor]
) -> tuple[Tensor | None, ...]:
    with recording(source.space.device, rules=False):
        output, slope = source.differential(leaves, batch)
        return backward([output], leaves, [slope], retain_graph=False)


def _product(
    source: ScalarSource,
    batch: Batch,
    product: HessianProduct,
    v: Tensor,
    *,
    batched: bool = False,
    retain: bool = True,
) -> Tensor:
    """One batch's Hessian times a row, or rows."""
    space = source.space
    try:
        products = product(space.split(v), batched=batched, retain=retain)
        return space.join(products, batched=batched)
    except (RuntimeError, NotImplementedError) as error:
        if batched:
            raise
        raise source.explained(error, batch, order=2) from error
