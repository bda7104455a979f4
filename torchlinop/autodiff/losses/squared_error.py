"""Squared error."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from torchlinop.autodiff.losses.loss_function import (
    HessianProduct,
    LikelihoodLoss,
    closed_form,
    ones_by_row,
    require_same_shape,
    row_dimension,
)
from torchlinop.autodiff.losses.roots import HessianRoot, diagonal_root


class MeanSquaredError(LikelihoodLoss):
    r"""Squared error :math:`\sum (f - y)^2`; Hessian :math:`2 I`."""

    def normalizer(self, target: Tensor, batch_size: int) -> float:
        return float(target.numel()) if isinstance(target, Tensor) else 1.0

    def row_dimension(self, prediction: Tensor) -> int | None:
        return row_dimension(prediction, classes_first=False)

    @closed_form
    def gradient(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> Tensor:
        require_same_shape(prediction, target, "MSELoss")
        return (2 * scale) * (prediction - target.to(prediction))

    @closed_form
    def hessian_product(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> HessianProduct:
        require_same_shape(prediction, target, "MSELoss")
        return _multiple(2 * scale)

    def hessian_root(
        self, prediction: Tensor, target: Tensor, batch_size: int
    ) -> HessianRoot:
        require_same_shape(prediction, target, "MSELoss")
        two = torch.full_like(prediction.detach(), 2.0)
        return diagonal_root(two, self.row_dimension(prediction))

    def row_weights(self, prediction: Tensor, target: Tensor) -> Tensor:
        return ones_by_row(prediction, self.row_dimension(prediction))

    def sample_gradients(
        self, prediction: Tensor, target: Tensor, mc_samples: int, generator: Generator
    ) -> Tensor:
        require_same_shape(prediction, target, "MSELoss")
        shape = (*prediction.shape, mc_samples)
        u = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
        # 2u - 1 on the open interval (-1, 1); sqrt(2) erfinv of it is standard normal
        noise = torch.erfinv(2 * u - (1 - 2.0**-53))
        return 2 * noise.movedim(-1, 0).to(prediction.device, prediction.dtype)

    def num_draws(self, target: Tensor) -> int:
        return target.numel()


def _multiple(factor: float) -> HessianProduct:
    def product(u: Tensor) -> Tensor:
        return factor * u

    return product
