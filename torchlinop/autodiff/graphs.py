"""Graphs that autograd has recorded: where they end, and which Functions are in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree


class Output(NamedTuple):
    """Where a tensor comes from, and a function that makes a cotangent of it."""

    edge: GradientEdge
    ones: Callable[[], Tensor]


def edges_of(tree: Any) -> list[GradientEdge]:
    """Where the tensors in ``tree`` come from."""
    return [output.edge for output in outputs_of(tree)]


def outputs_of(tree: Any) -> list[Output]:
    """Edges as in :func:`edges_of`, each with a function that makes a cotangent."""
    return [
        Output(
            get_gradient_edge(t),
            partial(torch.ones, t.shape, dtype=t.dtype, device=t.device),
        )
        for t in pytree.tree_leaves(tree)
        if isinstance(t, Tensor) and _has_graph(t)
    ]


def _has_graph(tensor: Tensor) -> bool:
    return (
        tensor.requires_grad
        and tensor.layout == torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def nodes_between(
    outputs: Sequence[GradientEdge], inputs: Sequence[GradientEdge] = ()
) -> Iterator[Any]:
    """Nodes of the graph from ``outputs`` back to ``inputs``, these not included."""
    return _walk([edge.node for edge in outputs], {edge.node for edge in inputs})


def _nodes_of(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """Nodes of the graphs of tensors."""
    roots = [t.grad_fn or get_gradient_edge(t).node for t in outputs if _has_graph(t)]
    return _walk(roots, set())


def _walk(stack: list[Any], seen: set[Any]) -> Iterator[Any]:
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack += [following for following, _ in node.next_functions]


def leaves_of(output: Tensor) -> list[Tensor]:
    """Tensors in which the graph of ``output`` ends."""
    return leaves_among(_nodes_of([output]))


def leaves_among(nodes: Iterable[Any]) -> list[Tensor]:
    """Tensors to which the nodes among these lead that accumulate gradients."""
    return [n.variable for n in nodes if type(n).__name__ == "AccumulateGrad"]


def custom_functions(outputs: Sequence[Tensor]) -> list[str]:
    """Names of the user-written autograd.Functions in the graph, without torch's own."""
    with torch._C.DisableTorchFunction():  # a mode would see every attribute that is read
        return [
            kind.__name__
            for kind in functions_among(_nodes_of(outputs))
            if not kind.__module__.startswith("torch.")
            or kind.__module__ == "torch._functorch.autograd_function"  # a user's, in vmap
        ]


def require_twice_differentiable(outputs: Sequence[Tensor]) -> None:
    """Raise if a Function in the graph has no second derivative by declaration."""
    names = once_differentiable_functions(outputs)
    if names:
        raise RuntimeError(
            f"trying to differentiate twice {', '.join(names)}, marked with "
            "@once_differentiable"
        )


def once_differentiable_functions(outputs: Sequence[Tensor]) -> list[str]:
    """Names of the Functions in the graph that cannot be differentiated twice.

    Those marked ``once_differentiable``, and those of torch's control flow.

    Differentiating their gradient again gives no error in PyTorch when only parameters
    are asked for: the term is silently missing.
    """
    with torch._C.DisableTorchFunction():
        return marked_once(_nodes_of(outputs))


def marked_once(nodes: Iterable[Any]) -> list[str]:
    """Names of the Functions among the nodes that cannot be differentiated twice."""
    marked = []
    for kind in functions_among(nodes):
        code = getattr(kind.backward, "__code__", None)
        declared = (
            code is not None
            and code.co_filename == torch.autograd.function.__file__
            and hasattr(kind.backward, "__wrapped__")
        )
        if declared or kind.__module__.startswith("torch._higher_order_ops."):
            marked.append(kind.__name__)
    return marked


def functions_among(nodes: Iterable[Any]) -> list[Any]:
    """The autograd.Functions among the nodes, each once; those of this package aside."""
    custom = torch.autograd.function.BackwardCFunction
    kinds: Any = dict.fromkeys(
        type(node)._forward_cls for node in nodes if issubclass(type(node), custom)
    )
    return [kind for kind in kinds if not kind.__module__.startswith("torchlinop.")]
