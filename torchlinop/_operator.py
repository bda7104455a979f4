"""The operator: a SciPy LinearOperator that computes in torch on any kind of array.

A concrete operator implements two methods: :meth:`TorchLinearOperator._apply`, the
product with an ``(N, K)`` tensor, and :meth:`TorchLinearOperator._adjoint`. Everything
else (array kinds, dtypes, shapes, the algebra) is here, once.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from typing import Any, NoReturn

import numpy as np
import scipy.sparse.linalg
import torch
from scipy import sparse
from torch import Tensor

from torchlinop import _interchange
from torchlinop._interchange import as_number, as_tensor, import_array, is_scalar
from torchlinop._typing import Array, Scalar


class TorchLinearOperator(scipy.sparse.linalg.LinearOperator):
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

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(_interchange.numpy_dtype(dtype), shape)
        self.torch_dtype = dtype
        self.device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The operator's class; where cupyx is in use, as a subclass of cupyx's as well.

        For ``isinstance``, by which cupyx's solvers decide whether to make a wrapper,
        which would multiply blocks column by column.
        """
        base = _interchange.cupyx_operator_type()
        cls: type = type(self)
        return cls if base is None else _interchange.with_base(cls, base)

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
    def _adjoint(self) -> TorchLinearOperator:
        """Return the conjugate transpose; a self-adjoint operator returns itself."""

    # -------------------------------------------------------------------- the door

    def _product(self, x: Tensor) -> Tensor:
        """Multiply a tensor: every product of every operator passes here, once.

        ``x`` has shape ``(N, K)`` and the operator's dtype or, for a real operator, its
        complex counterpart, which is multiplied by parts in one block.
        """
        if torch.is_autocast_enabled(self.device.type):
            with torch.autocast(self.device.type, enabled=False):
                return self._product(x)
        if x.dtype.is_complex and not self.torch_dtype.is_complex:
            k = x.shape[1]
            parts = self._apply(torch.cat([x.real, x.imag], dim=1).to(self.torch_dtype))
            return torch.complex(parts[:, :k].contiguous(), parts[:, k:].contiguous())
        if x.dtype != self.torch_dtype:
            x = x.to(self.torch_dtype)
        return self._apply(x)

    def _multiply(self, x: Array, *, adjoint: bool) -> Array:
        """Multiply an array of shape ``(N,)`` or ``(N, K)`` of any kind."""
        operator = self._adjoint() if adjoint else self
        tensor, export = import_array(x, operator.device, operator.torch_dtype)
        if tensor.ndim == 1:
            return export(operator._product(tensor.unsqueeze(1)).reshape(-1))
        return export(operator._product(tensor).contiguous())

    # ------------------------------------------------------- SciPy's public methods

    def matvec(self, x: Array) -> Array:
        """Product with a vector of shape ``(N,)`` or ``(N, 1)``."""
        x = _with_shape(x)
        if x.shape != (self.shape[1],) and x.shape != (self.shape[1], 1):
            self._refuse("matvec", x, "(N,) or (N, 1)", self.shape[1])
        return self._multiply(x, adjoint=False)

    def rmatvec(self, x: Array) -> Array:
        """Product of the adjoint with a vector of shape ``(M,)`` or ``(M, 1)``."""
        x = _with_shape(x)
        if x.shape != (self.shape[0],) and x.shape != (self.shape[0], 1):
            self._refuse("rmatvec", x, "(M,) or (M, 1)", self.shape[0])
        return self._multiply(x, adjoint=True)

    def matmat(self, X: Array) -> Array:
        """Product with a matrix of shape ``(N, K)``."""
        X = _with_shape(X)
        if len(X.shape) != 2 or X.shape[0] != self.shape[1]:
            self._refuse("matmat", X, "(N, K)", self.shape[1])
        return self._multiply(X, adjoint=False)

    def rmatmat(self, X: Array) -> Array:
        """Product of the adjoint with a matrix of shape ``(M, K)``."""
        X = _with_shape(X)
        if len(X.shape) != 2 or X.shape[0] != self.shape[0]:
            self._refuse("rmatmat", X, "(M, K)", self.shape[0])
        return self._multiply(X, adjoint=True)

    def dot(self, x: Any) -> Any:
        """Product with an array, an operator (giving an operator) or a scalar."""
        if not _is_plain_array(x):
            other = self._operand(x)
            if other is not None:
                return ProductLinearOperator(self, other)
            if is_scalar(x):
                return _scaled(self, as_number(x))
            x = _with_shape(x)
        if len(x.shape) not in (1, 2) or x.shape[0] != self.shape[1]:
            self._refuse("@", x, "(N,) or (N, K)", self.shape[1])
        return self._multiply(x, adjoint=False)

    def rdot(self, x: Any) -> Any:
        """Product ``x @ self`` with an array, an operator or a scalar."""
        other = self._operand(x)
        if other is not None:
            return ProductLinearOperator(other, self)
        if is_scalar(x):
            return _scaled(self, as_number(x))
        x = _with_shape(x)
        if len(x.shape) not in (1, 2) or x.shape[-1] != self.shape[0]:
            self._refuse("x @ operator", x, "(M,) or (K, M)", self.shape[0])
        if len(x.shape) == 1:
            return self.transpose()._multiply(x, adjoint=False)
        return self.transpose()._multiply(x.T, adjoint=False).T

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

    # ------------------------------------------------------------------ the algebra

    def _operand(self, other: Any) -> TorchLinearOperator | None:
        """Return another operator or sparse matrix as one of ours, arrays as None."""
        if isinstance(other, TorchLinearOperator):
            return other
        if isinstance(other, scipy.sparse.linalg.LinearOperator) or (
            sparse.issparse(other)
        ):
            return ForeignLinearOperator(other, device=self.device)
        if _interchange.is_cupyx_matrix(other):
            return CupyxLinearOperator(other, device=self.device)
        return None

    def _summand(self, other: Any) -> TorchLinearOperator | None:
        """Return what can be added to this operator; dense matrices are wrapped."""
        operand = self._operand(other)
        if operand is not None or is_scalar(other):
            return operand
        if getattr(other, "ndim", None) == 2:
            return DenseLinearOperator(as_tensor(other, self.device))
        return None

    def __call__(self, x: Any) -> Any:
        return self.dot(x)

    def __mul__(self, x: Any) -> Any:
        return self.dot(x)

    def __rmul__(self, x: Any) -> Any:
        return self.rdot(x)

    def __matmul__(self, x: Any) -> Any:
        if not _is_plain_array(x) and is_scalar(x):
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
        return _scaled(self, 1 / as_number(x))

    def __neg__(self) -> TorchLinearOperator:
        return _scaled(self, -1.0)

    def __add__(self, x: Any) -> TorchLinearOperator:
        other = self._summand(x)
        return NotImplemented if other is None else SumLinearOperator(self, other)

    def __radd__(self, x: Any) -> TorchLinearOperator:
        other = self._summand(x)
        return NotImplemented if other is None else SumLinearOperator(other, self)

    def __sub__(self, x: Any) -> TorchLinearOperator:
        other = self._summand(x)
        return NotImplemented if other is None else SumLinearOperator(self, -other)

    def __rsub__(self, x: Any) -> TorchLinearOperator:
        other = self._summand(x)
        return NotImplemented if other is None else SumLinearOperator(other, -self)

    def __pow__(self, p: Scalar) -> TorchLinearOperator:
        return PowerLinearOperator(self, p) if is_scalar(p) else NotImplemented

    def adjoint(self) -> TorchLinearOperator:
        """Conjugate transpose; the same object if the operator is self-adjoint."""
        return self._adjoint()

    def transpose(self) -> TorchLinearOperator:
        """Transpose without conjugation."""
        return self._transpose()

    def _transpose(self) -> TorchLinearOperator:
        adjoint = self._adjoint()
        if self.torch_dtype.is_complex:
            return ConjugateLinearOperator(adjoint)
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


