"""Strategies for arrays: any shape, stride, order, dtype, byte order and flag."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

#: of a computation: float32 if an operator or an array is so
NUMPY_DTYPES = ["?", *"bBhHiIlLqQ", "f2", "f4", "f8", "g", "c8", "c16", "G"]
TORCH_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
]


@st.composite
def shapes(draw: Any, n: int) -> tuple[int, ...]:
    """Of a vector or a matrix that an operator with ``n`` columns takes."""
    columns = draw(st.sampled_from([None, 1, 0, 2, 3, 9]))
    return (n,) if columns is None else (n, columns)


def _values(draw: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Small numbers of either sign, with zeros, as complex."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    part = rng.uniform(-4, 4, (2, *shape)) * (rng.random((2, *shape)) < 0.9)
    return part[0] + 1j * part[1]


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.kind != "c":
        values = values.real
    if dtype.kind in "bu":
        values = np.abs(values)
    return values.astype(dtype)


@st.composite
def _layouts(draw: Any, ndim: int) -> dict:
    return {
        "order": draw(st.permutations(range(ndim))),
        "steps": [draw(st.sampled_from([1, -1, 2, -2, 3, -3])) for _ in range(ndim)],
        "start": [draw(st.integers(0, 2)) for _ in range(ndim)],
    }


def _laid_out(base: Any, shape: tuple[int, ...], layout: dict) -> np.ndarray:
    """A view of ``shape`` into larger memory that ``base(shape)`` makes."""
    order = layout["order"]
    room = [
        start + max(size, 1) * abs(step)
        for start, size, step in zip(layout["start"], shape, layout["steps"], strict=True)
    ]
    memory = base(tuple(room[axis] for axis in order)).transpose(np.argsort(order))
    spread = tuple(
        slice(start, start + size * abs(step), abs(step))
        for start, size, step in zip(layout["start"], shape, layout["steps"], strict=True)
    )
    view = memory[spread]
    return view[tuple(slice(None, None, 1 if s > 0 else -1) for s in layout["steps"])]


@st.composite
def numpy_arrays(draw: Any, shape: tuple[int, ...]) -> np.ndarray:
    """NumPy arrays of any kind of memory."""
    dtype = np.dtype(draw(st.sampled_from(NUMPY_DTYPES)))
    dtype = dtype.newbyteorder(draw(st.sampled_from("=<>")))
    kind = draw(st.sampled_from(["strided", "unaligned", "packed", "repeated"]))
    values = _cast(_values(draw, shape), dtype)
    if kind == "repeated":  # strides of zero
        array = np.broadcast_to(values[:1] if shape[0] else values, shape)
    else:
        array = _laid_out(
            lambda room: _memory(kind, room, dtype), shape, draw(_layouts(len(shape)))
        )
        array[...] = values
    if kind != "repeated" and draw(st.booleans()):
        array.flags.writeable = False
    if array.ndim == 2 and draw(st.integers(0, 9)) == 0:
        return np.asmatrix(array)
    return array


def _memory(kind: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if kind == "packed":
        return np.zeros(shape, dtype=[("pad", "i1"), ("value", dtype)])["value"]
    if kind == "unaligned":
        size = int(np.prod(shape)) * dtype.itemsize
        return np.zeros(size + 1, np.uint8)[1:].view(dtype).reshape(shape)
    return np.zeros(shape, dtype)


@st.composite
def tensors(draw: Any, shape: tuple[int, ...]) -> Tensor:
    """Tensors of any dtype, strides and flags."""
    dtype = draw(st.sampled_from(TORCH_DTYPES))
    layout = draw(_layouts(len(shape)))
    layout["steps"] = [abs(step) for step in layout["steps"]]
    memory = _laid_out(np.zeros, shape, layout)
    values = torch.from_numpy(_values(draw, shape))
    values = values if dtype.is_complex else values.real
    values = values.abs() if dtype in (torch.bool, torch.uint8) else values
    strides = [stride // memory.itemsize for stride in memory.strides]
    tensor = torch.empty_strided(shape, strides, dtype=dtype).copy_(values)
    if draw(st.booleans()):
        tensor = tensor[:1].expand(shape) if shape[0] else tensor
    view = draw(st.sampled_from(["", "conj", "neg", "requires_grad", "inference"]))
    if view == "conj":
        return tensor.conj()
    if view == "neg" and dtype.is_complex:
        return tensor.conj().imag if dtype != torch.complex32 else tensor
    if view == "requires_grad" and (dtype.is_floating_point or dtype.is_complex):
        return tensor.requires_grad_()
    if view == "inference":
        with torch.inference_mode():
            return tensor.clone()
    return tensor
