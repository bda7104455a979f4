"""Comparing a product with finite differences, where user-written code is differentiated.

An ``autograd.Function`` whose backward works on NumPy arrays, on detached tensors or under
``no_grad`` is a constant to torch: its own derivative is silently missing from second
derivatives, and from Jacobian products that are made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

#: a function of the leaves, with one value or several
Function = Callable[[list[Tensor]], Tensor | Sequence[Tensor | None]]

#: steps relative to the leaves, from coarse to fine, by the dtype of the leaves
_STEPS = {
    torch.float32: [2.0**-k for k in (3, 5, 7, 9, 11)],
    torch.float64: [2.0**-k for k in (6, 10, 14, 18, 22)],
}
#: how well the differences of two steps have to agree before anything is said
_AGREEMENT = 0.01
#: how far the product has to be off, beyond the error of the differences
_TOLERANCE = 0.05
#: Differences of a smooth function agree better with every finer step, by the square of
#: the ratio of the steps (16 and 256). Where very many kinks are crossed, differences agree
#: by the law of large numbers, and worse with finer steps.
_IMPROVEMENT = 4.0


class WrongDerivativeError(RuntimeError):
    """A derivative that user-written code gives is not that of the function."""


def check_hessian(
    gradient: Function,
    product: Callable[[list[Tensor]], Sequence[Tensor]],
    leaves: Sequence[Tensor],
    functions: Sequence[str],
) -> None:
    """Compare ``H v`` with central differences of the gradient, for one random ``v``.

    Parameters
    ----------
    gradient
        First derivative as a function of the leaves, one tensor (or None) for each.
    product
        ``v -> H v``, each a list shaped like the leaves.
    leaves
        The point.
    functions
        Names for the error: :func:`~torchlinop.autodiff.graphs.custom_functions`.

    Raises
    ------
    WrongDerivativeError
        For one of the leaves, the differences agree among themselves and the product is
        more than 5 % off. Where they do not agree (kinks, rounding, half precision, a
        function that cannot be evaluated near by), nothing is known and nothing raised.
    """
    _check(gradient, product, leaves, functions, "second derivative")


def check_jacobian(
    function: Callable[[list[Tensor]], Tensor],
    product: Callable[[list[Tensor]], Tensor],
    leaves: Sequence[Tensor],
    functions: Sequence[str],
) -> None:
    """Compare ``J v`` with central differences of the function, for one random ``v``.

    The rest is as for :func:`check_hessian`.
    """
    _check(function, lambda v: [product(v)], leaves, functions, "derivative")


def _check(
    function: Function,
    product: Callable[[list[Tensor]], Sequence[Tensor]],
    leaves: Sequence[Tensor],
    functions: Sequence[str],
    kind: str,
) -> None:
    steps = _STEPS.get(leaves[0].dtype)
    if steps is None:
        return
    v = _direction(leaves)
    claimed = [p.detach().double() for p in product(v)]
    tiny = 8 * torch.finfo(leaves[0].dtype).eps
    along = _Line(function, leaves, v, claimed)
    try:
        near = along.differences(steps[-2])
        if all(_relative(d, p) <= _AGREEMENT for d, p in zip(near, claimed, strict=True)):
            return
        ladder = [along.differences(h) for h in steps]
        noise = along.differences(tiny)
        kinks = along.kinks(steps[-2])
    except (RuntimeError, ValueError, ArithmeticError):
        return
    for i, p in enumerate(claimed):
        differences = [d[i] for d in ladder]
        rounding = tiny * float((noise[i] - differences[-1]).norm())
        off = _disagreement(differences, p, kinks[i], [rounding / h for h in steps])
        if off is not None:
            raise WrongDerivativeError(
                f"The {kind} that torch computes is {100 * off:.0f} % off from finite "
                f"differences; the model uses the custom autograd.Function "
                f"{', '.join(functions)}, whose backward is not differentiated itself or "
                "is not the derivative of its forward. Write backward with torch "
                "operations on tensors saved by ctx.save_for_backward (no NumPy arrays, no "
                "detach, no no_grad). If it is meant to be what it is, pass "
                "check_derivatives=False."
            )


def _direction(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return always the same random tensors, each as large as its leaf."""
    generator = torch.Generator("cpu").manual_seed(0)
    sizes = [float(x.detach().double().norm()) / max(x.numel(), 1) ** 0.5 for x in leaves]
    direction = []
    for leaf, size in zip(leaves, sizes, strict=True):
        v = torch.randn(leaf.shape, generator=generator, dtype=torch.float64, device="cpu")
        v *= size or max(sizes) or 1.0  # a leaf of zeros is as large as the largest
        direction.append(v.to(leaf.device, leaf.dtype))
    return direction


class _Line:
    """A function of the leaves along one direction, its values in float64."""

    def __init__(
        self,
        function: Function,
        leaves: Sequence[Tensor],
        direction: Sequence[Tensor],
        like: Sequence[Tensor],
    ) -> None:
        self._function = function
        self._leaves = leaves
        self._direction = direction
        self._like = like

    def _at(self, t: float) -> list[Tensor]:
        moved = [
            x.detach().add(v, alpha=t).requires_grad_()
            for x, v in zip(self._leaves, self._direction, strict=True)
        ]
        values = self._function(moved)
        listed = [values] if isinstance(values, Tensor) else values
        return [
            torch.zeros_like(p) if value is None else value.detach().double()
            for value, p in zip(listed, self._like, strict=True)
        ]

    def differences(self, h: float) -> list[Tensor]:
        """Central differences."""
        pairs = zip(self._at(h), self._at(-h), strict=True)
        return [(right - left) / (2 * h) for right, left in pairs]

    def kinks(self, h: float) -> list[float]:
        """Half of what one-sided differences differ by: the part of kinks at the point."""
        triples = zip(self._at(h), self._at(0.0), self._at(-h), strict=True)
        return [float((a - 2 * b + c).norm()) / (2 * h) for a, b, c in triples]


def _relative(a: Tensor, b: Tensor) -> float:
    scale = float(torch.maximum(a.norm(), b.norm()))
    return float((a - b).norm()) / scale if scale else 0.0


def _disagreement(
    differences: Sequence[Tensor], claimed: Tensor, kink: float, rounding: Sequence[float]
) -> float | None:
    """By which part of its size ``claimed`` is off; None if that is not certain.

    Parameters
    ----------
    differences
        For finer and finer steps.
    claimed
        What they approach if it is right.
    kink
        What they are wrong by where the point itself is a kink: ``relu(0)``.
    rounding
        Error of each of the differences by rounding alone.
    """
    scale = float(torch.maximum(differences[-1].norm(), claimed.norm()))
    changes = [float((b - a).norm()) for a, b in pairwise(differences)]
    start = next((k for k, e in enumerate(changes) if e <= _AGREEMENT * scale), None)
    if start is None or start + 1 == len(changes):
        return None
    for k in range(start + 1, len(changes)):
        if not changes[k] <= max(changes[k - 1] / _IMPROVEMENT, 4 * rounding[k + 1]):
            return None
    error, best = min((e, k) for k, e in enumerate(changes) if k >= start)
    off = float((differences[best + 1] - claimed).norm())
    return off / scale if off > _TOLERANCE * scale + 5 * (error + kink) else None