def _is_plain_array(x: Any) -> bool:
    """Whether ``x`` is one of the usual arrays, which is quick to see."""
    return (type(x) is np.ndarray or type(x) is Tensor) and x.ndim > 0


def _with_shape(x: Array) -> Array:
    """Return ``x`` with a ``.shape``; sequences and scalars become NumPy arrays."""
    if hasattr(x, "shape"):
        return x
    array = (
        np.asarray(x) if isinstance(x, (list, tuple)) or hasattr(x, "__array__") else None
    )
    if array is None:
        raise TypeError(
            "Expected an array, an operator or a number, got an object of type "
            f"{type(x).__name__}."
        )
    return array


# ----------------------------------------------------------------------- composites


def _common(a: TorchLinearOperator, b: TorchLinearOperator) -> torch.dtype:
    """Return the dtype of a sum or product; refuse operands on two devices."""
    if a.device != b.device:
        raise ValueError(
            f"Cannot combine operators on two devices: {a!r} and {b!r}. Build both on "
            "one device."
        )
    return torch.promote_types(a.torch_dtype, b.torch_dtype)


class SumLinearOperator(TorchLinearOperator):
    """``A + B``."""

    def __init__(self, a: TorchLinearOperator, b: TorchLinearOperator) -> None:
        if a.shape != b.shape:
            raise ValueError(
                f"Cannot add a {a.shape[0]} x {a.shape[1]} operator and a "
                f"{b.shape[0]} x {b.shape[1]} one: the shapes have to agree."
            )
        super().__init__(a.shape, _common(a, b), a.device)
        self.args = (a, b)

    def _apply(self, x: Tensor) -> Tensor:
        a, b = self.args
        y, z = a._product(_narrow(x, a)), b._product(_narrow(x, b))
        if y.dtype == self.torch_dtype:
            return y.add_(z)
        return (y + z).to(self.torch_dtype)

    def _adjoint(self) -> TorchLinearOperator:
        a, b = self.args
        a_adjoint, b_adjoint = a._adjoint(), b._adjoint()
        if a_adjoint is a and b_adjoint is b:
            return self
        return SumLinearOperator(a_adjoint, b_adjoint)


