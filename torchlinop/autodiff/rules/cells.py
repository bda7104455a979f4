r"""What a recurrent network does in one step, with its first two derivatives.

A step maps the states before it and its gates to the states after it, entry by entry. The
gates are what the nonlinearities are applied to; the first of them are driven by the hidden
state, :math:`a_t = u_t + W h_{t-1}`. Shapes: ``T`` steps, ``B`` sequences, ``H`` entries of
a state, ``G`` gates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Cell(ABC):
    """A kind of recurrent network.

    Attributes
    ----------
    states
        How many there are; the first is the hidden state ``h``.
    carried
        How many of them, the last ones, enter the next step other than through ``W``.
    gates
        How many there are.
    """

    states = 1
    carried = 0
    gates = 1

    @abstractmethod
    def step(self, gates: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Write the states ``(B, H)`` after a step, from gates ``(B, G, H)``."""

    @abstractmethod
    def jacobians(self, gates: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Derivatives of the states after each step in the carried ones and the gates.

        Parameters
        ----------
        gates
            Shape ``(T, B, G, H)``.
        states
            Each ``(T + 1, B, H)``.

        Returns
        -------
        Tensor
            Shape ``(T, B, states, carried + G, H)``.
        """

    @abstractmethod
    def curvature(
        self,
        gates: Tensor,
        states: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        tangents: Sequence[Tensor],
        results: Sequence[Tensor],
    ) -> tuple[Tensor | None, ...]:
        """Derivatives of what :meth:`jacobians` makes of cotangents and tangents.

        Parameters
        ----------
        gates, states
            As in :meth:`jacobians`.
        cotangents
            Of each state, ``(T + 1, B, H)``.
        tangents
            Of the gates and of each state.
        results
            Tangents of the states, ``(T, B, H)``, that follow from those of one step
            before.

        Returns
        -------
        tuple of Tensor
            With respect to the gates and to each state; None is zero.
        """


class LSTM(Cell):
    r"""Gates ``i, f, g, o``: :math:`c_t = f c_{t-1} + i g` and :math:`h_t = o \tanh c_t`."""

    states = 2
    carried = 1
    gates = 4

    def step(self, gates: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        i, f, _, o = torch.sigmoid(gates).unbind(1)
        h, c = after
        torch.mul(f, before[1], out=c)
        c.addcmul_(i, gates[:, 2].tanh())
        torch.mul(o, c.tanh(), out=h)

    def jacobians(self, gates: Tensor, states: Sequence[Tensor]) -> Tensor:
        c = states[1]
        i, f, g, o = _lstm_gates(gates)
        t = c[1:].tanh()
        zero = torch.zeros_like(c[1:])
        of_c = [f, g * i * (1 - i), c[:-1] * f * (1 - f), i * (1 - g * g), zero]
        matrices = gates.new_empty((*gates.shape[:2], 2, 5, gates.shape[-1]))
        of_h, of_c = matrices.unbind(2)[0], torch.stack(of_c, 2, out=matrices[:, :, 1])
        torch.mul(of_c, (o * (1 - t * t)).unsqueeze(2), out=of_h)
        of_h[:, :, 4] = t * o * (1 - o)
        return matrices

    def curvature(
        self,
        gates: Tensor,
        states: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        tangents: Sequence[Tensor],
        results: Sequence[Tensor],
    ) -> tuple[Tensor | None, ...]:
        c = states[1]
        i, f, g, o = _lstm_gates(gates)
        t = c[1:].tanh()
        di, df, dg, do, dt = i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o), 1 - t * t
        of_h = cotangents[0][1:]
        of_c = torch.addcmul(cotangents[1][1:], of_h, o * dt)
        vi, vf, vg, vo = tangents[0].unbind(2)
        before, after = tangents[2][:-1], results[1]
        through_f = of_c * df
        by_gates = [
            of_c * di * (g * (1 - 2 * i) * vi + dg * vg),
            through_f * (c[:-1] * (1 - 2 * f) * vf + before),
            of_c * dg * (di * vi - 2 * i * g * vg),
            of_h * do * (t * (1 - 2 * o) * vo + dt * after),
        ]
        by_c = _at_start(through_f * vf) + _at_end(
            of_h * dt * (do * vo - 2 * o * t * after)
        )
        return torch.stack(by_gates, 2), None, by_c


class GRU(Cell):
    r"""Gates ``r, z, m, n``, the first three driven by the hidden state.

    :math:`N = \tanh(n + r m)` and :math:`h_t = (1 - z) N + z h_{t-1}`.
    """

    carried = 1
    gates = 4

    def step(self, gates: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        r, z = torch.sigmoid(gates[:, :2]).unbind(1)
        candidate = torch.addcmul(gates[:, 3], r, gates[:, 2]).tanh_()
        torch.lerp(candidate, before[0], z, out=after[0])

    def jacobians(self, gates: Tensor, states: Sequence[Tensor]) -> Tensor:
        h = states[0][:-1]
        m = gates[:, :, 2]
        r, z, n = _gru_gates(gates)
        by_n = (1 - z) * (1 - n * n)
        by_gates = [by_n * m * r * (1 - r), (h - n) * z * (1 - z), by_n * r, by_n]
        return torch.stack([z, *by_gates], 2).unsqueeze(2)

    def curvature(
        self,
        gates: Tensor,
        states: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        tangents: Sequence[Tensor],
        results: Sequence[Tensor],
    ) -> tuple[Tensor | None, ...]:
        h = states[0][:-1]
        m = gates[:, :, 2]
        r, z, n = _gru_gates(gates)
        dr, dz, dn = r * (1 - r), z * (1 - z), 1 - n * n
        of_h = cotangents[0][1:]
        vr, vz, vm, vn = tangents[0].unbind(2)
        inner = vn + r * vm + m * dr * vr  # of n + r m
        slope = of_h * (1 - z) * dn
        change = -of_h * dn * (dz * vz + 2 * (1 - z) * n * inner)  # of slope
        by_z = of_h * dz * ((1 - 2 * z) * vz * (h - n) + tangents[1][:-1] - dn * inner)
        by_r = dr * (change * m + slope * ((1 - 2 * r) * vr * m + vm))
        by_gates = [by_r, by_z, change * r + slope * dr * vr, change]
        return torch.stack(by_gates, 2), _at_start(of_h * dz * vz)


class Tanh(Cell):
    r""":math:`h_t = \tanh a_t`."""

    def step(self, gates: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        torch.tanh(gates[:, 0], out=after[0])

    def jacobians(self, gates: Tensor, states: Sequence[Tensor]) -> Tensor:
        return (1 - states[0][1:].square()).unflatten(-1, (1, 1, -1))

    def curvature(
        self,
        gates: Tensor,
        states: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        tangents: Sequence[Tensor],
        results: Sequence[Tensor],
    ) -> tuple[Tensor | None, ...]:
        h = gates.tanh()
        slope = (1 - h * h) * cotangents[0][1:].unsqueeze(2)
        return -2 * h * slope * tangents[0], None


class ReLU(Cell):
    r""":math:`h_t = \max(a_t, 0)`."""

    def step(self, gates: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        torch.clamp(gates[:, 0], min=0, out=after[0])

    def jacobians(self, gates: Tensor, states: Sequence[Tensor]) -> Tensor:
        return (gates > 0).to(gates.dtype).unsqueeze(2)

    def curvature(
        self,
        gates: Tensor,
        states: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        tangents: Sequence[Tensor],
        results: Sequence[Tensor],
    ) -> tuple[Tensor | None, ...]:
        return None, None


def _lstm_gates(gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    i, f, _, o = torch.sigmoid(gates).unbind(2)
    return i, f, gates[:, :, 2].tanh(), o


def _gru_gates(gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r, z = torch.sigmoid(gates[:, :, :2]).unbind(2)
    return r, z, torch.addcmul(gates[:, :, 3], r, gates[:, :, 2]).tanh()


def _at_start(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, 1))


def _at_end(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 1, 0))
