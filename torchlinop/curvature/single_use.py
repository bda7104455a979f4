"""A model's derivatives on a batch for one product, of which nothing is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchlinop.autodiff.backward import backward, with_zeros
from torchlinop.autodiff.graphs import custom_functions
from torchlinop.autodiff.linearize import forward_derivative
from torchlinop.autodiff.probing import probe_vector
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
    """``J v`` by forward mode and ``J^T u`` by one backward pass, from one evaluation.

    Without the graph of the gradient that a linearization records: for one product less
    time. Forward mode is used where it exists and agrees, the first time and at a random
    vector, with the reverse mode that all else is made of.

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
        self._look = source.looks

    def jvp(self, batch: Batch, v: Tensor) -> Tensor:
        """``J v`` for a flat ``v``, shaped like the prediction."""
        constants = [leaf.detach() for leaf in self._source.leaves()]
        return self._derivative(batch, v, constants).tangent

    def derivative(self, batch: Batch, v: Tensor) -> Derivative:
        """Evaluate a batch and differentiate along the flat ``v``."""
        return self._derivative(batch, v, self._source.leaves())

    def _derivative(self, batch: Batch, v: Tensor, leaves: list[Tensor]) -> Derivative:
        self._source.require_unchanged(batch)
        if self._look != self._source.looks:
            self._look, self._forward_mode = self._source.looks, None
        checked = self._check.over(batch)
        if self._forward_mode and checked and not self._check.custom:
            forward = self._forward(batch, v, leaves)
            if forward is not None and not custom_functions([forward[0]]):
                value, tangent = forward
                vjp = partial(self._backward, batch, value, leaves)
                return Derivative(value.detach(), tangent, vjp)
            self._forward_mode = False
        if self._forward_mode is None:
            self._forward_mode = self._forward_agrees(batch, v)
        model, output = LinearizedModel.of(self._source, batch, self._check)
        return Derivative(output, model.jvp(v), model.vjp)

    def vjp(self, batch: Batch, u: Tensor) -> Tensor:
        """``J^T u`` as a flat vector, for ``u`` shaped like the batch's prediction."""
        source, space = self._source, self._source.space
        source.require_unchanged(batch)
        if not self._check.over(batch):
            return LinearizedModel.of(source, batch, self._check)[0].vjp(u)
        try:
            # without rules for second derivatives, of which there are none
            with recording(space.device, rules=False, draws=source.draws(batch)):
                leaves = source.leaves()
                output = source.predict(leaves, batch)
        except Exception as error:
            raise source.explained(error, batch, order=1) from error
        return self._backward(batch, output, leaves, u)

    def _backward(
        self, batch: Batch, output: Tensor, leaves: list[Tensor], u: Tensor
    ) -> Tensor:
        """``J^T u`` from a prediction's graph, which is used up."""
        source, space = self._source, self._source.space
        if not output.requires_grad:
            return torch.zeros(space.dim, dtype=space.dtype, device=space.device)
        try:
            parts = backward([output], leaves, [u], retain_graph=False)
        except Exception as error:
            raise source.explained(error, batch, order=1) from error
        return space.join(with_zeros(parts, leaves))

    def _forward(
        self, batch: Batch, v: Tensor, leaves: list[Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Prediction and derivative by forward mode, None if there is none."""
        source = self._source
        try:
            return forward_derivative(
                lambda duals: source.predict(duals, batch),
                leaves,
                source.space.split(v),
                draws=source.draws(batch),
            )
        except (RuntimeError, NotImplementedError):
            return None

    def _forward_agrees(self, batch: Batch, v: Tensor) -> bool:
        probe = probe_vector(len(v), v.dtype, v.device)
        constants = [leaf.detach() for leaf in self._source.leaves()]
        forward = self._forward(batch, probe, constants)
        if forward is None:
            return False
        tangent = forward[1]
        del forward  # with a large vocabulary these are the largest tensors there are
        reverse = LinearizedModel.of(self._source, batch, self._check)[0].jvp(probe)
        # a ReLU whose argument rounds to the other side of zero is no disagreement
        rtol = torch.finfo(reverse.dtype).eps ** (1 / 3)
        return bool((tangent - reverse).norm() <= rtol * reverse.norm())
