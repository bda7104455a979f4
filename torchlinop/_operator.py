"""The operator: a SciPy LinearOperator that computes in torch on any kind of array.

A concrete operator implements two methods: :meth:`TorchLinearOperator._apply`, the
product with an ``(N, K)`` tensor, and :meth:`TorchLinearOperator._adjoint`. Everything
else is here: the operands of ``@ * / + - **``, and what comes of them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from torchlinop._algebra import Action, Conjugate, Multiple, Power, Product, Sum
from torchlinop._door import Door
from torchlinop._dtypes import as_number, is_scalar
from torchlinop._foreign import Dense, foreign_action
from torchlinop._interchange import as_tensor, is_plain_array, with_shape
from torchlinop._typing import Scalar


class TorchLinearOperator(Door):
    """A linear operator whose products are computed by torch.

    Takes NumPy, torch and CuPy arrays and any other with ``__dlpack__``, and returns the
    same kind on the same device, with dtype ``result_type(operator, array)``.

    Parameters
    ----------
    shape
        ``(M, N)``.
    dtype
        One of ``torch.float32``, ``float64``, ``complex64``, ``complex128``: what the
        operator computes in.
    device
        Where it computes.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    torch_dtype : torch.dtype
    device : torch.device
    """

    @abstractmethod
    def _adjoint(self) -> TorchLinearOperator:
        """Return the conjugate transpose; a self-adjoint operator returns itself."""

    # --------------------------------------------------------------------- operands

    def dot(self, x: Any) -> Any:
        """Product with an array, an operator (giving an operator) or a scalar."""
        if not is_plain_array(x):
            other = self._operand(x)
            if other is not None:
                return self._times(other)
            if is_scalar(x):
                return self._scaled(as_number(x))
            x = with_shape(x)
        if len(x.shape) not in (1, 2) or x.shape[0] != self.shape[1]:
            self._refuse("@", x, "(N,) or (N, K)", self.shape[1])
        return self._multiply(x, adjoint=False)

    def rdot(self, x: Any) -> Any:
        """Product ``x @ self`` with an array, an operator or a scalar."""
        other = self._operand(x)
        if other is not None:
            return other._times(self)
        if is_scalar(x):
            return self._scaled(as_number(x))
        x = with_shape(x)
        if len(x.shape) not in (1, 2) or x.shape[-1] != self.shape[0]:
            self._refuse("x @ operator", x, "(M,) or (K, M)", self.shape[0])
        if len(x.shape) == 1:
            return self.transpose()._multiply(x, adjoint=False)
        return self.transpose()._multiply(x.T, adjoint=False).T

    # ------------------------------------------------------------------ the algebra

    def _operand(self, other: Any) -> TorchLinearOperator | None:
        """Return another operator or sparse matrix as one of ours, arrays as None."""
        if isinstance(other, TorchLinearOperator):
            return other
        action = foreign_action(other, self.device)
        return None if action is None else ActionLinearOperator(action)

    def _summand(self, other: Any) -> TorchLinearOperator | None:
        """Return what can be added to this operator; dense matrices are wrapped."""
        operand = self._operand(other)
        if operand is not None or is_scalar(other):
            return operand
        if getattr(other, "ndim", None) == 2:
            return ActionLinearOperator(Dense(as_tensor(other, self.device)))
        return None

    # matrices with a structure stay what they are

    def _plus(self, other: TorchLinearOperator) -> TorchLinearOperator:
        return ActionLinearOperator(Sum(self, other))

    def _times(self, other: TorchLinearOperator) -> TorchLinearOperator:
        return ActionLinearOperator(Product(self, other))

    def _scaled(self, alpha: float | complex) -> TorchLinearOperator:
        return ActionLinearOperator(Multiple(self, alpha))

    def _raised(self, p: Scalar) -> TorchLinearOperator:
        return ActionLinearOperator(Power(self, p))

    def __call__(self, x: Any) -> Any:
        return self.dot(x)

    def __mul__(self, x: Any) -> Any:
        return self.dot(x)

    def __rmul__(self, x: Any) -> Any:
        return self.rdot(x)

    def __matmul__(self, x: Any) -> Any:
        if not is_plain_array(x) and is_scalar(x):
            raise ValueError("Scalar operands are not allowed with @; use * instead.")
        return self.dot(x)

    def __rmatmul__(self, x: Any) -> Any:
        if is_scalar(x):
            raise ValueError("Scalar operands are not allowed with @; use * instead.")
        return self.rdot(x)

    def __truediv__(self, x: Scalar) -> TorchLinearOperator:
        if not is_scalar(x):
            raise ValueError(
                f"An operator can be divided by a scalar only, got {type(x).__name__}."
            )
        return self._scaled(1 / as_number(x))

    def __neg__(self) -> TorchLinearOperator:
        return self._scaled(-1.0)

    def __add__(self, x: Any) -> TorchLinearOperator:
        other = self._summand(x)
        return NotImplemented if other is None else self._plus(other)

    def __radd__(self, x: Any) -> TorchLinearOperator:
        other = self._summand(x)
        return NotImplemented if other is None else other._plus(self)

    def __sub__(self, x: Any) -> TorchLinearOperator:
        other = self._summand(x)
        return NotImplemented if other is None else self._plus(-other)

    def __rsub__(self, x: Any) -> TorchLinearOperator:
        other = self._summand(x)
        return NotImplemented if other is None else other._plus(-self)

    def __pow__(self, p: Scalar) -> TorchLinearOperator:
        return self._raised(p) if is_scalar(p) else NotImplemented

    def adjoint(self) -> TorchLinearOperator:
        """Conjugate transpose; the same object if the operator is self-adjoint."""
        return self._adjoint()

    def transpose(self) -> TorchLinearOperator:
        """Transpose without conjugation."""
        return self._transpose()

    def _transpose(self) -> TorchLinearOperator:
        adjoint = self._adjoint()
        if self.torch_dtype.is_complex:
            return ActionLinearOperator(Conjugate(adjoint))
        return adjoint

    @property
    def H(self) -> TorchLinearOperator:
        """Conjugate transpose."""
        return self.adjoint()

    @property
    def T(self) -> TorchLinearOperator:
        """Transpose without conjugation."""
        return self.transpose()

    # --------------------------------------------------------------------- the rest

    def to_dense(self) -> Tensor:
        """Return the matrix, shape ``(M, N)``, as a torch tensor on the operator's device.

        Examples
        --------
        >>> import torch, torchlinop
        >>> (2 * torchlinop.aslinearoperator(torch.eye(2))).to_dense()
        tensor([[2., 0.],
                [0., 2.]])
        """
        n = self.shape[1]
        identity = torch.eye(n, dtype=self.torch_dtype, device=self.device)
        return self._product(identity).contiguous()

    def to_scipy(self) -> TorchLinearOperator:
        """Return the operator itself, which is a SciPy operator already."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Let ``torch.matmul(x, op)``, ``tensor @ op`` and the like reach the operator."""
        method = _TORCH_BINARY.get(getattr(func, "__name__", ""))
        if method is None or kwargs or len(args) != 2:
            return NotImplemented
        left, right = args
        forward, reflected = method
        if isinstance(left, TorchLinearOperator):
            return getattr(left, forward)(right)
        return getattr(right, reflected)(left)


