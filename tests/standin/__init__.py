"""A stand-in for CuPy on the host, so that CuPy's own solvers run without a GPU.

:func:`installed` puts a module ``cupy`` into ``sys.modules`` whose arrays wrap NumPy
arrays and are as unwilling as CuPy's to become NumPy arrays. Where CuPy's wheel is
present as files, ``cupyx.scipy.sparse.linalg`` and ``cupy.cublas`` are the wheel's own
Python sources, executed on such arrays with the raw BLAS calls done by NumPy.

What it cannot show: streams, devices, and CuPy's own kernels.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

from tests.standin import array, blas

_ROOTS = ("cupy", "cupyx", "cupy_backends")
_SOLVERS = Path("cupyx", "scipy", "sparse", "linalg")


@functools.cache
def wheel() -> Path | None:
    """Folder that holds CuPy's files, or None; CuPy is not imported.

    The environment variable ``TORCHLINOP_CUPY_PATH`` names another folder, for instance
    one that ``pip install --no-deps --target`` has filled with another version.
    """
    override = os.environ.get("TORCHLINOP_CUPY_PATH")
    if override:
        if not Path(override, _SOLVERS).is_dir():
            raise FileNotFoundError(f"TORCHLINOP_CUPY_PATH: no {_SOLVERS} in {override}")
        return Path(override)
    spec = importlib.util.find_spec("cupyx")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parents[1]


@contextmanager
def installed() -> Iterator[ModuleType]:
    """Let ``import cupy`` and ``import cupyx`` find the stand-in for a while."""
    modules = _modules(wheel())
    aside = _taken_out()
    sys.modules.update(modules)
    modules["cupy"].random.seed(0)
    try:
        yield modules["cupy"]
    finally:
        modules.update(_taken_out())  # the wheel's files are imported once only
        sys.modules.update(aside)


def _taken_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] in _ROOTS]
    return {name: sys.modules.pop(name) for name in names}


@functools.cache
def _modules(folder: Path | None) -> dict[str, ModuleType]:
    """What the wheel's Python files import and cannot import without a GPU."""
    modules: dict[str, ModuleType] = {}

    def add(name: str, path: str | None = None, **content: object) -> None:
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        # where a path is given, further submodules come from the wheel
        module.__path__ = [str(folder / path)] if folder and path else []
        module.__dict__.update(content)
        modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)

    add("cupy", "cupy", **array.FUNCTIONS)
    add("cupy.linalg", **array.LINALG)
    add("cupy.linalg._util")
    add("cupy.random", **array.RANDOM)
    add("cupy._core", ndarray=array.ndarray, elementwise_copy=array.elementwise_copy)
    add("cupy._core.core", ndarray=array.ndarray)
    add("cupy._core._dtype")
    add("cupy.cuda", runtime=SimpleNamespace(is_hip=False))
    add("cupy.cuda.device", get_cublas_handle=lambda: 0)
    add("cupy_backends")
    add("cupy_backends.cuda")
    add("cupy_backends.cuda.libs")
    add("cupy_backends.cuda.libs.cublas", **blas.FUNCTIONS)
    add("cupy_backends.cuda.libs.cusparse")
    if folder is not None:
        add("cupyx", "cupyx")
        add("cupyx.cusparse", check_availability=lambda name: False)
        add("cupyx.scipy", "cupyx/scipy")
        nothing = {name: lambda x: False for name in ("issparse", "isspmatrix")}
        add("cupyx.scipy.sparse", "cupyx/scipy/sparse", **nothing)
        nothing = {name: lambda x: False for name in ("_is_csr", "isspmatrix_csr")}
        add("cupyx.scipy.sparse._csr", **nothing)
    return modules
