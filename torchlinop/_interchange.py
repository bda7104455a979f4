"""Any array to torch, and the result back to the same kind of array.

The only module that knows NumPy, CuPy and DLPack. Memory is shared wherever both sides
can see it; what cannot be viewed safely is copied once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import array_api_compat
import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from torchlinop._typing import Array

_NUMPY_TO_TORCH: dict[np.dtype, torch.dtype] = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.complex64): torch.complex64,
    np.dtype(np.complex128): torch.complex128,
}
_TORCH_TO_NUMPY: dict[torch.dtype, np.dtype] = {t: n for n, t in _NUMPY_TO_TORCH.items()}
#: host-device copies of at least this many bytes go through pinned memory
_PINNED_BYTES = 1 << 16


class Imported(NamedTuple):
    """A tensor made from an array, and the way back for results."""

    tensor: Tensor
    #: turns a fresh tensor on the operator's device into an array of the input's kind
    export: Callable[[Tensor], Array]


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """NumPy's name for an operator's dtype (float32/64, complex64/128)."""
    try:
        return _TORCH_TO_NUMPY[dtype]
    except KeyError:
        raise TypeError(
            "An operator computes in torch.float32 or float64, complex64 or complex128, "
            f"got {dtype!r}."
        ) from None


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """Torch's name for a NumPy dtype in which operators can compute.

    Integers and booleans become float64, half precision float32.
    """
    dtype = np.dtype(dtype)
    if dtype in _NUMPY_TO_TORCH:
        return _NUMPY_TO_TORCH[dtype]
    if dtype.kind == "c":
        return torch.complex128
    return torch.float32 if dtype == np.float16 else torch.float64


def is_scalar(x: Any) -> bool:
    """Whether ``x`` is a number: Python, NumPy, or a 0-dimensional array of any kind."""
    if np.isscalar(x):
        return not isinstance(x, (str, bytes))
    return getattr(x, "shape", None) == () and (
        hasattr(x, "__float__") or hasattr(x, "__complex__")
    )


def as_number(x: Any) -> float | complex:
    """Return a scalar as a Python number."""
    value = x.item() if hasattr(x, "item") else x
    try:
        return float(value)
    except TypeError:
        return complex(value)


def import_array(x: Array, device: torch.device, dtype: torch.dtype) -> Imported:
    """View or copy an array as a tensor on ``device``.

    Parameters
    ----------
    x
        NumPy, torch, CuPy, any array with ``__dlpack__``, or a (nested) sequence.
    device
        Where the operator computes.
    dtype
        The operator's dtype.

    Returns
    -------
    Imported
        The tensor, of ``dtype`` or its complex counterpart, never to be written to; and
        the export function, which gives results the dtype
        ``result_type(operator, x)``, as a dense matrix would.

    Raises
    ------
    TypeError
        ``x`` is sparse, holds objects or strings, or is no array.
    ValueError
        ``x`` lives on another accelerator than the operator.
    """
    if isinstance(x, np.ndarray):
        return _from_numpy(x, device, dtype)
    if isinstance(x, Tensor):
        return _from_torch(x, device, dtype)
    if _is_cupy(x):
        return _from_cupy(x, device, dtype)
    if sparse.issparse(x):
        raise TypeError(
            f"Got a sparse {type(x).__name__} where a dense vector or matrix was "
            "expected. Pass x.toarray(), or torchlinop.aslinearoperator(x) for a "
            "product of operators."
        )
    if _speaks_dlpack(x):
        return _from_dlpack(x, device, dtype)
    try:
        array = np.asarray(x)
    except Exception as error:
        raise TypeError(
            f"Expected a dense array (NumPy, torch, CuPy, or one with __dlpack__), got "
            f"{type(x).__name__}."
        ) from error
    return _from_numpy(array, device, dtype)


def as_tensor(x: Array, device: torch.device | None = None) -> Tensor:
    """Return an array as a tensor of the dtype in which an operator made of it computes.

    float32, float64 and their complex counterparts stay, half precision becomes float32,
    integers float64. By default on the device where ``x`` is.
    """
    if _is_cupy(x):
        tensor = _view_of_cupy(x)
    elif isinstance(x, Tensor):
        tensor = x
    elif _speaks_dlpack(x):
        tensor = _copy_through_dlpack(x)
    else:
        array = np.asarray(x)
        here = device or torch.device("cpu")
        return _from_numpy(array, here, torch_dtype(array.dtype)).tensor
    dtype = tensor.dtype
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    elif dtype not in _TORCH_TO_NUMPY:
        dtype = torch.float64
    return _from_torch(tensor, device or tensor.device, dtype).tensor


# -------------------------------------------------------------------------- NumPy


def _from_numpy(x: np.ndarray, device: torch.device, dtype: torch.dtype) -> Imported:
    compute = _TORCH_TO_NUMPY[dtype]
    if x.dtype == compute and type(x) is np.ndarray:
        target = result = compute
    else:
        target, result = _numpy_dtypes(x, compute)
    tensor = _numpy_view_or_copy(x, target)
    if device.type == "cpu":

        def export(y: Tensor) -> Array:
            array = y.numpy()
            if array.dtype != result:
                array = array.astype(result)
            return np.asmatrix(array) if isinstance(x, np.matrix) else array

        return Imported(tensor, export)

    def export_from_device(y: Tensor) -> Array:
        array = _to_host(y).numpy().astype(result, copy=False)
        return np.asmatrix(array) if isinstance(x, np.matrix) else array

    return Imported(_to_device(tensor, device), export_from_device)


def _numpy_dtypes(x: np.ndarray, compute: np.dtype) -> tuple[np.dtype, np.dtype]:
    """Return the dtypes in which to compute with ``x`` and to return the result."""
    if x.dtype.kind not in "biufc":
        raise TypeError(
            f"Expected an array of numbers, got dtype {x.dtype}. Convert it first, for "
            "instance with x.astype(float)."
        )
    if isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
        raise TypeError(
            "Got a masked array with masked entries, which have no value to multiply. "
            "Fill them first, for instance with x.filled(0)."
        )
    result = np.result_type(compute, x.dtype)
    if result.kind == "c" and compute.kind != "c":
        return np.dtype(f"c{2 * compute.itemsize}"), result
    return compute, result


def _numpy_view_or_copy(x: np.ndarray, dtype: np.dtype) -> Tensor:
    """Share memory if torch can view the array and may alias it, else copy once."""
    flags = x.flags
    viewable = (
        x.dtype == dtype
        and flags.writeable
        and flags.aligned
        and (flags.c_contiguous or all(s >= 0 and s % x.itemsize == 0 for s in x.strides))
    )
    if not viewable:
        x = np.array(x, dtype=dtype, order="K" if x.ndim == 1 else "C", copy=True)
        if any(s < 0 for s in x.strides):
            x = np.ascontiguousarray(x)
    return torch.from_numpy(x if type(x) is np.ndarray else np.asarray(x))


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.nbytes < _PINNED_BYTES:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _to_host(tensor: Tensor) -> Tensor:
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.nbytes < _PINNED_BYTES:
        return tensor.cpu()
    staging = torch.empty_like(tensor, device="cpu", pin_memory=True)
    staging.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return staging


# -------------------------------------------------------------------------- torch


def _from_torch(x: Tensor, device: torch.device, dtype: torch.dtype) -> Imported:
    if x.layout != torch.strided:
        raise TypeError(
            f"Got a sparse tensor (layout {x.layout}) where a dense vector or matrix "
            "was expected. Pass x.to_dense()."
        )
    _check_device(x, device, "tensor")
    origin = x.device
    result = torch.promote_types(dtype, x.dtype)
    target = dtype.to_complex() if x.dtype.is_complex else dtype
    tensor = x.detach().to(device, target)
    if tensor.is_inference():
        tensor = tensor.clone()
    return Imported(tensor, lambda y: y.to(origin, result))


# --------------------------------------------------------------------------- CuPy


def _is_cupy(x: Array) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def _from_cupy(x: Array, device: torch.device, dtype: torch.dtype) -> Imported:
    if x.dtype.kind not in "biufc":
        raise TypeError(f"Expected a CuPy array of numbers, got dtype {x.dtype}.")
    target, result = _foreign_dtypes(x, dtype)
    tensor = _view_of_cupy(x)
    _check_device(tensor, device, "CuPy array")
    origin = tensor.device

    def export(y: Tensor) -> Array:
        return to_cupy(y.to(origin)).astype(result, copy=False)

    return Imported(tensor.to(device, target), export)


def to_cupy(y: Tensor) -> Array:
    """View a tensor as a CuPy array, in the order of the current streams of both.

    Memory is shared. CuPy's stream waits for torch's (DLPack sees to that); where they
    differ, torch's allocator is told that CuPy's stream uses the memory, too.
    """
    cupy: Any = sys.modules["cupy"]
    y = y.resolve_conj().resolve_neg().contiguous()
    if not y.is_cuda:
        y = y.to(cupy_device())  # CuPy imports no memory of the host
    if not y.is_cuda:
        return cupy.from_dlpack(y)
    with _on_device_of(y):
        array = cupy.from_dlpack(y)
        stream = cupy.cuda.get_current_stream().ptr
        if stream != torch.cuda.current_stream(y.device).cuda_stream:
            y.record_stream(torch.cuda.ExternalStream(stream, device=y.device))
    return array


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, without which torch exports nothing."""
    if tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def cupy_device() -> torch.device:
    """Torch's name for the device on which CuPy makes arrays now."""
    return _view_of_cupy(sys.modules["cupy"].empty(1)).device


