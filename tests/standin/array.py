"""CuPy's arrays on the host: what they can do and, above all, what they refuse."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Flags:
    """CuPy's flags; there is no ``writeable``."""

    c_contiguous: bool
    f_contiguous: bool
    owndata: bool

    def __getitem__(self, name: str) -> bool:
        return getattr(self, name.lower())


@dataclasses.dataclass(frozen=True)
class MemoryPointer:
    ptr: int


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):  # noqa: N801
    """A NumPy array behind CuPy's interface.

    The mixin does what CuPy's operators do: leave the operation to an operand whose
    ``__array_ufunc__`` is None (a linear operator), and call the ufunc otherwise.
    """

    __array_priority__ = 100

    def __init__(self, host: np.ndarray) -> None:
        self._host = host

    # ------------------------------------------------------------- what is refused

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

    # -------------------------------------------------------------------- exchange

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: Any = None,
        dl_device: Any = None,
        copy: Any = None,
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
    def data(self) -> MemoryPointer:
        return MemoryPointer(self._host.ctypes.data)

    # ---------------------------------------------------------------------- layout

    @property
    def shape(self) -> tuple[int, ...]:
        return self._host.shape

    @shape.setter
    def shape(self, shape: tuple[int, ...]) -> None:
        self._host = self._host.reshape(shape, copy=False)

    @property
    def flags(self) -> Flags:
        flags = self._host.flags
        return Flags(flags.c_contiguous, flags.f_contiguous, flags.owndata)

    @property
    def _c_contiguous(self) -> bool:
        return self.flags.c_contiguous

    @property
    def _f_contiguous(self) -> bool:
        return self.flags.f_contiguous

    # -------------------------------------------------------------------- contents

    def __getitem__(self, key: Any) -> ndarray:
        return ndarray(self._host[_key(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._host[_key(key)] = to_host(value)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self._host)))

    def __len__(self) -> int:
        return len(self._host)

    def __bool__(self) -> bool:
        return bool(self._host)

    def __int__(self) -> int:
        return int(self._host)

    def __float__(self) -> float:
        return float(self._host)

    def __complex__(self) -> complex:
        return complex(self._host)

    def item(self) -> Any:
        return self._host.item()

    def fill(self, value: Any) -> None:
        self._host.fill(to_host(value))

    def __repr__(self) -> str:
        return f"standin.{self._host!r}"


def _key(key: Any) -> tuple:
    """Index such that integers give 0-d views, into which CuPy's solvers write."""
    keys = key if isinstance(key, tuple) else (key,)
    return (*map(to_host, keys), *(() if any(k is ... for k in keys) else (...,)))


def _property(name: str) -> property:
    return property(lambda self: from_host(getattr(self._host, name)))


def _method(name: str) -> Callable:
    return lambda self, *args, **kwargs: from_host(
        getattr(self._host, name)(*map(to_host, args), **kwargs)
    )


for _name in ("T", "dtype", "imag", "itemsize", "nbytes", "ndim", "real", "size", "strides"):
    setattr(ndarray, _name, _property(_name))
for _name in (
    *("all", "any", "argsort", "astype", "conj", "copy", "dot", "max", "min", "ravel"),
    *("reshape", "squeeze", "sum", "transpose"),
):
    setattr(ndarray, _name, _method(_name))


def to_host(x: Any) -> Any:
    """Unwrap; NumPy arrays are refused, as CuPy refuses them in its functions."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    return type(x)(map(to_host, x)) if type(x) in (list, tuple) else x


def from_host(x: Any) -> Any:
    """Wrap arrays, and NumPy's scalars as the 0-d arrays that CuPy returns."""
    if isinstance(x, tuple) and any(isinstance(item, np.ndarray) for item in x):
        return tuple(map(from_host, x))
    return ndarray(np.asarray(x)) if isinstance(x, (np.ndarray, np.generic)) else x


def _lifted(function: Callable) -> Callable:
    """A NumPy function as a function of these arrays."""

    @functools.wraps(function)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        return from_host(function(*map(to_host, args), **kwargs))

    return lifted


# ------------------------------------------------------------------ module functions


def array(x: Any, dtype: Any = None, copy: bool = True, order: str = "K") -> ndarray:
    """Copy to the device: CuPy's one way in for NumPy arrays."""
    host = x._host if isinstance(x, ndarray) else np.array(x)
    if copy:
        return ndarray(np.array(host, dtype=dtype, order=order))
    return ndarray(np.asarray(host, dtype=dtype))


def asarray(x: Any, dtype: Any = None) -> ndarray:
    return array(x, dtype, copy=False)


def asnumpy(x: Any) -> np.ndarray:
    return x.get() if isinstance(x, ndarray) else np.asarray(x)


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    """Memory full of NaN, so that nobody reads it unpunished."""
    host = np.empty(shape, dtype, order)
    host.fill(np.nan if host.dtype.kind in "fc" else 77)
    return ndarray(host)


def empty_like(x: ndarray) -> ndarray:
    return empty(x.shape, x.dtype)


def from_dlpack(x: Any) -> ndarray:
    # by way of torch, since NumPy's own from_dlpack is read-only in some versions
    return ndarray(torch.utils.dlpack.from_dlpack(x.__dlpack__()).numpy())


def result_type(*arrays_and_dtypes: Any) -> np.dtype:
    # this is CuPy's code: linear operators go to NumPy, which finds their .dtype
    return np.result_type(
        *(a.dtype if isinstance(a, ndarray) else a for a in arrays_and_dtypes)
    )


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


class _Random:
    """NumPy's generator; nothing depends on CuPy's numbers."""

    def seed(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def random(self, shape: Any) -> ndarray:
        return ndarray(self._generator.random(shape))


_random = _Random()
RANDOM = {"seed": _random.seed, "random": _random.random}
LINALG = {
    name: _lifted(getattr(np.linalg, name))
    for name in ("cholesky", "eigh", "inv", "norm", "solve")
}
FUNCTIONS: dict[str, Any] = {
    **{
        f.__name__: f
        for f in (
            *(ndarray, array, asarray, asnumpy, empty, empty_like, from_dlpack),
            *(result_type, ElementwiseKernel, np.dtype, np.finfo, np.isscalar),
            *(np.float32, np.float64, np.complex64, np.complex128, np.int64),
        )
    },
    **{
        name: _lifted(getattr(np, name))
        for name in (
            *("any", "arange", "argsort", "ascontiguousarray", "asfortranarray"),
            *("atleast_2d", "conj", "diag", "dot", "eye", "hstack", "inner", "isnan"),
            *("matmul", "max", "maximum", "ones", "sort", "sqrt", "sum", "vdot"),
            *("where", "zeros", "zeros_like"),
        )
    },
    "newaxis": None,
    "__version__": "0.standin",
}
