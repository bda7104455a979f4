r"""One direction of one layer of a recurrent network, over all its steps.

The derivatives of a trajectory are linear recurrences, :math:`\dot a_t = \dot u_t + W
\dot h_{t-1}` and :math:`\dot s_t = J_t (\dot s_{t-1}, \dot a_t)` with diagonal blocks
:math:`J_t`: forward in time for tangents, backward for cotangents. Both are kernels of
three calls a step, whatever the number of vectors; all else is done for all steps at once.

A kernel works in one tensor of shape ``(T + 1, B, K, blocks, H)`` for ``K`` vectors: row
``t`` has the states before step ``t`` and its gates. So what multiplies ``J_t`` lies side
by side, and so do the gates that ``W`` drives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, _add_batch_dim, _remove_batch_dim
from torch.autograd import Function

from torchlinop.autodiff.rules.cells import Cell
from torchlinop.autodiff.rules.functions import call, note_tensors, wanted

Sources = Sequence[Tensor | None]


class _Rows:
    """The memory of a recurrence, filled with its sources."""

    def __init__(self, jacobians: Tensor, sources: Sources, gates: int) -> None:
        steps, batch, states, inputs, size = jacobians.shape
        vectors = max(len(x) for x in sources if x is not None)
        shape = (steps + 1, batch, vectors, states + gates, size)
        self.memory = jacobians.new_zeros(shape)
        of_gates, *of_states = sources
        if of_gates is not None:
            self.memory[:-1, :, :, states:] = of_gates.movedim(0, 2)
        for i, source in enumerate(of_states):
            if source is not None:
                self.memory[:, :, :, i] = source.movedim(0, 2)
        self._first, self._states = states + gates - inputs, states

    def states(self) -> Tensor:
        """All states, ``(T + 1, B, K, states, H)``."""
        return self.memory[:, :, :, : self._states]

    def inputs(self) -> Tensor:
        """What the Jacobians multiply, ``(T + 1, B, K, inputs, H)``."""
        return self.memory[:, :, :, self._first :]

    def hidden(self) -> tuple[Tensor, ...]:
        """The hidden states as matrices ``(B * K, H)``."""
        return self.memory[:, :, :, 0].flatten(1, 2).unbind()

    def driven(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The gates that the weight drives as matrices ``(B * K, driven * H)``."""
        last = self._states + len(weight) // weight.shape[1]
        return self.memory[:, :, :, self._states : last].flatten(1, 2).flatten(2).unbind()


def _pull(weight: Tensor, jacobians: Tensor, sources: Sources, gates: int) -> Tensor:
    """Cotangents of states and gates, ``(K, T + 1, B, blocks, H)``."""
    rows = _Rows(jacobians, sources, gates)
    hidden, driven = rows.hidden(), rows.driven(weight)
    inputs = rows.inputs().unbind()
    states = [s.unsqueeze(3).unbind() for s in rows.states().unbind(3)]
    blocks = [j.unsqueeze(2).unbind() for j in jacobians.unbind(2)]
    for t in reversed(range(len(jacobians))):
        for j, s in zip(blocks, states, strict=True):
            inputs[t].addcmul_(j[t], s[t + 1])
        hidden[t].addmm_(driven[t], weight)
    return rows.memory.movedim(2, 0)


def _push(weight: Tensor, jacobians: Tensor, sources: Sources, gates: int) -> Tensor:
    """Tangents of states and gates, ``(K, T + 1, B, blocks, H)``."""
    rows = _Rows(jacobians, sources, gates)
    hidden, driven = rows.hidden(), rows.driven(weight)
    inputs, states = rows.inputs().unsqueeze(3).unbind(), rows.states().unbind()
    adds = any(source is not None for source in sources[1:])
    weight = weight.T.contiguous()
    products = None
    for t, j in enumerate(jacobians.unsqueeze(2).unbind()):
        driven[t].addmm_(hidden[t], weight)
        products = torch.mul(j, inputs[t], out=products)
        if adds:
            states[t + 1].add_(products.sum(3))
        else:
            torch.sum(products, 3, out=states[t + 1])
    return rows.memory.movedim(2, 0)


# ------------------------------------------------- kernels that a recorder sees as one

_LIBRARY = torch.library.Library("torchlinop", "FRAGMENT")


