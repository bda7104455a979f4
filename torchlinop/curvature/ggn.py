"""The generalized Gauss-Newton matrix, and what it shares with the Fisher matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

from torch import Tensor

from torchlinop._kept import KeptLinearizations
from torchlinop._operator import TorchLinearOperator
from torchlinop._typing import Data, Loss, Model, Parameters
from torchlinop.autodiff.diagnose import (
    is_missing_derivative,
    once_differentiable_functions,
)
from torchlinop.autodiff.linearize import (
    ForwardJacobianProducts,
    JacobianProducts,
    recording,
    retained_bytes,
)
from torchlinop.autodiff.losses import HessianProduct
from torchlinop.autodiff.replay import Replayed
from torchlinop.data import Batch
from torchlinop.risk import EmpiricalRisk, ModelOnData, RiskOptions, TorchFunction

#: from a prediction and its batch to the product with a matrix in prediction space
Middle = Callable[[Tensor, Batch], HessianProduct]


class GGNLinearOperator(TorchLinearOperator):
    r"""Generalized Gauss-Newton matrix of the empirical risk.

    .. math:: G = \frac1Z \sum_n J_n^\top \, \nabla_f^2 \ell(f_n, y_n) \, J_n

    with :math:`J_n` the Jacobian of the prediction :math:`f_n` with respect to the
    parameters: the Hessian of the risk with the model replaced by its linearization.
    Positive semi-definite for losses that are convex in the prediction. For softmax
    cross-entropy and squared error it is the Fisher information matrix.

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
    Schraudolph, "Fast curvature matrix-vector products for second-order gradient
    descent", Neural Computation 14 (2002), https://doi.org/10.1162/08997660260028683

    Examples
    --------
    For a linear model the GGN is the Hessian, here :math:`\frac2N X^\top X`:

    >>> import torch
    >>> from torchlinop import GGNLinearOperator
    >>> X, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1)
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> G = GGNLinearOperator(model, torch.nn.MSELoss(), model.parameters(), [(X, y)])
    >>> G @ torch.tensor([1.0, -1.0])
    tensor([-4., -6.])
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
        self.space = risk.space
        n = self.space.dim
        super().__init__((n, n), self.space.dtype, self.space.device)
        self._maps = KeptLinearizations(risk, GaussNewtonBuilder(risk, _LossHessian(risk)))

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


class _LossHessian:
    """The loss Hessian at a prediction, divided by the normaliser."""

    def __init__(self, risk: EmpiricalRisk) -> None:
        self._risk = risk

    def __call__(self, prediction: Tensor, batch: Batch) -> HessianProduct:
        risk = self._risk
        return risk.loss.hessian_product(
            prediction, batch.y, batch.size, 1 / risk.normalizer
        )


class LinearizedModel:
    """A model's Jacobian on one batch, by whichever mode of differentiation exists."""

    def __init__(self, model: ModelOnData | TorchFunction, batch: Batch) -> None:
        self._model = model
        self._batch = batch

        def build(leaves: list[Tensor]) -> tuple[JacobianProducts, int]:
            prediction = model.predict(leaves, batch.X)
            if once_differentiable_functions([prediction]):
                products = self._forward(leaves)
            else:
                products = JacobianProducts(prediction, leaves)
            return products, retained_bytes(products.graph, (*leaves, *batch.sources))

        self._products, self.nbytes = model.record(batch, build)
        self.output = self._products.output

    def jvp(self, v: Tensor, *, batched: bool = False) -> Tensor:
        """``J v`` for a flat ``v``, shaped like the prediction."""
        columns = self._model.space.split(v)
        try:
            return self._products.jvp(columns, batched=batched)
        except (RuntimeError, NotImplementedError) as error:
            if batched or not is_missing_derivative(error):
                raise
            if isinstance(self._products, ForwardJacobianProducts):
                raise self._model.explained(error, self._batch) from error
        self._products = self._model.record(self._batch, self._forward)
        return self.jvp(v)

    def _forward(self, leaves: list[Tensor]) -> JacobianProducts:
        X = self._batch.X
        return ForwardJacobianProducts(lambda p: self._model.predict(p, X), leaves)

    def vjp(self, u: Tensor, *, batched: bool = False) -> Tensor:
        """``J^T u`` as a flat vector, for ``u`` shaped like the prediction."""
        products = self._products.vjp(u, batched=batched)
        return self._model.space.join(products, batched=batched)


class GaussNewtonBuilder:
    r"""Builds :math:`J^\top M J` of one batch, with ``middle`` giving ``M``."""

    def __init__(self, risk: EmpiricalRisk, middle: Middle) -> None:
        self._risk = risk
        self._middle = middle

    def __call__(self, batch: Batch) -> _GaussNewtonMap:  # noqa: D102
        jacobian = LinearizedModel(self._risk, batch)
        with recording(self._risk.space.device, rules=False):
            middle = self._middle(jacobian.output, batch)
        return _GaussNewtonMap(jacobian, middle)


class _GaussNewtonMap:
    """One batch's contribution as a function of rows."""

    def __init__(self, jacobian: LinearizedModel, middle: HessianProduct) -> None:
        self._jacobian = jacobian
        self._middle = middle
        self._replayed = Replayed()
        self.nbytes = jacobian.nbytes

    def __call__(self, v: Tensor, *, batched: bool = False) -> Tensor:
        if batched:
            return self._product(v, batched=True)
        return self._replayed(self._product, v)

    def _product(self, v: Tensor, *, batched: bool = False) -> Tensor:
        u = self._jacobian.jvp(v, batched=batched)
        return self._jacobian.vjp(self._middle(u), batched=batched)
