"""Logistic loss of binary labels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Generator, Tensor

from torchlinop._typing import Reduction
from torchlinop.autodiff.losses.loss_function import (
    HessianProduct,
    LikelihoodLoss,
    closed_form,
    require_same_shape,
    row_dimension,
)
from torchlinop.autodiff.losses.roots import HessianRoot, diagonal_root


class BinaryCrossEntropyWithLogits(LikelihoodLoss):
    r"""Logistic loss with element ``weight`` and ``pos_weight`` :math:`q`.

    Gradient :math:`w\,[(1-y) - (1 + (q-1)y)\,\sigma(-z)]`, Hessian
    :math:`w\,(1 + (q-1) y)\,\sigma(z)\,\sigma(-z)`.
    """

    def __init__(
        self,
        reduction: Reduction,
        *,
        weight: Tensor | None,
        pos_weight: Tensor | None,
    ) -> None:
        super().__init__(reduction)
        self.weight = weight
        self.pos_weight = pos_weight

    def normalizer(self, target: Tensor, batch_size: int) -> float:
        return float(target.numel())

    def row_dimension(self, prediction: Tensor) -> int | None:
        return row_dimension(prediction, classes_first=False)

    def _parts(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        require_same_shape(prediction, target, "BCEWithLogitsLoss")
        z, y = prediction.detach(), target.to(prediction)
        weight = 1.0 if self.weight is None else self.weight.to(z)
        mass = torch.ones_like(y)
        if self.pos_weight is not None:
            mass = 1 + (self.pos_weight.to(z) - 1) * y
        return z, y, weight * mass, weight * torch.ones_like(y)

    @closed_form
    def gradient(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> Tensor:
        _, y, mass, weight = self._parts(prediction, target)
        gradient = (-scale * mass) * torch.sigmoid(-prediction)
        gradient.detach().add_(scale * weight * (1 - y))  # a constant, so without a node
        return gradient

    @closed_form
    def hessian_product(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> HessianProduct:
        z, _, mass, _ = self._parts(prediction, target)
        return partial(torch.mul, scale * mass * torch.sigmoid(z) * torch.sigmoid(-z))

    def hessian_root(
        self, prediction: Tensor, target: Tensor, batch_size: int
    ) -> HessianRoot:
        z, _, mass, _ = self._parts(prediction, target)
        diagonal = mass * torch.sigmoid(z) * torch.sigmoid(-z)
        return diagonal_root(diagonal, self.row_dimension(prediction))

    def row_weights(self, prediction: Tensor, target: Tensor) -> Tensor:
        _, _, mass, _ = self._parts(prediction, target)
        dim = self.row_dimension(prediction)
        return mass if dim is None else mass.mean(dim, keepdim=True)

    def sample_gradients(
        self, prediction: Tensor, target: Tensor, mc_samples: int, generator: Generator
    ) -> Tensor:
        z, _, mass, _ = self._parts(prediction, target)
        shape = (*z.shape, mc_samples)
        u = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu").to(
            z.device
        )
        p = torch.sigmoid(z)
        label = (u < p.double().unsqueeze(-1)).movedim(-1, 0)
        return mass.sqrt() * (p - label.to(p))

    def num_draws(self, target: Tensor) -> int:
        return target.numel()
