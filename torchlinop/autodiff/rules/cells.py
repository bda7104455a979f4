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
from torch import Tensor

Tensors = Sequence[Tensor]


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
    def step(self, gates: Tensor, before: Tensors, after: Tensors) -> None:
        """Write the states ``(B, H)`` after a step, from gates ``(B, G, H)``."""

    @abstractmethod
    def jacobians(self, gates: Tensor, states: Tensors) -> Tensor:
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
        self, gates: Tensor, states: Tensors, cotangents: Tensors
    ) -> tuple[Tensor, ...]:
        """What :meth:`bend` needs of the trajectory and of the states' cotangents.

        The latter are of what enters the next step, and through ``W``.
        """

    @abstractmethod
    def bend(
        self, curvature: Tensors, tangents: Tensors, after: Tensors
    ) -> tuple[Tensor | None, ...]:
        """Derivatives of the cotangents' products with :meth:`jacobians` and tangents.

        Parameters
        ----------
        curvature
            Of :meth:`curvature`.
        tangents
            Of the gates and of each state.
        after
            Tangents of the states, ``(T, B, H)``, as they follow from one step before.

        Returns
        -------
        tuple of Tensor
            With respect to the gates and to each state; None is zero.
        """


class LSTM(Cell):
    r"""Gates ``i, f, g, o``: :math:`c_t = f c_{t-1} + i g`, :math:`h_t = o \tanh c_t`."""

    states = 2
    carried = 1
    gates = 4

    def step(self, gates: Tensor, before: Tensors, after: Tensors) -> None:
        i, f, _, o = torch.sigmoid(gates).unbind(1)
        h, c = after
        torch.mul(f, before[1], out=c)
        c.addcmul_(i, gates[:, 2].tanh())
        torch.mul(o, c.tanh(), out=h)

    def jacobians(self, gates: Tensor, states: Tensors) -> Tensor:
        c = states[1]
        i, f, g, o = _lstm_gates(gates)
        t = c[1:].tanh()
        zero = torch.zeros_like(c[1:])
        by_gates = [g * i * (1 - i), c[:-1] * f * (1 - f), i * (1 - g * g), zero]
        matrices = gates.new_empty((*gates.shape[:2], 2, 5, gates.shape[-1]))
        of_h, of_c = matrices.unbind(2)
        torch.stack([f, *by_gates], 2, out=of_c)
        torch.mul(of_c, (o * (1 - t * t)).unsqueeze(2), out=of_h)
        of_h[:, :, 4] = t * o * (1 - o)
        return matrices

    def curvature(
        self, gates: Tensor, states: Tensors, cotangents: Tensors
    ) -> tuple[Tensor, ...]:
        c = states[1]
        i, f, g, o = _lstm_gates(gates)
        t = c[1:].tanh()
        di, df, dg, do, dt = i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o), 1 - t * t
        of_h = cotangents[0][1:]
        of_c = torch.addcmul(cotangents[1][1:], of_h, o * dt)
        ii, ig, gg = of_c * di * (1 - 2 * i) * g, of_c * di * dg, -2 * of_c * i * g * dg
        ff, fc = of_c * df * (1 - 2 * f) * c[:-1], of_c * df
        oo, oc, cc = of_h * do * (1 - 2 * o) * t, of_h * do * dt, -2 * of_h * o * t * dt
        return ii, ig, gg, ff, fc, oo, oc, cc

    def bend(
        self, curvature: Tensors, tangents: Tensors, after: Tensors
    ) -> tuple[Tensor | None, ...]:
        ii, ig, gg, ff, fc, oo, oc, cc = curvature
        i, f, g, o = tangents[0].unbind(2)
        before, c = tangents[2][:-1], after[1]
        by_gates = [
            ii * i + ig * g,
            ff * f + fc * before,
            ig * i + gg * g,
            oo * o + oc * c,
        ]
        return torch.stack(by_gates, 2), None, _joined(fc * f, oc * o + cc * c)


