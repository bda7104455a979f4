"""A model's derivatives on a batch for one product, of which nothing is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchlinop.autodiff.backward import backward
from torchlinop.autodiff.linearize import forward_derivative
from torchlinop.autodiff.recording import recording
from torchlinop.curvature.derivative_check import DerivativeCheck
from torchlinop.curvature.linearized_model import LinearizedModel
from torchlinop.data import Batch
from torchlinop.sources import Source


class Derivative(NamedTuple):
    """A prediction, its derivative along a vector, and what multiplies with ``J^T``."""

    output: Tensor
    tangent: Tensor
    vjp: Callable[[Tensor], Tensor]


class SingleUse:
    """``J v`` by forward mode and ``J^T u`` by one backward pass.

    Neither records what only the other one needs, as a linearization does: less memory,
    and for one product less time. Forward mode is used where it exists and agrees, the
    first time, with the reverse mode that all else is made of.

    Parameters
    ----------
    source
        The function and its point.
    check
        Whether the Jacobian is to be compared with finite differences.
    """

    def __init__(self, source: Source, check: DerivativeCheck) -> None:
        self._source = source
        self._check = check
        #: whether forward mode works for this function: not known before the first use
        self._forward_mode: bool | None = None

    def derivative(self, batch: Batch, v: Tensor) -> Derivative:
        """Evaluate a batch and differentiate along the flat ``v``."""
        if self._forward_mode and self._check.over(batch) and not self._check.custom:
            output, tangent = self._forward(batch, v)
            return Derivative(output, tangent, partial(self.vjp, batch))
        forward = self._forward_tangent(batch, v) if self._forward_mode is None else None
        model, output = LinearizedModel.of(self._source, batch, self._check)
        tangent = model.jvp(v)
        if self._forward_mode is None:
            self._forward_mode = forward is not None and _agree(forward, tangent)
        return Derivative(output, tangent, model.vjp)

    def vjp(self, batch: Batch, u: Tensor) -> Tensor:
        """``J^T u`` as a flat vector, for ``u`` shaped like the batch's prediction."""
        space = self._source.space

        leaves = self._source.leaves()
        # without rules for second derivatives, of which there are none
        with recording(space.device, rules=False, draws=self._source.draws):
            output = self._source.predict(leaves, batch)
            if not output.requires_grad:
                return torch.zeros(space.dim, dtype=space.dtype, device=space.device)
            parts = backward([output], leaves, [u], retain_graph=False)
        pairs = zip(parts, leaves, strict=True)
        return space.join([torch.zeros_like(p) if g is None else g for g, p in pairs])

    def _forward(self, batch: Batch, v: Tensor) -> tuple[Tensor, Tensor]:
        source = self._source
        return forward_derivative(
            lambda leaves: source.predict(leaves, batch),
            source.leaves(),
            source.space.split(v),
            draws=source.draws,
        )

    def _forward_tangent(self, batch: Batch, v: Tensor) -> Tensor | None:
        """The derivative by forward mode, None for functions that have none."""
        try:
            return self._forward(batch, v)[1]
        except (RuntimeError, NotImplementedError):
            return None


def _agree(forward: Tensor, reverse: Tensor) -> bool:
    # a ReLU whose argument rounds to the other side of zero is no disagreement
    rtol = torch.finfo(reverse.dtype).eps ** (1 / 3)
    return bool((forward - reverse).norm() <= rtol * reverse.norm())
