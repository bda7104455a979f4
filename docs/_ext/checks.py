"""The build fails on a public name without documentation."""

from __future__ import annotations

from typing import Any

import torchlinop
from sphinx.util import logging


def public_names() -> list[str]:
    """Full names of all that the package and its rooms offer."""
    rooms = {"estimate": torchlinop.estimate, "plot": torchlinop.plot}
    rooms["verify"] = torchlinop.verify
    names = [f"torchlinop.{name}" for name in torchlinop.__all__]
    return names + [
        f"torchlinop.{r}.{n}" for r, room in rooms.items() for n in room.__all__
    ]


def check_reference(_: Any, env: Any) -> None:
    """Warn, which ends a build with ``-W``, for each name that no page documents."""
    documented = env.get_domain("py").objects
    for name in public_names():
        if name not in documented:
            logging.getLogger(__name__).warning(
                "%s is public but on no page of the reference", name
            )


def setup(app: Any) -> dict[str, bool]:
    """Check when all pages have been read."""
    app.connect("env-check-consistency", check_reference)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