def cupyx_operator_type() -> type | None:
    """``LinearOperator`` of cupyx, if somebody has imported it."""
    module = sys.modules.get("cupyx.scipy.sparse.linalg")
    return None if module is None else getattr(module, "LinearOperator", None)


def with_base(cls: type, base: type) -> type:
    """Return a class of the same name that also has another base, if there can be one."""
    known: tuple[type, type] | None = cls.__dict__.get("_with_base")
    if known is None or known[0] is not base:
        try:
            twin = type(cls.__name__, (cls, base), {"__module__": cls.__module__})
        except Exception:  # a class whose __init_subclass__ wants arguments
            twin = cls
        known = base, twin
        cls._with_base = known  # type: ignore[attr-defined]
    return known[1]


def is_cupyx_matrix(x: Any) -> bool:
    """Whether ``x`` is a linear operator or sparse matrix of cupyx."""
    if not type(x).__module__.startswith("cupyx"):
        base = cupyx_operator_type()
        return base is not None and issubclass(type(x), base)
    return hasattr(x, "shape") and (hasattr(x, "matvec") or hasattr(x, "nnz"))


def _view_of_cupy(x: Array) -> Tensor:
    if any(s < 0 for s in x.strides):  # torch would abort the process
        x = x.copy()
    return torch.from_dlpack(x)


