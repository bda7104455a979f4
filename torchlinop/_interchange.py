"""Any array to torch, and the result back to the same kind of array.

Memory is shared wherever both sides can see it; what cannot be viewed safely is copied
once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import array_api_compat
import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from torchlinop._cupy import is_cupy_array, to_cupy, view_of_cupy
from torchlinop._dtypes import TORCH_TO_NUMPY, promoted, torch_dtype
from torchlinop._spread import is_spread, require_vector, spread_like, whole
from torchlinop._typing import Array

#: copies to and from CUDA devices of at least this many bytes go through pinned memory
_PINNED_BYTES = 1 << 16
_CPU = torch.device("cpu")  # quicker to compare than names of types


class Imported(NamedTuple):
    """A tensor made from an array, and the way back for results."""

    tensor: Tensor
    #: turns a fresh tensor on the operator's device into an array of the input's kind
    export: Callable[[Tensor], Array]


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
    if is_cupy_array(x):
        return _from_cupy(x, device, dtype)
    if sparse.issparse(x):
        raise TypeError(
            f"Got a sparse {type(x).__name__} where a dense vector or matrix was "
            "expected. Pass x.toarray(), or torchlinop.aslinearoperator(x) for a "
            "product of operators."
        )
    if _speaks_dlpack(x):
        return _from_dlpack(x, device, dtype)
    return _from_numpy(_as_numpy(x), device, dtype)


def as_tensor(x: Array, device: torch.device | None = None) -> Tensor:
    """Return an array as a tensor of the dtype in which an operator made of it computes.

    float32, float64 and their complex counterparts stay, half precision becomes float32,
    integers float64. By default on the device where ``x`` is.
    """
    if is_cupy_array(x):
        tensor = view_of_cupy(x)
    elif isinstance(x, Tensor):
        tensor = whole(x) if is_spread(x) else x
    elif _speaks_dlpack(x):
        tensor = _copy_through_dlpack(x)
    else:
        array = _as_numpy(x)
        here = device or torch.device("cpu")
        return _from_numpy(array, here, torch_dtype(array.dtype)).tensor
    dtype = tensor.dtype
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    elif dtype not in TORCH_TO_NUMPY:
        dtype = torch.float64
    return _from_torch(tensor, device or tensor.device, dtype).tensor


def is_plain_array(x: Any) -> bool:
    """Whether ``x`` is one of the usual arrays, which is quick to see."""
    return (type(x) is np.ndarray or type(x) is Tensor) and x.ndim > 0


def with_shape(x: Array) -> Array:
    """Return ``x`` with a ``.shape``; sequences and scalars become NumPy arrays."""
    if hasattr(x, "shape"):
        return x
    array = _as_numpy(x)
    if array.ndim == 0 and array.dtype.kind not in "biufc":
        raise TypeError(
            "Expected an array, an operator or a number, got an object of type "
            f"{type(x).__name__}."
        )
    return array


def _as_numpy(x: Any) -> np.ndarray:
    """Make an array of what NumPy can read; a list of tensors is no vector."""
    parts = x.values() if isinstance(x, Mapping) else x
    if isinstance(x, (list, tuple, Mapping)) and any(
        isinstance(part, Tensor) and part.ndim for part in parts
    ):
        shapes = [tuple(getattr(part, "shape", ())) for part in parts]
        raise TypeError(
            f"Expected one vector or matrix, got a {type(x).__name__} of {len(shapes)} "
            f"tensors, of shapes {shapes}. Of tensors shaped like the parameters make a "
            "vector with operator.space.to_vector(tensors), of others with "
            "torch.cat([t.flatten() for t in tensors])."
        )
    try:
        return np.asarray(x)
    except Exception as error:
        raise TypeError(
            f"Expected a dense array (NumPy, torch, CuPy, or one with __dlpack__), got a "
            f"{type(x).__name__} of which NumPy makes none: {error}"
        ) from error


# -------------------------------------------------------------------------- NumPy


def _from_numpy(x: np.ndarray, device: torch.device, dtype: torch.dtype) -> Imported:
    compute = TORCH_TO_NUMPY[dtype]
    if device == _CPU and type(x) is np.ndarray and x.dtype == compute:
        return Imported(_numpy_view_or_copy(x, compute), Tensor.numpy)  # the usual case
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
    # torch looks at the strides even of a dimension that is 0 or 1 long, which NumPy's
    # contiguous flags pass over
    size, strides = x.itemsize, x.strides
    viewable = (
        x.dtype == dtype
        and x.flags.behaved  # writeable and aligned
        and (strides == (size,) or all(s >= 0 and s % size == 0 for s in strides))
    )
    if not viewable:
        x = np.array(x, dtype=dtype, order="C", copy=True)
    return torch.from_numpy(x if type(x) is np.ndarray else np.asarray(x))


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda" or tensor.nbytes < _PINNED_BYTES:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _to_host(tensor: Tensor) -> Tensor:
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.device.type != "cuda" or tensor.nbytes < _PINNED_BYTES:
        return tensor.cpu()
    staging = torch.empty_like(tensor, device="cpu", pin_memory=True)
    staging.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return staging


# -------------------------------------------------------------------------- torch


def _from_torch(x: Tensor, device: torch.device, dtype: torch.dtype) -> Imported:
    if is_spread(x):
        require_vector(x)
        tensor, export = _from_torch(whole(x), device, dtype)
        return Imported(tensor, lambda y: spread_like(export(y), x))
    if x.layout != torch.strided:
        raise TypeError(
            f"Got a sparse tensor (layout {x.layout}) where a dense vector or matrix "
            "was expected. Pass x.to_dense()."
        )
    if x.is_quantized:
        raise TypeError(f"Got a tensor of {x.dtype}. Pass x.dequantize().")
    _check_device(x, device, "tensor")
    origin = x.device
    result = promoted(dtype, x.dtype)
    target = dtype.to_complex() if x.dtype.is_complex else dtype
    tensor = x.detach().to(device, target)
    if tensor.is_inference():
        tensor = tensor.clone()
    return Imported(tensor, lambda y: y.to(origin, result))


# --------------------------------------------------------------------------- CuPy


def _from_cupy(x: Array, device: torch.device, dtype: torch.dtype) -> Imported:
    if x.dtype.kind not in "biufc":
        raise TypeError(f"Expected a CuPy array of numbers, got dtype {x.dtype}.")
    target, result = _foreign_dtypes(x, dtype)
    tensor = view_of_cupy(x)
    _check_device(tensor, device, "CuPy array")
    origin = tensor.device

    def export(y: Tensor) -> Array:
        return to_cupy(y.to(origin)).astype(result, copy=False)

    return Imported(tensor.to(device, target), export)


def _foreign_dtypes(x: Array, dtype: torch.dtype) -> tuple[torch.dtype, np.dtype]:
    result = np.result_type(TORCH_TO_NUMPY[dtype], x.dtype)
    complex_input = x.dtype.kind == "c"
    return (dtype.to_complex() if complex_input else dtype), result


def _check_device(tensor: Tensor, device: torch.device, what: str) -> None:
    here, there = tensor.device, device
    kinds = {here.type, there.type}
    if here != there and ("cpu" not in kinds or "meta" in kinds):
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
    result = promoted(dtype, tensor.dtype)
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
