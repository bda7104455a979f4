"""A model's Jacobian on one batch, by whichever mode of differentiation exists."""

from __future__ import annotations

from torch import Tensor

from torchlinop.autodiff.diagnose import is_missing_derivative
from torchlinop.autodiff.differences import check_jacobian
from torchlinop.autodiff.graphs import once_differentiable_functions
from torchlinop.autodiff.linearize import (
    ForwardJacobianProducts,
    JacobianProducts,
    retained_bytes,
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
    check
        Whether the Jacobian is to be compared with finite differences.

    Attributes
    ----------
    output : Tensor
        The prediction.
    nbytes : int
        What the linearization keeps alive.
    """

    def __init__(self, source: Source, batch: Batch, check: DerivativeCheck) -> None:
        self._source = source
        self._batch = batch

        def build(leaves: list[Tensor]) -> tuple[JacobianProducts, int, list[str]]:
            prediction = source.predict(leaves, batch)
            if once_differentiable_functions([prediction]):
                products = self._forward(leaves)
            else:
                products = JacobianProducts(prediction, leaves)
            nbytes = retained_bytes(products.graph, (*leaves, *batch.sources))
            return products, nbytes, check.due(batch, [prediction])

        self._products, self.nbytes, functions = source.record(batch, build, order=1)
        if functions:
            check_jacobian(self._value, self._jvp_of_parts, source.leaves(), functions)
            check.done()
        self.output = self._products.output

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
        self._products = self._source.record(self._batch, self._forward, order=1)
        return self.jvp(v)

    def _jvp_of_parts(self, v: list[Tensor]) -> Tensor:
        return self.jvp(self._source.space.join(v))

    def _value(self, leaves: list[Tensor]) -> Tensor:
        with recording(self._source.space.device, rules=False):
            return self._source.predict(leaves, self._batch)

    def _forward(self, leaves: list[Tensor]) -> JacobianProducts:
        return ForwardJacobianProducts(
            lambda p: self._source.predict(p, self._batch), leaves
        )

    def vjp(self, u: Tensor, *, batched: bool = False) -> Tensor:
        """``J^T u`` as a flat vector, for ``u`` shaped like the prediction."""
        products = self._products.vjp(u, batched=batched)
        return self._source.space.join(products, batched=batched)
