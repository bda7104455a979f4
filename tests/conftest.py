"""Array kinds and settings that all tests share."""

from __future__ import annotations

import enum
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules import module as module_hooks
from torchlinop.autodiff import columns, experience
from torchlinop.autodiff.replay import expected


def pytest_configure() -> None:
    """Let Ctrl-C be what it is, also where the shell has started the tests to ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay whatever can be replayed, whether that is faster or not."""
    monkeypatch.setattr(experience, "_EXPECTED", 10**9)
    monkeypatch.setattr(columns, "_PAYS", float("inf"))
    monkeypatch.setattr(expected, "_LITTLE", 0.0)


class ArrayKind(enum.Enum):
    """What a user may pass to an operator."""

    NUMPY = "numpy"
    NUMPY_READONLY = "numpy, read-only"
    TORCH = "torch"
    STRICT = "array-api-strict"
    CUPY = "cupy"


class Arrays:
    """Makes arrays of one kind and reads them back."""

    def __init__(self, kind: ArrayKind) -> None:
        self.kind = kind
        self.make: Callable[[np.ndarray], Any]
        if kind is ArrayKind.NUMPY:
            self.make, self.type = np.copy, np.ndarray
        elif kind is ArrayKind.NUMPY_READONLY:
            self.make, self.type = _read_only, np.ndarray
        elif kind is ArrayKind.TORCH:
            self.make, self.type = lambda a: torch.from_numpy(a.copy()), torch.Tensor
        elif kind is ArrayKind.STRICT:
            strict = array_api_strict()
            self.make = lambda a: strict.asarray(a, copy=True)
            self.type = type(strict.asarray(0))
        else:
            if not torch.cuda.is_available():
                pytest.skip("CuPy arrays need a GPU; tests/cupyx uses a stand-in")
            cupy = pytest.importorskip("cupy")
            self.make, self.type = cupy.asarray, cupy.ndarray

    def read(self, array: Any) -> np.ndarray:
        """As NumPy, after checking that the kind is kept."""
        assert isinstance(array, self.type), type(array)
        if self.kind is ArrayKind.TORCH:
            return array.numpy()
        if self.kind is ArrayKind.STRICT:
            return np.from_dlpack(array)
        return array.get() if self.kind is ArrayKind.CUPY else array

    def fill(self, array: Any, value: float) -> None:
        """Overwrite an array, as a solver may do with what it owns."""
        if self.kind is ArrayKind.TORCH:
            array.fill_(value)
        elif self.kind is not ArrayKind.NUMPY_READONLY:
            array[...] = value


def array_api_strict() -> Any:
    """The module, or a skip where it is missing or its DLPack does not work."""
    if np.lib.NumpyVersion(np.__version__) < "2.1.0":
        pytest.skip("DLPack of array-api-strict needs NumPy 2.1")
    return pytest.importorskip("array_api_strict", reason="array-api-strict not installed")


def _read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


@pytest.fixture(params=list(ArrayKind), ids=lambda kind: kind.value)
def arrays(request: pytest.FixtureRequest) -> Arrays:
    """Every kind of array in turn; what the machine lacks is skipped."""
    return Arrays(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261121)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seed the global generator, and notice a test that changes global flags."""
    torch.manual_seed(0)
    before = _global_state()
    yield
    assert _global_state() == before


def _global_state() -> tuple:
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._len_torch_function_stack(),
        len(module_hooks._global_forward_hooks)
        + len(module_hooks._global_forward_pre_hooks),
        torch.backends.cudnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # small problems, and several test processes


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """A default device on which nothing can be computed."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
