"""Softmax cross-entropy."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from torchlinop._typing import Reduction
from torchlinop.autodiff.losses.loss_function import (
    ClosedFormGradient,
    HessianProduct,
    LikelihoodLoss,
    row_dimension,
)
from torchlinop.autodiff.losses.roots import HessianRoot, softmax_root

#: cumulated probabilities that are held at once
_CUMULATED = 1 << 21


class CrossEntropy(LikelihoodLoss):
    r"""Softmax cross-entropy with everything :class:`torch.nn.CrossEntropyLoss` offers.

    With target mass :math:`t` (class weights, smoothing, ignored targets and soft labels
    included) and :math:`c = \sum_k t_k`, the gradient of a row is :math:`c\,p - t` and
    its Hessian :math:`c\,(\operatorname{diag} p - p p^\top)`.
    """

    def __init__(
        self,
        reduction: Reduction,
        *,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
    ) -> None:
        super().__init__(reduction)
        self.weight = weight
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def normalizer(self, target: Tensor, batch_size: int) -> float:
        if not isinstance(target, Tensor):
            raise TypeError(
                "CrossEntropyLoss needs class indices or probabilities as targets, got "
                f"{type(target).__name__} for y."
            )
        if target.is_floating_point():
            classes = target.shape[0] if target.ndim == 1 else target.shape[1]
            return target.numel() / classes
        kept = target[target != self.ignore_index]
        if self.weight is None:
            return float(kept.numel())
        return self.weight.to(kept.device)[kept.long()].sum(dtype=torch.float64).item()

    def row_dimension(self, prediction: Tensor) -> int | None:
        return row_dimension(prediction, classes_first=True)

    def _target_mass(self, prediction: Tensor, target: Tensor) -> Tensor:
        dim = 0 if prediction.ndim == 1 else 1
        classes = prediction.shape[dim]
        self._check_target(prediction, target, dim)
        per_class = [1] * prediction.ndim
        per_class[dim] = classes
        if self.weight is None:
            weight = prediction.new_ones(1)
        else:
            weight = self.weight.to(prediction).view(per_class)
        if target.is_floating_point():
            mass, kept = target.to(prediction), None
        else:
            kept = (target != self.ignore_index).unsqueeze(dim)
            index = target.long().unsqueeze(dim).where(kept, 0)
            mass = torch.zeros_like(prediction).scatter_(dim, index, 1.0)
        if self.label_smoothing:
            smoothing = self.label_smoothing
            mass = (1 - smoothing) * mass + smoothing / classes
        mass = mass * weight
        return mass if kept is None else mass * kept

    def _check_target(self, prediction: Tensor, target: Tensor, dim: int) -> None:
        classes = prediction.shape[dim]
        expected = tuple(prediction.shape)
        if not target.is_floating_point():
            expected = expected[:dim] + expected[dim + 1 :]
            if target.dtype not in (torch.int64, torch.uint8):
                raise TypeError(
                    f"Class indices have to be of dtype int64, got {target.dtype}. Pass "
                    "y.long()."
                )
        if tuple(target.shape) != expected:
            raise ValueError(
                f"CrossEntropyLoss of a prediction of shape {tuple(prediction.shape)} "
                f"expects a target of shape {expected}, got {tuple(target.shape)}."
            )
        if self.weight is not None and self.weight.shape != (classes,):
            raise ValueError(
                f"The class weight has shape {tuple(self.weight.shape)}, the prediction "
                f"{classes} classes."
            )
        if not target.is_floating_point():
            kept = target[target != self.ignore_index]
            if kept.numel() and not 0 <= kept.min() <= kept.max() < classes:
                raise ValueError(
                    f"Targets lie between {int(kept.min())} and {int(kept.max())}, but "
                    f"the prediction has {classes} classes, 0 to {classes - 1}."
                )

    def _parts(
        self, prediction: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        dim = -1 if prediction.ndim == 1 else 1 - prediction.ndim
        prediction = prediction.detach()
        mass = self._target_mass(prediction, target)
        return torch.softmax(prediction, dim), mass, mass.sum(dim, keepdim=True), dim

    def gradient(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> Tensor:
        p, mass, total, dim = self._parts(prediction, target)
        product = _softmax_hessian(p, (scale * total) * p, dim)
        gradient = scale * (total * p - mass)
        return ClosedFormGradient.apply(prediction, gradient, product)

    def hessian_product(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> HessianProduct:
        p, _, total, dim = self._parts(prediction, target)
        return _softmax_hessian(p, (scale * total) * p, dim)

    def hessian_root(
        self, prediction: Tensor, target: Tensor, batch_size: int
    ) -> HessianRoot:
        p, total, dim = self._probabilities(prediction, target)
        return softmax_root(p, total, dim)

    def row_weights(self, prediction: Tensor, target: Tensor) -> Tensor:
        dim = 0 if prediction.ndim == 1 else 1
        self._check_target(prediction, target, dim)
        if target.is_floating_point():
            mass = self._target_mass(prediction, target)
            return mass.sum(dim, keepdim=True)
        classes = prediction.shape[dim]
        weight = prediction.new_ones(classes)
        if self.weight is not None:
            weight = self.weight.to(prediction)
        kept = (target != self.ignore_index).unsqueeze(dim)
        own = weight[target.long().unsqueeze(dim).where(kept, 0)]
        smoothing = self.label_smoothing
        return kept * ((1 - smoothing) * own + smoothing * weight.mean())

    def _probabilities(
        self, prediction: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """Return probabilities and row weights, with little memory besides."""
        dim = -1 if prediction.ndim == 1 else 1 - prediction.ndim
        p = torch.softmax(prediction.detach(), dim)
        return p, self.row_weights(prediction.detach(), target), dim

    def sample_gradients(
        self, prediction: Tensor, target: Tensor, mc_samples: int, generator: Generator
    ) -> Tensor:
        p, total, dim = self._probabilities(prediction, target)
        rows = p.movedim(dim, -1)  # (*rows, classes)
        shape = (*rows.shape[:-1], mc_samples)
        u = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu").to(
            p.device
        )
        label = (
            _drawn(rows.flatten(0, -2), u.flatten(0, -2))
            if rows.ndim > 1
            else (_drawn(rows.unsqueeze(0), u.unsqueeze(0)).squeeze(0))
        )
        label = label.reshape(shape).movedim(-1, 0).unsqueeze(dim)  # (M, *rows, 1)
        root = total.sqrt()
        samples = p.mul_(root).unsqueeze(0)
        if mc_samples > 1:
            samples = samples.repeat(mc_samples, *[1] * p.ndim)
        return samples.scatter_add_(dim, label, -root.expand(label.shape))


def _drawn(rows: Tensor, u: Tensor) -> Tensor:
    """Labels ``(R, M)`` for uniform numbers, by the cumulated probabilities ``(R, C)``."""
    step = max(1, _CUMULATED // max(1, rows.shape[1]))
    labels = []
    for part, own in zip(rows.split(step), u.split(step), strict=True):
        cumulative = part.double().cumsum(-1)
        label = torch.searchsorted(cumulative, own * cumulative[:, -1:], right=True)
        labels.append(label.clamp_(max=rows.shape[1] - 1))
    return torch.cat(labels)


def _softmax_hessian(p: Tensor, weighted_p: Tensor, dim: int) -> HessianProduct:
    def product(u: Tensor) -> Tensor:
        return weighted_p * (u - (p * u).sum(dim, keepdim=True))

    return product
