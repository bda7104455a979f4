"""Everything in this folder needs a CUDA device and CuPy."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from tests.problems import Problem


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def cupy() -> ModuleType:
    """CuPy, or a skip with the reason."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return pytest.importorskip("cupy")


@pytest.fixture
def solvers(cupy: ModuleType) -> ModuleType:
    return pytest.importorskip("cupyx.scipy.sparse.linalg")


def on(device: str, problem: Problem) -> Problem:
    """A copy of a problem on another device."""
    model = copy.deepcopy(problem.model).to(device)
    data = [(X.to(device), y.to(device)) for X, y in problem.data]
    return Problem(
        model, copy.deepcopy(problem.loss).to(device), list(model.parameters()), data
    )


def doubled(problem: Problem) -> Problem:
    """The same numbers in float64."""
    model = copy.deepcopy(problem.model).double()
    data = [
        (X.double(), y.double() if y.is_floating_point() else y) for X, y in problem.data
    ]
    return Problem(model, problem.loss, list(model.parameters()), data)


class Memcpy(NamedTuple):
    kind: str
    nbytes: int


@pytest.fixture
def memcpys(tmp_path: Path) -> Callable[[Callable[[], object]], list[Memcpy]]:
    """Run a function under torch's profiler and list the copies of memory it made."""

    def run(function: Callable[[], object]) -> list[Memcpy]:
        activities = [
            torch.profiler.ProfilerActivity.CPU,
            torch.profiler.ProfilerActivity.CUDA,
        ]
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            function()
            torch.cuda.synchronize()
        trace = tmp_path / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
        copies = [e for e in events if e.get("cat") == "gpu_memcpy"]
        copies.sort(key=lambda e: e["ts"])
        return [Memcpy(e["name"], int(e["args"]["bytes"])) for e in copies]

    return run
