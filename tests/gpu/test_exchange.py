"""No copy that is not needed, and the right order on every stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchlinop import (
    DiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    TorchLinearOperator,
)

from tests.gpu.conftest import on
from tests.problems import Problem, classification, mlp

N = 1 << 20


class Spy(TorchLinearOperator):
    """Twice the identity; notes the memory it reads and writes."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        super().__init__((n, n), dtype, torch.device("cuda"))
        self.read: list[int] = []
        self.written: list[int] = []

    def _apply(self, x: Tensor) -> Tensor:
        y = 2 * x
        self.read.append(x.data_ptr())
        self.written.append(y.data_ptr())
        return y

    def _adjoint(self) -> TorchLinearOperator:
        return self


def large() -> Problem:
    """A network of 110,000 parameters: a vector is larger than all that solvers move."""
    torch.manual_seed(0)
    model = mlp(100, 1000, 10, dtype=torch.float32)
    data = [(torch.randn(64, 100), torch.randint(10, (64,)))]
    params = list(model.parameters())
    return on("cuda", Problem(model, torch.nn.CrossEntropyLoss(), params, data))


@pytest.mark.parametrize("columns", [None, 3])
def test_memory_is_shared_with_cupy(cupy, columns):
    A = Spy(1000, torch.float32)
    x = cupy.ones(1000 if columns is None else (1000, columns), "f")
    y = A @ x
    assert A.read == [x.data.ptr]
    assert A.written == [y.data.ptr]


def test_a_product_copies_nothing(cupy, memcpys):
    A = DiagonalLinearOperator(torch.ones(N, device="cuda"))
    x = cupy.ones(N, "f")
    A @ x
    assert memcpys(lambda: A @ x) == []


def test_a_numpy_vector_is_moved_once_each_way(cupy, memcpys):
    A = DiagonalLinearOperator(torch.ones(N, device="cuda"))
    x = np.ones(N, "f")
    A @ x
    copies = memcpys(lambda: A @ x)
    assert [c.nbytes for c in copies] == [4 * N, 4 * N]
    assert "HtoD" in copies[0].kind
    assert "DtoH" in copies[1].kind
    assert all("Pinned" in c.kind for c in copies)


@pytest.mark.parametrize("name", ["eigsh", "cg", "minres", "lobpcg", "gmres"])
def test_no_vector_leaves_the_gpu_in_a_solve(cupy, solvers, memcpys, name):
    p = large()
    A = GGNLinearOperator(*p.arguments) + 0.1 * DiagonalLinearOperator(
        torch.ones(sum(t.numel() for t in p.params), device="cuda")
    )
    n = A.shape[0]
    b = cupy.ones(n, "f")

    def solve() -> None:
        if name == "eigsh":
            solvers.eigsh(A, k=3)
        elif name == "lobpcg":
            X = cupy.random.default_rng(0).standard_normal((n, 3), dtype="f")
            solvers.lobpcg(A, X, maxiter=5)
        else:
            getattr(solvers, name)(A, b, maxiter=10)

    solve()
    large_copies = [c for c in memcpys(solve) if "DtoD" not in c.kind and c.nbytes >= 4 * n]
    assert large_copies == []


def _delay(cycles: int = 20_000_000) -> None:
    """Keep the current torch stream busy for some ten milliseconds."""
    torch.cuda._sleep(cycles)


def _torch_streams(side: bool):
    return torch.cuda.stream(torch.cuda.Stream() if side else None)


@pytest.mark.parametrize("torch_side", [False, True])
@pytest.mark.parametrize("cupy_side", [False, True])
def test_products_are_in_order_on_every_stream(cupy, torch_side, cupy_side):
    p = large()
    H = HessianLinearOperator(*p.arguments)
    n = H.shape[0]
    host = np.random.default_rng(0).standard_normal(n).astype("f")
    expected = H @ host
    torch.cuda.synchronize()
    cupy_stream = (
        cupy.cuda.Stream(non_blocking=True) if cupy_side else cupy.cuda.Stream.null
    )
    scale = np.abs(expected).max()
    kept = []
    with cupy_stream, _torch_streams(torch_side):
        for i in range(20):
            x = cupy.asarray(host)
            x = x * 2 / 2  # work of CuPy's stream that the product has to wait for
            _delay()
            y = H @ x
            x[...] = cupy.nan  # may not reach the product
            doubled = y * 2  # has to wait for the product
            del y
            # pressure: freed memory is given out again at once, on both sides
            torch.full((n,), torch.nan, device="cuda")
            cupy.full(n, cupy.nan, "f")
            if i % 4 == 0:
                kept.append(doubled)
        kept.append(doubled)
        cupy_stream.synchronize()
    for doubled in kept:
        np.testing.assert_allclose(doubled.get() / 2, expected, rtol=0, atol=1e-5 * scale)


def test_linearizations_are_used_on_another_stream_than_they_were_made(cupy):
    p = large()
    host = np.ones(sum(t.numel() for t in p.params), "f")
    expected = HessianLinearOperator(*p.arguments) @ host
    H = HessianLinearOperator(*p.arguments)
    x = torch.ones(len(host), device="cuda")
    torch.cuda.synchronize()
    _delay()
    H @ x  # recorded here, behind the delay
    with torch.cuda.stream(torch.cuda.Stream()):
        y = H @ x
        torch.cuda.current_stream().synchronize()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y.cpu().numpy(), expected, rtol=0, atol=1e-5 * scale)


def test_linearizations_are_dropped_while_another_stream_reads_them(cupy):
    p = large()
    host = np.ones(sum(t.numel() for t in p.params), "f")
    x = torch.ones(len(host), device="cuda")
    H = HessianLinearOperator(*p.arguments)
    expected = H @ host
    for _ in range(4):
        H @ x  # replayed from now on
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        _delay()
        y = H @ x
    del H
    garbage = [torch.full((len(host),), torch.nan, device="cuda") for _ in range(50)]
    side.synchronize()
    del garbage
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y.cpu().numpy(), expected, rtol=0, atol=1e-5 * scale)


def test_arrays_of_another_gpu_are_refused(cupy):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    A = DiagonalLinearOperator(torch.ones(8, device="cuda:0"))
    with cupy.cuda.Device(1):
        x = cupy.ones(8, "f")
    with pytest.raises(ValueError, match=r"CuPy array is on cuda:1 .* on cuda:0"):
        A @ x
    with pytest.raises(ValueError, match=r"tensor is on cuda:1 .* on cuda:0"):
        A @ torch.ones(8, device="cuda:1")


def test_an_operator_on_the_cpu_takes_arrays_from_the_gpu(cupy):
    p = classification()
    H = HessianLinearOperator(*p.arguments)
    y = H @ cupy.ones(27)
    assert isinstance(y, cupy.ndarray)
    np.testing.assert_allclose(y.get(), H @ np.ones(27), atol=1e-14)
