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
    return Path(spec.origin).parents[1] if spec and spec.origin else None


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
        modules.update(_taken_out())  # so that the wheel's files are imported only once
        sys.modules.update(aside)


def _taken_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] in _ROOTS]
    return {name: sys.modules.pop(name) for name in names}


@functools.cache
def _modules(folder: Path | None) -> dict[str, ModuleType]:
    """What the solvers' files import and what cannot be imported without a GPU."""
    modules: dict[str, ModuleType] = {}

    def add(name: str, content: dict | None = None, *, more: bool = False) -> None:
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        # where there is more, the wheel has it
        path = folder.joinpath(*name.split(".")) if folder and more else None
        module.__path__ = [str(path)] if path else []
        module.__dict__.update(content or {})
        modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)

    def never(*names: str) -> dict:
        return dict.fromkeys(names, lambda x: False)

    core = {"ndarray": array.ndarray, "elementwise_copy": array.elementwise_copy}
    add("cupy", array.FUNCTIONS, more=True)
    add("cupy.linalg", array.LINALG)
    add("cupy.linalg._util")
    add("cupy.random", array.RANDOM)
    add("cupy._core", core)
    add("cupy._core.core", core)
    add("cupy._core._dtype")
    add("cupy.cuda", {"runtime": SimpleNamespace(is_hip=False)})
    add("cupy.cuda.device", {"get_cublas_handle": lambda: 0})
    add("cupy_backends")
    add("cupy_backends.cuda")
    add("cupy_backends.cuda.libs")
    add("cupy_backends.cuda.libs.cublas", blas.FUNCTIONS)
    add("cupy_backends.cuda.libs.cusparse")
    if folder is not None:
        add("cupyx", more=True)
        add("cupyx.cusparse", never("check_availability"))
        add("cupyx.scipy", more=True)
        add("cupyx.scipy.sparse", never("issparse", "isspmatrix"), more=True)
        add("cupyx.scipy.sparse._csr", never("_is_csr", "isspmatrix_csr"))
    return modules