class GRU(Cell):
    r"""Gates ``r, z, m, n``, the first three driven by the hidden state.

    :math:`N = \tanh(n + r m)` and :math:`h_t = (1 - z) N + z h_{t-1}`.
    """

    carried = 1
    gates = 4

    def step(self, gates: Tensor, before: Tensors, after: Tensors) -> None:
        r, z = torch.sigmoid(gates[:, :2]).unbind(1)
        candidate = torch.addcmul(gates[:, 3], r, gates[:, 2]).tanh_()
        torch.lerp(candidate, before[0], z, out=after[0])

    def jacobians(self, gates: Tensor, states: Tensors) -> Tensor:
        h = states[0][:-1]
        m = gates[:, :, 2]
        r, z, n = _gru_gates(gates)
        by_n = (1 - z) * (1 - n * n)
        by_gates = [by_n * m * r * (1 - r), (h - n) * z * (1 - z), by_n * r, by_n]
        return torch.stack([z, *by_gates], 2).unsqueeze(2)

    def curvature(
        self, gates: Tensor, states: Tensors, cotangents: Tensors
    ) -> tuple[Tensor, ...]:
        h = states[0][:-1]
        m = gates[:, :, 2]
        r, z, n = _gru_gates(gates)
        dr, dz, dn = r * (1 - r), z * (1 - z), 1 - n * n
        of_h = cotangents[0][1:]
        zz, zh, zn = of_h * dz * (1 - 2 * z) * (h - n), of_h * dz, -of_h * dz * dn
        nn, rm = -2 * of_h * (1 - z) * n * dn, of_h * (1 - z) * dn * dr
        return r, m * dr, zz, zh, zn, nn, rm * (1 - 2 * r) * m, rm

    def bend(
        self, curvature: Tensors, tangents: Tensors, after: Tensors
    ) -> tuple[Tensor | None, ...]:
        by_m, by_r, zz, zh, zn, nn, rr, rm = curvature
        r, z, m, n = tangents[0].unbind(2)
        n = n + by_m * m + by_r * r  # in all that the candidate is made of
        change = zn * z + nn * n
        by_gates = [
            by_r * change + rr * r + rm * m,
            zz * z + zh * tangents[1][:-1] + zn * n,
            by_m * change + rm * r,
            change,
        ]
        by_h = zh * z
        return torch.stack(by_gates, 2), _joined(by_h, by_h.new_zeros(by_h.shape))


class Tanh(Cell):
    r""":math:`h_t = \tanh a_t`."""

    def step(self, gates: Tensor, before: Tensors, after: Tensors) -> None:
        torch.tanh(gates[:, 0], out=after[0])

    def jacobians(self, gates: Tensor, states: Tensors) -> Tensor:
        return (1 - states[0][1:].square()).unflatten(-1, (1, 1, -1))

    def curvature(
        self, gates: Tensor, states: Tensors, cotangents: Tensors
    ) -> tuple[Tensor, ...]:
        h = gates.tanh()
        return (-2 * h * (1 - h * h) * cotangents[0][1:].unsqueeze(2),)

    def bend(
        self, curvature: Tensors, tangents: Tensors, after: Tensors
    ) -> tuple[Tensor | None, ...]:
        return curvature[0] * tangents[0], None


class ReLU(Cell):
    r""":math:`h_t = \max(a_t, 0)`."""

    def step(self, gates: Tensor, before: Tensors, after: Tensors) -> None:
        torch.clamp(gates[:, 0], min=0, out=after[0])

    def jacobians(self, gates: Tensor, states: Tensors) -> Tensor:
        return (gates > 0).to(gates.dtype).unsqueeze(2)

    def curvature(
        self, gates: Tensor, states: Tensors, cotangents: Tensors
    ) -> tuple[Tensor, ...]:
        return ()

    def bend(
        self, curvature: Tensors, tangents: Tensors, after: Tensors
    ) -> tuple[Tensor | None, ...]:
        return None, None


def _lstm_gates(gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    i, f, _, o = torch.sigmoid(gates).unbind(2)
    return i, f, gates[:, :, 2].tanh(), o


def _gru_gates(gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r, z = torch.sigmoid(gates[:, :, :2]).unbind(2)
    return r, z, torch.addcmul(gates[:, :, 3], r, gates[:, :, 2]).tanh()


def _joined(before: Tensor, after: Tensor) -> Tensor:
    """Add what concerns the states before and after each step, ``(T + 1, ...)``."""
    return torch.cat([before[:1], before[1:] + after[:-1], after[-1:]])
