"""Operators in other processes, and copies of them."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torchlinop import (
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)

from tests.cases import CASES
from tests.problems import classification

FACTORED = {
    kind.__name__: kind
    for kind in (
        KFACLinearOperator,
        EKFACLinearOperator,
        KFOCLinearOperator,
        GGNDiagonalLinearOperator,
    )
}
#: names of all operators that can be copied; the local functions of two cases cannot
LOCAL = {"hessian_of_a_function", "jacobian_of_a_function"}
NAMES = [*CASES, *FACTORED]
#: to other processes: one of each kind
UNUSED = ["hessian", "jacobian"]
SENT = [*UNUSED, "fisher_mc", "complex_transpose", "sparse_matrix", "KFACLinearOperator"]


def _operator(name: str) -> Any:
    if name in FACTORED:
        return FACTORED[name](*classification().arguments)
    return CASES[name](torch.float64).operator


def _products(A: Any) -> list[np.ndarray]:
    """With a vector and a block, of the operator and of its adjoint."""
    m, n = A.shape
    x, u = np.cos(np.arange(n)), np.cos(np.arange(m))
    X = np.cos(np.arange(2.0 * n)).reshape(n, 2)
    return [A @ x, A @ X, A.H @ u, A.matvec(torch.from_numpy(x)).numpy()]


def _same(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for y, z in zip(actual, expected, strict=True):
        np.testing.assert_allclose(y, z, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("used", [False, True])
def test_deep_copies(name, used):
    A = _operator(name)
    expected = _products(A if used else _operator(name))
    again = copy.deepcopy(A)
    assert type(again) is type(A)
    _same(_products(again), expected)
    _same(_products(copy.copy(A)), expected)
    _same(_products(A), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LOCAL])
def test_pickles(name):
    A = _operator(name)
    expected = _products(A)
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        _same(_products(pickle.loads(pickle.dumps(A, protocol))), expected)


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_pickles_of_local_functions_name_the_function(name):
    with pytest.raises((AttributeError, pickle.PicklingError), match="<locals>"):
        pickle.dumps(_operator(name))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda A: pickle.loads(pickle.dumps(A))])
def test_copies_have_a_model_of_their_own(copied):
    problem = classification()
    H = HessianLinearOperator(*problem.arguments)
    before = _products(H)
    again = copied(H)
    with torch.no_grad():
        problem.params[0].mul_(2)
    _same(_products(again), before)
    assert np.abs(H @ np.ones(27) - again @ np.ones(27)).max() > 1e-3


def _send(queue: Any, operators: dict[str, Any]) -> None:
    queue.put({name: _products(A) for name, A in operators.items()})


def _in_another_process(method: str, operators: dict[str, Any]) -> dict[str, list]:
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_send, args=(queue, operators))
    process.start()
    try:
        return queue.get(timeout=30)
    finally:
        queue.close()
        process.join(10)
        process.kill()


# Python 3.12 warns of threads that may hold locks, as those of a queue do not
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(method):
    """Operators with all that they have kept, and new ones."""
    expected = {name: _products(_operator(name)) for name in SENT}
    operators = {name: _operator(name) for name in SENT}
    for A in operators.values():
        _products(A)
    unused = {f"{name} anew": _operator(name) for name in UNUSED}
    expected |= {f"{name} anew": expected[name] for name in UNUSED}
    found = _in_another_process(method, {**operators, **unused})
    assert found.keys() == expected.keys()
    for name, products in found.items():
        _same(products, expected[name])


def _fork(run: Callable[[], bool]) -> bool:
    """Whether a child in which only this thread goes on succeeds within ten seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # ends a child that waits for ever
        try:
            os._exit(0 if run() else 1)
        except BaseException:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_fork_while_another_thread_records():
    """The child has the other thread's locks, but not the thread."""
    problem = classification()
    busy = GGNLinearOperator(*problem.arguments, cache=False)
    H = HessianLinearOperator(*problem.arguments, cache=False)
    expected, stop = H @ np.ones(27), threading.Event()

    def work():
        while not stop.is_set():
            busy @ np.ones(27)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        done = [_fork(lambda: np.allclose(H @ np.ones(27), expected)) for _ in range(5)]
    finally:
        stop.set()
        thread.join()
    assert all(done)
    np.testing.assert_allclose(H @ np.ones(27), expected)
