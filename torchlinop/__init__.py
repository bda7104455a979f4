"""Curvature matrices of PyTorch models as SciPy linear operators.

A public name is imported when it is first used, with what it needs. Which names there
are, and where, is listed once, in the stub ``__init__.pyi``.
"""

from __future__ import annotations

import ast
import threading
from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {
    alias.name: node.module
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}

__all__ = sorted(_HOMES)

#: held while names are imported: modules that import one another would wait for each other
#: in two threads. None of what is imported here asks this module for a name
_IMPORTING = threading.RLock()


def __getattr__(name: str) -> object:
    """Import a public name at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _IMPORTING:
        if _HOMES[name] == __name__:
            return import_module(f"{__name__}.{name}")
        globals()[name] = value = getattr(import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return [*globals().keys() | _HOMES.keys()]
