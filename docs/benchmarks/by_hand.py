"""Products of a mean cross-entropy written in plain torch, as quick as they easily get."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd import grad


class ByHand:
    """Products with the Hessian and the GGN of one batch.

    Parameters
    ----------
    model, X, y
        All parameters count; the classes are the second dimension of ``model(X)``.
    """

    def __init__(self, model: nn.Module, X: Tensor, y: Tensor) -> None:
        self._model, self._X, self._y = model, X, y
        self._names = [name for name, _ in model.named_parameters()]
        self._params = list(model.parameters())
        self._sizes = [p.numel() for p in self._params]

    def _split(self, v: Tensor) -> list[Tensor]:
        parts = v.split(self._sizes)
        return [part.view(p.shape) for part, p in zip(parts, self._params, strict=True)]

    def _joined(self, parts: tuple[Tensor, ...]) -> Tensor:
        return torch._utils._flatten_dense_tensors(parts)

    def _gradient(self) -> tuple[Tensor, ...]:
        loss = nn.functional.cross_entropy(self._model(self._X), self._y)
        return grad(loss, self._params, create_graph=True)

    def _loss_hessian(self, p: Tensor, u: Tensor) -> Tensor:
        product = p * u
        along = product.sum(1, keepdim=True)
        return product.addcmul_(p, along, value=-1).div_(self._y.numel())

    def kept(self, label: str) -> Callable[[Tensor], Tensor]:
        """Products with a graph that is kept: the double-backward trick for the GGN."""
        if label == "Hessian":
            gradient = self._gradient()
            return lambda v: self._joined(
                grad(gradient, self._params, self._split(v), retain_graph=True)
            )
        f = self._model(self._X)
        u = torch.zeros(()).expand(f.shape).requires_grad_()
        pullback = grad(f, self._params, u, create_graph=True)
        p = f.detach().softmax(1)

        def product(v: Tensor) -> Tensor:
            (jv,) = grad(pullback, u, self._split(v), retain_graph=True)
            parts = grad(f, self._params, self._loss_hessian(p, jv), retain_graph=True)
            return self._joined(parts)

        return product

    def once(self, label: str) -> Callable[[Tensor], Tensor]:
        """Products that keep nothing: forward mode for the GGN."""
        return self._hessian_once if label == "Hessian" else self._ggn_once

    def block(self, label: str) -> Callable[[Tensor], Tensor]:
        """Products with columns, one by one, that keep nothing."""
        return partial(self._block, label)

    def _block(self, label: str, V: Tensor) -> Tensor:
        product = self.kept(label)
        return torch.stack([product(v.contiguous()) for v in V.T], 1)

    def _hessian_once(self, v: Tensor) -> Tensor:
        return self._joined(grad(self._gradient(), self._params, self._split(v)))

    def _ggn_once(self, v: Tensor) -> Tensor:
        with forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(p, t)
                for name, p, t in zip(
                    self._names, self._params, self._split(v), strict=True
                )
            }
            dual = torch.func.functional_call(self._model, duals, (self._X,))
            f, jv = forward_ad.unpack_dual(dual)
        p = f.detach().softmax(1)
        return self._joined(grad(f, self._params, self._loss_hessian(p, jv.detach())))
