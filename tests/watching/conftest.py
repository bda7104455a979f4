"""CuPy without a GPU, for the tests that need it."""

from tests.cupyx.conftest import cupy, solvers

__all__ = ["cupy", "solvers"]
