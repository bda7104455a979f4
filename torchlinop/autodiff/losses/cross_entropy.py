"""Softmax cross-entropy."""

from __future__ import annotations

from functools import partial

import torch
from torch import Generator, Tensor

from torchlinop._typing import Reduction
from torchlinop.autodiff.losses.loss_function import (
    HessianProduct,
    LikelihoodLoss,
    closed_form,
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
        dim = _class_dimension(prediction) % prediction.ndim
        classes = prediction.shape[dim]
        kept: Tensor | float = 1.0
        if target.is_floating_point():
            self._check_target(prediction, target, dim)
            mass = target.to(prediction)
        else:
            index, kept = self._indexed(prediction, target)
            mass = torch.zeros_like(prediction).scatter_(dim, index, 1.0)
        per_class = [1] * prediction.ndim
        per_class[dim] = classes
        if self.weight is None:
            weight = prediction.new_ones(1)
        else:
            weight = self.weight.to(prediction).view(per_class)
        if self.label_smoothing:
            smoothing = self.label_smoothing
            mass = (1 - smoothing) * mass + smoothing / classes
        return (mass * weight).mul_(kept)

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

    def _indexed(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return the class of each row, 0 if it is ignored, and 0 if it is, else 1."""
        dim = _class_dimension(prediction)
        self._check_target(prediction, target, dim % prediction.ndim)
        index = target.long().unsqueeze(dim)
        kept: Tensor | float = 1.0
        least, most = _limits(index)
        if least <= self.ignore_index <= most:
            kept = (index != self.ignore_index).to(prediction)
            index = index.where(index != self.ignore_index, 0)
            least, most = _limits(index)
        classes = prediction.shape[dim]
        if not 0 <= least <= most < classes:
            raise ValueError(
                f"Targets lie between {least} and {most}, but the prediction has "
                f"{classes} classes, 0 to {classes - 1}."
            )
        return index, kept

    @closed_form
    def gradient(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> Tensor:
        dim = _class_dimension(prediction)
        p = torch.softmax(prediction, dim)
        # what is subtracted is a constant, which needs no node in the graph
        if target.is_floating_point() or self.label_smoothing:
            mass = scale * self._target_mass(prediction.detach(), target)
            gradient = p * mass.sum(dim, keepdim=True)
            gradient.detach().sub_(mass)
        else:  # no tensor of that size for the one class
            index, kept = self._indexed(prediction, target)
            total = scale * self._weights(p, index, kept)
            gradient = p * total
            gradient.detach().scatter_add_(dim, index, _filled(p, index.shape, -total))
        return gradient

    @closed_form
    def hessian_product(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> HessianProduct:
        dim = _class_dimension(prediction)
        p = torch.softmax(prediction.detach(), dim)
        total = scale * self._totals(p, target)
        return partial(_times_softmax_hessian, p, total, dim)

    def hessian_root(
        self, prediction: Tensor, target: Tensor, batch_size: int
    ) -> HessianRoot:
        dim = _class_dimension(prediction)
        p = torch.softmax(prediction.detach(), dim)
        return softmax_root(p, self.row_weights(prediction, target), dim)

    def row_weights(self, prediction: Tensor, target: Tensor) -> Tensor:
        prediction = prediction.detach()
        row = prediction.narrow(_class_dimension(prediction), 0, 1)
        return _filled(row, row.shape, self._totals(prediction, target))

    def _totals(self, prediction: Tensor, target: Tensor) -> Tensor | float:
        """Weights of the rows; one number where all have the same."""
        if target.is_floating_point():
            dim = _class_dimension(prediction)
            return self._target_mass(prediction, target).sum(dim, keepdim=True)
        return self._weights(prediction, *self._indexed(prediction, target))

    def _weights(
        self, prediction: Tensor, index: Tensor, kept: Tensor | float
    ) -> Tensor | float:
        """Weights of rows of known classes."""
        if self.weight is None:
            return kept
        weight, smoothing = self.weight.to(prediction), self.label_smoothing
        return kept * ((1 - smoothing) * weight[index] + smoothing * weight.mean())

    def sample_gradients(
        self, prediction: Tensor, target: Tensor, mc_samples: int, generator: Generator
    ) -> Tensor:
        dim = _class_dimension(prediction)
        p = torch.softmax(prediction.detach(), dim)
        total = self.row_weights(prediction, target)
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

    def num_draws(self, target: Tensor) -> int:
        if not target.is_floating_point():  # classes by number
            return target.numel()
        return target.numel() // target.shape[_class_dimension(target)]


def _limits(index: Tensor) -> tuple[int, int]:
    """Return the smallest and the largest entry, 0 if there is none."""
    if not index.numel():
        return 0, 0
    least, most = torch.aminmax(index)
    return int(least), int(most)


def _filled(like: Tensor, shape: torch.Size, weights: Tensor | float) -> Tensor:
    """Return weights of a shape, which one number stands for."""
    return weights if isinstance(weights, Tensor) else like.new_full(shape, weights)


def _drawn(rows: Tensor, u: Tensor) -> Tensor:
    """Labels ``(R, M)`` for uniform numbers, by the cumulated probabilities ``(R, C)``."""
    step = max(1, _CUMULATED // max(1, rows.shape[1]))
    labels = []
    for part, own in zip(rows.split(step), u.split(step), strict=True):
        cumulative = part.double().cumsum(-1)
        label = torch.searchsorted(cumulative, own * cumulative[:, -1:], right=True)
        labels.append(label.clamp_(max=rows.shape[1] - 1))
    return torch.cat(labels)


def _class_dimension(prediction: Tensor) -> int:
    """Return the dimension of the classes, counted from the end."""
    return -1 if prediction.ndim == 1 else 1 - prediction.ndim


def _times_softmax_hessian(p: Tensor, total: Tensor | float, dim: int, u: Tensor) -> Tensor:
    """Product with ``total (diag p - p p^T)``, row by row; ``total`` has one entry each."""
    # in place: with a large vocabulary these are the largest tensors there are
    product = p * u
    along = product.sum(dim, keepdim=True)
    return product.addcmul_(p, along, value=-1).mul_(total)
