"""Backward passes through a recorded graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._vmap_internals import _vmap
from torch.autograd.graph import GradientEdge, _engine_run_backward


def with_zeros(
    derivatives: Sequence[Tensor | None],
    like: Sequence[Tensor],
    batch: tuple[int, ...] = (),
) -> list[Tensor]:
    """Return zeros in the place of None, of shape ``(*batch, *like.shape)``."""
    return [
        x.new_zeros((*batch, *x.shape)) if d is None else d
        for d, x in zip(derivatives, like, strict=True)
    ]


def backward(
    outputs: Sequence[Tensor | GradientEdge],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool = True,
    batched: bool = False,
) -> tuple[Tensor | None, ...]:
    """Derivatives of ``sum_i <outputs_i, cotangents_i>`` with respect to ``inputs``.

    What ``torch.autograd.grad`` does once it has compared shapes, which are known here:
    for that it imports SymPy, a third of a second. None stands for an input on which no
    output depends.

    Parameters
    ----------
    outputs
        Tensors with a graph, or the edges where they come from.
    inputs
        Leaves of the graph, or tensors in it.
    cotangents
        One for each output, of its shape; of shape ``(K, *shape)`` if batched.
    create_graph
        Whether the derivatives can be differentiated.
    retain_graph
        Whether the graph can be used again.
    batched
        Whether to make ``K`` passes at once.
    """

    def run(vectors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return _engine_run_backward(
            tuple(outputs),
            tuple(vectors),
            retain_graph,
            create_graph,
            tuple(inputs),
            True,  # there may be unused inputs
            accumulate_grad=False,
        )

    with torch._C.DisableTorchFunction():  # no mode is in force in autograd.grad either
        if batched:
            return _vmap(run, 0, 0, allow_none_pass_through=True)(tuple(cotangents))
        return run(cotangents)
