"""CuPy's arrays on the host: what they can do and, above all, what they refuse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):  # noqa: N801
    """A NumPy array behind CuPy's interface.

    The mixin does what CuPy's operators do: leave the operation to an operand whose
    ``__array_ufunc__`` is None (a linear operator), and call the ufunc otherwise.
    """

    __array_priority__ = 100

    def __init__(self, host: np.ndarray) -> None:
        self._host = host

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return NotImplemented  # CuPy has some of these; nothing should depend on that

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: tuple = (), **kwargs: Any
    ) -> Any:
        for x in (*inputs, *out):
            if not isinstance(x, ndarray) and not np.isscalar(x):
                raise TypeError(f"Unsupported type {type(x)}")
        if out:
            kwargs["out"] = tuple(x._host for x in out)
        result = getattr(ufunc, method)(*map(to_host, inputs), **kwargs)
        return out[0] if out else from_host(result)

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, copy: Any = None
    ) -> Any:
        # torch 2.13 ends the process on negative strides; a failed test is better
        if any(s < 0 for s in self.strides):
            raise BufferError("torch cannot take negative strides")
        return self._host.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._host.__dlpack_device__()

    def get(self) -> np.ndarray:
        return self._host.copy()

    @property
    def data(self) -> SimpleNamespace:
        return SimpleNamespace(ptr=self._host.ctypes.data)

    @property
    def flags(self) -> Flags:
        return Flags(self._host)

    @property
    def _c_contiguous(self) -> bool:
        return self._host.flags.c_contiguous

    @property
    def _f_contiguous(self) -> bool:
        return self._host.flags.f_contiguous

    def __getitem__(self, key: Any) -> ndarray:
        return ndarray(self._host[_key(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._host[_key(key)] = to_host(value)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return len(self._host)

    def __bool__(self) -> bool:
        return bool(self._host)

    def __int__(self) -> int:
        return int(self._host)

    def __float__(self) -> float:
        return float(self._host)

    def __repr__(self) -> str:
        return f"standin.{self._host!r}"


class Flags(SimpleNamespace):
    """CuPy's flags, of which none is ``writeable``."""

    def __init__(self, host: np.ndarray) -> None:
        names = ("c_contiguous", "f_contiguous", "owndata")
        super().__init__(**{name: getattr(host.flags, name) for name in names})

    def __getitem__(self, name: str) -> bool:
        return getattr(self, name.lower())


def _key(key: Any) -> tuple:
    """Index such that integers give 0-d views, into which CuPy's solvers write."""
    keys = key if isinstance(key, tuple) else (key,)
    return (*map(to_host, keys), *(() if any(k is ... for k in keys) else (...,)))


def to_host(x: Any) -> Any:
    """Unwrap; NumPy arrays and operators are refused, as CuPy's functions refuse them."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, np.ndarray) or getattr(x, "__array_ufunc__", ...) is None:
        raise TypeError(f"Unsupported type {type(x)}")
    return type(x)(map(to_host, x)) if type(x) in (list, tuple) else x


def from_host(x: Any) -> Any:
    """Wrap arrays, and NumPy's scalars as the 0-d arrays that CuPy returns."""
    if isinstance(x, tuple) and any(isinstance(item, np.ndarray) for item in x):
        return tuple(map(from_host, x))
    return ndarray(np.asarray(x)) if isinstance(x, (np.ndarray, np.generic)) else x


def _lifted(function: Callable) -> Callable:
    """A NumPy function as a function of these arrays."""
    return lambda *args, **kwargs: from_host(function(*map(to_host, args), **kwargs))


def _attribute(name: str) -> property:
    return property(lambda self: from_host(getattr(self._host, name)))


def _method(name: str) -> Callable:
    def method(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        return _lifted(getattr(self._host, name))(*args, **kwargs)

    return method


for _name in ("T", "dtype", "imag", "itemsize", "nbytes", "ndim"):
    setattr(ndarray, _name, _attribute(_name))
for _name in ("real", "shape", "size", "strides"):
    setattr(ndarray, _name, _attribute(_name))
for _name in ("all", "any", "astype", "conj", "copy", "dot", "fill", "item", "max"):
    setattr(ndarray, _name, _method(_name))
for _name in ("min", "ravel", "reshape", "squeeze", "sum", "transpose"):
    setattr(ndarray, _name, _method(_name))


# ----------------------------------------------------------------- functions of cupy


def array(x: Any, dtype: Any = None, copy: bool = True) -> ndarray:
    """The one way in for NumPy arrays, which are copied (to the device)."""
    host = x._host if isinstance(x, ndarray) else np.array(x)
    return ndarray(np.array(host, dtype) if copy else np.asarray(host, dtype))


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    """Memory full of NaN, so that nobody reads it unpunished."""
    host = np.empty(shape, dtype, order)
    host.fill(np.nan if host.dtype.kind in "fc" else 77)
    return ndarray(host)


def from_dlpack(x: Any) -> ndarray:
    # by way of torch, since the result of NumPy's own may be read-only
    return ndarray(torch.utils.dlpack.from_dlpack(x.__dlpack__()).numpy())


def result_type(*operands: Any) -> np.dtype:
    # as CuPy does it: linear operators go to NumPy, which finds their .dtype
    return np.result_type(*(x.dtype if isinstance(x, ndarray) else x for x in operands))


def elementwise_copy(source: ndarray, target: ndarray) -> None:
    target._host[...] = source._host


class ElementwiseKernel:
    """CuPy's compiled kernels, of which the solvers have one."""

    def __init__(self, inputs: str, outputs: str, operation: str, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any) -> None:
        if self._name != "cupy_eigsh_normalize":
            raise NotImplementedError(self._name)
        u, beta, j, n, v, V = map(to_host, args)
        v[...] = u / beta[j]
        V.reshape(-1)[(j + 1) * n : (j + 2) * n] = v


def _all_lifted(module: Any, names: str) -> dict[str, Callable]:
    return {name: _lifted(getattr(module, name)) for name in names.split()}


RANDOM = _all_lifted(np.random.RandomState(0), "seed random")
LINALG = _all_lifted(np.linalg, "cholesky eigh inv norm solve")
FUNCTIONS = {
    "ndarray": ndarray,
    "array": array,
    "asarray": functools.partial(array, copy=False),
    "asnumpy": lambda x: x.get() if isinstance(x, ndarray) else np.asarray(x),
    "empty": empty,
    "empty_like": lambda x: empty(x.shape, x.dtype),
    "from_dlpack": from_dlpack,
    "result_type": result_type,
    "ElementwiseKernel": ElementwiseKernel,
    **{name: getattr(np, name) for name in ("dtype", "finfo", "isscalar", "newaxis")},
    **{name: getattr(np, name) for name in ("float32", "float64", "complexfloating")},
    **_all_lifted(np, "any argsort asfortranarray atleast_2d conj diag dot eye hstack"),
    **_all_lifted(np, "inner isnan matmul max maximum ones sort sqrt sum vdot where"),
    **_all_lifted(np, "zeros zeros_like"),
}