#: names of torch functions, and the operator methods they stand for
_TORCH_BINARY = {
    **dict.fromkeys(
        ("matmul", "mm", "mv", "__matmul__", "__rmatmul__"),
        ("__matmul__", "__rmatmul__"),
    ),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), ("dot", "rdot")),
    **dict.fromkeys(("add", "__add__", "__radd__"), ("__add__", "__radd__")),
    **dict.fromkeys(("sub", "subtract", "__sub__"), ("__sub__", "__rsub__")),
}


class ActionLinearOperator(TorchLinearOperator):
    """What the algebra and other libraries' matrices are as operators.

    Parameters
    ----------
    action
        Of :mod:`torchlinop._algebra` or :mod:`torchlinop._foreign`.
    origin
        The operator of which this is the adjoint, if it was made as one.
    """

    def __init__(self, action: Action, origin: TorchLinearOperator | None = None) -> None:
        super().__init__(action.shape, action.dtype, action.device)
        self.args = action.args
        self._action = action
        self._origin = origin

    def _apply(self, x: Tensor) -> Tensor:
        return self._action.apply(x)

    def _adjoint(self) -> TorchLinearOperator:
        if self._origin is not None:
            return self._origin
        adjoint = self._action.adjoint()
        return self if adjoint is self._action else ActionLinearOperator(adjoint, self)

    def _scaled(self, alpha: float | complex) -> TorchLinearOperator:
        if isinstance(self._action, Multiple):
            inner, beta = self.args
            return ActionLinearOperator(Multiple(inner, alpha * beta))
        return super()._scaled(alpha)

    def __repr__(self) -> str:
        kind = type(self._action).__name__
        return super().__repr__().replace("ActionLinearOperator", kind)


def aslinearoperator(
    obj: Any, *, device: torch.device | str | None = None
) -> TorchLinearOperator:
    """Return a matrix of any kind as an operator that takes arrays of any kind.

    Parameters
    ----------
    obj
        A torch tensor, a NumPy or CuPy array, a sparse matrix, an operator of SciPy or
        cupyx, any object with ``shape`` and ``matvec`` (pylops), or one of ours
        (returned as it is). Integers compute as float64.
    device
        Where to compute; by default where ``obj`` is.

    Raises
    ------
    TypeError
        ``obj`` is nothing that has a matrix.
    ValueError
        ``obj`` has not two dimensions.

    Examples
    --------
    >>> import numpy as np, torch, torchlinop
    >>> A = torchlinop.aslinearoperator(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> A @ np.ones(2, dtype=np.float32)
    array([3., 7.], dtype=float32)
    """
    if isinstance(obj, TorchLinearOperator):
        return obj
    device = None if device is None else torch.device(device)
    action = foreign_action(obj, device)
    if action is not None:
        return ActionLinearOperator(action)
    is_array = hasattr(obj, "__array__") or hasattr(obj, "__dlpack__")
    if not is_array and not isinstance(obj, (list, tuple)):
        raise TypeError(
            "Expected a matrix (torch, NumPy, CuPy, sparse) or a linear operator, got "
            f"{type(obj).__name__}."
        )
    return ActionLinearOperator(Dense(as_tensor(obj, device)))
