"""Replays as CUDA graphs: the same products, on any stream and thread, freed at the end."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torchlinop import GGNLinearOperator
from torchlinop.autodiff.replay.captured import _Captured, captured

from tests.gpu.conftest import on
from tests.problems import classification

DEVICE = torch.device("cuda")

pytestmark = pytest.mark.usefixtures("cupy")  # skips without a GPU


def _settled() -> GGNLinearOperator:
    G = GGNLinearOperator(*on("cuda", classification()).arguments)
    for _ in range(8):
        G @ torch.randn(G.shape[1], dtype=G.torch_dtype, device=DEVICE)
    return G


def _run(G: GGNLinearOperator):
    (rows,) = G._maps._kept.maps.values()
    return rows._run


def test_the_replay_of_a_small_model_is_captured():
    G = _settled()
    assert isinstance(_run(G), _Captured)
    dense = GGNLinearOperator(*classification().arguments).to_dense()
    kept = []
    for _ in range(3):
        v = torch.randn(G.shape[1], dtype=G.torch_dtype, device=DEVICE)
        kept.append((G @ v, v))
    for y, v in kept:  # no result lies in the memory of the graph
        torch.testing.assert_close(y.cpu(), dense @ v.cpu(), rtol=1e-9, atol=1e-12)


def test_streams_and_threads_take_turns():
    G = _settled()
    dense = G.to_dense()
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            for _ in range(50):
                v = torch.randn(
                    G.shape[1], dtype=G.torch_dtype, device=DEVICE, generator=generator
                )
                y = G @ v
                if not torch.allclose(y, dense @ v, rtol=1e-9, atol=1e-12):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_kernel_that_waits_for_the_host_is_not_captured():
    def run(x: torch.Tensor) -> torch.Tensor:
        return x * x.sum().item()

    x = torch.ones(4, device=DEVICE)
    assert captured(run, x, 0) is run
    torch.testing.assert_close(torch.ones(4, device=DEVICE) * 2, torch.full_like(x, 2))


def test_the_memory_of_a_graph_is_freed():
    def memory() -> int:
        gc.collect()
        torch.cuda.synchronize(DEVICE)
        return torch.cuda.memory_allocated(DEVICE)

    _settled()  # workspaces of libraries stay
    before = memory()
    G = _settled()
    del G
    assert memory() <= before
