"""The door: products with arrays of any kind, as SciPy's solvers ask for them.

Every product of every operator passes through :meth:`Door._product`, once, but for one
with a single vector that nobody observes and nothing is to be done to: its way is shorter.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NoReturn

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from torchlinop._cupy import cupyx_operator_type, with_base
from torchlinop._dtypes import numpy_dtype
from torchlinop._interchange import import_array, with_shape
from torchlinop._observers import OBSERVERS, observed
from torchlinop._typing import Array
from torchlinop.autodiff.transposing import by_rows


class Door(LinearOperator):
    """An operator without its algebra, which ``TorchLinearOperator`` adds."""

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(numpy_dtype(dtype), shape)
        self.torch_dtype = dtype
        self.device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
        self._device_type = self.device.type  # torch makes a new string each time

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The operator's class; where cupyx is in use, as a subclass of cupyx's as well.

        For ``isinstance``, by which cupyx's solvers decide whether to make a wrapper,
        which would multiply blocks column by column.
        """
        base = cupyx_operator_type()
        cls: type = type(self)
        return cls if base is None else with_base(cls, base)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle would compare __class__ with the type and refuse
        _, _, *rest = super().__reduce_ex__(2)
        return (_blank, (type(self),), *rest)

    # ------------------------------------------------- what an operator implements

    @abstractmethod
    def _apply(self, x: Tensor) -> Tensor:
        """Product with ``x``.

        Parameters
        ----------
        x
            Shape ``(N, K)``, of the operator's dtype and on its device; not to be
            written to, any strides.

        Returns
        -------
        Tensor
            Shape ``(M, K)``: fresh memory that neither ``x`` nor the operator shares.
        """

    @abstractmethod
    def _adjoint(self) -> Door:
        """Return the conjugate transpose; a self-adjoint operator returns itself."""

    def _apply_vector(self, x: Tensor) -> Tensor:
        """Product with a vector: as :meth:`_apply`, of shapes ``(N,)`` and ``(M,)``.

        For an operator to define (with ``_apply``, as final) that would take the vector
        out of its column again: in a small product that is a third of our own time.
        """
        return self._apply(x.unsqueeze(1)).squeeze(1)

    # -------------------------------------------------------------------- the door

    def _product(self, x: Tensor) -> Tensor:
        """Multiply a matrix: every product of every operator passes here, once.

        ``x`` has shape ``(N, K)`` and the operator's dtype or, for a real operator, its
        complex counterpart, which is multiplied by parts in one block.
        """
        return observed(self, x) if OBSERVERS else self._unobserved(x)

    def _vector_product(self, x: Tensor) -> Tensor:
        """Multiply a vector of shape ``(N,)``: directly, if nothing is in between."""
        if (
            OBSERVERS
            or x.dtype is not self.torch_dtype
            or torch.is_autocast_enabled(self._device_type)
        ):
            return self._product(x.unsqueeze(1)).squeeze(1)
        return self._apply_vector(x)

    def _unobserved(self, x: Tensor) -> Tensor:
        """Multiply, in nobody's sight."""
        if torch.is_autocast_enabled(self._device_type):
            with torch.autocast(self._device_type, enabled=False):
                return self._unobserved(x)
        if x.dtype == self.torch_dtype:
            return self._apply(x)
        if x.dtype.is_complex and not self.torch_dtype.is_complex:
            k = x.shape[1]
            parts = self._apply(torch.cat([x.real, x.imag], dim=1).to(self.torch_dtype))
            return torch.complex(parts[:, :k].contiguous(), parts[:, k:].contiguous())
        return self._apply(x.to(self.torch_dtype))

    def _multiply(self, x: Array, *, adjoint: bool) -> Array:
        """Multiply an array of shape ``(N,)`` or ``(N, K)`` of any kind."""
        operator = self._adjoint() if adjoint else self
        tensor, export = import_array(x, operator.device, operator.torch_dtype)
        if tensor.ndim == 1:
            return export(operator._vector_product(tensor))
        return export(by_rows(operator._product(tensor)))

    # ------------------------------------------------------- SciPy's public methods

    def matvec(self, x: Array) -> Array:
        """Product with a vector of shape ``(N,)`` or ``(N, 1)``."""
        x = with_shape(x)
        if x.shape != (self.shape[1],) and x.shape != (self.shape[1], 1):
            self._refuse("matvec", x, "(N,) or (N, 1)", self.shape[1])
        return self._multiply(x, adjoint=False)

    def rmatvec(self, x: Array) -> Array:
        """Product of the adjoint with a vector of shape ``(M,)`` or ``(M, 1)``."""
        x = with_shape(x)
        if x.shape != (self.shape[0],) and x.shape != (self.shape[0], 1):
            self._refuse("rmatvec", x, "(M,) or (M, 1)", self.shape[0])
        return self._multiply(x, adjoint=True)

    def matmat(self, X: Array) -> Array:
        """Product with a matrix of shape ``(N, K)``."""
        X = with_shape(X)
        if len(X.shape) != 2 or X.shape[0] != self.shape[1]:
            self._refuse("matmat", X, "(N, K)", self.shape[1])
        return self._multiply(X, adjoint=False)

    def rmatmat(self, X: Array) -> Array:
        """Product of the adjoint with a matrix of shape ``(M, K)``."""
        X = with_shape(X)
        if len(X.shape) != 2 or X.shape[0] != self.shape[0]:
            self._refuse("rmatmat", X, "(M, K)", self.shape[0])
        return self._multiply(X, adjoint=True)

    def _matvec(self, x: Array) -> Array:
        # SciPy's wrappers call this one directly; since 1.18 with rows of vectors too
        if x.ndim > 1 and x.shape != (self.shape[1], 1):
            rows = x.reshape(-1, self.shape[1])
            product = self._multiply(rows.T, adjoint=False)
            return product.T.reshape(*x.shape[:-1], self.shape[0])
        return self._multiply(x, adjoint=False)

    def _rmatvec(self, x: Array) -> Array:
        return self._adjoint()._matvec(x)

    def _matmat(self, X: Array) -> Array:
        return self._multiply(X, adjoint=False)

    def _rmatmat(self, X: Array) -> Array:
        return self._multiply(X, adjoint=True)

    def _init_dtype(self) -> None:
        """SciPy probes for the dtype here; ours is known."""

    def _check_matching_namespace(self, x: Any) -> None:
        """SciPy compares array libraries here; every kind is welcome."""

    def _refuse(self, method: str, x: Array, expected: str, size: int) -> NoReturn:
        letter = "M" if "M" in expected else "N"
        hint = ""
        if len(x.shape) == 2 and x.shape[1] == size and x.shape[0] != size:
            hint = " The transpose of what came would fit."
        raise ValueError(
            f"{method} of a {self.shape[0]} x {self.shape[1]} operator expects shape "
            f"{expected} with {letter} = {size}, got {tuple(x.shape)}.{hint}"
        )

    def __repr__(self) -> str:
        m, n = self.shape
        return f"<{m}x{n} {type(self).__name__} of {self.dtype} on {self.device}>"


def _blank(cls: Any) -> Any:
    """Return an operator without attributes, for pickle and copy to fill."""
    return cls.__new__(cls)
