r"""Matrices :math:`J^\top M J` of one batch, with ``M`` in the space of predictions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from torchlinop.autodiff.losses import HessianProduct
from torchlinop.autodiff.recording import recording
from torchlinop.autodiff.replay import Replayed
from torchlinop.curvature.derivative_check import DerivativeCheck
from torchlinop.curvature.linearized_model import LinearizedModel
from torchlinop.data import Batch
from torchlinop.sources import EmpiricalRisk

#: from a risk, a prediction and its batch to the product with a matrix in its space
Middle = Callable[[EmpiricalRisk, Tensor, Batch], HessianProduct]


def gauss_newton(risk: EmpiricalRisk, middle: Middle) -> Callable[[Batch], GaussNewtonMap]:
    """Return the function that linearizes a batch's contribution."""
    return partial(_gauss_newton_map, risk, middle, DerivativeCheck(risk))


def _gauss_newton_map(
    risk: EmpiricalRisk, middle: Middle, check: DerivativeCheck, batch: Batch
) -> GaussNewtonMap:
    jacobian = LinearizedModel(risk, batch, check)
    with recording(risk.space.device, rules=False):
        product = middle(risk, jacobian.output, batch)

    def explained(error: Exception) -> Exception:
        return risk.explained(error, batch, order=1)

    return GaussNewtonMap(jacobian, product, explained)


class GaussNewtonMap:
    """One batch's contribution as a function of rows."""

    def __init__(
        self,
        jacobian: LinearizedModel,
        middle: HessianProduct,
        explained: Callable[[Exception], Exception],
    ) -> None:
        self._jacobian = jacobian
        self._explained = explained
        self._middle = middle
        self._replayed = Replayed()
        self.nbytes = jacobian.nbytes

    def __call__(self, v: Tensor, *, batched: bool = False) -> Tensor:
        """Product with a row, or with rows."""
        if batched:
            return self._product(v, batched=True)
        return self._replayed(self._product, v)

    def _product(self, v: Tensor, *, batched: bool = False) -> Tensor:
        u = self._jacobian.jvp(v, batched=batched)
        try:
            u = self._middle(u)
        except (RuntimeError, NotImplementedError) as error:
            raise self._explained(error) from error
        return self._jacobian.vjp(u, batched=batched)