class ProductLinearOperator(TorchLinearOperator):
    """``A @ B``."""

    def __init__(self, a: TorchLinearOperator, b: TorchLinearOperator) -> None:
        if a.shape[1] != b.shape[0]:
            raise ValueError(
                f"Cannot multiply a {a.shape[0]} x {a.shape[1]} operator and a "
                f"{b.shape[0]} x {b.shape[1]} one: {a.shape[1]} columns meet "
                f"{b.shape[0]} rows."
            )
        super().__init__((a.shape[0], b.shape[1]), _common(a, b), a.device)
        self.args = (a, b)

    def _apply(self, x: Tensor) -> Tensor:
        a, b = self.args
        y = a._product(_narrow(b._product(_narrow(x, b)), a))
        return y.to(self.torch_dtype)

    def _adjoint(self) -> TorchLinearOperator:
        a, b = self.args
        return ProductLinearOperator(b._adjoint(), a._adjoint())


class ScaledLinearOperator(TorchLinearOperator):
    """``alpha * A``; keeps the precision of ``A`` whatever the scalar's type."""

    def __init__(self, a: TorchLinearOperator, alpha: float | complex) -> None:
        complex_scale = isinstance(alpha, complex)
        dtype = a.torch_dtype.to_complex() if complex_scale else a.torch_dtype
        super().__init__(a.shape, dtype, a.device)
        self.args = (a, alpha)

    def _apply(self, x: Tensor) -> Tensor:
        a, alpha = self.args
        y = a._product(x)
        return y.mul_(alpha) if y.dtype == self.torch_dtype else y * alpha

    def _adjoint(self) -> TorchLinearOperator:
        a, alpha = self.args
        adjoint = a._adjoint()
        if adjoint is a and not isinstance(alpha, complex):
            return self
        return ScaledLinearOperator(adjoint, alpha.conjugate())


def _scaled(a: TorchLinearOperator, alpha: float | complex) -> TorchLinearOperator:
    if isinstance(a, ScaledLinearOperator):
        inner, beta = a.args
        return ScaledLinearOperator(inner, alpha * beta)
    return ScaledLinearOperator(a, alpha)


class PowerLinearOperator(TorchLinearOperator):
    """``A ** p`` for an integer ``p >= 0``."""

    def __init__(self, a: TorchLinearOperator, p: Scalar) -> None:
        if a.shape[0] != a.shape[1]:
            raise ValueError(
                f"Only a square operator has powers, got {a.shape[0]} x {a.shape[1]}."
            )
        exponent = as_number(p)
        if isinstance(exponent, complex) or exponent < 0 or exponent % 1:
            raise ValueError(f"The exponent has to be an integer >= 0, got {p!r}.")
        super().__init__(a.shape, a.torch_dtype, a.device)
        self.args = (a, int(exponent))

    def _apply(self, x: Tensor) -> Tensor:
        a, p = self.args
        y = x.clone() if p == 0 else x
        for _ in range(p):
            y = a._product(y)
        return y

    def _adjoint(self) -> TorchLinearOperator:
        a, p = self.args
        adjoint = a._adjoint()
        return self if adjoint is a else PowerLinearOperator(adjoint, p)


class ConjugateLinearOperator(TorchLinearOperator):
    """Entrywise complex conjugate of ``A``."""

    def __init__(self, a: TorchLinearOperator) -> None:
        super().__init__(a.shape, a.torch_dtype, a.device)
        self.args = (a,)

    def _apply(self, x: Tensor) -> Tensor:
        return self.args[0]._product(x.conj().resolve_conj()).conj_physical()

    def _adjoint(self) -> TorchLinearOperator:
        return ConjugateLinearOperator(self.args[0]._adjoint())


