"""Linearize once, apply many: products with derivatives at a fixed point.

Everything that does not depend on the vector is computed when a linearization is built
and is kept in an autograd graph; a product is one pass through that graph. Second
derivatives are taken reverse over reverse, which is as accurate as the gradient itself,
and a Jacobian is applied by differentiating the (linear) map ``u -> J^T u``.

Blocks of vectors have the block dimension first: ``(K, *shape)``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torchlinop.autodiff.backward import backward, with_zeros
from torchlinop.autodiff.recording import recording

Function = Callable[[Sequence[Tensor]], Tensor]


class HessianProduct:
    """``v -> H v`` from a recorded gradient.

    Parameters
    ----------
    gradient
        Gradient with respect to each of ``parameters``, with its graph. Only the graph is
        kept.
    parameters
        The leaves at which the gradient was recorded.
    """

    def __init__(
        self, gradient: Sequence[Tensor | None], parameters: Sequence[Tensor]
    ) -> None:
        with torch._C.DisableTorchFunction():  # nothing for a mode to see
            known = [(i, g) for i, g in enumerate(gradient) if g is not None]
            active = [i for i, g in known if g.requires_grad]
            self._active = active if len(active) < len(gradient) else None
            #: where the gradients come from: whose graphs this linearization keeps alive
            self.graph = [get_gradient_edge(g) for _, g in known if g.requires_grad]
        self._parameters = tuple(parameters)

    def __call__(
        self, v: Sequence[Tensor], *, batched: bool = False, retain: bool = True
    ) -> list[Tensor]:
        """``H v`` as one tensor per parameter, shaped like ``v``."""
        v_active = v if self._active is None else [v[i] for i in self._active]
        if not v_active:
            return with_zeros([None] * len(v), v)
        products = backward(
            self.graph, self._parameters, v_active, retain_graph=retain, batched=batched
        )
        return with_zeros(products, v)


class JacobianProducts:
    """``v -> J v`` and ``u -> J^T u`` from a recorded output.

    Parameters
    ----------
    output
        The function's value, with its graph. Only the graph is kept.
    parameters
        The leaves at which it was recorded.

    Attributes
    ----------
    shape, dtype, device
        Of the output.
    graph : list of GradientEdge
        What this linearization keeps alive.
    """

    def __init__(self, output: Tensor, parameters: Sequence[Tensor]) -> None:
        self._set_output(output, parameters)
        self._pullback: list[GradientEdge] = []
        self._active: list[int] = []
        with torch._C.DisableTorchFunction():  # nothing for a mode to see
            # all zeros, as one number
            zero = torch.zeros((), dtype=self.dtype, device=self.device)
            self._cotangent = zero.expand(self.shape).requires_grad_()
            if self._output is None:
                return
            pullback = backward(
                [output], self._parameters, [self._cotangent], create_graph=True
            )
            for i, z in enumerate(pullback):
                if z is not None and z.requires_grad:
                    self._active.append(i)
                    self._pullback.append(get_gradient_edge(z))
        self.graph += self._pullback

    def _set_output(self, output: Tensor, parameters: Sequence[Tensor]) -> None:
        self._parameters = tuple(parameters)
        with torch._C.DisableTorchFunction():  # a mode would see what is read
            self.shape, self.dtype = output.shape, output.dtype
            self.device = output.device
            self._output = get_gradient_edge(output) if output.requires_grad else None
        self.graph = [] if self._output is None else [self._output]

    def jvp(self, v: Sequence[Tensor], *, batched: bool = False) -> Tensor:
        """``J v``, shaped like the output."""
        (product,) = (
            backward(
                self._pullback,
                [self._cotangent],
                [v[i] for i in self._active],
                batched=batched,
            )
            if self._active
            else (None,)
        )
        if product is None:
            shape = (v[0].shape[0],) if batched else ()
            return v[0].new_zeros((*shape, *self.shape), dtype=self.dtype)
        return product

    def vjp(self, u: Tensor, *, batched: bool = False) -> list[Tensor]:
        """``J^T u`` as one tensor per parameter."""
        shape = (u.shape[0],) if batched else ()
        if self._output is None:
            return with_zeros([None] * len(self._parameters), self._parameters, shape)
        products = backward([self._output], self._parameters, [u], batched=batched)
        return with_zeros(products, self._parameters, shape)


class ForwardJacobianProducts(JacobianProducts):
    """``J v`` by forward-mode differentiation, for operations without a second derivative.

    Every product evaluates the function again.
    """

    def __init__(self, function: Function, parameters: Sequence[Tensor]) -> None:
        self._function = function
        self._set_output(function(tuple(parameters)), parameters)

    def jvp(self, v: Sequence[Tensor], *, batched: bool = False) -> Tensor:
        """``J v``, shaped like the output."""
        if batched:
            return torch.stack([self.jvp(column) for column in zip(*v, strict=True)])
        constants = [p.detach() for p in self._parameters]
        return forward_derivative(self._function, constants, v)[1]


def forward_derivative(
    function: Function,
    parameters: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    draws: bool = True,
) -> tuple[Tensor, Tensor]:
    """Evaluate a function and its derivative along ``v``, by forward mode.

    The value comes with its graph if the parameters require gradients; the derivative never
    does. Where the function turns gradients off, it is a constant, as in reverse mode.
    ``draws``: whether it may take Python's or NumPy's random numbers.
    """
    evaluating = recording(parameters[0].device, rules=False, draws=draws, forward=True)
    forward_ad._maybe_load_decompositions()
    with evaluating, forward_ad.dual_level() as level:
        # not by forward_ad's functions, which take ten microseconds a parameter
        with torch._C.DisableTorchFunction():  # nothing for a mode to see
            duals = [
                torch._VF._make_dual(p, t.to(p.dtype), level=level)
                for p, t in zip(parameters, v, strict=True)
            ]
        value = function(duals)
        with torch._C.DisableTorchFunction():
            value, tangent = torch._VF._unpack_dual(value, level=level)
    return value, torch.zeros_like(value) if tangent is None else tangent.detach()


#: whether this thread's graphs save what they need in other memory
_ELSEWHERE = threading.local()


@contextmanager
def saved_elsewhere() -> Iterator[None]:
    """Let graphs that are recorded here count as holding no memory."""
    _ELSEWHERE.now = True
    try:
        yield
    finally:
        _ELSEWHERE.now = False


class Retained(NamedTuple):
    """What graphs keep alive."""

    nbytes: int
    nodes: int


def retained(graph: Sequence[GradientEdge], exclude: Sequence[Tensor] = ()) -> Retained:
    """Bytes of distinct storages that graphs keep alive, and the number of their nodes.

    Counts what every node saved for its backward pass, except the storages of
    ``exclude`` (parameters and data, which live anyway). In :func:`saved_elsewhere` that is
    nothing.
    """
    if getattr(_ELSEWHERE, "now", False):
        return Retained(0, 0)
    with torch._C.DisableTorchFunction():  # a mode would see every attribute that is read
        return _retained(graph, exclude)


def _retained(graph: Sequence[GradientEdge], exclude: Sequence[Tensor]) -> Retained:
    seen: set[int] = set()
    for t in exclude:
        _count(t, seen)
    total = 0
    nodes: set[object] = set()
    stack: list[object] = [edge.node for edge in graph]
    while stack:
        node = stack.pop()
        if node in nodes:
            continue
        nodes.add(node)
        for name in _saved_names(type(node), node):
            try:
                value = getattr(node, name)
            except RuntimeError:  # freed, or never filled
                continue
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, Tensor):
                    total += _count(tensor, seen)
        stack.extend(f for f, _ in node.next_functions if f is not None)  # type: ignore[attr-defined]
    return Retained(total, len(nodes))


def _count(tensor: Tensor, seen: set[int]) -> int:
    try:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    except (RuntimeError, NotImplementedError):  # inside a transform, or sparse
        return tensor.numel() * tensor.element_size()


_SAVED_NAMES: dict[type, list[str]] = {}


def _saved_names(kind: type, node: object) -> list[str]:
    if kind not in _SAVED_NAMES:
        # what is no tensor, such as sizes, has no raw name
        raw = [name for name in dir(node) if name.startswith("_raw_saved_")]
        written = hasattr(kind, "saved_tensors")  # in Python
        _SAVED_NAMES[kind] = ["saved_tensors"] if written else [name[4:] for name in raw]
    return _SAVED_NAMES[kind]
