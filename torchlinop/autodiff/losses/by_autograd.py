"""Any loss, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchlinop._typing import Loss, Reduction
from torchlinop.autodiff.backward import backward
from torchlinop.autodiff.losses.loss_function import (
    HessianProduct,
    LossFunction,
    ones_by_row,
    row_dimension,
)
from torchlinop.autodiff.losses.roots import HessianRoot, root_by_eigenvalues


class CallableLoss(LossFunction):
    """Any ``loss(prediction, target) -> scalar``, differentiated by autograd.

    Parameters
    ----------
    function
        The loss as the user wrote it.
    reduction
        Whether ``function`` sums or averages.
    count
        What an average of ``function`` divides by, from the target and the batch size.
    classes_first
        Whether a prediction has its classes in dimension 1, as for cross-entropy.
    """

    def __init__(
        self,
        function: Loss,
        reduction: Reduction,
        count: Callable[[Tensor, int], float],
        *,
        classes_first: bool = False,
    ) -> None:
        super().__init__(reduction)
        self.function = function
        self._count = count
        self._classes_first = classes_first

    def normalizer(self, target: Tensor, batch_size: int) -> float:
        return self._count(target, batch_size)

    def row_dimension(self, prediction: Tensor) -> int | None:
        return row_dimension(prediction, classes_first=self._classes_first)

    def _total(self, prediction: Tensor, target: Tensor, batch_size: int) -> Tensor:
        value = self.function(prediction, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value)
            raise ValueError(
                f"The loss function has to return a scalar tensor, got {got}. "
                "Sum or average it over the batch and pass reduction='sum' or 'mean'."
            )
        if self.reduction == "mean":
            value = value * self.normalizer(target, batch_size)
        return value.sum()

    def gradient(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> Tensor:
        value = scale * self._total(prediction, target, batch_size)
        if not value.requires_grad:
            return torch.zeros_like(prediction)
        (gradient,) = torch.autograd.grad(
            value, prediction, create_graph=True, allow_unused=True
        )
        return torch.zeros_like(prediction) if gradient is None else gradient

    def hessian_product(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> HessianProduct:
        prediction = prediction.detach().requires_grad_()
        gradient = self.gradient(prediction, target, batch_size, scale)

        def product(u: Tensor) -> Tensor:
            if not gradient.requires_grad:  # piecewise linear
                return torch.zeros_like(u)
            batched = u.ndim > prediction.ndim
            (out,) = backward([gradient], [prediction], [u], batched=batched)
            return torch.zeros_like(u) if out is None else out

        return product

    def hessian_root(
        self, prediction: Tensor, target: Tensor, batch_size: int
    ) -> HessianRoot:
        product = self.hessian_product(prediction, target, batch_size, 1.0)
        dim = self.row_dimension(prediction)
        return root_by_eigenvalues(product, prediction.detach(), dim)

    def row_weights(self, prediction: Tensor, target: Tensor) -> Tensor:
        return ones_by_row(prediction, self.row_dimension(prediction))
