"""The context in which SciPy's BLAS leaves the cores to torch."""

from __future__ import annotations

import threading

import pytest
import scipy.linalg  # noqa: F401  whose BLAS is another one than NumPy's
import torch
from threadpoolctl import ThreadpoolController
from torchlinop import single_threaded_blas


@pytest.fixture
def threads():
    """Numbers of threads of the pools that get in the way, and of torch: two each."""
    pools = ThreadpoolController().select(threading_layer="pthreads")
    if not pools.lib_controllers:
        pytest.skip("NumPy and SciPy are built without threads of their own")
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    limits = []
    _in_a_thread(lambda: limits.append(pools.limit(limits=2)))
    yield lambda: ({p.num_threads for p in pools.lib_controllers}, torch.get_num_threads())
    _in_a_thread(limits[0].restore_original_limits)
    torch.set_num_threads(torch_threads)


def _in_a_thread(function):
    """Threadpoolctl lets nobody else change what a thread that is alive has changed."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_only_within(threads):
    assert threads() == ({2}, 2)
    with single_threaded_blas():
        assert threads() == ({1}, 2)
    assert threads() == ({2}, 2)


def test_nested_and_as_decorator(threads):
    @single_threaded_blas()
    def work():
        with single_threaded_blas():
            pass
        return threads()

    assert work() == work() == ({1}, 2)
    assert threads() == ({2}, 2)


def test_after_an_error(threads):
    with pytest.raises(KeyboardInterrupt), single_threaded_blas():
        raise KeyboardInterrupt
    assert threads() == ({2}, 2)


@pytest.mark.parametrize("alive", [True, False], ids=["alive", "ended"])
def test_threads_that_overlap(threads, alive):
    """The context of a thread that came first ends before this one's."""
    inside, leave, left, end = (threading.Event() for _ in range(4))

    def work():
        with single_threaded_blas():
            inside.set()
            leave.wait()
        left.set()
        end.wait()

    first = threading.Thread(target=work, daemon=True)
    first.start()
    inside.wait()
    with single_threaded_blas():
        assert threads() == ({1}, 2)
        leave.set()
        left.wait()
        if not alive:
            end.set()
            first.join()
    assert threads() == ({2}, 2)
    with single_threaded_blas():
        assert threads() == ({1}, 2)
    end.set()
    first.join()
    assert threads() == ({2}, 2)
