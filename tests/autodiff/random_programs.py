"""Random linear functions, to be compared with their replays."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor
from torchlinop.autodiff.columns import WARM_UP, LinearRows
from torchlinop.autodiff.experience import Experience

N = 12
LENGTH = 12


class Program:
    """A random linear function of a vector, as a list of steps.

    A step is a function of the values before it. Steps are drawn one after the other,
    those that do not fit the shapes are dropped.
    """

    def __init__(self, seed: int, dtype: torch.dtype, steps: list) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.constants: list[torch.Tensor] = []
        self.steps: list[tuple] = []
        values = [torch.ones(N, dtype=dtype)]
        while len(self.steps) < LENGTH:
            make = self.random.choice(steps)
            i = self.random.randrange(max(0, len(values) - 4), len(values))
            j = self.random.randrange(len(values))
            try:
                step = make(self, values[i], values[j])
                new = step(values[i], values[j])
            except (RuntimeError, IndexError, TypeError, NotImplementedError):
                continue
            if new.numel() in range(1, 400) and new.dtype in (dtype, self.complex):
                values.append(new)
                self.steps.append((step, i, j))

    @property
    def complex(self) -> torch.dtype:
        return torch.complex(*[torch.zeros(1, dtype=self.dtype)] * 2).dtype

    def constant(self, *shape: int) -> torch.Tensor:
        """Return a constant in this or that memory format, rarely zero."""
        c = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
        kind = self.random.randrange(6)
        if kind == 0:
            c = torch.zeros_like(c)
        elif kind == 1:
            c = c.new_zeros(2 * c.numel()).as_strided(c.shape, [2 * s for s in c.stride()])
        elif kind == 2 and c.ndim:
            c = c[..., :1].expand(c.shape)
        elif kind == 3:
            c = torch._efficientzerotensor(c.shape, dtype=c.dtype)
        self.constants.append(c)
        return c

    def index(self, size: int, count: int) -> torch.Tensor:
        return torch.randint(size, (count,), generator=self.generator)

    def values(self, x: torch.Tensor) -> list[torch.Tensor]:
        values = [x]
        for step, i, j in self.steps:
            values.append(step(values[i], values[j]))
        return [
            torch.view_as_real(v.resolve_conj()) if v.is_complex() else v for v in values
        ]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([v.reshape(-1) for v in self.values(x)[-5:]])


def _factor(p, a, b):
    shape = p.random.choice([a.shape, a.shape[-1:], (), (1,) * a.ndim, (2, *a.shape)])
    c = p.constant(*shape)
    return p.random.choice(
        [lambda a, b: a * c, lambda a, b: c * a, lambda a, b: (a * c) * c]
    )


def _scalar(p, a, b):
    s = p.random.choice([2, -0.5, 0, 1.5])
    return p.random.choice(
        [
            lambda a, b: a * s,
            lambda a, b: a / 3,
            lambda a, b: -a,
            lambda a, b: torch.ops.aten.mul.Scalar(a, s),
        ]
    )


def _sum(p, a, b):
    alpha = p.random.choice([1, 1, 0.5])
    return p.random.choice(
        [
            lambda a, b: torch.add(a, b, alpha=alpha),
            lambda a, b: torch.sub(a, b, alpha=alpha),
            lambda a, b: torch.stack([a, b]),
            lambda a, b: torch.cat([a.reshape(-1), b.reshape(-1)]),
            lambda a, b: torch.lerp(a, b, 0.3),
        ]
    )


def _zero(p, a, b):
    z = torch._efficientzerotensor(a.shape, dtype=a.dtype)
    return p.random.choice(
        [
            lambda a, b: a + z,
            lambda a, b: z.clone() + a,
            lambda a, b: a + torch.zeros_like(a),
            lambda a, b: a * torch.ops.aten.mul.Scalar(z, 2),
            lambda a, b: torch.zeros(3, 1, dtype=a.dtype) + a,
        ]
    )


def _matmul(p, a, b):
    n = a.shape[-1] if a.ndim else 1
    c = p.constant(n, p.random.randrange(1, 5))
    e = p.constant(c.shape[1])
    return p.random.choice(
        [
            lambda a, b: a @ c,
            lambda a, b: c.T @ a.reshape(n, -1),
            lambda a, b: a.reshape(-1, n) @ c + (a.sum() * e).expand(a.numel() // n, -1),
            lambda a, b: torch.einsum("...i,ij->j...", a, c),
            lambda a, b: (a.reshape(-1, n) @ c).view(-1) + (a.reshape(-1, n) @ c).view(-1),
        ]
    )


def _view(p, a, b):
    d, k = p.random.randrange(3), p.random.randrange(1, 4)
    return p.random.choice(
        [
            lambda a, b: a.t(),
            lambda a, b: a.t().t(),
            lambda a, b: a.view(-1, k),
            lambda a, b: a.reshape(k, -1),
            lambda a, b: a.transpose(0, d),
            lambda a, b: a.movedim(0, -1),
            lambda a, b: a.unsqueeze(d).expand(*[-1] * d, k, *[-1] * (a.ndim - d)),
            lambda a, b: a.expand(k, *a.shape),
            lambda a, b: a.narrow(0, 1, k),
            lambda a, b: a[..., ::2],
            lambda a, b: a.unfold(0, 2, 1),
            lambda a, b: a.diagonal(),
            lambda a, b: a.detach(),
            lambda a, b: a.data,
            lambda a, b: a.chunk(3)[1],
            lambda a, b: a.unbind()[-1],
            lambda a, b: a.clone().as_strided((2, 2), (1, 2), 1),
            lambda a, b: a.real if a.is_complex() else a.flip(0),
        ]
    )


def _index(p, a, b):
    rows = p.index(a.shape[0] if a.ndim else 1, 5)
    mask = torch.rand(a.shape, generator=p.generator) < 0.6
    c = p.constant(*a.shape)
    order = p.index(max(a.numel(), 1), a.numel())
    return p.random.choice(
        [
            lambda a, b: a[rows],
            lambda a, b: a[rows, rows % a.shape[1]],
            lambda a, b: a[mask],
            lambda a, b: torch.where(mask, a, 0 * c),
            lambda a, b: torch.where(mask, a, b),
            lambda a, b: a.masked_fill(mask, 0),
            lambda a, b: a.new_zeros(a.numel()).scatter_add(0, order, a.reshape(-1)),
            lambda a, b: a.reshape(-1).gather(0, order),
            lambda a, b: a.new_zeros(a.shape).index_add(0, rows, a[rows]),
            lambda a, b: a.new_zeros(9).index_put((order % 9,), a.reshape(-1), True),
            lambda a, b: a.roll(1),
            lambda a, b: torch.nn.functional.pad(a, (1, 2)),
            lambda a, b: a.cumsum(0),
            lambda a, b: a.sum(-1),
            lambda a, b: a.mean(),
            lambda a, b: torch.tril(a),
            lambda a, b: a.diag(),
            lambda a, b: a.repeat(2),
        ]
    )


def _complex(p, a, b):
    c = torch.complex(
        p.constant(a.shape[-1] if a.ndim else 1), torch.ones(1, dtype=p.dtype)
    )
    return p.random.choice(
        [
            lambda a, b: torch.fft.rfft(a),
            lambda a, b: torch.fft.fft(a).conj(),
            lambda a, b: torch.fft.ifft(a, dim=0).imag,
            lambda a, b: torch.fft.fft(a * c).real,
            lambda a, b: a * c.conj(),
            lambda a, b: torch.conj(a) + a,
            lambda a, b: torch.fft.fft(a).conj().imag,  # a lazy negative
            lambda a, b: (torch.fft.fft(a).conj() @ c.conj()).imag * 2,
            lambda a, b: torch.view_as_real(torch.fft.fft(a)),
            lambda a, b: torch.ops.aten.mul.Scalar(torch.fft.fft(a).conj(), 2j),
        ]
    )


def _written(p, a, b):
    rows = p.index(a.shape[0] if a.ndim else 1, 3)
    unique = rows.unique()
    outside = torch.ones(a.shape, dtype=a.dtype)
    window = outside[..., :1]

    def at_rows(a, b):
        y = a.clone()
        y[rows] *= 2
        y[unique] = a[unique] * 3
        return y

    def through_a_view(a, b):
        y = torch.zeros(2, *a.shape, dtype=a.dtype)
        y[1] += a
        y.view(-1)[: a.numel()].copy_(a.reshape(-1))
        return y

    def seen_by_a_view(a, b):
        y = a.clone()
        view = y.t() if y.ndim == 2 else y[1:]
        y.mul_(2).add_(b if b.shape == a.shape else 0)
        return view * 1

    def outside_memory(a, b):
        outside.copy_(a)
        window.mul_(2)
        return outside.clone()

    def out(a, b):
        y = torch.empty_like(a)
        torch.mul(a, 2, out=y)
        return y

    def accumulated(a, b):
        y = a.new_zeros(9)
        y.index_put_((rows % 9,), a.reshape(-1)[:3], accumulate=True)
        y.scatter_add_(0, rows % 9, a.reshape(-1)[:3])
        return y.addcmul_(y, y.new_ones(9)).neg_()

    def resized(a, b):
        y = a.new_empty(0)
        y.resize_(a.shape).copy_(a)
        return y

    def foreach(a, b):
        y = [a.clone(), b.clone()]
        torch._foreach_mul_(y, 2.0)
        return y[0] + y[1].sum()

    return p.random.choice(
        [
            at_rows,
            through_a_view,
            seen_by_a_view,
            outside_memory,
            out,
            accumulated,
            resized,
            foreach,
        ]
    )


PLAIN = [_factor, _scalar, _sum, _zero, _matmul, _view, _view, _index, _complex]
#: what programs are made of
KINDS = {"plain": PLAIN, "with writes": [*PLAIN, _written, _written]}


def as_rows(function: Callable[[Tensor], Tensor]) -> LinearRows:
    return LinearRows(lambda x, batched=False: function(x), nbytes=0, nodes=1)


def is_replayed(rows: LinearRows) -> bool:
    return rows._run is not None and rows._run is not rows._function


def check(seed: int, dtype: torch.dtype, steps: list) -> tuple[float, bool]:
    """Compare a replayed program with itself, and with itself in float64.

    Returns the largest difference, in roundings of the largest intermediate value, and
    whether the program was replayed.
    """
    program, precise = Program(seed, dtype, steps), Program(seed, torch.float64, steps)
    rows, experience = as_rows(program), Experience()
    generator = torch.Generator().manual_seed(seed)
    error = 0.0
    for _ in range(WARM_UP + 4):
        x = torch.randn(N + 3, generator=generator, dtype=torch.float64).to(dtype)[3:]
        kept = x.clone()
        largest = max(v.abs().max().item() for v in precise.values(x.double()))
        y = rows.row(x, experience)
        for expected in (program(x), precise(x.double())):
            difference = (y.double() - expected.double()).abs().max().item()
            error = max(error, difference / (torch.finfo(dtype).eps * largest))
            if difference != difference:  # max of a number and NaN is either
                return float("inf"), True
        y.fill_(torch.nan)  # must reach neither the argument nor the next product
        if not torch.equal(x, kept):
            return float("inf"), True
    return error, is_replayed(rows)