def _narrow(x: Tensor, a: TorchLinearOperator) -> Tensor:
    """Give ``x`` the precision of ``a``, keeping it complex if it is."""
    dtype = a.torch_dtype
    return x.to(dtype.to_complex() if x.dtype.is_complex else dtype)


# ----------------------------------------------------------------- foreign matrices


class DenseLinearOperator(TorchLinearOperator):
    """A dense matrix.

    Parameters
    ----------
    matrix
        Shape ``(M, N)``, real or complex. Its memory is shared, not copied.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2:
            raise ValueError(
                f"A matrix has two dimensions, got shape {tuple(matrix.shape)}."
            )
        super().__init__(tuple(matrix.shape), matrix.dtype, matrix.device)  # type: ignore[arg-type]
        self._matrix = matrix.detach()

    def _apply(self, x: Tensor) -> Tensor:
        return self._matrix @ x

    def _adjoint(self) -> TorchLinearOperator:
        return DenseLinearOperator(self._matrix.mH)


class ForeignLinearOperator(TorchLinearOperator):
    """A SciPy operator or sparse matrix, multiplied on the host by its own code.

    Parameters
    ----------
    operator
        Anything that ``scipy.sparse.linalg.aslinearoperator`` accepts.
    device
        Where vectors come from; on a GPU every product copies them to the host and back.
    """

    def __init__(self, operator: Any, *, device: torch.device) -> None:
        wrapped = scipy.sparse.linalg.aslinearoperator(operator)
        dtype = np.dtype(float) if wrapped.dtype is None else wrapped.dtype
        super().__init__(wrapped.shape, _interchange.torch_dtype(dtype), device)
        self._operator = wrapped

    def _apply(self, x: Tensor) -> Tensor:
        host = x.cpu().resolve_conj().resolve_neg().numpy()
        y = np.array(self._operator.matmat(host), dtype=self.dtype, order="C")
        return torch.from_numpy(y).to(self.device)

    def _adjoint(self) -> TorchLinearOperator:
        return ForeignLinearOperator(self._operator.H, device=self.device)


class CupyxLinearOperator(TorchLinearOperator):
    """An operator or sparse matrix of cupyx, multiplied on the GPU by its own code.

    Parameters
    ----------
    operator
        Anything that ``cupyx.scipy.sparse.linalg.aslinearoperator`` accepts.
    device
        Where vectors come from, by default where CuPy works now.
    """

    def __init__(self, operator: Any, *, device: torch.device | None = None) -> None:
        cupyx = importlib.import_module("cupyx.scipy.sparse.linalg")
        wrapped = cupyx.aslinearoperator(operator)
        dtype = _interchange.torch_dtype(wrapped.dtype)
        super().__init__(wrapped.shape, dtype, device or _interchange.cupy_device())
        self._operator = wrapped

    def _apply(self, x: Tensor) -> Tensor:
        try:
            if x.shape[1] == 1:
                y = self._operator.matvec(_interchange.to_cupy(x.reshape(-1)))
            else:
                y = self._operator.matmat(_interchange.to_cupy(x))
        except (TypeError, NotImplementedError) as error:
            raise NotImplementedError(
                f"The operator of cupyx could not be multiplied ({error}). For products "
                "with its adjoint it has to be made with rmatvec=."
            ) from error
        # a copy, since the operator may keep what it returned
        product = as_tensor(y, self.device).to(self.torch_dtype, copy=True)
        return product.reshape(self.shape[0], x.shape[1])

    def _adjoint(self) -> TorchLinearOperator:
        return CupyxLinearOperator(self._operator.H, device=self.device)


def aslinearoperator(
    obj: Any, *, device: torch.device | str | None = None
) -> TorchLinearOperator:
    """Return a matrix of any kind as an operator that takes arrays of any kind.

    Parameters
    ----------
    obj
        A torch tensor, a NumPy or CuPy array, a sparse matrix, an operator of SciPy or
        cupyx, or one of ours (returned as it is). Integers compute as float64.
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
    if isinstance(obj, scipy.sparse.linalg.LinearOperator) or sparse.issparse(obj):
        return ForeignLinearOperator(obj, device=device or torch.device("cpu"))
    if _interchange.is_cupyx_matrix(obj):
        return CupyxLinearOperator(obj, device=device)
    if not hasattr(obj, "__array__") and not hasattr(obj, "__dlpack__"):
        if hasattr(obj, "shape") and hasattr(obj, "matvec"):
            return ForeignLinearOperator(obj, device=device or torch.device("cpu"))
        if not isinstance(obj, (list, tuple)):
            raise TypeError(
                "Expected a matrix (torch, NumPy, CuPy, sparse) or a linear operator, "
                f"got {type(obj).__name__}."
            )
    return DenseLinearOperator(as_tensor(obj, device))