def _kernel(name: str, core: Callable) -> Any:
    def single(weight: Tensor, jacobians: Tensor, sources: Sources, gates: int) -> Tensor:
        one = [None if x is None else x.unsqueeze(0) for x in sources]
        return core(weight, jacobians, one, gates).squeeze(0)

    def batched(weight: Tensor, jacobians: Tensor, sources: Sources, gates: int) -> Tensor:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        # what is the same for all vectors is taken as one
        many = [None if x is None else _remove_batch_dim(x, level, 1, 0) for x in sources]
        return _add_batch_dim(core(weight, jacobians, many, gates), 0, level)

    while hasattr(torch.ops.torchlinop, name):  # of an import before, in this process
        name += "_"
    arguments = "Tensor weight, Tensor jacobians, Tensor?[] sources, int gates"
    _LIBRARY.define(f"{name}({arguments}) -> Tensor")
    _LIBRARY.impl(name, single, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, batched, "Batched")
    return getattr(torch.ops.torchlinop, name).default


pull = _kernel("pull", _pull)
push = _kernel("push", _push)


def _run(kernel: Any, cell: Cell, args: tuple) -> tuple[Tensor, ...]:
    """Apply a kernel; the result is of the gates ``(T, B, G, H)`` and of each state."""
    weight, jacobians, *rest = args
    result = kernel(weight, jacobians, rest[-cell.states - 1 :], cell.gates)
    states, gates = result.split((cell.states, cell.gates), 2)
    return gates[:-1], *states.unbind(2)


# ---------------------------------------------------------------------------- Functions