def _foreign_dtypes(x: Array, dtype: torch.dtype) -> tuple[torch.dtype, np.dtype]:
    result = np.result_type(_TORCH_TO_NUMPY[dtype], x.dtype)
    complex_input = x.dtype.kind == "c"
    return (dtype.to_complex() if complex_input else dtype), result


def _check_device(tensor: Tensor, device: torch.device, what: str) -> None:
    here, there = tensor.device, device
    if there.type != "cpu" and here.type != "cpu" and here != there:
        raise ValueError(
            f"The {what} is on {here} and the operator computes on {there}. Copy the "
            "array to the operator's device first."
        )


# ----------------------------------------------------------- other DLPack libraries


def _speaks_dlpack(x: Array) -> bool:
    """Whether to go through DLPack: not where NumPy can view the memory itself."""
    return hasattr(x, "__dlpack__") and not hasattr(x, "__array_interface__")


def _copy_through_dlpack(x: Array) -> Tensor:
    """Copy first: torch aborts the process on negative strides, and a read-only
    exporter would be aliased by a writable tensor.
    """
    try:
        return torch.from_dlpack(_namespace(x).asarray(x, copy=True))
    except Exception as error:
        raise TypeError(
            f"torch could not take {type(x).__module__}.{type(x).__name__} through "
            f"DLPack: {error}. Copy it into a contiguous array of a plain dtype first."
        ) from error


def _from_dlpack(x: Array, device: torch.device, dtype: torch.dtype) -> Imported:
    tensor = _copy_through_dlpack(x)
    _check_device(tensor, device, type(x).__name__)
    origin = tensor.device
    result = torch.promote_types(dtype, tensor.dtype)
    target = dtype.to_complex() if tensor.dtype.is_complex else dtype
    namespace = _namespace(x)

    def export(y: Tensor) -> Array:
        y = y.to(origin, result).resolve_conj().resolve_neg().contiguous()
        return namespace.from_dlpack(y)

    return Imported(tensor.to(device, target), export)


def _namespace(x: Array) -> Any:
    """Return the module whose ``from_dlpack`` makes arrays of the kind of ``x``."""
    try:
        return array_api_compat.array_namespace(x)
    except TypeError:
        root = sys.modules[type(x).__module__.partition(".")[0]]
        for module in (root, getattr(root, "dlpack", None)):
            if hasattr(module, "from_dlpack"):
                return module
    raise TypeError(
        f"{type(x).__module__}.{type(x).__name__} exports DLPack but its library offers "
        "no from_dlpack, so the result could not be returned in kind. Convert it to "
        "NumPy or torch first."
    )
