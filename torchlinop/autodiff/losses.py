r"""What a loss contributes to a curvature matrix: closed forms in the prediction.

A loss is treated as a sum over the data divided by a normaliser,
:math:`\frac1Z \sum_n \ell_n(f_n, y_n)`, where :math:`Z` is 1 for ``reduction="sum"``
and, for ``"mean"``, what PyTorch divides by: the number of elements, of samples, or the
total class weight of the targets that are not ignored. All derivatives here are those
of the *sum*, times a ``scale``: the caller's :math:`1/Z` for the whole data set.

Shapes: ``prediction`` is what the model returns, ``target`` what the data holds. A
direction ``u`` has the prediction's shape, optionally with one leading batch dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.autograd import Function

from torchlinop._typing import Loss, Reduction

HessianProduct = Callable[[Tensor], Tensor]


class LossFunction(ABC):
    """A loss with the derivatives that curvature matrices need.

    Parameters
    ----------
    reduction
        How the user's loss combines the data: ``"mean"`` or ``"sum"``.
    """

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction

    @abstractmethod
    def normalizer(self, target: Tensor, batch_size: int) -> float:
        """What ``reduction="mean"`` divides this batch's sum by."""

    @abstractmethod
    def gradient(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> Tensor:
        """``scale`` times the gradient of the summed loss in the prediction.

        The result is differentiable in ``prediction``, once.
        """

    @abstractmethod
    def hessian_product(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> HessianProduct:
        """Map ``u`` to ``scale`` times the loss Hessian at ``prediction`` times ``u``."""


class LikelihoodLoss(LossFunction):
    """A loss that is the negative logarithm of a known likelihood."""

    @abstractmethod
    def sample_gradients(
        self, prediction: Tensor, target: Tensor, mc_samples: int, generator: Generator
    ) -> Tensor:
        """Random ``s``, shape ``(mc_samples, *prediction.shape)``, ``E[s s^T]`` = Hessian.

        Drawn on the CPU in float64, sample by sample of the data, so that neither the
        device nor the batch size changes what is drawn.
        """


def row_dimension(prediction: Tensor, *, classes_first: bool) -> int | None:
    """Dimension (negative) of ``prediction`` that holds one datum's components.

    ``None``: every entry is a datum of its own.
    """
    if prediction.ndim == 0:
        return None
    if classes_first:
        return -1 if prediction.ndim == 1 else 1 - prediction.ndim
    return None if prediction.ndim == 1 else -1


class _ClosedFormGradient(Function):
    """The loss gradient as a function of the prediction, with its Hessian product."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, gradient: Tensor, product: Any) -> Tensor:
        ctx.product = product
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple:
        return ctx.product(u), None, None


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
        return _ClosedFormGradient.apply(prediction, gradient, product)

    def hessian_product(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> HessianProduct:
        p, _, total, dim = self._parts(prediction, target)
        return _softmax_hessian(p, (scale * total) * p, dim)

    def sample_gradients(
        self, prediction: Tensor, target: Tensor, mc_samples: int, generator: Generator
    ) -> Tensor:
        p, _, total, dim = self._parts(prediction, target)
        rows = p.movedim(dim, -1)  # (*rows, classes)
        shape = (*rows.shape[:-1], mc_samples)
        u = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu").to(
            p.device
        )
        cumulative = rows.double().cumsum(-1)
        u = u * cumulative[..., -1:]
        label = torch.searchsorted(cumulative, u, right=True)
        label = label.clamp_(max=rows.shape[-1] - 1).movedim(-1, 0)  # (M, *rows)
        onehot = torch.zeros_like(p).expand(mc_samples, *p.shape).clone()
        onehot.scatter_(dim, label.unsqueeze(dim), 1.0)
        return (p - onehot) * total.sqrt()


def _softmax_hessian(p: Tensor, weighted_p: Tensor, dim: int) -> HessianProduct:
    def product(u: Tensor) -> Tensor:
        return weighted_p * (u - (p * u).sum(dim, keepdim=True))

    return product


class MeanSquaredError(LikelihoodLoss):
    r"""Squared error :math:`\sum (f - y)^2`; Hessian :math:`2 I`."""

    def normalizer(self, target: Tensor, batch_size: int) -> float:
        return float(target.numel()) if isinstance(target, Tensor) else 1.0

    def gradient(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> Tensor:
        _same_shape(prediction, target, "MSELoss")
        gradient = (2 * scale) * (prediction.detach() - target.to(prediction))
        return _ClosedFormGradient.apply(prediction, gradient, _multiple(2 * scale))

    def hessian_product(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> HessianProduct:
        _same_shape(prediction, target, "MSELoss")
        return _multiple(2 * scale)

    def sample_gradients(
        self, prediction: Tensor, target: Tensor, mc_samples: int, generator: Generator
    ) -> Tensor:
        _same_shape(prediction, target, "MSELoss")
        shape = (*prediction.shape, mc_samples)
        u = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
        # 2u - 1 on the open interval (-1, 1); sqrt(2) erfinv of it is standard normal
        noise = torch.erfinv(2 * u - (1 - 2.0**-53))
        return 2 * noise.movedim(-1, 0).to(prediction.device, prediction.dtype)


def _multiple(factor: float) -> HessianProduct:
    def product(u: Tensor) -> Tensor:
        return factor * u

    return product


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

    def _parts(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        _same_shape(prediction, target, "BCEWithLogitsLoss")
        z, y = prediction.detach(), target.to(prediction)
        weight = 1.0 if self.weight is None else self.weight.to(z)
        mass = torch.ones_like(y)
        if self.pos_weight is not None:
            mass = 1 + (self.pos_weight.to(z) - 1) * y
        return z, y, weight * mass, weight * torch.ones_like(y)

    def gradient(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> Tensor:
        z, y, mass, weight = self._parts(prediction, target)
        gradient = scale * (weight * (1 - y) - mass * torch.sigmoid(-z))
        product = _diagonal(scale * mass * torch.sigmoid(z) * torch.sigmoid(-z))
        return _ClosedFormGradient.apply(prediction, gradient, product)

    def hessian_product(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> HessianProduct:
        z, _, mass, _ = self._parts(prediction, target)
        return _diagonal(scale * mass * torch.sigmoid(z) * torch.sigmoid(-z))

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


def _diagonal(d: Tensor) -> HessianProduct:
    def product(u: Tensor) -> Tensor:
        return d * u

    return product


def _same_shape(prediction: Tensor, target: Tensor, name: str) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} needs a tensor as target, got {type(target).__name__}.")
    if prediction.shape != target.shape:
        raise ValueError(
            f"{name} compares entry by entry, but the model returned shape "
            f"{tuple(prediction.shape)} and the target has shape {tuple(target.shape)}. "
            "Reshape one of them (for a single output, model(X).squeeze(-1) or "
            "y.unsqueeze(-1))."
        )


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
    """

    def __init__(
        self,
        function: Loss,
        reduction: Reduction,
        count: Callable[[Tensor, int], float],
    ) -> None:
        super().__init__(reduction)
        self.function = function
        self._count = count

    def normalizer(self, target: Tensor, batch_size: int) -> float:
        return self._count(target, batch_size)

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
            (out,) = torch.autograd.grad(
                gradient,
                prediction,
                u,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=u.ndim > prediction.ndim,
            )
            return torch.zeros_like(u) if out is None else out

        return product


def _by_batch(_: Tensor, batch_size: int) -> float:
    return float(batch_size)


def _by_element(target: Tensor, _: int) -> float:
    return float(target.numel())


#: losses of one number per element whose mean divides by the number of elements
_ELEMENTWISE = (
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
)
_FUNCTIONAL: dict[Any, Callable[[], nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.nll_loss: nn.NLLLoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
    F.soft_margin_loss: nn.SoftMarginLoss,
}


def as_loss(loss_function: Loss, reduction: Reduction | None) -> LossFunction:
    """Recognize a loss, or wrap it with the reduction that the caller states.

    Raises
    ------
    TypeError
        ``loss_function`` is not callable.
    ValueError
        The reduction is unknown, unsupported, or contradicts the loss's own.
    """
    if not callable(loss_function):
        raise TypeError(
            f"loss_function has to be callable, got {type(loss_function).__name__}."
        )
    if reduction not in (None, "mean", "sum"):
        raise ValueError(f"reduction has to be 'mean' or 'sum', got {reduction!r}.")
    module = loss_function
    if isinstance(loss_function, Hashable):
        module = _FUNCTIONAL.get(loss_function, lambda: loss_function)()
    known = isinstance(module, nn.Module) and type(module) in _KNOWN
    if not known:
        if reduction is None:
            raise ValueError(
                f"How {_name(loss_function)} combines the data of a batch is not known, "
                "and batches cannot be added up without it. State it: "
                "reduction='mean' (an average over the batch) or reduction='sum'."
            )
        return CallableLoss(loss_function, reduction, _by_batch)
    own = module.reduction  # type: ignore[union-attr]
    if own not in ("mean", "sum"):
        raise ValueError(
            f"{_name(loss_function)} has reduction={own!r}, which gives no scalar. "
            "Construct it with reduction='mean' or 'sum'."
        )
    if reduction not in (None, own):
        raise ValueError(
            f"reduction={reduction!r} contradicts {_name(loss_function)}, which has "
            f"reduction={own!r}. Leave reduction out."
        )
    return _KNOWN[type(module)](module)


def _name(loss_function: Loss) -> str:
    if isinstance(loss_function, nn.Module):
        return type(loss_function).__name__
    return getattr(loss_function, "__name__", repr(loss_function))


def _cross_entropy(module: Any) -> LossFunction:
    return CrossEntropy(
        module.reduction,
        weight=module.weight,
        ignore_index=module.ignore_index,
        label_smoothing=module.label_smoothing,
    )


def _binary(module: Any) -> LossFunction:
    return BinaryCrossEntropyWithLogits(
        module.reduction, weight=module.weight, pos_weight=module.pos_weight
    )


def _negative_log_likelihood(module: Any) -> LossFunction:
    counting = CrossEntropy(
        module.reduction,
        weight=module.weight,
        ignore_index=module.ignore_index,
        label_smoothing=0.0,
    )
    return CallableLoss(module, module.reduction, counting.normalizer)


_KNOWN: dict[type, Callable[[Any], LossFunction]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.MSELoss: lambda module: MeanSquaredError(module.reduction),
    nn.BCEWithLogitsLoss: _binary,
    nn.NLLLoss: _negative_log_likelihood,
    **{
        kind: lambda module: CallableLoss(module, module.reduction, _by_element)
        for kind in _ELEMENTWISE
    },
}