def states_of(
    cell: Cell, weight: Tensor, drive: Tensor, initial: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """States before, between and after all steps, each ``(T + 1, B, H)``.

    Parameters
    ----------
    cell
        What happens in a step.
    weight
        Multiplies the hidden state, shape ``(driven * H, H)``.
    drive
        What the gates are otherwise, ``(T, B, G, H)``.
    initial
        States before the first step, each ``(B, H)``.
    """
    return _Trajectory.apply(cell, weight, drive, *initial)[1:-1]


class _Trajectory(Function):
    """Gates of all steps, all states, and the Jacobians of the steps."""

    @staticmethod
    def forward(cell: Cell, weight: Tensor, drive: Tensor, *initial: Tensor) -> tuple:
        gates = drive.clone(memory_format=torch.contiguous_format)
        states = [s.new_empty((len(drive) + 1, *s.shape)) for s in initial]
        driven = gates[:, :, : len(weight) // weight.shape[1]].flatten(2).unbind()
        before = tuple(s[0].copy_(s0) for s, s0 in zip(states, initial, strict=True))
        transposed = weight.T.contiguous()
        later = zip(*(s[1:].unbind() for s in states), strict=True)
        for a, part, after in zip(gates.unbind(), driven, later, strict=True):
            part.addmm_(before[0], transposed)
            cell.step(a, before, after)
            before = after
        return gates, *states, cell.jacobians(gates, states)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        note_tensors(ctx, inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[-1])
        ctx.cell, weight, *_ = inputs
        ctx.save_for_backward(weight, *output)
        ctx.save_for_forward(weight, *output)

    @staticmethod
    def jvp(ctx: Any, _: None, of_weight: Any, of_drive: Any, *of_initial: Any) -> tuple:
        weight, gates, *states, jacobians = ctx.saved_tensors
        source = of_drive
        if of_weight is not None:
            term = F.linear(states[0][:-1], of_weight).unflatten(-1, (-1, weight.shape[1]))
            term = F.pad(term, (0, 0, 0, gates.shape[2] - term.shape[2]))
            source = term if source is None else source + term
        later = (0, 0, 0, 0, 0, len(gates))
        of_states = [
            None if s is None else F.pad(s.unsqueeze(0), later) for s in of_initial
        ]
        point = (weight, jacobians, gates, *states)
        return *call(_Push, ctx.cell, *point, source, *of_states), None

    @staticmethod
    def backward(ctx: Any, *sources: Tensor | None) -> tuple:
        weight, gates, *states, jacobians = ctx.saved_tensors
        if all(x is None for x in sources):
            return (None,) * len(ctx.is_tensor)
        args = (weight, jacobians, gates, *states, *sources[:-1])
        of_gates, *of_states = call(_Pull, ctx.cell, *args)
        wants = wanted(ctx)
        by_weight = _outer(weight, of_gates, states[0]) if wants[1] else None
        return _as_wanted(wants, None, by_weight, of_gates, *(s[0] for s in of_states))


class _Pull(Function):
    """Cotangents of gates and states, backward in time.

    Called with a cell, the point (the weight, the Jacobians, gates and states of the
    trajectory), and sources of gates and states, in which the result is linear.
    """

    @staticmethod
    def forward(cell: Cell, *args: Any) -> tuple[Tensor, ...]:
        return _run(pull, cell, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        note_tensors(ctx, inputs)
        ctx.set_materialize_grads(False)
        ctx.cell, *args = inputs
        ctx.curvature = None
        ctx.save_for_backward(*args[: -len(output)], *output)

    @staticmethod
    def backward(ctx: Any, *sources: Tensor | None) -> tuple:
        if all(x is None for x in sources):
            return (None,) * len(ctx.is_tensor)
        saved = ctx.saved_tensors
        point, cotangents = saved[: -len(sources)], saved[-len(sources) :]
        tangents = call(_Push, ctx.cell, *point, *sources)

        def curvature() -> tuple[Tensor, ...]:
            if torch.is_grad_enabled():
                return _curvature(ctx.cell, point, cotangents)
            if ctx.curvature is None:  # the same in all products
                ctx.curvature = _curvature(ctx.cell, point, cotangents)
            return ctx.curvature

        wants = wanted(ctx)
        by_point = _by_point(
            ctx.cell, wants, curvature, point, cotangents, tangents, sources[1:]
        )
        return _as_wanted(wants, None, *by_point, *tangents)


class _Push(Function):
    """Tangents of gates and states, forward in time. Called as :class:`_Pull` is."""

    @staticmethod
    def forward(cell: Cell, *args: Any) -> tuple[Tensor, ...]:
        return _run(push, cell, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        note_tensors(ctx, inputs)
        ctx.set_materialize_grads(False)
        ctx.cell, *args = inputs
        ctx.save_for_backward(*args, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        if all(x is None for x in cotangents):
            return (None,) * len(ctx.is_tensor)
        saved, count = ctx.saved_tensors, len(cotangents)
        point, tangents = saved[: -2 * count], saved[-count:]
        sources = saved[-2 * count : -count]
        pulled = call(_Pull, ctx.cell, *point, *cotangents)
        curvature = partial(_curvature, ctx.cell, point, pulled)
        wants = wanted(ctx)
        by_point = _by_point(
            ctx.cell, wants, curvature, point, pulled, tangents, sources[1:]
        )
        return _as_wanted(wants, None, *by_point, *pulled)


def _as_wanted(wants: list[bool], *derivatives: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(d if want else None for d, want in zip(derivatives, wants, strict=True))


def _curvature(cell: Cell, point: tuple, cotangents: tuple) -> tuple[Tensor, ...]:
    _, _, gates, *states = point
    return cell.curvature(gates, states, cotangents[1:])


def _by_point(
    cell: Cell,
    wants: list[bool],
    curvature: Callable[[], tuple[Tensor, ...]],
    point: tuple,
    cotangents: tuple,
    tangents: tuple,
    of_states: Sources,
) -> tuple[Tensor | None, ...]:
    """Derivatives of what cotangents and tangents have in common, if they are wanted."""
    _, want_weight, _, *want_trajectory = wants[: 3 + len(cotangents)]
    by_trajectory: tuple[Tensor | None, ...] = (None,) * len(cotangents)
    if any(want_trajectory):
        after = [
            (v if source is None else v - source)[1:]
            for v, source in zip(tangents[1:], of_states, strict=True)
        ]
        by_trajectory = cell.bend(curvature(), tangents, after)
    weight = point[0]
    by_weight = _outer(weight, cotangents[0], tangents[1]) if want_weight else None
    return by_weight, None, *by_trajectory


def _outer(weight: Tensor, gates: Tensor, hidden: Tensor) -> Tensor:
    """Sum over the steps of the outer products of driven gates and hidden states."""
    rows, size = weight.shape
    driven = gates.narrow(2, 0, rows // size).reshape(-1, rows)
    return torch.mm(driven.T, hidden[:-1].reshape(-1, size))
