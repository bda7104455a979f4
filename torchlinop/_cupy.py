"""CuPy: its arrays seen as tensors and back, and its operators.

Nothing is imported: what is not in ``sys.modules`` nobody uses.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from torchlinop._typing import Array


def is_cupy_array(x: Array) -> bool:
    """Whether ``x`` is an array of CuPy."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def view_of_cupy(x: Array) -> Tensor:
    """Share memory if torch can view the array, else copy once."""
    if any(stride < 0 or stride % x.itemsize for stride in x.strides):
        x = x.copy()  # torch would abort the process
    return torch.from_dlpack(x)


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
    return view_of_cupy(sys.modules["cupy"].empty(1)).device


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
