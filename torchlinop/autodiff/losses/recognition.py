"""Finding the closed form of a loss that a caller passes, or wrapping it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchlinop._typing import Loss, Reduction
from torchlinop.autodiff.losses.binary import BinaryCrossEntropyWithLogits
from torchlinop.autodiff.losses.by_autograd import CallableLoss
from torchlinop.autodiff.losses.cross_entropy import CrossEntropy
from torchlinop.autodiff.losses.loss_function import LossFunction
from torchlinop.autodiff.losses.squared_error import MeanSquaredError


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
    return CallableLoss(module, module.reduction, counting.normalizer, classes_first=True)


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
