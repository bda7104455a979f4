"""How the reference is made, and the check that it has every public name."""

from __future__ import annotations

import inspect
from typing import Any

import torchlinop
from scipy.sparse.linalg import LinearOperator
from sphinx.domains.python import PyObject
from sphinx.util import logging

ROOMS = {
    "distributed": torchlinop.distributed,
    "estimate": torchlinop.estimate,
    "plot": torchlinop.plot,
    "verify": torchlinop.verify,
}


def public_names() -> list[str]:
    """Full names of all that the package and its rooms offer."""
    names = [f"torchlinop.{name}" for name in torchlinop.__all__ if name not in ROOMS]
    for room, module in ROOMS.items():
        names += [f"torchlinop.{room}.{name}" for name in module.__all__]
    return names


def check_reference(_: Any, env: Any) -> None:
    """Warn, which ends a build with ``-W``, for each name that no page documents."""
    documented = env.get_domain("py").objects
    for name in public_names():
        if name not in documented:
            logging.getLogger(__name__).warning(
                "%s is public but on no page of the reference", name
            )


def signature(*event: Any) -> tuple[str, str] | None:
    """Give operators the arguments of their constructor: SciPy's ``__new__`` hides them."""
    _, what, _, obj, *_ = event
    if what != "class" or not issubclass(obj, LinearOperator):
        return None
    parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(bare)), ""


def setup(app: Any) -> dict[str, bool]:
    """Connect the above; attributes are called so, not variables."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("env-check-consistency", check_reference)
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
