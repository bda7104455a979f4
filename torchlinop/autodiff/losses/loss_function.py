"""What every loss offers, and what the closed forms share."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from torchlinop._typing import Reduction
from torchlinop.autodiff.losses.roots import HessianRoot

#: a partial function, the tensors among whose arguments are what it holds, if it can be
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

        The result is differentiable in ``prediction``.
        """

    @abstractmethod
    def hessian_product(
        self, prediction: Tensor, target: Tensor, batch_size: int, scale: float
    ) -> HessianProduct:
        """Map ``u`` to ``scale`` times the loss Hessian at ``prediction`` times ``u``."""

    @abstractmethod
    def hessian_root(
        self, prediction: Tensor, target: Tensor, batch_size: int
    ) -> HessianRoot:
        """Return a root of the loss Hessian at ``prediction``."""

    @abstractmethod
    def row_weights(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Weights of the data in the loss.

        The prediction's shape with 1 in the row dimension; without one, its shape.
        """

    @abstractmethod
    def row_dimension(self, prediction: Tensor) -> int | None:
        """Return the (negative) dimension that holds one datum's components.

        ``None``: every entry of ``prediction`` is a datum of its own.
        """


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

    @abstractmethod
    def num_draws(self, target: Tensor) -> int:
        """How many numbers are drawn for each of the samples of a batch's targets."""


def row_dimension(prediction: Tensor, *, classes_first: bool) -> int | None:
    """Return the dimension that holds one datum's components: the classes, or the last.

    What :meth:`LossFunction.row_dimension` returns.
    """
    if prediction.ndim == 0:
        return None
    if classes_first:
        return -1 if prediction.ndim == 1 else 1 - prediction.ndim
    return None if prediction.ndim == 1 else -1


def ones_by_row(prediction: Tensor, dim: int | None) -> Tensor:
    """Return equal weights of the data."""
    ones = torch.ones_like(prediction.detach())
    return ones if dim is None else ones.narrow(dim, 0, 1)


def tensors_of(product: HessianProduct) -> list[Tensor]:
    """Return what a product with a matrix holds."""
    return [t for t in getattr(product, "args", ()) if isinstance(t, Tensor)]


def closed_form(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method compute outside of modes, which have nothing to replace in it."""

    @functools.wraps(method)
    def wrapper(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return method(*args)

    return wrapper


def require_same_shape(prediction: Tensor, target: Tensor, name: str) -> None:
    """Raise unless the target is a tensor of the prediction's shape."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} needs a tensor as target, got {type(target).__name__}.")
    if prediction.shape != target.shape:
        raise ValueError(
            f"{name} compares entry by entry, but the model returned shape "
            f"{tuple(prediction.shape)} and the target has shape {tuple(target.shape)}. "
            "Reshape one of them (for a single output, model(X).squeeze(-1) or "
            "y.unsqueeze(-1))."
        )
