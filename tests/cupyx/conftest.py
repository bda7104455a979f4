"""CuPy and its solvers, without a GPU.

The arrays are those of ``tests/standin``, the solvers are CuPy's own files where its
wheel is installed. Tests of real CuPy arrays on a GPU are in ``tests/gpu``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests import standin


@pytest.fixture
def cupy() -> Iterator[ModuleType]:
    """The stand-in, in ``sys.modules`` for one test."""
    with standin.installed() as module:
        yield module


@pytest.fixture
def solvers(cupy: ModuleType) -> ModuleType:
    """``cupyx.scipy.sparse.linalg`` from CuPy's own files."""
    if standin.wheel() is None:
        pytest.skip("CuPy's files are not installed; see tests/standin/__init__.py")
    return importlib.import_module("cupyx.scipy.sparse.linalg")
