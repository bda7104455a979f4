"""The Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from torchlinop._kept import KeptLinearizations
from torchlinop._operator import TorchLinearOperator
from torchlinop._space import ParameterSpace
from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.autodiff.diagnose import require_twice_differentiable
from torchlinop.autodiff.linearize import HessianProduct, retained_bytes
from torchlinop.autodiff.replay import Replayed
from torchlinop.data import Batch
from torchlinop.risk import EmpiricalRisk, RiskOptions, TorchFunction


class HessianLinearOperator(TorchLinearOperator):
    r"""Hessian of the empirical risk, :math:`\nabla_\theta^2 L(\theta)`.

    Symmetric, in general indefinite.

    Parameters
    ----------
    model, loss_function, params, data
        What :class:`~torchlinop.risk.EmpiricalRisk` describes; any loss will do.
    **options
        Keyword arguments of :class:`~torchlinop.risk.EmpiricalRisk`.

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
        model: Model,
        loss_function: Loss,
        params: Parameters,
        data: Data,
        **options: Unpack[RiskOptions],
    ) -> None:
        risk = EmpiricalRisk(model, loss_function, params, data, **options)
        self._setup(risk, _OfRisk(risk))

    @classmethod
    def from_function(cls, f: Callable[[Any], Tensor], x: Any) -> HessianLinearOperator:
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
        operator = cls.__new__(cls)
        function = TorchFunction(f, x)
        operator._setup(function, _OfFunction(function))
        return operator

    def _setup(self, source: EmpiricalRisk | TorchFunction, build: Any) -> None:
        self.space: ParameterSpace = source.space
        n = self.space.dim
        super().__init__((n, n), self.space.dtype, self.space.device)
        self._maps: KeptLinearizations[_HessianMap] = KeptLinearizations(source, build)

    def _apply(self, x: Tensor) -> Tensor:
        return self._maps.total(x)

    def _adjoint(self) -> TorchLinearOperator:
        return self

    def refresh(self) -> None:
        """Forget everything that was kept, after changes that could not be noticed.

        Needed only after writing through ``.data`` on a GPU, or after changing something
        other than parameters, buffers and data (a Python attribute of the model).
        """
        self._maps.refresh()


class _HessianMap:
    """One batch's Hessian as a function of rows."""

    def __init__(
        self,
        product: HessianProduct,
        source: EmpiricalRisk | TorchFunction,
        batch: Batch,
        nbytes: int,
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
            raise self._source.explained(error, self._batch) from error


class _OfRisk:
    """Builds the Hessian of one batch's share of the risk."""

    def __init__(self, risk: EmpiricalRisk) -> None:
        self._risk = risk

    def __call__(self, batch: Batch) -> _HessianMap:
        risk = self._risk

        def build(leaves: list[Tensor]) -> tuple[HessianProduct, int]:
            prediction = risk.predict(leaves, batch.X)
            if not prediction.requires_grad:
                return HessianProduct([None] * len(leaves), leaves), 0
            require_twice_differentiable([prediction])
            scale = 1 / risk.normalizer
            slope = risk.loss.gradient(prediction, batch.y, batch.size, scale)
            gradient = torch.autograd.grad(
                prediction, leaves, slope, create_graph=True, allow_unused=True
            )
            product = HessianProduct(gradient, leaves)
            return product, retained_bytes(product.graph, (*leaves, *batch.sources))

        product, nbytes = risk.record(batch, build)
        return _HessianMap(product, risk, batch, nbytes)


class _OfFunction:
    """Builds the Hessian of a function."""

    def __init__(self, function: TorchFunction) -> None:
        self._function = function

    def __call__(self, batch: Batch) -> _HessianMap:
        def build(leaves: list[Tensor]) -> tuple[HessianProduct, int]:
            value = self._function.predict(leaves)
            if value.numel() != 1:
                raise ValueError(
                    "The Hessian is that of a scalar function, but f returned shape "
                    f"{tuple(value.shape)}. For a vector-valued function use "
                    "JacobianLinearOperator.from_function."
                )
            if not value.requires_grad:
                return HessianProduct([None] * len(leaves), leaves), 0
            require_twice_differentiable([value])
            gradient = torch.autograd.grad(
                value.sum(), leaves, create_graph=True, allow_unused=True
            )
            product = HessianProduct(gradient, leaves)
            return product, retained_bytes(product.graph, leaves)

        product, nbytes = self._function.record(batch, build)
        return _HessianMap(product, self._function, batch, nbytes)
