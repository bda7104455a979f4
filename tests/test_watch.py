"""Changes in tensors of every make are noticed, and being watched leaves no trace."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch.utils._pytree import tree_map_only
from torchlinop._watch import Watch


class Marked(torch.Tensor):
    """A subclass on the memory of another tensor."""


class Opaque(torch.Tensor):
    """A wrapper without memory of its own, which does not tell what it wraps."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = tree_map_only(cls, lambda t: t.inner, args)
        return tree_map_only(torch.Tensor, cls, func(*args, **(kwargs or {})))


class Wrapper(Opaque):
    """A wrapper that tells what it wraps, as a DTensor does."""

    def __tensor_flatten__(self):
        return ["inner"], None


def _quantized(value):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated
        return torch.quantize_per_tensor(torch.full((5,), value), 0.1, 0, torch.qint8)


def _nested(layout):
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


def _of(layout):
    return torch.eye(4).to_sparse(
        layout=layout, blocksize=(2, 2) if "bs" in str(layout) else None
    )


#: how a tensor is made, and how it is changed behind its version counter where it can be
CASES = {
    "subclass": (lambda: Marked(torch.ones(5)), lambda t: t.data.add_(1)),
    "wrapper": (lambda: Wrapper(torch.ones(5)), lambda t: t.inner.data.add_(1)),
    "nested wrapper": (
        lambda: Wrapper(Wrapper(torch.ones(5))),
        lambda t: t.inner.inner.data.add_(1),
    ),
    "opaque wrapper": (lambda: Opaque(torch.ones(5)), lambda t: t.add_(1)),
    "COO": (lambda: _of(torch.sparse_coo), lambda t: t._values().data.mul_(2)),
    "CSR": (lambda: _of(torch.sparse_csr), lambda t: t.values().data.mul_(2)),
    "CSR indices": (lambda: _of(torch.sparse_csr), lambda t: t.col_indices().data.fill_(0)),
    "CSC": (lambda: _of(torch.sparse_csc), lambda t: t.values().data.mul_(2)),
    "BSR": (lambda: _of(torch.sparse_bsr), lambda t: t.values().data.mul_(2)),
    "BSC": (lambda: _of(torch.sparse_bsc), lambda t: t.values().data.mul_(2)),
    "quantized": (lambda: _quantized(0.5), lambda t: t.data.copy_(_quantized(0.7))),
    "nested": (lambda: _nested(torch.strided), lambda t: t.values().data.mul_(2)),
    "jagged": (lambda: _nested(torch.jagged), lambda t: t.values().data.mul_(2)),
    "float8": (
        lambda: torch.ones(4).to(torch.float8_e4m3fn),
        lambda t: t.data.copy_(torch.zeros(4)),
    ),
    "complex": (
        lambda: torch.ones(3, dtype=torch.complex64),
        lambda t: t.imag.data.fill_(1),
    ),
    "conjugated": (
        lambda: torch.ones(3, dtype=torch.complex64).conj(),
        lambda t: t.imag.data.fill_(1),
    ),
    "negated": (lambda: torch._neg_view(torch.ones(3)), lambda t: t.data.fill_(1)),
    "scalar": (lambda: torch.tensor(3.0), lambda t: t.data.mul_(2)),
    "part": (lambda: torch.ones(3, 4)[1:, 1:3], lambda t: t.data.mul_(2)),
    "expanded": (lambda: torch.ones(1).expand(4), lambda t: t.data[0].mul_(2)),
    "meta": (lambda: torch.ones(3, device="meta"), lambda t: t.mul_(2)),
}


@pytest.mark.parametrize(("make", "change"), CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse [CB]S[RC] tensor support:UserWarning")
def test_changes_of_strange_tensors(make, change):
    tensor = make()
    watch = Watch([tensor])
    assert not watch.changed()
    change(tensor)
    assert watch.changed()


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta")])
def test_watching_in_any_context(context):
    tensor = torch.ones(3, 4)
    with context():
        watches = Watch([tensor]), Watch([tensor[:, ::2]])
        assert not any(watch.changed() for watch in watches)
        tensor.data.mul_(2)
        assert all(watch.changed() for watch in watches)


@pytest.mark.parametrize("size", [5, 100_000])
def test_storages_can_still_be_resized(size):
    """As sharded parameters are; after ``Tensor.numpy`` they could not."""
    tensor = torch.ones(size)
    watch = Watch([tensor])
    tensor.untyped_storage().resize_(0)
    assert watch.changed()
    tensor.untyped_storage().resize_(8 * size)
    tensor.data.fill_(1)
    Watch([tensor]).changed()


def test_a_tensor_that_another_thread_writes():
    tensor = torch.zeros(50_000)
    stop = threading.Event()

    def write():
        while not stop.is_set():
            tensor.data.add_(1)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(50):
            Watch([tensor]).changed()  # either answer is right
    finally:
        stop.set()
        thread.join()
    watch = Watch([tensor])
    assert not watch.changed()
    tensor.data.add_(1)
    assert watch.changed()


@pytest.mark.parametrize(
    "add",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_buffer("scale", torch.ones(1)),
        lambda m: m.register_parameter("bias", None),
        lambda m: m.add_module("inner", torch.nn.Identity()),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_added_to_a_module_is_noticed(add, place):
    """Where there was something of that kind and where there was nothing."""
    model = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Tanh())
    full = model[0]
    full.register_forward_hook(lambda *_: None)
    full.register_forward_pre_hook(lambda *_: None)
    full.register_buffer("b", torch.ones(1))
    full.register_parameter("p", None)
    full.add_module("m", torch.nn.Identity())
    watch = Watch([], modules=[model])
    assert not watch.changed()
    add(model[place])
    assert watch.changed()
