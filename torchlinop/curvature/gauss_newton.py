r"""Matrices :math:`J^\top M J` of one batch, with ``M`` in the space of predictions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from torchlinop.autodiff.columns import LinearRows, PassingRows
from torchlinop.autodiff.losses import HessianProduct, LikelihoodLoss
from torchlinop.autodiff.losses.loss_function import tensors_of
from torchlinop.autodiff.recording import recording
from torchlinop.curvature.derivative_check import DerivativeCheck
from torchlinop.curvature.linearized_model import LinearizedModel
from torchlinop.curvature.single_use import SingleUse
from torchlinop.data import Batch
from torchlinop.sources import EmpiricalRisk

#: from a risk, a prediction and its batch to the product with a matrix in its space
Middle = Callable[[EmpiricalRisk, Tensor, Batch], HessianProduct]


class BatchGaussNewton:
    """Linearizes the model on a batch, and puts a matrix between the Jacobians.

    Parameters
    ----------
    risk
        Model, loss and data.
    middle
        The matrix.
    """

    def __init__(self, risk: EmpiricalRisk, middle: Middle) -> None:
        self._risk = risk
        self._middle = middle
        self._check = DerivativeCheck(risk)
        self._single_use = SingleUse(risk, self._check)

    def linearize(self, batch: Batch) -> LinearRows:
        """Keep the graphs of the batch's prediction."""
        jacobian, output = LinearizedModel.of(self._risk, batch, self._check)
        matrix, held = self._matrix(output, batch)
        rows = partial(_product, jacobian, matrix)
        return LinearRows(rows, nbytes=jacobian.nbytes + held, nodes=jacobian.nodes)

    def passing(self, batch: Batch) -> PassingRows:
        """Apply the batch's contribution with nothing kept."""
        return PassingRows(partial(self._once, batch), partial(self.linearize, batch))

    def _matrix(self, output: Tensor, batch: Batch) -> tuple[HessianProduct, int]:
        """Return the matrix at a prediction, and how many bytes it holds."""
        risk = self._risk
        draws = not isinstance(risk.loss, LikelihoodLoss)  # a user's own function
        with recording(risk.space.device, rules=False, draws=draws):
            product = self._middle(risk, output, batch)

        def explained(u: Tensor) -> Tensor:
            try:
                return product(u)
            except (RuntimeError, NotImplementedError) as error:
                raise risk.explained(error, batch, order=1) from error

        return explained, sum(t.nbytes for t in tensors_of(product))

    def _once(self, batch: Batch, v: Tensor) -> Tensor:
        output, tangent, vjp = self._single_use.derivative(batch, v)
        matrix, _ = self._matrix(output, batch)
        del output  # with a large vocabulary these are the largest tensors there are
        u = matrix(tangent)
        del tangent, matrix
        return vjp(u)


def _product(
    jacobian: LinearizedModel, matrix: HessianProduct, v: Tensor, *, batched: bool = False
) -> Tensor:
    """One batch's contribution times a row, or rows."""
    return jacobian.vjp(matrix(jacobian.jvp(v, batched=batched)), batched=batched)
