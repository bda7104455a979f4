"""A model's Jacobian on one batch, by whichever mode of differentiation exists."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from torchlinop.autodiff.diagnose import is_missing_derivative
from torchlinop.autodiff.differences import check_jacobian
from torchlinop.autodiff.graphs import once_differentiable_functions
from torchlinop.autodiff.linearize import (
    ForwardJacobianProducts,
    JacobianProducts,
    Retained,
    retained,
)
from torchlinop.autodiff.recording import recording
from torchlinop.curvature.derivative_check import DerivativeCheck
from torchlinop.data import Batch
from torchlinop.sources import Source


class LinearizedModel:
    """Products with the Jacobian of a source on one batch.

    Parameters
    ----------
    source
        The function and its point.
    batch
        Its data.
    products
        The recorded prediction.
    kept
        What they keep alive.

    Attributes
    ----------
    shape, dtype
        Of the prediction.
    nbytes : int
        What the linearization keeps alive.
    nodes : int
        Size of its graph.
    """

    def __init__(
        self, source: Source, batch: Batch, products: JacobianProducts, kept: Retained
    ) -> None:
        self._source = source
        self._batch = batch
        self._products = products
        self.nbytes, self.nodes = kept
        self.shape, self.dtype = products.shape, products.dtype

    @staticmethod
    def of(
        source: Source, batch: Batch, check: DerivativeCheck
    ) -> tuple[LinearizedModel, Tensor]:
        """Linearize a source on a batch; return the prediction, too, which is not kept.

        ``check`` says whether the Jacobian is to be compared with finite differences.
        """

        def build(
            leaves: list[Tensor],
        ) -> tuple[JacobianProducts, Retained, Tensor, list[str]]:
            prediction = source.predict(leaves, batch)
            if once_differentiable_functions([prediction]):
                products = _forward(source, batch, leaves)
            else:
                products = JacobianProducts(prediction, leaves)
            kept = retained(products.graph, (*leaves, *batch.sources))
            return products, kept, prediction.detach(), check.due(batch, [prediction])

        products, kept, output, functions = source.record(batch, build, order=1)
        model = LinearizedModel(source, batch, products, kept)
        if functions:
            check_jacobian(model._value, model._jvp_of_parts, source.leaves(), functions)
            check.done()
        return model, output

    def jvp(self, v: Tensor, *, batched: bool = False) -> Tensor:
        """``J v`` for a flat ``v``, shaped like the prediction."""
        columns = self._source.space.split(v)
        try:
            return self._products.jvp(columns, batched=batched)
        except (RuntimeError, NotImplementedError) as error:
            if batched or not is_missing_derivative(error):
                raise
            if isinstance(self._products, ForwardJacobianProducts):
                raise self._source.explained(error, self._batch, order=1) from error
        forward = partial(_forward, self._source, self._batch)
        self._products = self._source.record(self._batch, forward, order=1)
        return self.jvp(v)

    def _jvp_of_parts(self, v: list[Tensor]) -> Tensor:
        return self.jvp(self._source.space.join(v))

    def _value(self, leaves: list[Tensor]) -> Tensor:
        with recording(self._source.space.device, rules=False):
            return self._source.predict(leaves, self._batch)

    def vjp(self, u: Tensor, *, batched: bool = False) -> Tensor:
        """``J^T u`` as a flat vector, for ``u`` shaped like the prediction."""
        products = self._products.vjp(u, batched=batched)
        return self._source.space.join(products, batched=batched)


def _forward(source: Source, batch: Batch, leaves: list[Tensor]) -> JacobianProducts:
    return ForwardJacobianProducts(lambda p: source.predict(p, batch), leaves)
