"""Sums, products, multiples, powers and conjugates of operators, as actions.

An action says what a matrix does: its product with a tensor, and its adjoint.
``TorchLinearOperator`` makes operators of actions, so it can offer ``+`` and ``@`` while
nothing here depends on it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from torchlinop._door import Door
from torchlinop._dtypes import as_number
from torchlinop._typing import Scalar


class Action(Protocol):
    """A matrix by what it does."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    #: what it is made of, as SciPy's composites have it
    args: tuple[Any, ...]

    def apply(self, x: Tensor) -> Tensor:
        """Product with ``(N, K)``, as an operator's ``_apply``."""

    def adjoint(self) -> Action:
        """Return the conjugate transpose; a self-adjoint action returns itself."""


class Sum:
    """``A + B``."""

    def __init__(self, a: Door, b: Door) -> None:
        if a.shape != b.shape:
            raise ValueError(
                f"Cannot add a {a.shape[0]} x {a.shape[1]} operator and a "
                f"{b.shape[0]} x {b.shape[1]} one: the shapes have to agree."
            )
        self.shape, self.dtype, self.device = a.shape, _common(a, b), a.device
        self.args = (a, b)

    def apply(self, x: Tensor) -> Tensor:
        a, b = self.args
        y, z = a._product(_narrow(x, a)), b._product(_narrow(x, b))
        if y.dtype == self.dtype:
            return y.add_(z)
        return (y + z).to(self.dtype)

    def adjoint(self) -> Sum:
        a, b = self.args
        a_adjoint, b_adjoint = a._adjoint(), b._adjoint()
        if a_adjoint is a and b_adjoint is b:
            return self
        return Sum(a_adjoint, b_adjoint)


class Product:
    """``A @ B``."""

    def __init__(self, a: Door, b: Door) -> None:
        if a.shape[1] != b.shape[0]:
            raise ValueError(
                f"Cannot multiply a {a.shape[0]} x {a.shape[1]} operator and a "
                f"{b.shape[0]} x {b.shape[1]} one: {a.shape[1]} columns meet "
                f"{b.shape[0]} rows."
            )
        self.shape = (a.shape[0], b.shape[1])
        self.dtype, self.device = _common(a, b), a.device
        self.args = (a, b)

    def apply(self, x: Tensor) -> Tensor:
        a, b = self.args
        y = a._product(_narrow(b._product(_narrow(x, b)), a))
        return y.to(self.dtype)

    def adjoint(self) -> Product:
        a, b = self.args
        return Product(b._adjoint(), a._adjoint())


class Multiple:
    """``alpha * A``; keeps the precision of ``A`` whatever the scalar's type."""

    def __init__(self, a: Door, alpha: float | complex) -> None:
        complex_scale = isinstance(alpha, complex)
        self.shape, self.device = a.shape, a.device
        self.dtype = a.torch_dtype.to_complex() if complex_scale else a.torch_dtype
        self.args = (a, alpha)

    def apply(self, x: Tensor) -> Tensor:
        a, alpha = self.args
        y = a._product(x)
        return y.mul_(alpha) if y.dtype == self.dtype else y * alpha

    def adjoint(self) -> Multiple:
        a, alpha = self.args
        adjoint = a._adjoint()
        if adjoint is a and not isinstance(alpha, complex):
            return self
        return Multiple(adjoint, alpha.conjugate())


class Power:
    """``A ** p`` for an integer ``p >= 0``."""

    def __init__(self, a: Door, p: Scalar) -> None:
        if a.shape[0] != a.shape[1]:
            raise ValueError(
                f"Only a square operator has powers, got {a.shape[0]} x {a.shape[1]}."
            )
        exponent = as_number(p)
        if isinstance(exponent, complex) or exponent < 0 or exponent % 1:
            raise ValueError(f"The exponent has to be an integer >= 0, got {p!r}.")
        self.shape, self.dtype, self.device = a.shape, a.torch_dtype, a.device
        self.args = (a, int(exponent))

    def apply(self, x: Tensor) -> Tensor:
        a, p = self.args
        y = x.clone() if p == 0 else x
        for _ in range(p):
            y = a._product(y)
        return y

    def adjoint(self) -> Power:
        a, p = self.args
        adjoint = a._adjoint()
        return self if adjoint is a else Power(adjoint, p)


class Conjugate:
    """Entrywise complex conjugate of ``A``."""

    def __init__(self, a: Door) -> None:
        self.shape, self.dtype, self.device = a.shape, a.torch_dtype, a.device
        self.args = (a,)

    def apply(self, x: Tensor) -> Tensor:
        return self.args[0]._product(x.conj().resolve_conj()).conj_physical()

    def adjoint(self) -> Conjugate:
        return Conjugate(self.args[0]._adjoint())


def _common(a: Door, b: Door) -> torch.dtype:
    """Return the dtype of a sum or product; refuse operands on two devices."""
    if a.device != b.device:
        raise ValueError(
            f"Cannot combine operators on two devices: {a!r} and {b!r}. Build both on "
            "one device."
        )
    return torch.promote_types(a.torch_dtype, b.torch_dtype)


def _narrow(x: Tensor, a: Door) -> Tensor:
    """Give ``x`` the precision of ``a``, keeping it complex if it is."""
    dtype = a.torch_dtype
    return x.to(dtype.to_complex() if x.dtype.is_complex else dtype)
